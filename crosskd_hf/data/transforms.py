"""Training augmentation on records, in which box, label, area, iscrowd and id of an object travel together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..models.image_processing import resized_size

_FORMATS = (
    tv_tensors.BoundingBoxFormat.XYXY,
    tv_tensors.BoundingBoxFormat.XYWH,
    tv_tensors.BoundingBoxFormat.CXCYWH,
)
_OVERSHOOT = 0.1  # of float pixels beyond [0, 1]: bicubic resizing rings
_RESIZING = (v2.Resize, v2.RandomResize, v2.RandomShortestSize, v2.ScaleJitter, v2.RandomResizedCrop)


class _Fields(TypedDict):
    image: tv_tensors.Image
    boxes: tv_tensors.BoundingBoxes
    labels: Tensor
    area: Tensor
    iscrowd: Tensor
    id: Tensor


class Record(_Fields, total=False):
    """One image and its G objects, as torchvision's v2 transforms take them.

    image: (3, H, W) uint8; boxes: (G, 4) xyxy float32 px; labels: (G,) int64 in [0, K); area: (G,) float32 px, which
    transforms of torchvision leave as it was (no loss reads it); iscrowd, id: (G,) int64; resized: True if the image
    has its final size, which the image processor keeps.
    """

    resized: bool


def select_objects(record: Record, keep: Tensor) -> Record:
    """The record with those objects only for which `keep` (G,) is True; no field is left behind."""
    if bool(keep.all()):
        return record
    return Record(
        **{
            **record,
            "boxes": tv_tensors.wrap(record["boxes"].as_subclass(Tensor)[keep], like=record["boxes"]),
            "labels": record["labels"][keep],
            "area": record["area"][keep],
            "iscrowd": record["iscrowd"][keep],
            "id": record["id"][keep],
        }
    )


def finish_record(record: Record) -> Record:
    """What a transform returned, in the form of `Record`: pixels uint8, boxes xyxy and inside of the image.

    Read are the box formats XYXY, XYWH and CXCYWH; and one or three channels of uint8, uint16 or floats in [0, 1], as
    torchvision makes them. Transforms know boxes and labels, `v2.SanitizeBoundingBoxes()` among them: where they leave
    out objects, the other fields, which no loss reads, are made anew.

    Raises:
        ValueError: anything else, or boxes that belong to an image of another size.
    """
    _demand_record(record)
    image = _as_uint8(record["image"])
    record = clean_objects(_with_all_fields(Record(**{**record, "image": image})))
    height, width = record["boxes"].canvas_size
    if (height, width) != image.shape[-2:]:
        raise ValueError(
            f"a transform returned an image of {image.shape[-1]}x{image.shape[-2]}, but boxes for {width}x{height}; "
            "give the whole record to torchvision's v2 transforms, so that boxes follow the image"
        )
    return record


def _demand_record(record: Any) -> None:
    missing = [key for key in ("image", "boxes", "labels") if not isinstance(record, Mapping) or key not in record]
    if missing:
        what = f"a dict without {', '.join(missing)}" if isinstance(record, Mapping) else f"a {type(record).__name__}"
        raise ValueError(
            f"a transform returned {what}; it is given the record of an image, a dict with image, boxes and labels, "
            "and has to return it, changed"
        )


def _with_all_fields(record: Record) -> Record:
    """The record with area, iscrowd and id anew, if they are gone or have no longer a row for each box."""
    count = len(record["boxes"])
    others: tuple[Literal["area", "iscrowd", "id"], ...] = ("area", "iscrowd", "id")
    if len(record["labels"]) != count or all(key in record and len(record[key]) == count for key in others):
        return record
    sides = (corners := _as_corners(record["boxes"]).as_subclass(Tensor))[:, 2:] - corners[:, :2]
    zeros = torch.zeros(count, dtype=torch.int64)
    return Record(**{**record, "area": sides.prod(1), "iscrowd": zeros, "id": zeros - 1})


def _as_uint8(image: Any) -> tv_tensors.Image:
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] not in (1, 3):
        what = f"a tensor of shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"a transform returned the image as {what}; needed is a tensor (3, H, W), as of v2.ToImage()")
    if image.is_floating_point():
        low, high = (float(end) for end in image.aminmax())
        if not (low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT):
            raise ValueError(
                f"a transform returned float pixels from {low:.3g} to {high:.3g}; floats have to lie in [0, 1], as of "
                "v2.ToDtype(torch.float32, scale=True), and the image processor normalises: leave v2.Normalize out"
            )
        image = (image.float().clamp(0, 1) * 255).round().to(torch.uint8)  # half precision is off by less than a half
    elif image.dtype == torch.uint16:
        image = F.to_dtype(image, torch.uint8, scale=True)
    elif image.dtype != torch.uint8:
        raise ValueError(f"a transform returned {image.dtype} pixels; keep uint8, or floats in [0, 1]")
    return tv_tensors.Image(image.expand(3, -1, -1))


def _as_corners(boxes: Any) -> tv_tensors.BoundingBoxes:
    if not isinstance(boxes, tv_tensors.BoundingBoxes):
        raise ValueError(
            f"a transform returned boxes as {type(boxes).__name__}, which doesn't tell their format; "
            "wrap them: tv_tensors.wrap(boxes, like=record['boxes'])"
        )
    if boxes.format not in _FORMATS:
        raise ValueError(f"a transform returned rotated boxes ({boxes.format.value}); needed are XYXY, XYWH or CXCYWH")
    plain = boxes.as_subclass(Tensor)
    if not bool(plain.isfinite().all()):
        raise ValueError(f"a transform returned boxes that are not finite: {boxes.tolist()[:3]}")
    boxes = boxes if plain.dtype == torch.float32 else tv_tensors.wrap(plain.float(), like=boxes)
    if boxes.format is tv_tensors.BoundingBoxFormat.XYXY:
        return boxes
    return F.convert_bounding_box_format(boxes, new_format=tv_tensors.BoundingBoxFormat.XYXY)


def clean_objects(record: Record) -> Record:
    """Boxes as xyxy, clipped to the image; objects that have no area left are dropped with all their fields.

    Raises:
        ValueError: fields of different length: a transform left out boxes and not their labels; or boxes of which the
            format isn't known.
    """
    lengths = {key: len(record[key]) for key in ("boxes", "labels", "area", "iscrowd", "id")}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"a transform left an object's fields at different lengths: {lengths}; boxes and labels of an object have "
            "to go together, as v2.SanitizeBoundingBoxes leaves them out"
        )
    boxes = F.clamp_bounding_boxes(_as_corners(record["boxes"]))
    plain = boxes.as_subclass(Tensor)  # operators of a subclass take several times as long
    keep = (plain[:, 2:] > plain[:, :2]).all(dim=1)
    record = Record(**{**record, "boxes": boxes})
    return select_objects(record, keep)


def resize(record: Record, shortest: int, longest: int | None, antialias: bool) -> Record:
    """The record at another size, its shape kept (`resized_size`); areas follow."""
    height, width = record["image"].shape[-2:]
    size = resized_size(height, width, shortest, longest)
    image, boxes = (F.resize(record[key], list(size), antialias=antialias) for key in ("image", "boxes"))
    area = record["area"] * (size[0] * size[1] / (height * width))
    return clean_objects(Record(**{**record, "image": image, "boxes": boxes, "area": area}))


def crop(record: Record, top: int, left: int, height: int, width: int) -> Record:
    """A part of the record; boxes are clipped to it, and objects outside of it are gone."""
    image, boxes = (F.crop(record[key], top, left, height, width) for key in ("image", "boxes"))
    return clean_objects(Record(**{**record, "image": image, "boxes": boxes}))


@dataclass(frozen=True)
class RandomCrop:
    """A part of an image at another size, by which DETRs see objects larger than they are (DETR, ECCV 2020, section 4).

    Args:
        shortest_edges: one of these is drawn as the shorter side of the image before the crop, in px.
        longest_edge: limit of its longer side in px.
        size: (smallest, largest) side of the crop in px, drawn for height and width by themselves.
    """

    shortest_edges: tuple[int, ...] = (400, 500, 600)
    longest_edge: int = 4200
    size: tuple[int, int] = (384, 600)

    def __call__(self, record: Record, antialias: bool) -> Record:
        """Resize, then crop."""
        record = resize(record, _drawn(self.shortest_edges), self.longest_edge, antialias)
        edges = [_between(*self.range(edge)) for edge in record["image"].shape[-2:]]
        corner = [_between(0, whole - part) for whole, part in zip(record["image"].shape[-2:], edges, strict=True)]
        return crop(record, *corner, *edges)

    def range(self, edge: int) -> tuple[int, int]:
        """Smallest and largest side of a crop from an image whose side is `edge`."""
        return min(edge, self.size[0]), min(edge, self.size[1])


def _drawn(choices: Sequence[int]) -> int:
    return choices[int(torch.randint(len(choices), ()))]


def _between(low: int, high: int) -> int:
    return low + int(torch.randint(high - low + 1, ()))


class TrainTransform:
    """Random horizontal flip and multi-scale resize of a `Record`, and for DETRs a crop.

    Randomness comes from torch's global generator, so that the trainer's seed and resume govern it.

    Args:
        flip: probability of the flip, in [0, 1].
        shortest_edges: one of these is drawn for every image as its shorter side in px; empty: no resize here, the
            image processor's own size stays in force. Otherwise that resize is switched off, also if this transform
            is a part of another one, such as `v2.Compose`.
        longest_edge: limit of the longer side in px, which wins over the shorter side; None: no limit.
        antialias: whether images that shrink are smoothed first, as the image processor's `antialias`.
        random_crop: what half of the images go through before they are resized; needs `shortest_edges`.
    """

    def __init__(
        self,
        flip: float = 0.5,
        shortest_edges: Sequence[int] = (),
        longest_edge: int | None = None,
        antialias: bool = True,
        random_crop: RandomCrop | None = None,
    ):
        if not 0 <= flip <= 1:
            raise ValueError(f"flip is a probability in [0, 1], got {flip}")
        if any(edge < 1 for edge in shortest_edges):
            raise ValueError(f"shortest_edges are lengths in px >= 1, got {tuple(shortest_edges)}")
        if longest_edge is not None and longest_edge < max(shortest_edges, default=1):
            raise ValueError(f"longest_edge={longest_edge} is below shortest_edges {tuple(shortest_edges)}; raise it")
        self.flip = flip
        self.shortest_edges = tuple(shortest_edges)
        self.longest_edge = longest_edge
        self.antialias = antialias
        if random_crop is not None and not shortest_edges:
            raise ValueError("random_crop needs shortest_edges: what is cropped has to be brought to its final size")
        self.random_crop = random_crop

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
        if not self.resizes:
            return record
        if self.random_crop is not None and torch.rand(()) < 0.5:
            record = self.random_crop(record, self.antialias)
        record = resize(record, _drawn(self.shortest_edges), self.longest_edge, self.antialias)
        return Record(**{**record, "resized": True})


class KeepSize:
    """The last of several transforms, if images leave them at their final size: the image processor keeps it.

    Without, the processor resizes what `v2.RandomShortestSize` or the like made:
    `v2.Compose([v2.RandomShortestSize([480, 640]), KeepSize()])`.
    """

    def __call__(self, record: Record) -> Record:
        """Return the record, marked as resized."""
        return Record(**{**record, "resized": True})


def demand_transform(transform: Any) -> None:
    """Find a transform that can't be called with a record, before any image is read.

    Raises:
        ValueError: it is of torchvision before v2, which knows no boxes.
    """
    for part in _parts(transform):
        if type(part).__module__ == "torchvision.transforms.transforms":
            raise ValueError(
                f"{type(part).__name__} of torchvision.transforms changes an image and leaves its boxes: take that of "
                "torchvision.transforms.v2, without ToTensor and Normalize, which are the image processor's"
            )


def is_of_albumentations(transform: Any) -> bool:
    """Whether a transform is called with keywords."""
    return type(transform).__module__.startswith("albumentations.")


def is_multi_scale(transform: Any) -> bool:
    """Whether a `TrainTransform` with `shortest_edges` is `transform` or a part of it."""
    return any(isinstance(part, TrainTransform) and part.resizes for part in _parts(transform))


def undone_resizes(transform: Callable[[Record], Record] | None) -> list[str]:
    """Names of torchvision's resizing transforms in `transform`, if nothing in it tells that their size is final."""
    parts = list(_parts(transform))
    if is_multi_scale(transform) or any(isinstance(part, KeepSize) for part in parts):
        return []
    return [type(part).__name__ for part in parts if isinstance(part, _RESIZING) or _is_resize_of_albumentations(part)]


def _is_resize_of_albumentations(part: Any) -> bool:
    return is_of_albumentations(part) and type(part).__name__ in ("Resize", "LongestMaxSize", "SmallestMaxSize")


def _parts(transform: Any) -> list[Any]:
    """A transform and those that it is composed of."""
    return [transform, *(part for inner in getattr(transform, "transforms", ()) for part in _parts(inner))]
