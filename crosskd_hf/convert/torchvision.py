"""torchvision's RetinaNet and FCOS, given as built models: everything that ours must share is read from them.

Exact are logits, centerness and boxes, for every size of image. Different by design: torchvision resizes without
antialiasing, and its FCOS reports the square root of score x centerness.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet, RetinaNet_ResNet50_FPN_Weights
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from transformers import PreTrainedModel

from crosskd_hf.models import (
    DenseDetectorConfig,
    DetectionImageProcessor,
    FCOSConfig,
    FCOSForObjectDetection,
    RetinaNetConfig,
    RetinaNetForObjectDetection,
)
from crosskd_hf.models.backbone import weights_follow

from .backbones import recognise_backbone
from .checkpoint import CheckpointError, Conversion, load_exactly, read_checkpoint
from .class_names import COCO_IDS, choose_names, set_classes

ARCHITECTURES = ("fcos_resnet50_fpn", "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2")
COCO_OUTPUTS = 91  # raw COCO ids as classes: background and ten ids that no object has, beside the 80
STRIDES = (8, 16, 32, 64, 128)
BATCH_NORM_EPS = 1e-5  # of timm's nets; another one is written into the running variance

RULES = [
    (r"backbone\.body\.(.+)", r"backbone.net.\1"),
    (r"backbone\.fpn\.inner_blocks\.(\d+)\.0\.(.+)", r"neck.lateral.\1.\2"),
    (r"backbone\.fpn\.layer_blocks\.(\d+)\.0\.(.+)", r"neck.output.\1.\2"),
    (r"backbone\.fpn\.extra_blocks\.p6\.(.+)", r"neck.downsample.0.\1"),
    (r"backbone\.fpn\.extra_blocks\.p7\.(.+)", r"neck.downsample.1.\1"),
    (r"head\.classification_head\.cls_logits\.(.+)", r"head.classifier.\1"),
    (r"head\.regression_head\.bbox_reg\.(.+)", r"head.regressor.\1"),
    (r"head\.regression_head\.bbox_ctrness\.(.+)", r"head.centerness.\1"),
]
TOWER = re.compile(r"head\.(classification|regression)_head\.conv\.(\d+)\.(?:(\d)\.)?(weight|bias)")
TOWERS = {"classification": "cls_tower", "regression": "reg_tower"}


def load_torchvision(
    architecture: str, checkpoint: str | os.PathLike[str] | None = None, weights: str | None = None
) -> nn.Module:
    """Build one of torchvision's detectors with the weights of a file, or with torchvision's own, which it downloads.

    Args:
        architecture: One of `ARCHITECTURES`.
        checkpoint: A `.pth` of the model's state dict, maybe under "model". Nothing in it is executed.
        weights: Name of torchvision's weights, such as "COCO_V1"; they are kept in torch's hub cache.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Another architecture, a file that doesn't fit, or not exactly one of the two sources.
    """
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{architecture!r} can't be converted from torchvision; known: {', '.join(ARCHITECTURES)}."
        )
    if (checkpoint is None) == (weights is None):
        raise CheckpointError("Give either a checkpoint file or the name of torchvision's weights, such as COCO_V1.")
    if checkpoint is None:
        return torchvision.models.get_model(architecture, weights=weights)
    state = read_checkpoint(checkpoint).state
    name = "head.classification_head.cls_logits.weight"
    if name not in state:
        raise CheckpointError(f"{checkpoint} is no {architecture} of torchvision: it has no tensor {name}.")
    anchors = 1 if architecture.startswith("fcos") else 9
    model = torchvision.models.get_model(
        architecture, weights=None, weights_backbone=None, num_classes=len(state[name]) // anchors
    )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint} does not fit torchvision's {architecture}: {error}") from None
    if Path(checkpoint).name == Path(RetinaNet_ResNet50_FPN_Weights.COCO_V1.url).name:
        for norm in _norms(model):  # as torchvision does when it loads this file itself
            norm.eps = 0.0
    return model


def convert_torchvision(model: nn.Module, labels: Sequence[str] | None = None) -> Conversion:
    """Convert a `RetinaNet` or `FCOS` of torchvision with a ResNet and a feature pyramid.

    Of the 91 outputs that torchvision's COCO models have, the 80 of real classes are kept; the others (background and
    ids that no object has) are left out, which changes no other output. Of other models, output 0 is left out where
    `labels` doesn't name it: torchvision counts the background, its detectors don't use it.

    Args:
        model: As built and loaded by torchvision.
        labels: Class names in the order of the outputs, with or without output 0. Default: COCO's for 91 outputs.

    Raises:
        ValueError: A part of the model has no counterpart here (the message says which), or classes have no names.
    """
    if not isinstance(model, RetinaNet | FCOS):
        raise CheckpointError(
            f"{type(model).__name__} can't be converted: of torchvision's detectors only RetinaNet and FCOS have an "
            f"exact counterpart here."
        )
    _check_parts(model)
    outputs = model.head.classification_head.num_classes
    kept, names = _classes(outputs, labels)
    config = _config(model, len(kept))
    converted = _model(config)
    state = _state(model, kept, config)
    scales = {name: value for name, value in converted.state_dict().items() if name.startswith("head.scales.")}
    load_exactly(converted, {**scales, **state})  # torchvision has no scales: ours are 1
    _check_anchors(model, converted)
    set_classes(converted.config, names)
    processor = _processor(model)
    recognised = {
        "model": f"torchvision {type(model).__name__}, {len(state)} tensors, all mapped",
        "detector": type(converted).__name__,
        "backbone": config.backbone,
        "head": f"norm_groups={config.norm_groups}, conv_bias={config.conv_bias}, fpn_extra={config.fpn_extra}",
        "classes": f"{len(names)} of {outputs} outputs: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}",
        "size": f"{dict(processor.size)}",
    }
    return Conversion(converted.eval(), processor, recognised)


def _check_parts(model: RetinaNet | FCOS) -> None:
    """Refuse what the configuration can't say."""
    extra = model.backbone.fpn.extra_blocks
    if not isinstance(extra, LastLevelP6P7):
        raise CheckpointError(f"The pyramid's extra levels come from {type(extra).__name__}; needed is LastLevelP6P7.")
    inputs = len(model.backbone.fpn.inner_blocks)
    if inputs != 3:
        raise CheckpointError(
            f"The pyramid takes {inputs} features of the backbone; needed are three, of strides 8 to 32."
        )
    if len(model.backbone.fpn.inner_blocks[0]) > 1:
        raise CheckpointError("The pyramid's convolutions are followed by a norm, which ours doesn't have.")
    weights = getattr(model.box_coder, "weights", (1.0, 1.0, 1.0, 1.0))
    if tuple(weights) != (1.0, 1.0, 1.0, 1.0):
        raise CheckpointError(f"The box coder has weights {tuple(weights)}; ours has ones.")
    tower = model.head.regression_head.conv
    if any(isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d) for module in tower.modules()):
        raise CheckpointError("The head's towers have BatchNorm; ours have GroupNorm or none.")


def _classes(outputs: int, labels: Sequence[str] | None) -> tuple[list[int], tuple[str, ...]]:
    """Outputs to keep and their names."""
    if labels is None and outputs == COCO_OUTPUTS:
        return list(COCO_IDS), choose_names(len(COCO_IDS), None, None)
    if labels is not None and len(labels) == outputs:
        return list(range(outputs)), choose_names(outputs, labels, None)
    return list(range(1, outputs)), choose_names(outputs - 1, labels, None)


def _config(model: RetinaNet | FCOS, num_labels: int) -> DenseDetectorConfig:
    state = model.state_dict()
    shapes = {name.replace("backbone.body.", "backbone."): tuple(tensor.shape) for name, tensor in state.items()}
    tower = list(model.head.regression_head.conv.modules())
    convs = [module for module in tower if isinstance(module, nn.Conv2d)]
    groups = [module.num_groups for module in tower if isinstance(module, nn.GroupNorm)]
    fields: dict[str, Any] = {
        **recognise_backbone(shapes, caffe_style=False),
        "freeze_norm": any(isinstance(norm, FrozenBatchNorm2d) for norm in _norms(model)),
        "num_labels": num_labels,
        "num_convs": len(convs),
        "norm_groups": groups[0] if groups else None,
        "conv_bias": convs[0].bias is not None,
        "head_channels": convs[0].out_channels,
        "fpn_channels": model.backbone.out_channels,
        "fpn_extra": "on_output" if model.backbone.fpn.extra_blocks.use_P5 else "on_input",
        "fpn_extra_relu": True,
        "stretch_cells": True,
    }
    if isinstance(model, FCOS):
        variant = {"norm_on_bbox": True, "centerness_on_reg": True, "point_offset": 0.0}
        return FCOSConfig(**fields, **variant, center_radius=model.center_sampling_radius)
    low, high = model.proposal_matcher.low_threshold, model.proposal_matcher.high_threshold
    return RetinaNetConfig(**fields, round_anchors=True, positive_iou=high, negative_iou=low)


def _model(config: DenseDetectorConfig) -> FCOSForObjectDetection | RetinaNetForObjectDetection:
    with weights_follow():
        if isinstance(config, FCOSConfig):
            return FCOSForObjectDetection(config)
        assert isinstance(config, RetinaNetConfig)
        return RetinaNetForObjectDetection(config)


def _state(model: RetinaNet | FCOS, kept: list[int], config: DenseDetectorConfig) -> dict[str, Tensor]:
    state = {_rename(name): tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for leaf in ("weight", "bias"):
        name = f"head.classifier.{leaf}"
        outputs = model.head.classification_head.num_classes
        state[name] = state[name].unflatten(0, (-1, outputs))[:, kept].flatten(0, 1)  # (A, K, ...) to (A * kept, ...)
    names = {id(module): name for name, module in model.named_modules()}
    for norm in _norms(model):
        variance = f"{_rename(names[id(norm)] + '.')}running_var"
        state[variance] += norm.eps - BATCH_NORM_EPS  # may fall below zero; what is added to it again keeps it above
    return state


def _rename(name: str) -> str:
    tower = TOWER.fullmatch(name)
    if tower:
        head, place, part, leaf = tower[1], int(tower[2]), tower[3], tower[4]
        # RetinaNet numbers blocks and then their parts, FCOS convolution, norm and activation in one row.
        block, is_norm = (place, part == "1") if part is not None else (place // 3, place % 3 == 1)
        return f"head.{TOWERS[head]}.{block}.{'norm' if is_norm else 'conv'}.{leaf}"
    for pattern, target in RULES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, target, name)
    if name.startswith("backbone.body."):
        return name.replace("backbone.body.", "backbone.net.")
    raise CheckpointError(f"The tensor {name} has no place in the converted model.")


def _norms(model: nn.Module) -> list[nn.BatchNorm2d | FrozenBatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d)]


def _check_anchors(model: RetinaNet | FCOS, converted: PreTrainedModel) -> None:
    theirs = model.anchor_generator.cell_anchors
    ours = [converted.head.prior_boxes(stride) for stride in STRIDES]
    if isinstance(model, FCOS):  # theirs are boxes of a stride's size around a point, ours are the point
        theirs = [anchors[:, :2] + stride / 2 for anchors, stride in zip(theirs, STRIDES, strict=False)]
        ours = [points[:, :2] for points in ours]
    if len(theirs) != len(ours) or not all(map(torch.equal, theirs, ours)):
        raise CheckpointError(
            f"The anchors of the model (sizes {model.anchor_generator.sizes}, ratios "
            f"{model.anchor_generator.aspect_ratios}) are not torchvision's defaults; others can't be expressed."
        )


def _processor(model: RetinaNet | FCOS) -> DetectionImageProcessor:
    transform = model.transform
    # FCOS compares sqrt(score x centerness): a score below its square can't reach the threshold.
    threshold = model.score_thresh**2 if isinstance(model, FCOS) else model.score_thresh
    return DetectionImageProcessor(
        size={"shortest_edge": transform.min_size[-1], "longest_edge": transform.max_size},
        size_divisor=transform.size_divisible,
        image_mean=list(transform.image_mean),
        image_std=list(transform.image_std),
        score_threshold=threshold,
        candidates_per_level=model.topk_candidates,
        nms_threshold=model.nms_thresh,
        max_detections=model.detections_per_img,
    )
