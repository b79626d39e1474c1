"""Examples of a detection data set to batches: decoded, augmented, resized, normalised and padded."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms.v2 import functional as F
from transformers import BaseImageProcessor

from ..models.pixels import PixelRange
from .albumentations_adapter import Albumentations
from .compact import CompactPixels, compact_pixels, stacked
from .images import open_image
from .schema import demand_classes, demand_example
from .transforms import (
    Record,
    clean_objects,
    demand_transform,
    finish_record,
    is_of_albumentations,
    select_objects,
    undone_resizes,
)

logger = logging.getLogger(__name__)
LEAST_SIDE = 1  # px of a box that is trained on


class DetectionCollator:
    """Examples of `DetectionData.dataset` to a batch: decode, augment, resize, normalise, pad.

    Args:
        image_processor: resizes, normalises and pads; it is given images only, so that labels are right with every
            processor: boxes are relative to the unpadded image.
        transform: on a `Record`, e.g. `TrainTransform()` or torchvision's v2 transforms; or an `A.Compose` of
            Albumentations with `bbox_params`. None for evaluation.
            `finish_record` tells what it may return. The processor resizes what leaves it, unless a `TrainTransform`
            with `shortest_edges` or a `KeepSize` in it says that the size is final.
        num_classes: K of the model that learns from the labels; None: they are not checked.
        compact: batches of uint8 pixels and a bool mask, a fifth of the bytes and less than half of the time. A
            `Normalizer` makes of them, on the device, what the processor would have made; a processor of which that
            isn't true goes on making floats.
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        transform: Callable[[Record], Record] | None = None,
        num_classes: int | None = None,
        compact: bool = False,
    ):
        if is_of_albumentations(transform):
            transform = Albumentations(transform)
        demand_transform(transform)
        undone = undone_resizes(transform)
        if undone and getattr(image_processor, "do_resize", True):
            logger.warning(
                "%s of the transform doesn't set the final size: the image processor resizes once more, to %s. Put "
                "KeepSize() last if the transform's size is meant.",
                ", ".join(undone),
                getattr(image_processor, "size", None),
            )
        self.image_processor = image_processor
        self.transform = transform
        self.num_classes = num_classes
        self.pixels = compact_pixels(image_processor) if compact else None

    def compacted(self) -> DetectionCollator:
        """The same collator with `compact`; both draw the same augmentation."""
        twin = copy.copy(self)
        twin.pixels = compact_pixels(self.image_processor)
        return twin

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return `pixel_values` (B, 3, H, W), `pixel_mask` (B, H, W) int64 or bool with 1 for image, and `labels`.

        `labels[i]`: `class_labels` (n,) int64, `boxes` (n, 4) cxcywh in [0, 1] of the unpadded image, `area` (n,) px of
        the resized image, `iscrowd` (n,) zeros, `image_id` (1,), `orig_size` (2,) height and width of the example.
        Boxes are clipped, and those left without area dropped; so is what `is_trained_on` leaves out.

        Raises:
            ValueError: an example is in another schema, or a label none of `num_classes`; the message names its image.
        """
        for example in examples:
            demand_example(example)
        records = [self._record(example) for example in examples]
        images = [record["image"].as_subclass(Tensor) for record in records]
        options = {"do_resize": False} if _are_resized(records) else {}
        batch = (
            self._normalised(images, options) if self.pixels is None else self._compact(self.pixels, images, options)
        )
        areas = batch.pop("areas")
        labels = [_labels(*row) for row in zip(records, examples, areas, strict=True)]
        if self.num_classes is not None:
            demand_classes(labels, self.num_classes)
        for label, canvas in zip(labels, batch.pop("canvases", ()), strict=False):
            label["canvas"] = torch.tensor(canvas)
        return {**batch, "labels": labels}

    def _normalised(self, images: list[Tensor], options: dict[str, bool]) -> dict[str, Any]:
        batch = self.image_processor(images=images, return_tensors="pt", **options)
        mask = batch.get("pixel_mask")
        if mask is None:  # processors that stretch every image to one size
            mask = torch.ones_like(batch["pixel_values"][:, 0], dtype=torch.int64)
        return {"pixel_values": batch["pixel_values"], "pixel_mask": mask, "areas": mask.sum((1, 2)).tolist()}

    def _compact(self, pixels: CompactPixels, images: list[Tensor], options: dict[str, bool]) -> dict[str, Any]:
        images = pixels.resized(images, **options)
        values, mask = stacked(images, pixels.canvas(images))
        return {"pixel_values": values, "pixel_mask": mask, "areas": [image[0].numel() for image in images]}

    def _record(self, example: Mapping[str, Any]) -> Record:
        record = make_record(example, getattr(self.image_processor, "pixel_range", None))
        record = clean_objects(select_objects(record, is_trained_on(example["objects"])))
        return record if self.transform is None else finish_record(self.transform(record))


class EvaluationCollator(DetectionCollator):
    """Batches of which every image can be taken out as if it came alone: what is found never depends on the others.

    Heads with GroupNorm see the padding that an image gets beside a larger one, so that batches of mixed sizes change
    detections. `labels[i]["canvas"]` (2,) tells height and width of an image that is padded for itself.
    """

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """As of `DetectionCollator`, with `canvas` in every label."""
        if self.pixels is not None:
            return super().__call__(examples)
        alone = [super(EvaluationCollator, self).__call__([example]) for example in examples]
        canvases = [batch["pixel_values"].shape[-2:] for batch in alone]
        whole = [max(edges) for edges in zip(*canvases, strict=True)]
        first = alone[0]
        values = first["pixel_values"].new_zeros(len(alone), *first["pixel_values"].shape[1:-2], *whole)
        mask = first["pixel_mask"].new_zeros(len(alone), *whole)
        for row, (batch, (height, width)) in enumerate(zip(alone, canvases, strict=True)):
            values[row, :, :height, :width] = batch["pixel_values"][0]
            mask[row, :height, :width] = batch["pixel_mask"][0]
            batch["labels"][0]["canvas"] = torch.tensor([height, width])
        return {"pixel_values": values, "pixel_mask": mask, "labels": [batch["labels"][0] for batch in alone]}

    def _compact(self, pixels: CompactPixels, images: list[Tensor], options: dict[str, bool]) -> dict[str, Any]:
        images = pixels.resized(images, **options)
        canvases = [pixels.canvas([image]) for image in images]
        height, width = (max(edges) for edges in zip(*canvases, strict=True))
        values, mask = stacked(images, (height, width))
        areas = [image[0].numel() for image in images]
        return {"pixel_values": values, "pixel_mask": mask, "areas": areas, "canvases": canvases}


def _are_resized(records: Sequence[Record]) -> bool:
    """Whether the images of a batch have their final size."""
    resized = {record.get("resized", False) for record in records}
    if len(resized) > 1:
        raise ValueError(
            "a transform set the final size of some images of a batch and not of others; let every image take the same "
            "way through TrainTransform(shortest_edges=...) or KeepSize()"
        )
    return resized == {True}


def is_trained_on(objects: Mapping[str, Any]) -> Tensor:
    """Objects that training learns from, (n,) bool: no crowd regions, none marked `ignore`, none without an area.

    MMDetection's rule, too, is that both sides of the box and its area have to be positive, the sides at least 1 px.
    """
    sides = np.array(objects["bbox"], dtype=np.float64).reshape(-1, 4)[:, 2:]
    crowd, ignore = (
        np.zeros(len(sides), dtype=bool) if objects.get(key) is None else np.array(objects[key], dtype=bool)
        for key in ("iscrowd", "ignore")
    )
    return torch.from_numpy(~crowd & ~ignore & (_areas(objects, sides) > 0) & (sides >= LEAST_SIDE).all(1))


def _areas(objects: Mapping[str, Any], sides: Any) -> Any:
    """(n,) px; width x height of an object without one."""
    areas = np.array(objects["area"], dtype=np.float64)
    return np.where(np.isnan(areas), sides.prod(1), areas)


def make_record(example: Mapping[str, Any], pixel_range: PixelRange = None) -> Record:
    """Decode an example into the record that transforms work on; all of its objects, boxes as they are."""
    image = F.pil_to_tensor(open_image(example["image"], (example["width"], example["height"]), pixel_range))
    objects = example["objects"]
    boxes = torch.from_numpy(np.array(objects["bbox"], dtype=np.float32).reshape(-1, 4))
    areas = _areas(objects, boxes[:, 2:].numpy())
    boxes[:, 2:] += boxes[:, :2]
    return Record(
        image=tv_tensors.Image(image),
        boxes=tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(image.shape[1], image.shape[2])),
        labels=torch.as_tensor(objects["category"], dtype=torch.int64),
        area=torch.as_tensor(areas, dtype=torch.float32),
        iscrowd=torch.as_tensor([bool(crowd) for crowd in objects["iscrowd"]], dtype=torch.int64),
        id=torch.as_tensor(objects["id"], dtype=torch.int64),
    )


def _labels(record: Record, example: Mapping[str, Any], pixels: int) -> dict[str, Tensor]:
    """A record's objects as labels; `pixels` has the image that the model sees."""
    height, width = record["image"].shape[-2:]
    boxes = box_convert(record["boxes"].as_subclass(Tensor), "xyxy", "cxcywh")
    return {
        "class_labels": record["labels"].long(),
        "boxes": boxes / torch.tensor([width, height, width, height], dtype=torch.float32),
        "area": record["area"] * (pixels / (height * width)),
        "iscrowd": record["iscrowd"],
        "image_id": torch.tensor([example["image_id"]], dtype=torch.int64),
        "orig_size": torch.tensor([example["height"], example["width"]], dtype=torch.int64),
    }
