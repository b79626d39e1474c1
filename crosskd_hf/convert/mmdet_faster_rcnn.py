"""MMDetection's Faster R-CNN: what its checkpoints tell, and the names of its two heads."""

import re
from collections.abc import Mapping
from typing import Any

from crosskd_hf.models import FasterRCNNConfig

Shapes = Mapping[str, tuple[int, ...]]

MARK = "rpn_head.rpn_cls.weight"  # only detectors with an RPN have it
HEAD_RULES = [
    (r"rpn_head\.rpn_conv\.(.+)", r"rpn.conv.\1"),
    (r"rpn_head\.rpn_cls\.(.+)", r"rpn.classifier.\1"),
    (r"rpn_head\.rpn_reg\.(.+)", r"rpn.regressor.\1"),
    (r"roi_head\.bbox_head\.shared_fcs\.(\d+)\.(.+)", r"roi_head.shared.\1.\2"),
    (r"roi_head\.bbox_head\.fc_cls\.(.+)", r"roi_head.classifier.\1"),
    (r"roi_head\.bbox_head\.fc_reg\.(.+)", r"roi_head.regressor.\1"),
]


def recognise_faster_rcnn(shapes: Shapes, backbone: Mapping[str, Any]) -> FasterRCNNConfig:
    """Read the configuration from names and shapes; `backbone` holds its fields of the backbone.

    Raises:
        ValueError: The second stage is another one (Cascade R-CNN, double-head), or the pyramid has other levels.
    """
    needed = ["roi_head.bbox_head.fc_cls.weight", "roi_head.bbox_head.fc_reg.weight"]
    needed.append("roi_head.bbox_head.shared_fcs.0.weight")
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise ValueError(
            f"The checkpoint has an RPN, but no {missing[0]}: of two-stage detectors only Faster R-CNN with shared "
            f"fully connected layers and a feature pyramid can be converted."
        )
    laterals = _count(shapes, r"neck\.lateral_convs\.(\d+)\.")
    outputs = _count(shapes, r"neck\.fpn_convs\.(\d+)\.")
    if laterals != 4 or outputs != 4:
        raise ValueError(f"The pyramid has {laterals} lateral and {outputs} output convolutions; Faster R-CNN has 4.")
    classes = shapes[needed[0]][0] - 1
    boxes = shapes[needed[1]][0] // 4
    fc_channels, flat = shapes[needed[2]]
    fpn_channels = shapes["neck.lateral_convs.0.conv.weight"][0]
    return FasterRCNNConfig(
        **backbone,
        num_labels=classes,
        fpn_channels=fpn_channels,
        rpn_channels=shapes[MARK][1],
        roi_size=round((flat / fpn_channels) ** 0.5),
        fc_channels=fc_channels,
        num_fcs=_count(shapes, r"roi_head\.bbox_head\.shared_fcs\.(\d+)\."),
        class_agnostic=boxes == 1 and classes > 1,
    )


def _count(shapes: Shapes, pattern: str) -> int:
    return len({match[1] for name in shapes if (match := re.match(pattern, name))})
