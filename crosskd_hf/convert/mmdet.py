"""MMDetection checkpoints of dense detectors and Faster R-CNN, by names and shapes: pure dict -> dict, tables first.

A checkpoint does not tell everything in its shapes. What it cannot tell (Caffe-style strides, BGR input, ReLU in front
of extra levels, FCOS's variants) are the options of :class:`MMDetOptions`; `mmdet_config` reads them.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from crosskd_hf.models import (
    ATSSConfig,
    DenseDetectorConfig,
    FasterRCNNConfig,
    FCOSConfig,
    GFLConfig,
    RetinaNetConfig,
)

from . import mmdet_faster_rcnn
from .backbones import backbone_rules, fold_channel_order, rearrange, recognise_backbone, unused

Shapes = Mapping[str, tuple[int, ...]]

# Which predictors a head has tells which detector it is.
CLASSIFIERS: dict[str, type[DenseDetectorConfig]] = {
    "bbox_head.gfl_cls.weight": GFLConfig,
    "bbox_head.atss_cls.weight": ATSSConfig,
    "bbox_head.conv_cls.weight": FCOSConfig,
    "bbox_head.retina_cls.weight": RetinaNetConfig,
}
HEAD_RULES = [
    (r"bbox_head\.(cls|reg)_convs\.(\d+)\.conv\.(.+)", r"head.\1_tower.\2.conv.\3"),
    (r"bbox_head\.(cls|reg)_convs\.(\d+)\.gn\.(.+)", r"head.\1_tower.\2.norm.\3"),
    (r"bbox_head\.(?:gfl|atss|retina|conv)_cls\.(.+)", r"head.classifier.\1"),
    (r"bbox_head\.(?:gfl|atss|retina|conv)_reg\.(.+)", r"head.regressor.\1"),
    (r"bbox_head\.(?:atss|conv)_centerness\.(.+)", r"head.centerness.\1"),
    (r"bbox_head\.scales\.(\d+)\.scale", r"head.scales.\1.scale"),
    *mmdet_faster_rcnn.HEAD_RULES,
]
NECK_RULES = [(r"neck\.lateral_convs\.(\d+)\.conv\.(.+)", r"neck.lateral.\1.\2")]
INTEGRAL = "bbox_head.integral.project"  # a constant that the architecture itself gives


@dataclass
class MMDetOptions:
    """What names and shapes of a checkpoint cannot tell.

    Args:
        caffe_style: Bottlenecks stride on their first 1x1 convolution, and all BatchNorm scales are frozen.
        bgr: The images were BGR; the order is folded into the first convolution, so that users feed RGB.
        fpn_extra_relu: ReLU in front of the second extra level.
        norm_on_bbox, centerness_on_reg, center_sampling: Variants of FCOS.
    """

    caffe_style: bool = False
    bgr: bool = False
    fpn_extra_relu: bool = False
    norm_on_bbox: bool = False
    centerness_on_reg: bool = False
    center_sampling: bool = False


def recognise(shapes: Shapes, options: MMDetOptions) -> DenseDetectorConfig | FasterRCNNConfig:
    """Read a detector's configuration from the names and shapes of its checkpoint.

    Raises:
        ValueError: No detector that this library has.
    """
    if mmdet_faster_rcnn.MARK in shapes:
        return mmdet_faster_rcnn.recognise_faster_rcnn(shapes, recognise_backbone(shapes, options.caffe_style))
    classifier = next((name for name in CLASSIFIERS if name in shapes), None)
    if classifier is None:
        raise ValueError(
            f"No known detector: none of {', '.join(CLASSIFIERS)} is among the {len(shapes)} tensors, which begin with "
            f"{list(shapes)[:3]}. MMDetection's GFL, ATSS, FCOS, RetinaNet and Faster R-CNN can be converted."
        )
    config_class = CLASSIFIERS[classifier]
    anchors = 9 if config_class is RetinaNetConfig else 1
    outputs, head_channels = shapes[classifier][:2]
    sides = shapes[classifier.replace("_cls.", "_reg.")][0] // anchors
    laterals = _count(shapes, r"neck\.lateral_convs\.(\d+)\.")
    levels = _count(shapes, r"neck\.fpn_convs\.(\d+)\.")
    fpn_channels = shapes["neck.lateral_convs.0.conv.weight"][0]
    fields: dict[str, Any] = {
        **recognise_backbone(shapes, options.caffe_style),
        "num_labels": outputs // anchors,
        "head_channels": head_channels,
        "num_convs": _count(shapes, r"bbox_head\.cls_convs\.(\d+)\."),
        "norm_groups": 32 if "bbox_head.cls_convs.0.gn.weight" in shapes else None,
        "conv_bias": "bbox_head.cls_convs.0.conv.bias" in shapes,
        "reg_max": None if sides == 4 else sides // 4 - 1,
        "fpn_channels": fpn_channels,
        "backbone_strides": [8, 16, 32][:laterals],
        "strides": [8 * 2**level for level in range(levels)],
        "fpn_extra_relu": options.fpn_extra_relu,
    }
    if levels > laterals:
        extra_input = shapes[f"neck.fpn_convs.{laterals}.conv.weight"][1]
        fields["fpn_extra"] = "on_output" if extra_input == fpn_channels else "on_input"
    if config_class is FCOSConfig:
        fields["norm_on_bbox"], fields["centerness_on_reg"] = options.norm_on_bbox, options.centerness_on_reg
        fields["center_radius"] = 1.5 if options.center_sampling else None
    return config_class(**fields)


def rename(names: Iterable[str], config: DenseDetectorConfig | FasterRCNNConfig) -> dict[str, str]:
    """MMDetection's parameter names to ours; constants are left out.

    Raises:
        ValueError: A name that has no place in the model.
    """
    laterals = len(config.backbone_strides)
    rules = [
        (re.compile(pattern), target) for pattern, target in HEAD_RULES + NECK_RULES + backbone_rules(config.backbone)
    ]
    dropped = unused(config.backbone, config.backbone_last_channels)
    renamed, unknown = {}, []
    for name in names:
        if name == INTEGRAL or dropped.match(name):
            continue
        extra = re.fullmatch(r"neck\.fpn_convs\.(\d+)\.conv\.(.+)", name)
        if extra:
            level, leaf = int(extra[1]), extra[2]
            place = f"output.{level}" if level < laterals else f"downsample.{level - laterals}"
            renamed[name] = f"neck.{place}.{leaf}"
            continue
        target = next((pattern.sub(target, name) for pattern, target in rules if pattern.fullmatch(name)), None)
        if target is None:
            unknown.append(name)
        else:
            renamed[name] = target
    if unknown:
        raise ValueError(
            f"{len(unknown)} tensors have no place in {type(config).__name__} with {config.backbone}: {unknown[:5]}."
        )
    return renamed


def convert_mmdet(
    state: Mapping[str, Tensor], options: MMDetOptions | None = None
) -> tuple[DenseDetectorConfig | FasterRCNNConfig, dict[str, Tensor]]:
    """Convert the state dict of an MMDetection detector.

    Returns:
        Our configuration and our state dict, complete for a strict load.

    Raises:
        ValueError: Unknown detector or backbone, or a tensor without a place.
    """
    options = options or MMDetOptions()
    config = recognise({name: tuple(tensor.shape) for name, tensor in state.items()}, options)
    converted = {target: rearrange(name, state[name]) for name, target in rename(state, config).items()}
    if options.bgr:
        fold_channel_order(converted)
    return config, converted


def _count(shapes: Shapes, pattern: str) -> int:
    return len({match[1] for name in shapes if (match := re.match(pattern, name))})
