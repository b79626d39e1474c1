"""The augmentation of training images: a flip by default, and more of torchvision on request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torchvision.transforms import v2

from ..create import ImageSize
from ..data.transforms import Record, TrainTransform

AUGMENTATIONS = ("colour", "scale", "crop")


def training_transform(
    shortest_edges: Sequence[int] = (), image_size: ImageSize | None = None, augment: Sequence[str] = ()
) -> Callable[[Record], Record]:
    """A flip of every second image, and what `augment` names.

    Args:
        shortest_edges: Shorter sides in px to draw from; none: the image processor's size.
        image_size: Of new detectors, for its limit of the longer side, in px; None: 1333.
        augment: "colour" changes brightness, contrast, saturation and hue of every second image; "scale" puts every
            second image onto a grey canvas of up to twice its size; "crop" cuts out a part that keeps objects (SSD).

    Raises:
        ValueError: Another word.
    """
    unknown = [word for word in augment if word not in AUGMENTATIONS]
    if unknown:
        raise ValueError(f"augment: {', '.join(unknown)} is unknown, choose of {', '.join(AUGMENTATIONS)}.")
    limit = max([1333, *shortest_edges]) if image_size is None else image_size.longest_edge
    last = TrainTransform(shortest_edges=shortest_edges, longest_edge=limit)
    parts: list[Any] = []
    if "colour" in augment:
        parts.append(v2.RandomPhotometricDistort(p=0.5))
    if "scale" in augment:
        parts.append(v2.RandomZoomOut(fill=114, side_range=(1.0, 2.0), p=0.5))
    if "crop" in augment:
        parts += [v2.RandomIoUCrop(min_scale=0.5), v2.SanitizeBoundingBoxes(labels_getter=_fields)]
    return v2.Compose([*parts, last]) if parts else last


def _fields(record: Record) -> tuple[Any, ...]:
    """All fields of the objects, so that none stays behind when an object is cut off."""
    return record["labels"], record["area"], record["iscrowd"], record["id"]
