"""The ways to write a box that data sets of the Hub are read in."""

from __future__ import annotations

import difflib
import enum

import numpy as np

from .coco_json import Floats

_CORNERS = {"xywh": False, "coco": False, "xyxy": True, "pascal_voc": True, "voc": True}
_OTHERS = ("cxcywh", "cxcywhn", "cxcywhr", "xywhn", "xywhr", "xyxyn", "yxyx", "xyxyxyxy")  # no slips of the names above


def to_xywh(boxes: Floats, bbox_format: str | enum.Enum) -> Floats:
    """Boxes (G, 4) in px as left, top, width and height.

    Args:
        boxes: the numbers as they are.
        bbox_format: "xywh" (or "coco"), or "xyxy" (or "pascal_voc"), in any case; or torchvision's `BoundingBoxFormat`.

    Raises:
        ValueError: any other name.
    """
    if plain_name(bbox_format) == "xywh":
        return boxes
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def plain_name(bbox_format: str | enum.Enum) -> str:
    """ "xywh" or "xyxy", whichever of its names was given; arguments and errors as of `to_xywh`."""
    given = bbox_format.value if isinstance(bbox_format, enum.Enum) else bbox_format
    name = str(given).strip().lower().replace("-", "_").replace(" ", "_")
    if name in _CORNERS:
        return "xyxy" if _CORNERS[name] else "xywh"
    near = [] if name in _OTHERS else difflib.get_close_matches(name, _CORNERS, n=2)
    meant = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(
        f"bbox_format={given!r} is not read.{meant} Give 'xywh' (left, top, width, height; or 'coco') or 'xyxy' "
        "(left, top, right, bottom; or 'pascal_voc'), both in px. Convert other boxes first: centres by "
        "torchvision.ops.box_convert(boxes, 'cxcywh', 'xywh'), fractions (YOLO, Albumentations) by the image's size."
    )
