"""A published configuration beside the preset that stands for it: model, data, optimiser, schedule, test, methods.

Ours is written down in the words of the file, and every value of the file is compared; one that has no counterpart
here differs.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

from crosskd_hf.convert.deformable_detr import names_in_transformers
from crosskd_hf.convert.mmdet import rename
from crosskd_hf.create import build_detector
from crosskd_hf.data.categories import CategoryMap
from crosskd_hf.distillation import Distiller
from crosskd_hf.experiments import deformable_detr
from crosskd_hf.experiments.presets import Model, Preset
from crosskd_hf.models import DetectionImageProcessor
from crosskd_hf.models.backbone import Backbone
from crosskd_hf.models.pyramid import PyramidDetector
from crosskd_hf.training.coco_trainer import CocoTrainer
from crosskd_hf.training.config import CrossKDConfig
from crosskd_hf.training.schedules import WARMUP_STARTS, WARMUP_UPDATES
from tests.parity import protocol_words as words
from tests.parity.protocol_fields import Field, beside, unknown
from tests.parity.protocol_identity import find
from tests.parity.protocol_transforms import Augmentation, read_steps

Case = dict[str, Any]
WEIGHTS = {  # forms of the published tags, and timm's tag of the same weights
    r"torchvision://resnet\d+": "tv_in1k",
    r"open-mmlab://detectron2?/resnet\d+_caffe": "caffe",
    r"https://github\.com/SwinTransformer/.*/swin_tiny_patch4_window7_224\.pth": "ms_in1k",
}
COCO = CategoryMap(tuple(range(80)), tuple(f"class {number}" for number in range(80)))
# Which file it is, and what a comparison has no use for.
ABOUT = {"name", "branch", "role", "config", "note"}
COMPARED = {"protocol", "teacher", "schedule", "param_groups"}
CLOSE = 1e-6
SHARED = re.compile(r"^model\.decoder\.(?=(bbox|class)_embed)")  # heads that transformers' decoder holds, too
REMAINS = {
    "auto_scale_lr.enable": "rate of another batch",
    "test_loader.workers": "evaluation workers",
    "random_seed": "seed",
    "checkpoint_hook.interval": "checkpoints",
}


def compare(case: Case) -> list[Field]:
    """The fields of a configuration beside those of its preset.

    Raises:
        ValueError: No preset is this experiment.
    """
    train, odd = read_steps("train_transforms", case["protocol"]["train_transforms"])
    compared = {
        entry.name: [*odd, *fields(case, entry, train)] for entry in find(case, train.shortest)
    }  # several only where options of the methods differ
    best = min(compared, key=lambda name: (sum(not field.equal for field in compared[name]), len(name)))
    return [Field("preset", best, best), *compared[best]]


def fields(case: Case, entry: Preset, train: Augmentation) -> Iterator[Field]:
    """Every value of a configuration beside the preset's."""
    protocol = case["protocol"]
    model, processor = built(entry.model)
    args = arguments_of(entry)
    yield from _model("", protocol, entry.model, model, processor)
    yield from beside("pixels", protocol["pixels"], words.pixels(processor), CLOSE)
    yield from beside("head", protocol["head"], words.head(model), CLOSE)
    yield from beside("train_cfg", protocol["train_cfg"], words.train_cfg(model), CLOSE)
    yield from _augmentation(train, entry)
    yield from _test_images(protocol["test_transforms"], processor)
    settings = _settings(protocol, entry, args)
    for name, ours in settings.items():
        if name in protocol:
            yield from beside(name, protocol[name], ours, 1e-9, REMAINS)
    yield from unknown("protocol", protocol, {*settings, *READ, "distillation"})
    yield from _optimisation(case, entry, model, args)
    yield from unknown("", case, ABOUT | COMPARED)
    if case.get("teacher") and entry.teacher is not None:
        yield from _teacher(case["teacher"], entry)
        yield from _distillation(protocol["distillation"], entry, model)


# Sections of a protocol that have a comparison of their own.
READ = {
    *("weights", "neck", "pixels", "head", "train_cfg", "test_cfg", "train_transforms", "test_transforms"),
    *("optimizer", "paramwise", "schedulers"),
}


# ---- Models ----


_BUILT: dict[str, tuple[Any, DetectionImageProcessor]] = {}


def built(described: Model) -> tuple[Any, DetectionImageProcessor]:
    """A preset's model as it is built, without its weights' values, and its image processor; not to be changed."""
    known = _BUILT.get(str(described))
    if known is None:
        _BUILT[str(described)] = known = _build(described), described.image_processor()
    return known


def _build(described: Model) -> Any:
    spec = described.spec
    with torch.device("meta"), mock.patch.object(Backbone, "load_weights"):
        if spec.architecture == "deformable_detr":
            freeze = lambda module, name: deformable_detr.freeze_stem(module)  # noqa: E731
            with mock.patch.object(deformable_detr, "_load_backbone", freeze):
                return deformable_detr.new_deformable_detr(spec.backbone, COCO, spec.backbone_weights)
        return build_detector(spec, COCO)


def _model(
    name: str, published: Case, described: Model, model: Any, processor: DetectionImageProcessor
) -> Iterator[Field]:
    """Backbone, pyramid and post-processing: what files tell of students and teachers alike."""
    weights = {**published["weights"], "frozen_stages": max(published["weights"]["frozen_stages"], 0)}
    tag = weights["weights"]
    weights["weights"] = next((ours for theirs, ours in WEIGHTS.items() if re.fullmatch(theirs, tag)), tag)
    stages = weights.pop("out_indices")
    yield from beside(f"{name}weights", weights, words.weights(described, model))
    neck = dict(published["neck"])
    start = neck.pop("start_level", 0)
    neck |= {"levels": stages[start:], "in_channels": neck["in_channels"][start:]}
    neck["add_extra_convs"] = neck.get("add_extra_convs") or None
    neck["relu_before_extra_convs"] = neck.get("relu_before_extra_convs", False)
    ours = words.neck(model)
    if neck["type"] != "FPN":
        neck = {key: value for key, value in neck.items() if value or key not in _OF_FPN}
    yield from beside(f"{name}neck", neck, ours)
    yield from beside(f"{name}test_cfg", published["test_cfg"], words.test_cfg(processor, model), CLOSE)


_OF_FPN = {"add_extra_convs", "relu_before_extra_convs"}


def _teacher(published: Case, entry: Preset) -> Iterator[Field]:
    assert entry.teacher is not None
    model, processor = built(entry.teacher.model)
    yield from _model("teacher.", published, entry.teacher.model, model, processor)
    yield from beside("teacher.pixels", published["pixels"], words.pixels(processor), CLOSE)
    yield from unknown("teacher", published, {"config", "checkpoint", "weights", "neck", "pixels", "test_cfg"})


def _distillation(published: Case, entry: Preset, student: Any) -> Iterator[Field]:
    """Methods with the numbers that they resolve to for this pair, and none beside those of the file."""
    assert entry.teacher is not None
    teacher, _ = built(entry.teacher.model)
    pair = copy.deepcopy(student), copy.deepcopy(teacher)  # the distiller freezes the teacher
    distiller = Distiller(*pair, list(entry.training_arguments()["methods"]))
    configs = {name: method.config for name, method in distiller.named_methods.items()}
    distiller.close()
    ours = words.distillation(configs, teacher)
    yield Field("distillation.losses", sorted(published), sorted(ours))
    yield from beside("distillation", published, ours, CLOSE)
    if "crosskd" in configs:  # the authors' code knows no other
        options = configs["crosskd"]
        yield Field("distillation.strategy", "a", options.strategy or "a")
        yield Field("distillation.region", "P+N", options.region or "P+N")


# ---- Data ----


def _augmentation(published: Augmentation, entry: Preset) -> Iterator[Field]:
    training = entry.training
    transform = training.transform(training.multi_scale, training.longest_edge)
    crop = None if transform.random_crop is None else vars(transform.random_crop)
    edges = transform.shortest_edges or (training.test_shortest_edge,)
    yield Field("train_transforms.shortest", published.shortest, sorted(edges))
    yield Field("train_transforms.longest", published.longest, transform.longest_edge)
    yield Field("train_transforms.flip", published.flip, transform.flip)
    yield Field("train_transforms.crop", published.crop, crop)
    yield Field("train_transforms.antialias", False, transform.antialias)


def _test_images(steps: list[Case], processor: DetectionImageProcessor) -> Iterator[Field]:
    published, odd = read_steps("test_transforms", steps)
    size = dict(processor.size)
    yield from odd
    yield Field("test_transforms.shortest", published.shortest, [size["shortest_edge"]])
    yield Field("test_transforms.longest", published.longest, size["longest_edge"])
    yield Field("test_transforms.flip", published.flip, 0.0)
    yield Field("test_transforms.antialias", False, processor.antialias)


def _settings(protocol: Case, entry: Preset, args: CrossKDConfig) -> Case:
    """Sections of a protocol whose words are few: ours in the same words."""
    unused = protocol.get("test_time_augmentation") in (None, "defined but not used by val or test")
    sampler = {"type": "AspectRatioBatchSampler"} if args.group_by_aspect_ratio else None
    settings = args.schedule_settings()
    assert settings is not None
    annotations = {"coco": "data/coco/annotations/instances_val2017.json"}.get(entry.training.data)
    return {
        "filter": {"filter_empty_gt": entry.training.drop_empty, "min_size": entry.training.min_side},
        "train_loader": {
            "images_per_gpu": args.per_device_train_batch_size,
            "workers": args.dataloader_num_workers,
            "sampler": {"type": "DefaultSampler", "shuffle": args.train_sampling_strategy == "random"},
            "batch_sampler": sampler,
            "drop_last": args.dataloader_drop_last,
        },
        "test_loader": {
            "images_per_gpu": args.per_device_eval_batch_size,
            "workers": args.dataloader_num_workers,
            "batch_sampler": None,
        },
        "optimizer_wrapper": "AmpOptimWrapper" if args.fp16 or args.bf16 else "OptimWrapper",
        "clip": {"max_norm": args.max_grad_norm, "norm_type": 2} if args.max_grad_norm else None,
        "epochs": args.num_train_epochs,
        "validate_every_epochs": 1,  # what the examples set
        "auto_scale_lr": {"enable": args.scale_learning_rate, "base_batch_size": settings.images_per_update},
        "checkpoint_hook": {"type": "CheckpointHook", "interval": 1},
        "ema": args.ema_decay is not None,
        "random_seed": args.seed,
        "evaluator": {"type": "CocoMetric", "ann_file": annotations, "metric": "bbox", "format_only": False},
        "test_time_augmentation": protocol.get("test_time_augmentation") if unused else "none",
    }


# ---- Optimisation ----


def _optimisation(case: Case, entry: Preset, model: Any, args: CrossKDConfig) -> Iterator[Field]:
    protocol, length = case["protocol"], case["schedule"]["epoch_length"]
    trainer = bare_trainer(entry, model, protocol["auto_scale_lr"]["base_batch_size"], length)
    optimizer = trainer.create_optimizer()
    rate, group = trainer._base_learning_rate(), optimizer.param_groups[0]
    ours = {"type": type(optimizer).__name__, "lr": rate, "weight_decay": args.weight_decay}
    momentum = {"momentum": group["momentum"]} if "momentum" in group else {}
    yield from beside("optimizer", protocol["optimizer"], ours | momentum, 1e-9)
    yield from beside("schedulers", protocol["schedulers"], _schedulers(entry, args), 1e-9)
    yield from _paramwise(protocol["paramwise"], case["param_groups"], entry)
    yield from _groups(case["param_groups"], model, optimizer, rate, args.weight_decay)
    scheduler = trainer.create_scheduler(protocol["epochs"] * length, optimizer)
    first = next(i for i, g in enumerate(optimizer.param_groups) if g["initial_lr"] == rate)
    factor = scheduler.lr_lambdas[first]
    yield from unknown("schedule", case["schedule"], {"epoch_length", "rule", "lr"})
    for update, published in case["schedule"]["lr"]:
        yield Field(f"schedule.lr[{update}]", published, rate * factor(update), 1e-9)


def _schedulers(entry: Preset, args: CrossKDConfig) -> list[Case]:
    """Warm-up and decays."""
    schedule = entry.training.resolved_schedule
    start = WARMUP_STARTS[schedule.warmup_kind]
    warmup = {
        "linear": {"type": "LinearLR", "start_factor": start},
        "constant": {"type": "ConstantLR", "factor": start},
    }.get(schedule.warmup_kind)
    decays = {"type": "MultiStepLR", "begin": 0, "end": args.num_train_epochs, "by_epoch": True, "gamma": 0.1}
    first = [] if warmup is None else [warmup | {"by_epoch": False, "begin": 0, "end": WARMUP_UPDATES}]
    return [*first, decays | {"milestones": list(args.decay_epochs or schedule.decay_epochs)}]


def _paramwise(published: Case | None, groups: Case, entry: Preset) -> Iterator[Field]:
    """Factors by name and of biases. One for a module that the model doesn't have changes nothing."""
    names = [part for group in groups["groups"].values() for name in group["names"] for part in name.split(".")]
    given = dict(published or {})
    factors = {key: value for key, value in given.pop("custom_keys", {}).items() if key in names}
    training = entry.training
    ours: Case = {name: {"lr_mult": factor} for name, factor in training.lr_factors.items()}
    yield Field("paramwise.custom_keys", factors, ours)
    biases: Case = {} if training.bias_lr_factor == 1 else {"bias_lr_mult": training.bias_lr_factor}
    if training.bias_weight_decay is not None:
        biases["bias_decay_mult"] = training.bias_weight_decay / training.resolved_schedule.weight_decay
    yield Field("paramwise", given, biases, CLOSE)


def _groups(published: Case, model: nn.Module, optimizer: Any, rate: float, decay: float) -> Iterator[Field]:
    """Trained and frozen tensors, and those of each pair of factors on learning rate and weight decay, by name."""
    named = {id(parameter): SHARED.sub("", name) for name, parameter in model.named_parameters()}
    elements: dict[str, int] = defaultdict(int)
    names: dict[str, set[str]] = defaultdict(set)
    for group in optimizer.param_groups:
        title = f"lr x{group['lr'] / rate:g}, weight decay x{group['weight_decay'] / decay:g}"
        names[title] |= {named[id(parameter)] for parameter in group["params"]}
        elements[title] += sum(parameter.numel() for parameter in group["params"])
    groups = published["groups"]
    counts = {title: group["elements"] for title, group in groups.items()}
    yield Field("param_groups.elements", counts, dict(elements))
    yield Field("param_groups.trained_elements", published["trained_elements"], sum(elements.values()))
    yield Field("param_groups.trained_tensors", published["trained_tensors"], _tensors(groups))
    for title, group in groups.items():
        theirs, found = in_our_names(group["names"], model), names.get(title, set())
        yield Field(f"param_groups[{title}].names", sorted(theirs - found), sorted(found - theirs))
        factors = [float(number) for number in re.findall(r"x([\d.e-]+)", title)]
        yield Field(f"param_groups[{title}].factors", [group["lr_mult"], group["decay_mult"]], factors, CLOSE)
        yield Field(f"param_groups[{title}].tensors", group["tensors"], len(group["names"]))
        yield from unknown("param_groups", group, {"lr_mult", "decay_mult", "tensors", "elements", "names"})
    if isinstance(model, PyramidDetector):  # transformers keeps frozen norms as buffers
        frozen = {name: p.numel() for name, p in model.named_parameters() if not p.requires_grad}
        theirs = in_our_names(published["frozen_names"], model)
        yield Field("param_groups.frozen_names", sorted(theirs - set(frozen)), sorted(set(frozen) - theirs))
        yield Field("param_groups.frozen_tensors", published["frozen_tensors"], len(frozen))
        yield Field("param_groups.frozen_elements", published["frozen_elements"], sum(frozen.values()))
    known = {"groups", "trained_elements", "trained_tensors", "frozen_names", "frozen_tensors", "frozen_elements"}
    yield from unknown("param_groups", published, known | {"buffers", "sha256", "sha256_of"})


def _tensors(groups: Case) -> int:
    return sum(len(group["names"]) for group in groups.values())


def in_our_names(names: list[str], model: Any) -> set[str]:
    """MMDetection's names of parameters in ours, by the rules of the converter; one without a place stays as it is."""
    return {ours for name in names for ours in _in_our_names(name, model)}


def _in_our_names(name: str, model: Any) -> Iterable[str]:
    try:
        is_ours = isinstance(model, PyramidDetector)
        return rename([name], model.config).values() if is_ours else names_in_transformers(name)
    except ValueError:
        return (name,)


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
