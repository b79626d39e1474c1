"""The columns of a detection data set, and the names of its classes, which travel with them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import torch

from .categories import CategoryMap
from .report import Place


def features_of(categories: CategoryMap, ignore: bool = False) -> datasets.Features:
    """What examples hold beside their image; the classes are named. With `ignore`, marks of what isn't trained on."""
    integer, real = datasets.Value("int64"), datasets.Value("float64")
    objects = {
        "id": datasets.List(integer),
        "bbox": datasets.List(datasets.List(real, length=4)),
        "category": datasets.List(datasets.ClassLabel(names=list(categories.names))),
        "area": datasets.List(real),
        "iscrowd": datasets.List(integer),
    } | ({"ignore": datasets.List(integer)} if ignore else {})
    return datasets.Features({"image_id": integer, "width": integer, "height": integer, "objects": objects})


COLUMNS = ("image", "image_id", "width", "height", "objects")
FIELDS = ("id", "bbox", "category", "area", "iscrowd")


def demand_example(example: Any) -> None:
    """Check one row of a data set of the user's own, which a collator is to read.

    Raises:
        ValueError: It isn't in the schema of `load_coco`, or its image is none that is decoded here.
    """
    if not isinstance(example, Mapping):
        fault = f"is a {type(example).__name__}"
    elif missing := [*_lacking(example, COLUMNS), *_lacking(example.get("objects", {}), FIELDS, "objects.")]:
        fault = f"lacks {', '.join(missing)}"
    elif not isinstance(example["image"], PIL.Image.Image | str | os.PathLike | Mapping):
        fault = f"has a {type(example['image']).__name__} for its image, not a PIL image or a path"
    elif wrong := _wrong_objects(example["objects"]):
        fault = f"(image_id {example['image_id']}) {wrong}"
    else:
        return
    raise ValueError(
        f"A row of the data {fault}. Rows are read as load_coco makes them: dicts with {', '.join(COLUMNS)}, where "
        f"objects has lists of {', '.join(FIELDS)} (bbox: x, y, width and height in px). Read files by "
        "load_detection_dataset; make a datasets.Dataset of your own rows, which needs image and objects with bbox "
        "and category alone; or give a data_collator that makes batches of them."
    )


def demand_areas(objects: Mapping[str, Sequence[Any]]) -> None:
    """Find areas that stand for none: objects without an area are left out of training, as MMDetection does.

    Raises:
        ValueError: every object of an image has the area 0, and a box that has one.
    """
    areas = objects["area"]
    if len(areas) and all(area == 0 for area in areas) and all(box[2] > 0 and box[3] > 0 for box in objects["bbox"]):
        raise ValueError(
            f"All {len(areas)} objects of a row of the data have area 0, and would be left out of training: give the "
            "area of each, in px, or None for width x height."
        )


def _wrong_objects(objects: Mapping[str, Sequence[Any]]) -> str:
    """What is wrong with the objects of an image; empty if nothing is."""
    counts = {field: len(objects[field]) for field in FIELDS}
    if len(set(counts.values())) > 1:
        return f"has lists of different lengths in objects: {counts}"
    odd = [box for box in objects["bbox"] if not _is_box(box)]
    if odd:
        return f"has a box that isn't four finite numbers: {odd[0]!r}"
    named = [label for label in objects["category"] if not isinstance(label, int | np.integer | torch.Tensor)]
    return f"has a class that isn't a whole number: {named[0]!r}" if named else ""


def _is_box(box: Any) -> bool:
    try:
        return len(box) == 4 and all(map(math.isfinite, box))
    except TypeError:  # a number, texts, None
        return False


def _lacking(mapping: Any, keys: Sequence[str], prefix: str = "") -> list[str]:
    there = mapping if isinstance(mapping, Mapping) else {}
    return [prefix + key for key in keys if key not in there]


_OTHER_NAMES = {
    "bboxes": "bbox", "boxes": "bbox", "box": "bbox",
    "categories": "category", "labels": "category", "label": "category", "classes": "category", "class": "category",
    "category_id": "category", "category_ids": "category", "class_labels": "category", "class_label": "category",
    "areas": "area", "is_crowd": "iscrowd", "ids": "id",
}  # fmt: skip


def canonical_fields(names: Iterable[str]) -> dict[str, str]:
    """What this package calls a field of `objects` -> its name there: sets of the Hub have several.

    Raises:
        ValueError: two of them may be the same field, such as `label` and `category_id`.
    """
    fields: dict[str, str] = {}
    for name in names:
        field = _OTHER_NAMES.get(name, name)
        other = fields.setdefault(field, name)
        if name == field:
            fields[field] = name
        elif other not in (name, field):
            raise ValueError(
                f"'objects' has {other!r} and {name!r}, and either may be the {field} of an object: remove one of "
                f"them, or rename the right one to {field!r}"
            )
    return fields


def is_class(feature: Any) -> bool:
    """Whether a feature can hold a class: a ClassLabel, whole numbers or texts; or nothing at all."""
    if isinstance(feature, datasets.ClassLabel):
        return True
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint", "str", "large_str", "null"))


def class_label(objects: Any) -> datasets.ClassLabel | None:
    """The `ClassLabel` of `category` in the feature of an `objects` column: a struct of lists or a list of structs."""
    inner = objects.feature if isinstance(objects, datasets.List | datasets.LargeList) else objects
    fields = canonical_fields(inner) if isinstance(inner, dict) else {}
    category = inner[fields["category"]] if "category" in fields else None
    label = category.feature if isinstance(category, datasets.List | datasets.LargeList) else category
    return label if isinstance(label, datasets.ClassLabel) else None


def names_of(dataset: Any) -> tuple[str, ...] | None:
    """Names of a data set's classes: those of the `ClassLabel` in its column `objects`; None if it has none."""
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        return None
    label = class_label((dataset.features or {}).get("objects"))
    return None if label is None else tuple(label.names)


def demand_classes(labels: Iterable[Mapping[str, Any]], num_classes: int) -> None:
    """Check the labels of a batch.

    Args:
        labels: Of each image `class_labels` (n,), and maybe `image_id` (1,).
        num_classes: K.

    Raises:
        ValueError: A label is outside of [0, K); the message names its image.
    """
    for number, label in enumerate(labels):
        classes = label["class_labels"]
        outside = classes[(classes < 0) | (classes >= num_classes)]
        if len(outside):
            image = f"image_id {int(label['image_id'])}" if "image_id" in label else f"image {number} of the batch"
            raise ValueError(
                f"Labels of {image} are {outside.tolist()[:5]}, but the student has classes 0 to {num_classes - 1}. "
                f"Map the raw category ids of the data to 0..K-1 (load_coco and load_objects do), or give the "
                f"student as many classes."
            )


def labels_outside(dataset: datasets.Dataset, count: int) -> list[Place]:
    """Images with labels outside of [0, `count`), as far as the data set is in the schema of `load_coco`."""
    objects = dataset.features.get("objects")
    if not isinstance(objects, dict) or "category" not in objects or dataset.format["type"] == "custom":
        return []
    plain = dataset.with_format("arrow")
    category = pc.struct_field(plain.select_columns("objects")[:]["objects"].combine_chunks(), "category")
    if not pa.types.is_list(category.type) or not pa.types.is_integer(category.type.value_type):
        return []
    labels = pc.fill_null(pc.list_flatten(category), -1).to_numpy(zero_copy_only=False)
    outside = np.flatnonzero((labels < 0) | (labels >= count))
    rows = pc.list_parent_indices(category).to_numpy()[outside].tolist()
    return [_place(plain, row, label) for row, label in zip(rows, labels[outside].tolist(), strict=True)]


def _place(plain: datasets.Dataset, row: int, label: int) -> Place:
    columns = [name for name in ("image", "image_id") if name in plain.column_names]
    example = plain.select_columns(columns)[row].to_pylist()[0] if columns else {}
    image = example.get("image")
    path = image.get("path") if isinstance(image, dict) else None
    return Place(path or f"row {row}", detail=f"label {label}, image_id {example.get('image_id')}")
