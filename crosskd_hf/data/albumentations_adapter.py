"""Transforms of Albumentations on records: they are called with keywords, and write boxes in ways of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_convert

from .transforms import Record

# their name of a way to write boxes -> torchvision's, and whether boxes are fractions of the image
_FORMATS = {
    "coco": ("xywh", False),
    "pascal_voc": ("xyxy", False),
    "yolo": ("cxcywh", True),
    "albumentations": ("xyxy", True),
}


class Albumentations:
    """A `Compose` of Albumentations as a transform of a `Record`.

    Its randomness comes from torch's global generator, as that of all transforms: it is seeded anew for every image.

    Args:
        compose: `A.Compose([...], bbox_params=A.BboxParams(format=..., label_fields=[...]))`; each of the fields is
            given the classes. Leave `A.Normalize` out: the image processor normalises.

    Raises:
        ValueError: it has no `bbox_params`, so that boxes would stay where they are, or boxes of an unknown format.
    """

    def __init__(self, compose: Any) -> None:
        boxes = getattr(compose, "processors", {}).get("bboxes")
        if boxes is None:
            raise ValueError(
                f"{type(compose).__name__} of albumentations has no bbox_params, and would change images without their "
                "boxes: give A.Compose([...], bbox_params=A.BboxParams(format='pascal_voc', label_fields=['labels']))"
            )
        if boxes.params.format not in _FORMATS:
            raise ValueError(f"bbox_params of albumentations has format={boxes.params.format!r}; give 'pascal_voc'")
        self.transforms = (compose,)
        self.compose = compose
        self.format, self.fractions = _FORMATS[boxes.params.format]
        self.fields = tuple(boxes.params.label_fields or ())

    def __call__(self, record: Record) -> Record:
        """The changed record; objects whose boxes are left out are gone with all their fields."""
        if hasattr(self.compose, "set_random_seed"):
            self.compose.set_random_seed(int(torch.randint(2**31, ())))
        height, width = record["image"].shape[-2:]
        boxes = box_convert(record["boxes"].as_subclass(Tensor), "xyxy", self.format)
        boxes = boxes / self._unit(height, width)
        rows = torch.arange(len(boxes))[:, None]  # behind the box, where they are kept
        made = self.compose(
            image=record["image"].as_subclass(Tensor).permute(1, 2, 0).numpy(),
            bboxes=torch.cat([boxes, rows], 1).numpy(),
            **{field: record["labels"].numpy() for field in self.fields},
        )
        image = _channels_first(made["image"])
        numbers = np.array([box[:5] for box in made["bboxes"]], dtype=np.float32).reshape(-1, 5)
        size = (int(image.shape[-2]), int(image.shape[-1]))
        found = box_convert(torch.from_numpy(numbers[:, :4].copy()) * self._unit(*size), self.format, "xyxy")
        kept = torch.from_numpy(numbers[:, 4].copy()).long()
        wrapped = tv_tensors.BoundingBoxes(found, format="XYXY", canvas_size=size)  # type: ignore[call-overload]
        return Record(
            image=tv_tensors.Image(image),
            boxes=wrapped,
            labels=record["labels"][kept],
            area=record["area"][kept],
            iscrowd=record["iscrowd"][kept],
            id=record["id"][kept],
        )

    def _unit(self, height: int, width: int) -> Tensor:
        """(4,) px of 1 in the boxes."""
        return torch.tensor([width, height] * 2, dtype=torch.float32) if self.fractions else torch.ones(4)


def _channels_first(image: Any) -> Tensor:
    """(C, H, W) of an array (H, W, C) or (H, W), or of what their ToTensorV2 made."""
    if isinstance(image, Tensor):
        return image
    pixels = torch.from_numpy(np.ascontiguousarray(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
