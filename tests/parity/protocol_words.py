"""A model of this library, its image processor and its losses in the words of a published configuration."""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import nn

from crosskd_hf.experiments.presets import Model
from crosskd_hf.models import DetectionImageProcessor
from crosskd_hf.models.assigners import assign_atss
from crosskd_hf.models.layers import FPN
from crosskd_hf.models.roi_head import DELTA_STD
from crosskd_hf.training.detr_loss import WEIGHTS

Words = dict[str, Any]
HEADS = {  # by the name of the head's class
    "GFLHead": "gfl",
    "ATSSHead": "atss",
    "FCOSHead": "fcos",
    "RetinaHead": "retinanet",
    "DeformableDETRHead": "deformable_detr",
}
BACKBONES = {"swin": "SwinTransformer", "mobilenetv2": "MobileNetV2", "resnext": "ResNeXt", "resnet": "ResNet"}
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
FOCAL: Words = {"type": "FocalLoss", "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25}
BINARY: Words = {"type": "CrossEntropyLoss", "use_sigmoid": True}
PSEUDO: Words = {"allowed_border": -1, "pos_weight": -1, "debug": False}


def weights(described: Model, model: nn.Module) -> Words:
    """The backbone: its kind, and what of it is trained."""
    spec, config = described.spec, model.config.to_dict()
    kind = next(name for start, name in BACKBONES.items() if spec.backbone.startswith(start))
    backbone = next(module for key, module in model.named_modules() if key.rpartition(".")[2] == "backbone")
    norms = [module for module in backbone.modules() if isinstance(module, NORMS)]
    return {
        "type": kind,
        "depth": int(re.findall(r"\d+", spec.backbone)[0]) if kind.startswith("Res") else None,
        "style": ("caffe" if config.get("caffe_stride") else "pytorch") if kind.startswith("Res") else None,
        "weights": spec.backbone_weights,
        "frozen_stages": config["frozen_stages"] if "frozen_stages" in config else _frozen_stages(backbone),
        "norm_trained": any(p.requires_grad for norm in norms for p in norm.parameters(recurse=False)),
        "norm_eval": config.get("norm_eval", True) if kind.startswith("Res") else None,
        "drop_path_rate": (config.get("backbone_arguments") or {}).get("drop_path_rate"),
    }


def _frozen_stages(backbone: nn.Module) -> int:
    """Of a ResNet: 1 if stem and first stage get no gradient, 2 with the second, ..."""
    trained = [
        any(p.requires_grad for name, p in backbone.named_parameters() if f"layer{stage}." in name)
        for stage in range(1, 5)
    ]
    return trained.index(True)


def pixels(processor: DetectionImageProcessor) -> Words:
    """Statistics of the pixels on 0..255, the order of the channels, the padding."""
    return {
        "mean": [255 * value for value in processor.image_mean],
        "std": [255 * value for value in processor.image_std],
        "order": processor.channel_order.upper(),
        "scale": "0..255",
        "pad_divisor": processor.size_divisor,
        "pad_value": 0,
        "pad_side": "right and bottom",
    }


def neck(model: Any) -> Words:
    """The pyramid; `levels` are the backbone's stages that enter it, 0 has stride 4."""
    config = model.config
    if config.model_type == "deformable_detr":
        convolutions = [level[0] for level in model.model.input_proj]
        inner = convolutions[: len(config.backbone_config.out_indices)]
        return {
            "type": "ChannelMapper",
            "in_channels": [convolution.in_channels for convolution in inner],
            "kernel_size": inner[0].kernel_size[0],
            "out_channels": config.d_model,
            "act_cfg": None,
            "norm_cfg": {"type": "GN", "num_groups": model.model.input_proj[0][1].num_groups},
            "num_outs": config.num_feature_levels,
            "levels": [index % 5 - 1 for index in config.backbone_config.out_indices],  # timm counts the stem, too
        }
    (pyramid,) = [module for module in model.modules() if isinstance(module, FPN)]
    return {
        "type": "FPN",
        "in_channels": [lateral.in_channels for lateral in pyramid.lateral],
        "out_channels": config.fpn_channels,
        "add_extra_convs": None if config.fpn_extra == "max_pool" else config.fpn_extra,
        "num_outs": len(config.strides),
        "relu_before_extra_convs": config.fpn_extra_relu,
        "levels": [stride.bit_length() - 3 for stride in config.backbone_strides],
    }


def head(model: Any) -> Words:
    """The head with its anchors and its losses."""
    config = model.config
    kind = config.model_type.removeprefix("crosskd_")
    if kind == "deformable_detr":
        return _detr_head(config)
    if kind == "faster_rcnn":
        return _two_stages(config)
    losses, weighed = LOSSES[kind](config), config.loss_weights
    return {
        "type": next(name for name, architecture in HEADS.items() if architecture == kind),
        "num_classes": config.num_labels,
        "in_channels": config.fpn_channels,
        "stacked_convs": config.num_convs,
        "feat_channels": config.head_channels,
        "reg_max": config.reg_max,
        **ANCHORS[kind](config),
        **{name: loss | {"loss_weight": weighed[name]} for name, loss in losses.items()},
    }


LOSSES: dict[str, Any] = {
    "gfl": lambda config: {
        "loss_cls": {"type": "QualityFocalLoss", "use_sigmoid": True, "beta": config.quality_focal_beta},
        "loss_dfl": {"type": "DistributionFocalLoss"},
        "loss_bbox": {"type": f"{config.box_loss.upper().replace('IOU', 'IoU')}Loss"},
    },
    "atss": lambda config: {"loss_cls": FOCAL, "loss_bbox": {"type": "GIoULoss"}, "loss_centerness": BINARY},
    "fcos": lambda config: {"loss_cls": FOCAL, "loss_bbox": {"type": "IoULoss"}, "loss_centerness": BINARY},
    "retinanet": lambda config: {"loss_cls": FOCAL, "loss_bbox": {"type": "L1Loss"}},
}
"""What each head's losses are; the golden cases compare their values."""
ANCHORS: dict[str, Any] = {
    "gfl": lambda config: {"anchor_generator": _anchors(config, (1.0,), 1)},
    "atss": lambda config: {"anchor_generator": _anchors(config, (1.0,), 1), "bbox_coder": _coder(DELTA_STD)},
    "fcos": lambda config: {
        "strides": list(config.strides),
        "center_sampling": config.center_radius is not None,
        "norm_on_bbox": config.norm_on_bbox,
        "centerness_on_reg": config.centerness_on_reg,
    },
    "retinanet": lambda config: {
        "anchor_generator": _anchors(config, config.aspect_ratios, config.scales_per_octave),
        "bbox_coder": _coder((1.0, 1.0, 1.0, 1.0)),
    },
}


def _anchors(config: Any, ratios: Any, scales: int) -> Words:
    sizes = {"octave_base_scale": config.anchor_scale, "scales_per_octave": scales}
    return {"type": "AnchorGenerator", "ratios": list(ratios), "strides": list(config.strides), **sizes}


def _coder(std: tuple[float, ...]) -> Words:
    return {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": list(std)}


def _detr_head(config: Any) -> Words:
    return {
        "type": "DeformableDETRHead",
        "num_classes": config.num_labels,
        "sync_cls_avg_factor": True,
        "loss_cls": FOCAL | {"alpha": config.focal_alpha, "loss_weight": WEIGHTS["deformable_detr"]["loss_ce"]},
        "loss_bbox": {"type": "L1Loss", "loss_weight": config.bbox_loss_coefficient},
        "loss_iou": {"type": "GIoULoss", "loss_weight": config.giou_loss_coefficient},
    }


def _two_stages(config: Any) -> Words:
    weighed = config.loss_weights
    sizes = {"scales": [config.anchor_scale], "ratios": list(config.aspect_ratios), "strides": list(config.strides)}
    box, channels = {"type": "L1Loss"}, config.fpn_channels
    pooling = {"type": "RoIAlign", "output_size": config.roi_size, "sampling_ratio": 0}
    regions = {"type": "SingleRoIExtractor", "roi_layer": pooling, "out_channels": channels}
    return {
        "rpn": {
            "type": "RPNHead",
            "in_channels": channels,
            "feat_channels": config.rpn_channels,
            "anchor_generator": {"type": "AnchorGenerator", **sizes},
            "bbox_coder": _coder((1.0, 1.0, 1.0, 1.0)),
            "loss_cls": BINARY | {"loss_weight": weighed["loss_rpn_cls"]},
            "loss_bbox": box | {"loss_weight": weighed["loss_rpn_bbox"]},
        },
        "roi": {
            "type": "StandardRoIHead",
            "bbox_roi_extractor": regions | {"featmap_strides": list(config.backbone_strides)},
            "bbox_head": {
                "type": f"Shared{config.num_fcs}FCBBoxHead",
                "in_channels": channels,
                "fc_out_channels": config.fc_channels,
                "roi_feat_size": config.roi_size,
                "num_classes": config.num_labels,
                "bbox_coder": _coder(DELTA_STD),
                "reg_class_agnostic": config.class_agnostic,
                "loss_cls": BINARY | {"use_sigmoid": False, "loss_weight": weighed["loss_cls"]},
                "loss_bbox": box | {"loss_weight": weighed["loss_bbox"]},
            },
        },
    }


def train_cfg(model: Any) -> Words | None:
    """Assignment and sampling of the training; None where a head has no such settings."""
    config = model.config
    if config.model_type in ("crosskd_gfl", "crosskd_atss"):
        candidates = inspect.signature(assign_atss).parameters["candidates_per_level"].default
        return {"assigner": {"type": "ATSSAssigner", "topk": candidates}, **PSEUDO}
    if config.model_type == "crosskd_retinanet":
        assigner = _by_iou(config.positive_iou, config.negative_iou, 0)
        return {"assigner": assigner, "sampler": {"type": "PseudoSampler"}, **PSEUDO}
    if config.model_type == "deformable_detr":
        costs = [
            {"type": "FocalLossCost", "weight": config.class_cost},
            {"type": "BBoxL1Cost", "weight": config.bbox_cost, "box_format": "xywh"},  # centre, width, height
            {"type": "IoUCost", "weight": config.giou_cost, "iou_mode": "giou"},
        ]
        return {"assigner": {"type": "HungarianAssigner", "match_costs": costs}}
    return _two_stage_training(config) if config.model_type == "crosskd_faster_rcnn" else None


def _by_iou(positive: float, negative: float, forced: float, **further: bool) -> Words:
    ious = {"pos_iou_thr": positive, "neg_iou_thr": negative, "min_pos_iou": forced}
    return {"type": "MaxIoUAssigner", **ious, "ignore_iof_thr": -1, **further}


def _two_stage_training(config: Any) -> Words:
    rpn = config.rpn_positive_iou, config.rpn_negative_iou, config.rpn_forced_iou
    shared = {"type": "RandomSampler", "neg_pos_ub": -1}
    proposals = {"num": config.rpn_samples, "pos_fraction": config.rpn_positive_fraction, "add_gt_as_proposals": False}
    regions = {"num": config.roi_samples, "pos_fraction": config.roi_positive_fraction, "add_gt_as_proposals": True}
    return {
        "rpn": {"assigner": _by_iou(*rpn, match_low_quality=True), "sampler": shared | proposals, **PSEUDO},
        "rpn_proposal": _proposals(config, config.train_proposals_per_level, config.train_proposals),
        "rcnn": {
            "assigner": _by_iou(*[config.roi_positive_iou] * 3, match_low_quality=False),
            "sampler": shared | regions,
            **PSEUDO,
        },
    }


def _proposals(config: Any, per_level: int, per_image: int) -> Words:
    nms, least = {"type": "nms", "iou_threshold": config.proposal_nms}, int(config.min_proposal_size)
    return {"nms_pre": per_level, "max_per_img": per_image, "nms": nms, "min_bbox_size": least}


def test_cfg(processor: DetectionImageProcessor, model: Any) -> Words:
    """From outputs to detections."""
    if model.config.model_type == "deformable_detr":
        return {"max_per_img": processor.max_detections}
    settings = {
        "score_thr": processor.score_threshold,
        "nms": {"type": "nms", "iou_threshold": processor.nms_threshold},
        "max_per_img": processor.max_detections,
    }
    if model.config.model_type == "crosskd_faster_rcnn":
        config = model.config
        return {"rpn": _proposals(config, config.test_proposals_per_level, config.test_proposals), "rcnn": settings}
    return {"nms_pre": processor.candidates_per_level, "min_bbox_size": 0, **settings}


test_cfg.__test__ = False  # type: ignore[attr-defined]  # a name of the files, no test of pytest


def distillation(method: dict[str, Any], teacher: Any) -> Words:
    """The losses between student and teacher, from the resolved configurations of the methods by their names."""
    words: Words = {}
    if "crosskd" in method:
        words |= _crosskd(method["crosskd"], teacher.config)
    if "pkd" in method:
        words["loss_feat_kd"] = {"type": "PKDLoss", "loss_weight": method["pkd"].weight}
    return words


def _crosskd(config: Any, teacher: Any) -> Words:
    kind, terms = teacher.model_type, config.terms
    soft = {"type": "KnowledgeDistillationKLDivLoss", "class_reduction": "sum", "T": config.temperature}
    cls = {"type": "KDQualityFocalLoss", "beta": config.beta}
    box = {"crosskd_fcos": "IoULoss", "crosskd_faster_rcnn": "L1Loss", "deformable_detr": "L1Loss"}
    reg = soft if kind == "crosskd_gfl" else {"type": box.get(kind, "GIoULoss")}
    words = {
        "loss_cls_kd": (soft if kind == "crosskd_faster_rcnn" else cls) | {"loss_weight": terms.get("cls", 0.0)},
        "loss_reg_kd": reg | {"loss_weight": terms.get("reg", 0.0)},
    }
    if kind == "crosskd_atss":
        words["loss_center_kd"] = BINARY | {"loss_weight": terms["centerness"]}
    if kind == "deformable_detr" and config.box_loss == "l1+giou":
        words["loss_iou_kd"] = {"type": "GIoULoss", "loss_weight": terms["iou"]}
    return words if config.cut is None else words | {"reused_teacher_head_idx": config.cut}
