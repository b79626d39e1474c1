"""Training augmentation on records, in which box, label, area, iscrowd and id of an object travel together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F


class Record(TypedDict):
    """One image and its G objects, as torchvision's v2 transforms take them.

    image: (3, H, W) uint8; boxes: (G, 4) xyxy float32 px; labels: (G,) int64 in [0, K); area: (G,) float32 px;
    iscrowd, id: (G,) int64.
    """

    image: tv_tensors.Image
    boxes: tv_tensors.BoundingBoxes
    labels: Tensor
    area: Tensor
    iscrowd: Tensor
    id: Tensor


def select_objects(record: Record, keep: Tensor) -> Record:
    """The record with those objects only for which `keep` (G,) is True; no field is left behind."""
    return Record(
        image=record["image"],
        boxes=tv_tensors.wrap(record["boxes"][keep], like=record["boxes"]),
        labels=record["labels"][keep],
        area=record["area"][keep],
        iscrowd=record["iscrowd"][keep],
        id=record["id"][keep],
    )


def clean_objects(record: Record) -> Record:
    """Clip the boxes to the image and drop objects that have no area left, with all their fields.

    Raises:
        ValueError: fields of different length: a transform dropped boxes and left other fields behind.
    """
    lengths = {key: len(record[key]) for key in ("boxes", "labels", "area", "iscrowd", "id")}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"a transform left an object's fields at different lengths: {lengths}; with "
            "v2.SanitizeBoundingBoxes give labels_getter=lambda r: (r['labels'], r['area'], r['iscrowd'], r['id'])"
        )
    boxes = F.clamp_bounding_boxes(record["boxes"])
    keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    record = Record(**{**record, "boxes": boxes})
    return record if bool(keep.all()) else select_objects(record, keep)


class TrainTransform:
    """Random horizontal flip and multi-scale resize of a `Record`.

    Randomness comes from torch's global generator, so that the trainer's seed and resume govern it.

    Args:
        flip: probability of the flip, in [0, 1].
        shortest_edges: one of these is drawn for every image as its shorter side in px; empty: no resize here, the
            image processor's own size stays in force. Otherwise the collator switches the processor's resize off.
        longest_edge: limit of the longer side in px, which wins over the shorter side; None: no limit.
    """

    def __init__(self, flip: float = 0.5, shortest_edges: Sequence[int] = (), longest_edge: int | None = None):
        if not 0 <= flip <= 1:
            raise ValueError(f"flip is a probability in [0, 1], got {flip}")
        if any(edge < 1 for edge in shortest_edges):
            raise ValueError(f"shortest_edges are lengths in px >= 1, got {tuple(shortest_edges)}")
        if longest_edge is not None and longest_edge < max(shortest_edges, default=1):
            raise ValueError(f"longest_edge={longest_edge} is below shortest_edges {tuple(shortest_edges)}; raise it")
        self.flip = flip
        self.shortest_edges = tuple(shortest_edges)
        self.longest_edge = longest_edge

    @property
    def resizes(self) -> bool:
        """True if images leave at their final size."""
        return bool(self.shortest_edges)

    def __call__(self, record: Record) -> Record:
        """Return the changed record: areas follow the scale, boxes are clipped, empty ones dropped."""
        record = clean_objects(record)
        if torch.rand(()) < self.flip:
            flipped = (F.horizontal_flip(record["image"]), F.horizontal_flip(record["boxes"]))
            record = Record(**{**record, "image": flipped[0], "boxes": flipped[1]})
        return self._resize(record) if self.resizes else record

    def _resize(self, record: Record) -> Record:
        shortest = self.shortest_edges[int(torch.randint(len(self.shortest_edges), ()))]
        height, width = record["image"].shape[-2:]
        size = self.target_size(height, width, shortest)
        scale = size[0] * size[1] / (height * width)
        image, boxes = (F.resize(record[key], list(size), antialias=True) for key in ("image", "boxes"))
        return clean_objects(Record(**{**record, "image": image, "boxes": boxes, "area": record["area"] * scale}))

    def target_size(self, height: int, width: int, shortest: int) -> tuple[int, int]:
        """(height, width) after the resize of an image to `shortest`, its shape kept."""
        scale = shortest / min(height, width)
        if self.longest_edge is not None:
            scale = min(scale, self.longest_edge / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))
