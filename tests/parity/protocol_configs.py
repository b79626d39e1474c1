"""A published configuration beside the preset that stands for it: model, data, optimiser, schedule, test, methods."""

from __future__ import annotations

import inspect
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

from crosskd_hf.create import build_detector
from crosskd_hf.data.categories import CategoryMap
from crosskd_hf.distillation import Distiller
from crosskd_hf.experiments import deformable_detr
from crosskd_hf.experiments.presets import PRESETS, Model, Preset
from crosskd_hf.models import DetectionImageProcessor
from crosskd_hf.models.assigners import assign_atss
from crosskd_hf.models.backbone import Backbone
from crosskd_hf.models.layers import FPN
from crosskd_hf.models.pyramid import PyramidDetector
from crosskd_hf.training.coco_trainer import CocoTrainer
from crosskd_hf.training.config import CrossKDConfig
from tests.parity.protocol_fields import Field

Case = dict[str, Any]
HEADS = {
    "GFLHead": "gfl",
    "ATSSHead": "atss",
    "FCOSHead": "fcos",
    "RetinaHead": "retinanet",
    "DeformableDETRHead": "deformable_detr",
}
FOLDERS = {"gfl", "atss", "fcos", "retinanet", "faster_rcnn", "deformable_detr"}
WEIGHTS = {  # beginnings of the published tags, and timm's tag of the same weights
    "torchvision://resnet": "tv_in1k",
    "open-mmlab://detectron": "caffe",
    "https://github.com/SwinTransformer": "ms_in1k",
}
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
JOINED = re.compile(r"(decoder\..*self_attn)\.[qkv]_proj")  # one tensor in MMDetection, three in transformers
COCO = CategoryMap(tuple(range(80)), tuple(f"class {number}" for number in range(80)))


def compare(case: Case) -> list[Field]:
    """The fields of a configuration beside those of its preset.

    Raises:
        ValueError: No preset has these models, methods and epochs.
    """
    found = [entry for entry in PRESETS.values() if key_of(case) == key_of_preset(entry)]
    if not found:
        raise ValueError(f"no preset has {key_of(case)}")
    compared = {entry.name: list(fields(case, entry)) for entry in found}
    best = min(compared, key=lambda name: (sum(not field.equal for field in compared[name]), len(name)))
    return [Field("preset", best, best), *compared[best]]


# ---- Which preset it is ----


def key_of(case: Case) -> dict[str, Any]:
    """What tells a configuration from others: both models, methods, epochs, and where extra levels come from."""
    protocol, teacher, distillation = case["protocol"], case.get("teacher"), case["protocol"].get("distillation")
    methods = set()
    if distillation:
        methods |= {"crosskd"} if "loss_cls_kd" in distillation or "loss_reg_kd" in distillation else set()
        methods |= {"pkd"} if "loss_feat_kd" in distillation else set()
    head = protocol["head"]
    return {
        "student": f"{'faster_rcnn' if 'rpn' in head else HEADS[head['type']]}:{backbone_of(protocol['weights'])}",
        "teacher": None if not teacher else f"{architecture_of(teacher['config'])}:{backbone_of(teacher['weights'])}",
        "methods": methods,
        "epochs": protocol["epochs"],
        "extra": extra_of(protocol["neck"]),
        "shortest": sorted(augmentation_of(protocol["train_transforms"])["shortest"]),
    }


def key_of_preset(entry: Preset) -> dict[str, Any]:
    """The same of a preset."""
    spec, teacher = entry.student, entry.teacher
    extra = dict(spec.fields).get(
        "fpn_extra", {"retinanet": "on_input", "faster_rcnn": None}.get(spec.architecture, "on_output")
    )
    return {
        "student": f"{spec.architecture}:{spec.backbone}",
        "teacher": None if teacher is None else f"{teacher.detector.architecture}:{teacher.detector.backbone}",
        "methods": set() if entry.losses is None else {name.partition(":")[0] for name in entry.losses.methods},
        "epochs": entry.training.resolved_schedule.epochs,
        "extra": None if spec.architecture == "deformable_detr" else extra,
        "shortest": sorted(entry.training.shortest_edges),
    }


def backbone_of(weights: Case) -> str:
    """timm's name of a backbone."""
    depth = weights.get("depth")
    names = {
        "ResNet": f"resnet{depth}",
        "ResNeXt": f"resnext{depth}_32x4d",
        "SwinTransformer": "swin_tiny_patch4_window7_224",
        "MobileNetV2": "mobilenetv2_100",
    }
    return names[weights["type"]]


def architecture_of(path: str) -> str:
    """The detector of a configuration file."""
    return next(part for part in path.split("/") if part in FOLDERS)


def extra_of(neck: Case) -> str | None:
    """Where the extra levels of a pyramid come from."""
    return neck.get("add_extra_convs") or None


def augmentation_of(steps: list[Case]) -> dict[str, Any]:
    """Sizes, flip and crop of the training transforms."""
    flat = [step for step in steps if step["type"] != "RandomChoice"]
    found: dict[str, Any] = {"flip": 0.0, "crop": None}
    for step in steps:
        if step["type"] == "RandomFlip":
            found["flip"] = step["prob"]
        if step["type"] == "RandomChoice":  # of the whole image, and of a crop
            whole, part = step["transforms"]
            flat += whole
            first, cut = part[0]["scales"], part[1]
            found["crop"] = {
                "shortest_edges": sorted(min(scale) for scale in first),
                "longest_edge": max(first[0]),
                "size": cut["crop_size"],
            }
    (resize,) = [step for step in flat if "Resize" in step["type"]]
    scales = resize.get("scales") or resize["scale"]
    scales = scales if isinstance(scales[0], list) else [scales]
    if resize["type"] == "RandomResize":  # every length from one to the other
        low, high = sorted(min(scale) for scale in scales)
        return found | {"shortest": list(range(low, high + 1)), "longest": max(scales[0])}
    return found | {"shortest": sorted(min(scale) for scale in scales), "longest": max(scales[0])}


# ---- The fields ----


def fields(case: Case, entry: Preset) -> Iterator[Field]:
    """Every field of a configuration beside the preset's."""
    protocol = case["protocol"]
    model, processor = built(entry.model)
    yield from _weights("weights", protocol["weights"], entry.model, model)
    yield from _pixels("pixels", protocol["pixels"], processor)
    yield from _pyramid("neck", protocol["neck"], model)
    yield from _data(protocol, entry)
    yield from _training(case, entry, model)
    yield from _test(protocol, entry, processor, model)
    yield from _head(protocol, model)
    if case.get("teacher"):
        assert entry.teacher is not None
        teacher, its_processor = built(entry.teacher.model)
        yield from _weights("teacher.weights", case["teacher"]["weights"], entry.teacher.model, teacher)
        yield from _pixels("teacher.pixels", case["teacher"]["pixels"], its_processor)
        yield from _pyramid("teacher.neck", case["teacher"]["neck"], teacher)
        yield from _post_processing("teacher.test_cfg", case["teacher"]["test_cfg"], its_processor, teacher)
        yield from _distillation(protocol["distillation"], entry, model, teacher)


def built(described: Model) -> tuple[Any, DetectionImageProcessor]:
    """A preset's model as it is built, without its weights' values, and its image processor."""
    spec = described.spec
    with torch.device("meta"), mock.patch.object(Backbone, "load_weights"):
        if spec.architecture == "deformable_detr":
            freeze = lambda module, name: deformable_detr.freeze_stem(module)  # noqa: E731
            with mock.patch.object(deformable_detr, "_load_backbone", freeze):
                model: Any = deformable_detr.new_deformable_detr(spec.backbone, COCO, spec.backbone_weights)
        else:
            model = build_detector(spec, COCO)
    return model, described.image_processor()


def _weights(name: str, published: Case, described: Model, model: nn.Module) -> Iterator[Field]:
    tag = next((ours for theirs, ours in WEIGHTS.items() if published["weights"].startswith(theirs)), None)
    yield Field(f"{name}.weights", tag or published["weights"], described.spec.backbone_weights)
    config = model.config.to_dict()
    backbone = next(module for key, module in model.named_modules() if key.rpartition(".")[2] == "backbone")
    trained = any(
        parameter.requires_grad
        for module in backbone.modules()
        if isinstance(module, NORMS)
        for parameter in module.parameters(recurse=False)
    )
    yield Field(f"{name}.norm_trained", published["norm_trained"], trained)
    if "frozen_stages" in config:
        yield Field(f"{name}.frozen_stages", max(published["frozen_stages"], 0), config["frozen_stages"])
        drop = (config["backbone_arguments"] or {}).get("drop_path_rate")
        yield Field(f"{name}.drop_path_rate", published["drop_path_rate"], drop)
        yield Field(f"{name}.style", published["style"] == "caffe", config["caffe_stride"])
    if published["norm_eval"] is not None:
        yield Field(f"{name}.norm_eval", published["norm_eval"], config.get("norm_eval", True))


def _pixels(name: str, published: Case, processor: DetectionImageProcessor) -> Iterator[Field]:
    mean, std = ([255 * value for value in values] for values in (processor.image_mean, processor.image_std))
    yield Field(f"{name}.mean", published["mean"], mean, 1e-6)
    yield Field(f"{name}.std", published["std"], std, 1e-6)
    yield Field(f"{name}.order", published["order"].lower(), processor.channel_order)
    if "pad_divisor" in published:
        yield Field(f"{name}.pad_divisor", published["pad_divisor"], processor.size_divisor)


def _pyramid(name: str, published: Case, model: Any) -> Iterator[Field]:
    config = model.config.to_dict()
    if published["type"] != "FPN":
        yield Field(f"{name}.num_outs", published["num_outs"], config["num_feature_levels"])
        yield Field(f"{name}.out_channels", published["out_channels"], config["d_model"])
        return
    assert any(isinstance(module, FPN) for module in model.modules())
    extra = {"max_pool": None}.get(config["fpn_extra"], config["fpn_extra"])
    yield Field(f"{name}.add_extra_convs", extra_of(published), extra)
    relu = published.get("relu_before_extra_convs", False)
    yield Field(f"{name}.relu_before_extra_convs", relu, config["fpn_extra_relu"])
    yield Field(f"{name}.num_outs", published["num_outs"], len(config["strides"]))
    yield Field(f"{name}.out_channels", published["out_channels"], config["fpn_channels"])


def _data(protocol: Case, entry: Preset) -> Iterator[Field]:
    transform, loader = (
        entry.training.transform(entry.training.multi_scale, entry.training.longest_edge),
        protocol["train_loader"],
    )
    crop = transform.random_crop
    ours = None if crop is None else vars(crop)
    published = augmentation_of(protocol["train_transforms"])
    edges = transform.shortest_edges or (entry.training.test_shortest_edge,)
    yield Field("train_transforms.shortest", published["shortest"], sorted(edges))
    yield Field("train_transforms.longest", published["longest"], transform.longest_edge)
    yield Field("train_transforms.flip", published["flip"], transform.flip)
    yield Field("train_transforms.crop", published["crop"], ours)
    yield Field("train_transforms.antialias", False, transform.antialias)
    yield Field("filter.filter_empty_gt", protocol["filter"]["filter_empty_gt"], entry.training.drop_empty)
    yield Field("filter.min_size", protocol["filter"]["min_size"], entry.training.min_side)
    args = arguments_of(entry)
    yield Field("train_loader.images_per_gpu", loader["images_per_gpu"], args.per_device_train_batch_size)
    yield Field("train_loader.workers", loader["workers"], args.dataloader_num_workers)
    yield Field("train_loader.shuffle", loader["sampler"]["shuffle"], args.train_sampling_strategy == "random")
    grouped = (loader["batch_sampler"] or {}).get("type") == "AspectRatioBatchSampler"
    yield Field("train_loader.batch_sampler", grouped, args.group_by_aspect_ratio)
    yield Field("train_loader.drop_last", loader["drop_last"], args.dataloader_drop_last)


def _training(case: Case, entry: Preset, model: nn.Module) -> Iterator[Field]:
    protocol, args = case["protocol"], arguments_of(entry)
    scale = protocol["auto_scale_lr"]
    trainer = bare_trainer(entry, model, scale["base_batch_size"], case["schedule"]["epoch_length"])
    optimizer = trainer.create_optimizer()
    settings, group = protocol["optimizer"], optimizer.param_groups[0]
    rate = trainer._base_learning_rate()
    yield Field("optimizer.type", settings["type"], type(optimizer).__name__)
    yield Field("optimizer.lr", settings["lr"], rate, 1e-9)
    yield Field("optimizer.weight_decay", settings["weight_decay"], args.weight_decay)
    if "momentum" in settings:
        yield Field("optimizer.momentum", settings["momentum"], group["momentum"])
    yield Field("clip", (protocol["clip"] or {"max_norm": 0})["max_norm"], args.max_grad_norm)
    yield Field("epochs", protocol["epochs"], args.num_train_epochs)
    enabled = scale.get("enable", False)
    yield Field("auto_scale_lr.enable", enabled, args.scale_learning_rate, remains="rate of another batch")
    yield Field("auto_scale_lr.base_batch_size", scale["base_batch_size"], args.schedule_settings().images_per_update)
    yield Field("ema", protocol["ema"], args.ema_decay is not None)
    yield Field("optimizer_wrapper", protocol["optimizer_wrapper"] == "AmpOptimWrapper", args.fp16 or args.bf16)
    yield Field("random_seed", protocol["random_seed"], args.seed, remains="seed")
    yield Field("validate_every_epochs", protocol["validate_every_epochs"], {"epoch": 1}.get("epoch"))
    yield from _groups(case["param_groups"], model, optimizer, rate, args.weight_decay)
    updates = protocol["epochs"] * case["schedule"]["epoch_length"]
    scheduler = trainer.create_scheduler(updates, optimizer)
    first = next(i for i, g in enumerate(optimizer.param_groups) if g["initial_lr"] == max(_rates(case, rate)))
    base, factor = optimizer.param_groups[first]["initial_lr"], scheduler.lr_lambdas[first]
    pairs = [[update, base * factor(update)] for update, _ in case["schedule"]["lr"]]
    yield Field("schedule.lr", case["schedule"]["lr"], pairs, 1e-9)


def _rates(case: Case, rate: float) -> list[float]:
    """Learning rate of the first published group."""
    return [rate * case["schedule"]["lr"][-1][1] / case["schedule"]["lr"][-1][1]]


def _groups(published: Case, model: nn.Module, optimizer: Any, rate: float, decay: float) -> Iterator[Field]:
    """Trained and frozen tensors, and those of each pair of factors on learning rate and weight decay."""
    named = {id(parameter): JOINED.sub(r"\1.in_proj", name) for name, parameter in model.named_parameters()}
    tensors: Counter[str] = Counter()
    elements: Counter[str] = Counter()
    for group in optimizer.param_groups:
        name = f"lr x{group['lr'] / rate:g}, weight decay x{group['weight_decay'] / decay:g}"
        tensors[name] += len({named[id(parameter)] for parameter in group["params"]})
        elements[name] += sum(parameter.numel() for parameter in group["params"])
    groups = published["groups"]
    yield Field("param_groups.trained_tensors", published["trained_tensors"], sum(tensors.values()))
    yield Field("param_groups.trained_elements", published["trained_elements"], elements.total())
    if isinstance(model, PyramidDetector):  # transformers keeps frozen norms as buffers
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        yield Field("param_groups.frozen_tensors", published["frozen_tensors"], len(frozen))
        yield Field("param_groups.frozen_elements", published["frozen_elements"], sum(map(torch.numel, frozen)))
    yield Field("param_groups.tensors", {name: group["tensors"] for name, group in groups.items()}, dict(tensors))
    yield Field("param_groups.elements", {name: group["elements"] for name, group in groups.items()}, dict(elements))


def _test(protocol: Case, entry: Preset, processor: DetectionImageProcessor, model: Any) -> Iterator[Field]:
    (resize,) = [step for step in protocol["test_transforms"] if step["type"] == "Resize"]
    size = dict(processor.size)
    yield Field("test.size", sorted(resize["scale"]), sorted([size["shortest_edge"], size["longest_edge"]]))
    yield Field("test.antialias", False, processor.antialias)
    args = arguments_of(entry)
    loader = protocol["test_loader"]
    yield Field("test_loader.images_per_gpu", loader["images_per_gpu"], args.per_device_eval_batch_size)
    workers = args.dataloader_num_workers
    yield Field("test_loader.workers", loader["workers"], workers, remains="evaluation workers")
    yield from _post_processing("test_cfg", protocol["test_cfg"], processor, model)
    yield Field("evaluator.metric", protocol["evaluator"]["metric"], "bbox")
    yield Field("evaluator.threshold", 0, args.eval_threshold)
    unused = protocol["test_time_augmentation"] in (None, "defined but not used by val or test")
    yield Field("test_time_augmentation", unused, True)


def _post_processing(name: str, published: Case, processor: DetectionImageProcessor, model: Any) -> Iterator[Field]:
    if "rpn" in published:
        config, rpn = model.config, published["rpn"]
        ours = {"nms_pre": config.test_proposals_per_level, "max_per_img": config.test_proposals}
        nms = {"type": "nms", "iou_threshold": config.proposal_nms}
        yield Field(f"{name}.rpn", rpn, ours | {"nms": nms, "min_bbox_size": int(config.min_proposal_size)})
        published = published["rcnn"]
    settings = {
        "score_thr": processor.score_threshold,
        "nms_pre": processor.candidates_per_level,
        "nms": {"type": "nms", "iou_threshold": processor.nms_threshold},
        "max_per_img": processor.max_detections,
    }
    for key, ours in settings.items():
        if key in published:
            yield Field(f"{name}.{key}", published[key], ours)


def _head(protocol: Case, model: Any) -> Iterator[Field]:
    head, config = protocol["head"], model.config.to_dict()
    if "rpn" in head:
        losses = {f"loss_rpn_{key}": head["rpn"][f"loss_{key}"]["loss_weight"] for key in ("cls", "bbox")}
        losses |= {key: head["roi"]["bbox_head"][key]["loss_weight"] for key in ("loss_cls", "loss_bbox")}
        yield Field("head.loss_weights", losses, config["loss_weights"])
        rpn, roi = (protocol["train_cfg"][key] for key in ("rpn", "rcnn"))
        thresholds = [rpn["assigner"][key] for key in ("pos_iou_thr", "neg_iou_thr", "min_pos_iou")]
        yield Field(
            "train_cfg.rpn", thresholds, [config[f"rpn_{key}_iou"] for key in ("positive", "negative", "forced")]
        )
        samples = [part["sampler"][key] for part in (rpn, roi) for key in ("num", "pos_fraction")]
        ours = [config[f"{part}_{key}"] for part in ("rpn", "roi") for key in ("samples", "positive_fraction")]
        yield Field("train_cfg.samplers", samples, ours)
        proposals = protocol["train_cfg"]["rpn_proposal"]
        limits = [proposals["nms_pre"], proposals["max_per_img"]]
        yield Field("train_cfg.rpn_proposal", limits, [config["train_proposals_per_level"], config["train_proposals"]])
        return
    losses = {key: value["loss_weight"] for key, value in head.items() if key.startswith("loss_")}
    if head["type"] == "DeformableDETRHead":
        keys = {
            "loss_cls": "cls_loss_coefficient",
            "loss_bbox": "bbox_loss_coefficient",
            "loss_iou": "giou_loss_coefficient",
        }
        yield Field("head.loss_weights", losses, {key: config.get(ours, 2.0) for key, ours in keys.items()})
        costs = {cost["type"]: cost["weight"] for cost in protocol["train_cfg"]["assigner"]["match_costs"]}
        ours = {
            "FocalLossCost": config["class_cost"],
            "BBoxL1Cost": config["bbox_cost"],
            "IoUCost": config["giou_cost"],
        }
        yield Field("train_cfg.assigner", costs, ours)
        return
    yield Field("head.loss_weights", losses, config["loss_weights"])
    yield Field("head.stacked_convs", head["stacked_convs"], config["num_convs"])
    yield Field("head.feat_channels", head["feat_channels"], config["head_channels"])
    assigner = (protocol["train_cfg"] or {}).get("assigner", {})
    if "pos_iou_thr" in assigner:
        thresholds = [assigner["pos_iou_thr"], assigner["neg_iou_thr"]]
        yield Field("train_cfg.assigner", thresholds, [config["positive_iou"], config["negative_iou"]])
    if "topk" in assigner:
        default = inspect.signature(assign_atss).parameters["candidates_per_level"].default
        yield Field("train_cfg.topk", assigner["topk"], default)


def _distillation(published: Case, entry: Preset, student: Any, teacher: Any) -> Iterator[Field]:
    """Methods with the numbers that they resolve to for this pair."""
    assert entry.losses is not None
    distiller = Distiller(student, teacher, list(entry.training_arguments()["methods"]))
    configs = {name: method.config for name, method in distiller.named_methods.items()}
    distiller.close()
    names = {"loss_cls_kd": "cls", "loss_reg_kd": "reg", "loss_center_kd": "centerness", "loss_iou_kd": "iou"}
    terms = {term: published[key]["loss_weight"] for key, term in names.items() if key in published}
    crosskd = configs["crosskd"]
    yield Field("distillation.terms", terms, {term: crosskd.terms.get(term, 0.0) for term in terms})
    for key in ("loss_cls_kd", "loss_reg_kd"):
        if "beta" in published[key]:
            yield Field(f"distillation.{key}.beta", published[key]["beta"], crosskd.beta)
        if "T" in published[key]:
            yield Field(f"distillation.{key}.T", published[key]["T"], crosskd.temperature)
    if "reused_teacher_head_idx" in published:
        yield Field("distillation.cut", published["reused_teacher_head_idx"], crosskd.cut)
    if "loss_feat_kd" in published:
        yield Field("distillation.pkd", published["loss_feat_kd"]["loss_weight"], configs["pkd"].weight)


# ---- The product's own configuration and trainer ----


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def arguments_of(entry: Preset) -> CrossKDConfig:
    """The training arguments of a preset."""
    given = entry.training.arguments()
    return CrossKDConfig(_folder().name, use_cpu=True, report_to="none", **given)


def bare_trainer(entry: Preset, model: nn.Module, images: int, epoch_length: int) -> CocoTrainer:
    """A trainer that makes optimiser and schedule: updates of `images` images, `epoch_length` of them an epoch."""
    trainer = CocoTrainer.__new__(CocoTrainer)
    args = arguments_of(entry)
    args.per_device_train_batch_size = images
    state = {
        "args": args,
        "model": model,
        "train_dataset": range(epoch_length * images),
        "optimizer": None,
        "lr_scheduler": None,
        "optimizer_cls_and_kwargs": None,
        "_optimizer_for": None,
        "_step_scheduler": None,
        "_train_batch_size": images,
        "is_tp_enabled": False,
        "distiller": None,
        "accelerator": SimpleNamespace(),
    }
    vars(trainer).update(state)
    trainer._images_per_update = lambda: images  # type: ignore[method-assign]
    return trainer


def describe(name: str) -> str:
    """A field's name without what differs from file to file."""
    return re.sub(r"\d+", "N", name)
