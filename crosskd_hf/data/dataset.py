"""Detection data sets: COCO-format folders and Hub data sets to one schema, and its examples to batches."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms.v2 import functional as F
from transformers import BaseImageProcessor

from ..models.pixels import PixelRange
from .categories import CategoryMap
from .check_images import check_files
from .class_names import are_placeholders, match_names
from .coco_json import CocoTable, Floats, Ints, box_array, float_array
from .framed_image import FramedImage
from .images import open_image
from .inspection import Inspection, inspect_coco, inspect_table
from .report import DataError, DataReport, Finding, Place, found
from .schema import class_label, features_of
from .transforms import Record, clean_objects, finish_record, select_objects, undone_resizes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DetectionData:
    """A data set in the schema of this package, its classes, and what was found while it was read.

    An example of `dataset` is `{"image": PIL image, "image_id": int, "width": int, "height": int, "objects": {"id":
    [int], "bbox": [[x, y, w, h] px], "category": [contiguous int], "area": [px], "iscrowd": [0 or 1]}}`. Images are
    decoded when an example is asked for, to upright RGB; those of more than 8 bits keep their values, which the image
    processor scales. Boxes are those of the file: those partly outside of their image are clipped in training labels
    only; degenerate ones are gone, and listed in `report.dropped`. The names of the classes travel with `dataset`: its
    `category` is a `ClassLabel`.
    """

    dataset: datasets.Dataset
    categories: CategoryMap
    report: DataReport

    def with_classes(self, categories: CategoryMap) -> DetectionData:
        """The same images and objects, labelled by the classes of another map, which are found by name.

        Args:
            categories: Such as `match_categories(model.config, data.categories)`: the data in a model's order.

        Raises:
            ValueError: The data has objects of a class that `categories` doesn't hold.
        """
        if categories.names == self.categories.names:
            return replace(self, categories=categories)
        objects = self.dataset.with_format("arrow").select_columns("objects")[:]["objects"].combine_chunks()
        fields = dict(zip((field.name for field in objects.type), objects.flatten(), strict=True))
        labels = fields["category"].values.to_numpy()
        index_of = np.array(match_names(self.categories.names, categories.names).indices)
        missing = sorted({self.categories.names[label] for label in labels[index_of[labels] < 0]})
        if missing:
            raise ValueError(f"The data has objects of classes that the other map doesn't hold: {missing[:5]}.")
        fields["category"] = pa.ListArray.from_arrays(fields["category"].offsets, pa.array(index_of[labels]))
        column = {"objects": pa.StructArray.from_arrays(list(fields.values()), list(fields))}
        features = datasets.Features({"objects": features_of(categories)["objects"]})
        relabelled = datasets.Dataset.from_dict(column, features=features)
        others = self.dataset.remove_columns("objects")
        return replace(self, dataset=datasets.concatenate_datasets([others, relabelled], axis=1), categories=categories)


def load_coco(
    annotations: str | os.PathLike[str],
    images: str | os.PathLike[str],
    categories: CategoryMap | None = None,
    decode: bool = True,
) -> DetectionData:
    """Read a COCO-format json and its image folder; images without objects are kept.

    Args:
        annotations: path of the json.
        images: folder that the json's file names are relative to.
        categories: the map of the training split, to read another split with; None: made from this json, which then
            has to have objects.
        decode: every image is decoded now, so that none is found broken in the middle of training (a JPEG of COCO's
            size takes 1.4 ms of a core); False, for data known to be good: only headers, ends of JPEGs and checksums
            of PNGs are looked at (`probe_image`, 0.1 ms).

    Raises:
        DataError: everything that would make training stop or go wrong, all of it at once (see `check_data`).
    """
    inspection = inspect_coco(annotations, images, categories, decode)
    inspection.demand_ok()
    folder = Path(images).absolute()
    paths = [str(folder / name) for name in inspection.table.file_names]
    column = FramedImage.column(paths, *inspection.sizes.T)
    images_only = datasets.Dataset.from_dict({"image": column}, features=datasets.Features({"image": FramedImage()}))
    return _detection_data(images_only, inspection)


def load_objects(
    dataset: datasets.Dataset,
    categories: CategoryMap | None = None,
    bbox_format: Literal["xywh", "xyxy"] = "xywh",
) -> DetectionData:
    """Bring a data set with an `image` and an `objects` column (as detection sets of the Hub have) to our schema.

    `objects` holds `bbox` and `category` (ClassLabel, int or str), maybe `area`, `iscrowd` and `id`, as a dict of lists
    or as a list of dicts. Without integer `image_id`s row numbers are taken, missing `width` and `height` are read from
    the images, and where `id`s are missing or occur twice, objects are numbered from 1.

    Args:
        dataset: a map-style data set, e.g. `load_dataset("cppe-5", split="train")`.
        categories: the classes; None: those of the ClassLabel, or all values that occur.
        bbox_format: what the four numbers of a box are, in px.

    Raises:
        ValueError: no such columns. DataError: as `load_coco`.
    """
    if not {"image", "objects"} <= set(dataset.column_names or ()):
        raise ValueError(f"the data set needs columns image and objects, it has {dataset.column_names}; rename them")
    dataset = dataset.with_format(None)
    table = _table_of_objects(dataset, categories, bbox_format)
    stored = dataset.select_columns("image").cast_column("image", datasets.Image(decode=False))
    sources = ({"path": None, "bytes": b""} if image is None else image for image in stored["image"])
    sizes, findings = check_files(table.file_names, table.sizes, sources, decode=True)
    inspection = inspect_table(table, sizes, categories, [_refused_frame(finding) for finding in findings])
    inspection.demand_ok()
    return _detection_data(stored.cast_column("image", datasets.Image()), inspection)


class DetectionCollator:
    """Examples of `DetectionData.dataset` to a batch: decode, augment, resize, normalise, pad.

    Args:
        image_processor: resizes, normalises and pads; it is given images only, so that labels are right with every
            processor: boxes are relative to the unpadded image.
        transform: on a `Record`, e.g. `TrainTransform()` or torchvision's v2 transforms. None for evaluation.
            `finish_record` tells what it may return. The processor resizes what leaves it, unless a `TrainTransform`
            with `shortest_edges` or a `KeepSize` in it says that the size is final.
    """

    def __init__(self, image_processor: BaseImageProcessor, transform: Callable[[Record], Record] | None = None):
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

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return `pixel_values` (B, 3, H, W), `pixel_mask` (B, H, W) int64 with 1 for image, and `labels`.

        `labels[i]`: `class_labels` (n,) int64, `boxes` (n, 4) cxcywh in [0, 1] of the unpadded image, `area` (n,) px of
        the resized image, `iscrowd` (n,) zeros, `image_id` (1,), `orig_size` (2,) height and width of the example.
        Crowd regions are left out, boxes are clipped, and those left without area dropped.
        """
        records = [self._record(example) for example in examples]
        sizes = [record["image"].shape[-2:] for record in records]
        options = {"do_resize": False} if _are_resized(records) else {}
        images = [record["image"].as_subclass(Tensor) for record in records]
        batch = self.image_processor(images=images, return_tensors="pt", **options)
        mask = batch.get("pixel_mask")
        if mask is None:  # processors that stretch every image to one size
            mask = torch.ones_like(batch["pixel_values"][:, 0], dtype=torch.int64)
        labels = [
            _labels(record, example, int(valid.sum()) / (height * width))
            for record, example, valid, (height, width) in zip(records, examples, mask, sizes, strict=True)
        ]
        return {"pixel_values": batch["pixel_values"], "pixel_mask": mask, "labels": labels}

    def _record(self, example: Mapping[str, Any]) -> Record:
        record = clean_objects(make_record(example, getattr(self.image_processor, "pixel_range", None)))
        record = select_objects(record, record["iscrowd"] == 0)
        return record if self.transform is None else finish_record(self.transform(record))


def _are_resized(records: Sequence[Record]) -> bool:
    """Whether the images of a batch have their final size."""
    resized = {record.get("resized", False) for record in records}
    if len(resized) > 1:
        raise ValueError(
            "a transform set the final size of some images of a batch and not of others; let every image take the same "
            "way through TrainTransform(shortest_edges=...) or KeepSize()"
        )
    return resized == {True}


def make_record(example: Mapping[str, Any], pixel_range: PixelRange = None) -> Record:
    """Decode an example into the record that transforms work on; all of its objects, boxes as they are."""
    image = F.pil_to_tensor(open_image(example["image"], (example["width"], example["height"]), pixel_range))
    objects = example["objects"]
    boxes = torch.as_tensor(objects["bbox"], dtype=torch.float32).reshape(-1, 4)
    return Record(
        image=tv_tensors.Image(image),
        boxes=tv_tensors.BoundingBoxes(
            box_convert(boxes, "xywh", "xyxy"), format="XYXY", canvas_size=(image.shape[1], image.shape[2])
        ),
        labels=torch.as_tensor(objects["category"], dtype=torch.int64),
        area=torch.as_tensor(objects["area"], dtype=torch.float32),
        iscrowd=torch.as_tensor(objects["iscrowd"], dtype=torch.int64),
        id=torch.as_tensor(objects["id"], dtype=torch.int64),
    )


def _labels(record: Record, example: Mapping[str, Any], scale: float) -> dict[str, Tensor]:
    """A record's objects as labels; `scale` is the processor's change of area."""
    height, width = record["image"].shape[-2:]
    boxes = box_convert(record["boxes"].as_subclass(Tensor), "xyxy", "cxcywh")
    return {
        "class_labels": record["labels"],
        "boxes": boxes / torch.tensor([width, height, width, height], dtype=torch.float32),
        "area": record["area"] * scale,
        "iscrowd": record["iscrowd"],
        "image_id": torch.tensor([example["image_id"]], dtype=torch.int64),
        "orig_size": torch.tensor([example["height"], example["width"]], dtype=torch.int64),
    }


def _detection_data(images: datasets.Dataset, inspection: Inspection) -> DetectionData:
    """Put the image column and the inspected columns together, with a row per image."""
    table, rows = inspection.table, np.flatnonzero(inspection.keep)
    rows = rows[np.argsort(inspection.image_rows[rows], kind="stable")]
    counts = np.bincount(inspection.image_rows[rows], minlength=len(table.image_ids))
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    boxes = table.boxes[rows]
    fields: dict[str, pa.Array] = {
        "id": pa.array(table.annotation_ids[rows]),
        "bbox": pa.FixedSizeListArray.from_arrays(pa.array(boxes.reshape(-1)), 4),
        "category": pa.array(inspection.labels[rows]),
        "area": pa.array(inspection.areas[rows]),
        "iscrowd": pa.array(table.crowds[rows].astype(np.int64)),
    }
    lists = [pa.ListArray.from_arrays(offsets, values) for values in fields.values()]
    columns = {
        "image_id": pa.array(table.image_ids),
        "width": pa.array(inspection.sizes[:, 0]),
        "height": pa.array(inspection.sizes[:, 1]),
        "objects": pa.StructArray.from_arrays(lists, list(fields)),
    }
    annotations = datasets.Dataset.from_dict(columns, features=features_of(inspection.categories))
    dataset = datasets.concatenate_datasets([images, annotations], axis=1)
    return DetectionData(dataset, inspection.categories, inspection.report())


def _table_of_objects(
    dataset: datasets.Dataset, categories: CategoryMap | None, bbox_format: Literal["xywh", "xyxy"]
) -> CocoTable:
    """The columns of a data set with `objects` in the form of a COCO json's."""
    columns = set(dataset.column_names)
    label = _class_label(dataset.features["objects"])
    rows = [_by_field(objects) for objects in dataset.select_columns("objects")["objects"]]
    _demand_one_length(rows)
    counts = [len(row["bbox"]) for row in rows]
    values = [value for row in rows for value in row["category"]]
    listed = _listed(None if label is None else label.names, values, categories)
    raw = [value if isinstance(value, int) else listed.get(value, -1) for value in values]
    image_ids = _column(dataset, "image_id") if "image_id" in columns else np.empty(0, dtype=object)
    if image_ids.dtype != np.int64:
        image_ids = np.arange(len(dataset))
    sizes = [
        np.nan_to_num(float_array(_column(dataset, key).tolist())) if key in columns else np.zeros(len(dataset))
        for key in ("width", "height")
    ]
    boxes = box_array([box for row in rows for box in row["bbox"]])
    if bbox_format == "xyxy":
        boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    return CocoTable(
        image_ids=image_ids.astype(np.int64),
        file_names=[f"row {row}" for row in range(len(dataset))],
        sizes=np.stack(sizes, axis=1).astype(np.int64),
        annotation_ids=_ids([value for row in rows for value in row.get("id") or ()], sum(counts)),
        annotation_images=np.repeat(image_ids, counts).astype(np.int64),
        annotation_categories=np.array(raw, dtype=np.int64),
        boxes=boxes,
        areas=_joined(rows, "area", sum(counts)),
        crowds=np.nan_to_num(_joined(rows, "iscrowd", sum(counts))) != 0,
        categories=[{"id": raw, "name": name} for name, raw in listed.items()],
    )


def _refused_frame(finding: Finding) -> Finding:
    """`datasets.Image` always applies EXIF orientation: images whose annotations ignore it can't be read with it."""
    if finding.kind != "exif-ignored":
        return finding
    message = "width and height are those of the image without its EXIF rotation, which datasets.Image applies"
    return replace(finding, severity="error", message=message, fix="remove EXIF orientation, or swap width and height")


def _listed(names: Sequence[str] | None, values: Sequence[Any], categories: CategoryMap | None) -> dict[str, int]:
    """The classes of a data set, name to raw id: its ClassLabel's, or the values that occur.

    Numbers without names are raw ids of the given classes.
    """
    if names is not None and (categories is None or not are_placeholders(names)):
        return {name: index for index, name in enumerate(names)}
    found = {*values} - {None}
    if categories is not None and all(isinstance(value, int) for value in found):
        return dict(zip(categories.names, categories.raw_ids, strict=True))
    return {str(value): value if isinstance(value, int) else i for i, value in enumerate(sorted(found))}


def _by_field(objects: Any) -> dict[str, list[Any]]:
    """Objects as a dict of lists, whichever way they are stored; of an image without objects the lists are empty."""
    if isinstance(objects, dict):
        return {key: values or [] for key, values in objects.items()}
    keys = objects[0] if objects else ("bbox", "category")
    return {key: [entry[key] for entry in objects or ()] for key in keys}


def _demand_one_length(rows: Sequence[Mapping[str, list[Any]]]) -> None:
    """Raise a DataError if an image has more boxes than categories or the like, which would shift all later objects."""
    places = []
    for number, row in enumerate(rows):
        needed = {key: len(row[key]) for key in ("bbox", "category")}
        optional = {key: len(row[key]) for key in ("area", "iscrowd", "id") if row.get(key)}
        if len({*needed.values(), *optional.values()}) > 1:
            places.append(Place(f"row {number}", detail=str(needed | optional)))
    if places:
        message, fix = "an image's objects have lists of different lengths", "give every object one entry in each list"
        raise DataError(found("error", "objects-length", message, fix, places))


def _class_label(objects: Any) -> datasets.ClassLabel | None:
    """The feature that names the classes, if there is one."""
    inner = objects.feature if isinstance(objects, datasets.List | datasets.LargeList) else objects
    if "bbox" not in inner or "category" not in inner:
        raise ValueError(f"'objects' needs 'bbox' and 'category', it has {sorted(inner)}; rename its fields")
    return class_label(objects)


def _column(dataset: datasets.Dataset, name: str) -> Ints:
    return np.asarray(dataset.select_columns(name)[name][:])


def _ids(values: Sequence[Any], count: int) -> Ints:
    """The objects' ids; 1, 2, 3, ... if they are not `count` different integers."""
    unique = len(values) == count == len(set(values)) and all(isinstance(value, int) for value in values)
    return np.array(values, dtype=np.int64) if unique else np.arange(1, count + 1)


def _joined(rows: Sequence[Mapping[str, list[Any]]], key: str, count: int) -> Floats:
    """The numbers of all `count` objects; NaN where the data set has no such field."""
    values = [value for row in rows for value in row.get(key) or ()]
    return float_array(values) if len(values) == count else np.full(count, np.nan)
