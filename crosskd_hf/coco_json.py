"""A COCO annotation file as columns, read once and checked for its structure only."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from .data_report import DataError, Finding, Place

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class CocoTable:
    """Images (I of them) and annotations (G) as columns, in the order of the file; nothing is judged yet.

    Args:
        image_ids: (I,) raw image ids.
        file_names: I names relative to the image folder.
        sizes: (I, 2) width and height in px; 0 where the file doesn't say.
        annotation_ids: (G,) annotation ids.
        annotation_images: (G,) image id of each annotation.
        annotation_categories: (G,) raw category id of each annotation.
        boxes: (G, 4) xywh in px; NaN where the file has no four numbers.
        areas: (G,) px; NaN where the file doesn't say.
        crowds: (G,) True for crowd regions.
        categories: the listed categories as they stand in the file.
    """

    image_ids: Ints
    file_names: list[str]
    sizes: Ints
    annotation_ids: Ints
    annotation_images: Ints
    annotation_categories: Ints
    boxes: Floats
    areas: Floats
    crowds: Bools
    categories: list[dict[str, Any]]


def read_coco(path: str | os.PathLike[str]) -> CocoTable:
    """Read a COCO-format json.

    Raises:
        DataError: the file is missing or isn't json, `images`, `annotations` or `categories` is missing or isn't a list
            of objects, there is no image or category, or an id isn't an integer.
    """
    name = Path(path).name
    content = _read_json(Path(path))
    if not isinstance(content, dict):
        _stop(str(path), f"the json holds a {type(content).__name__} at its top level, an object is needed")
    images, annotations, categories = (_entries(content, key, name) for key in ("images", "annotations", "categories"))
    for key, entries in (("images", images), ("categories", categories)):
        if not entries:
            _stop(name, f"{key!r} is empty")
    return CocoTable(
        image_ids=_integers(images, "id", "images"),
        file_names=_strings(images, "file_name", "images"),
        sizes=np.stack([_integers(images, key, "images", default=0) for key in ("width", "height")], axis=1),
        annotation_ids=_integers(annotations, "id", "annotations"),
        annotation_images=_integers(annotations, "image_id", "annotations"),
        annotation_categories=_integers(annotations, "category_id", "annotations"),
        boxes=box_array([entry.get("bbox") for entry in annotations]),
        areas=float_array([entry.get("area") for entry in annotations]),
        crowds=np.nan_to_num(float_array([entry.get("iscrowd") for entry in annotations])) != 0,
        categories=categories,
    )


def positions(keys: Ints, queries: Ints) -> Ints:
    """Where each query stands in `keys` (the last place if it stands there twice); -1 where it doesn't."""
    if not len(keys):
        return np.full(len(queries), -1, dtype=np.int64)
    order = np.argsort(keys, kind="stable")
    found = np.searchsorted(keys, queries, side="right", sorter=order) - 1
    where = order[np.maximum(found, 0)]
    return np.where((found >= 0) & (keys[where] == queries), where, -1)


def box_array(boxes: Sequence[Any]) -> Floats:
    """Boxes of any origin to (G, 4) float64; a row that isn't four numbers becomes NaN."""
    try:
        array = np.asarray(boxes, dtype=np.float64)
        if array.shape == (len(boxes), 4):
            return array
    except (TypeError, ValueError):
        pass
    return np.array([_four(box) for box in boxes], dtype=np.float64).reshape(-1, 4)


def float_array(values: Sequence[Any]) -> Floats:
    """Numbers to (G,) float64; None and what isn't a number become NaN."""
    try:
        return np.array(values, dtype=np.float64)  # None becomes NaN
    except (TypeError, ValueError):
        return np.array([_number(value) for value in values], dtype=np.float64)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _four(box: Any) -> list[float]:
    values = [_number(value) for value in box] if isinstance(box, list | tuple) else []
    return values if len(values) == 4 else [float("nan")] * 4


def _read_json(path: Path) -> Any:
    if not path.is_file():
        _stop(str(path), "the annotation file does not exist", "give the path of a COCO-format json")
    collecting = gc.isenabled()
    gc.disable()  # millions of small dicts that are no garbage: a third of the time
    try:
        with path.open("rb") as file:
            return json.load(file)
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError, a nest of brackets
        _stop(str(path), f"the annotation file is not json: {error}", "give a COCO-format json; is it cut short?")
    finally:
        if collecting:
            gc.enable()


def _entries(content: Mapping[str, Any], key: str, name: str) -> list[dict[str, Any]]:
    if key not in content:
        _stop(name, f"the json has no {key!r}, only {sorted(content)[:10]}")
    entries = content[key]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        _stop(name, f"{key!r} is not a list of objects")
    return entries


def _integers(entries: Sequence[Mapping[str, Any]], key: str, part: str, default: int | None = None) -> Ints:
    values = [entry.get(key, default) for entry in entries]
    if default is not None:
        values = [default if value is None else value for value in values]
    _check_each(values, is_integer, f"{key!r} is not an integer", part)
    return np.array(values, dtype=np.int64)


def is_integer(value: Any) -> bool:
    """True for integers of 64 bits, also those written as 3.0; a bool is none."""
    if type(value) is int:
        return -(2**63) <= value < 2**63
    return type(value) is float and abs(value) < 2**63 and value == int(value)


def _strings(entries: Sequence[Mapping[str, Any]], key: str, part: str) -> list[str]:
    values = [entry.get(key) for entry in entries]
    _check_each(values, lambda value: isinstance(value, str), f"{key!r} is not a string", part)
    return [str(value) for value in values]


def _check_each(values: Sequence[Any], test: Callable[[Any], bool], message: str, part: str) -> None:
    faults = tuple(Place(f"{part}[{i}]", detail=repr(value)) for i, value in enumerate(values) if not test(value))
    if faults:
        fix = "correct these entries, or remove them"
        raise DataError([Finding("error", "json", message, fix, faults)])


def _stop(file: str, message: str, fix: str = "give a COCO-format json: images, annotations, categories") -> NoReturn:
    raise DataError([Finding("error", "json", message, fix, (Place(file),))])
