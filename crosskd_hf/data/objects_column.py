"""The `objects` column of detection sets of the Hub as the columns of an annotation file."""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc  # type: ignore[import-untyped]

from .box_formats import to_xywh
from .categories import CategoryMap
from .check_boxes import JudgedBoxes
from .class_names import are_placeholders
from .coco_json import Bools, CocoTable, Floats, Ints, box_array, flag, float_array, rotation_fields, rotations_of
from .report import DataError, Finding, Place, found
from .schema import FIELDS, canonical_fields, class_label, is_class


def table_of_objects(
    dataset: datasets.Dataset,
    categories: CategoryMap | None,
    bbox_format: str | enum.Enum,
    numbers: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> CocoTable:
    """The columns of a data set with `objects` in the form of a COCO json's.

    Args:
        dataset, categories, bbox_format: as of `load_objects`.
        numbers: what each row is called; None: 0, 1, 2, ...
        names: the classes of a column without a ClassLabel; None: the values that occur.
    """
    numbers = range(len(dataset)) if numbers is None else numbers
    columns = set(dataset.column_names)
    label = _class_label(dataset.features["objects"])
    rows = [fields_of_objects(objects) for objects in dataset.select_columns("objects")["objects"]]
    _demand_one_length(rows)
    counts = [len(row["bbox"]) for row in rows]
    values = [value for row in rows for value in row["category"]]
    listed = _listed(names if label is None else label.names, values, categories)
    raw = [value if isinstance(value, int) else listed.get(value, -1) for value in values]
    image_ids = _column(dataset, "image_id") if "image_id" in columns else np.empty(0, dtype=object)
    if image_ids.dtype != np.int64:
        image_ids = np.array(numbers)
    sizes = [
        np.nan_to_num(float_array(_column(dataset, key).tolist())) if key in columns else np.zeros(len(dataset))
        for key in ("width", "height")
    ]
    boxes = to_xywh(box_array([box for row in rows for box in row["bbox"]]), bbox_format)
    return CocoTable(
        image_ids=image_ids.astype(np.int64),
        file_names=[f"row {number}" for number in numbers],
        sizes=np.stack(sizes, axis=1).astype(np.int64),
        annotation_ids=_ids([value for row in rows for value in row.get("id") or ()], sum(counts)),
        annotation_images=np.repeat(image_ids, counts).astype(np.int64),
        annotation_categories=np.array(raw, dtype=np.int64),
        boxes=boxes,
        areas=_joined(rows, "area", sum(counts)),
        crowds=_crowds(rows, sum(counts)),
        categories=[{"id": raw, "name": name} for name, raw in listed.items()],
        rotations=rotations_of([entry for row in rows for entry in _entries(row)]),
    )


_OWN_SIZE = "if the boxes fit the images, remove the columns width and height: then the sizes are read from the images"
CORNERS_FIX = "if they are, read them so: bbox_format='xyxy' (--bbox_format xyxy); otherwise look at the boxes"
ROW_FIXES = {  # of faults of an image, which `drop` can leave out
    "size-mismatch": _OWN_SIZE,
    "image-size": _OWN_SIZE,
    "broken-image": "replace the image",
    "elongated": "cut the image into pieces",
    "exif-ignored": "remove the EXIF orientation, or swap width and height",
}


def demand_droppable(drop: Collection[str]) -> None:
    """Raise a ValueError for kinds of findings that `drop` can't leave out."""
    if isinstance(drop, str) or not isinstance(drop, Collection) or set(drop) - set(ROW_FIXES):
        raise ValueError(f"drop={drop!r}; give a list of kinds of findings, of {sorted(ROW_FIXES)}")


def for_rows(finding: Finding, drop: Collection[str]) -> Finding:
    """A finding of a data set that has no json to correct.

    `datasets.Image` always applies EXIF orientation: images whose annotations ignore it can't be read with it.
    """
    if finding.kind == "corner-boxes":
        return replace(finding, fix=CORNERS_FIX)
    if finding.kind not in ROW_FIXES:
        return finding
    if finding.kind == "exif-ignored":
        message = "width and height are those of the image without its EXIF rotation, which datasets.Image applies"
        finding = replace(finding, severity="error", message=message)
    if finding.kind in drop:
        return replace(finding, severity="warning", message=f"{finding.message}; these rows are left out", fix="")
    fix = (
        f"{ROW_FIXES[finding.kind]}; or leave these rows out: load_objects(..., drop=[{finding.kind!r}]), "
        f"--drop {finding.kind}"
    )
    return replace(finding, fix=fix)


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


def fields_of_objects(objects: Any) -> dict[str, list[Any]]:
    """Objects as a dict of lists, whichever way they are stored; of an image without objects the lists are empty."""
    if isinstance(objects, dict):
        return {field: objects[key] or [] for field, key in canonical_fields(objects).items()}
    names = dict.fromkeys(name for entry in objects or () for name in entry)  # of a stream, entries may differ
    keys = canonical_fields(names) if names else {"bbox": "bbox", "category": "category"}
    return {field: [entry.get(key) for entry in objects or ()] for field, key in keys.items()}


def _entries(row: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """What tells of rotation of an image's objects, one dict each."""
    known = [*rotation_fields(tuple(row)), *(["attributes"] if "attributes" in row else [])]
    fields = {key: row[key] for key in known if len(row[key]) == len(row["bbox"])}
    return [{key: values[number] for key, values in fields.items()} for number in range(len(row["bbox"]))]


def _demand_one_length(rows: Sequence[Mapping[str, list[Any]]]) -> None:
    """Raise a DataError if an image has more boxes than categories or the like, which would shift all later objects."""
    odd = []
    for number, row in enumerate(rows):
        needed = {key: len(row[key]) for key in ("bbox", "category")}
        optional = {key: len(row[key]) for key in ("area", "iscrowd", "id") if row.get(key)}
        if len({*needed.values(), *optional.values()}) > 1:
            odd.append((number, needed | optional))
    if odd:
        raise DataError(_shifted(odd))


def _shifted(rows: Sequence[tuple[int, Mapping[str, int]]]) -> list[Finding]:
    """Rows with more entries in one list than in another."""
    message, fix = "an image's objects have lists of different lengths", "give every object one entry in each list"
    places = [Place(f"row {number}", detail=str(dict(counts))) for number, counts in rows]
    return found("error", "objects-length", message, fix, places)


def _class_label(objects: Any) -> datasets.ClassLabel | None:
    """The feature that names the classes, if there is one."""
    inner = objects.feature if isinstance(objects, datasets.List | datasets.LargeList) else objects
    fields = canonical_fields(inner)
    if not {"bbox", "category"} <= set(fields):
        raise ValueError(f"'objects' needs 'bbox' and 'category', it has {sorted(inner)}; rename its fields")
    category = inner[fields["category"]]
    is_list = inner is objects and isinstance(category, datasets.List | datasets.LargeList)
    one = category.feature if is_list else category
    if not is_class(one):
        raise ValueError(
            f"'{fields['category']}' of 'objects' holds {one}; needed is one class for each object: a ClassLabel, a "
            "whole number or a text"
        )
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


def _crowds(rows: Sequence[Mapping[str, list[Any]]], count: int) -> Bools:
    """Which of all `count` objects are crowd regions; none where the data set has no such field."""
    values = [value for row in rows for value in row.get("iscrowd") or ()]
    return np.array([flag(value) for value in values] if len(values) == count else [False] * count, dtype=bool)


def judge_boxes(dataset: datasets.Dataset) -> list[Finding]:
    """What is wrong with the boxes of a data set in the schema of `load_coco`, which others may have written."""
    columns = dataset.with_format("arrow").select_columns(["width", "height", "objects"])[:]
    objects = columns["objects"].combine_chunks()
    fields = {key: pc.struct_field(objects, key) for key in FIELDS}
    counts = {key: pc.fill_null(pc.list_value_length(values), 0).to_numpy() for key, values in fields.items()}
    shifted = np.flatnonzero(np.ptp(list(counts.values()), axis=0)).tolist()
    if shifted:
        return _shifted([(row, {key: int(values[row]) for key, values in counts.items()}) for row in shifted])
    flat = {key: pc.list_flatten(fields[key]).to_pylist() for key in ("bbox", "area", "iscrowd")}
    rows = pc.list_parent_indices(fields["bbox"]).to_numpy(zero_copy_only=False)
    sizes = np.stack([np.nan_to_num(float_array(columns[key].to_pylist())) for key in ("width", "height")], axis=1)
    table = CocoTable(
        image_ids=np.arange(len(dataset)),
        file_names=[f"row {number}" for number in range(len(dataset))],
        sizes=sizes.astype(np.int64),
        annotation_ids=np.arange(1, len(rows) + 1),
        annotation_images=rows,
        annotation_categories=np.zeros(len(rows), dtype=np.int64),
        boxes=box_array(flat["bbox"]),
        areas=float_array(flat["area"]),
        crowds=np.array([bool(crowd) for crowd in flat["iscrowd"]], dtype=bool),
        categories=[],
    )
    return JudgedBoxes.of(table, table.sizes, rows).findings(training=False)


def category_values(dataset: datasets.Dataset) -> set[Any]:
    """The values of `category` that occur, whatever they are."""
    return {
        value
        for objects in dataset.select_columns("objects")["objects"]
        for value in fields_of_objects(objects)["category"]
    }
