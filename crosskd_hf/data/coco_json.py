"""A COCO annotation file as columns, read once and checked for its structure only."""

from __future__ import annotations

import gc
import json
import math
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from .report import DataError, Finding, Place, found

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
        odd_boxes: row of each box that isn't four finite numbers -> what the file has in its place.
        ignored: rows of annotations that the file marks `ignore`: training leaves them out.
        rotations: row of each box that the file turns by an angle -> that angle, in the file's own unit.
        sources: file and line of each annotation, where they tell more than the image and the annotation's id.
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
    odd_boxes: dict[int, str] = field(default_factory=dict)
    rotations: dict[int, float] = field(default_factory=dict)
    ignored: frozenset[int] = frozenset()
    sources: Sequence[str] = ()

    def select(self, rows: Sequence[int]) -> CocoTable:
        """Some of the images, by their rows, with their annotations."""
        image_ids = self.image_ids[list(rows)]
        kept = np.flatnonzero(np.isin(self.annotation_images, image_ids))
        new = {int(old): row for row, old in enumerate(kept.tolist())}
        return CocoTable(
            image_ids=image_ids,
            file_names=[self.file_names[row] for row in rows],
            sizes=self.sizes[list(rows)],
            annotation_ids=self.annotation_ids[kept],
            annotation_images=self.annotation_images[kept],
            annotation_categories=self.annotation_categories[kept],
            boxes=self.boxes[kept],
            areas=self.areas[kept],
            crowds=self.crowds[kept],
            categories=self.categories,
            odd_boxes={new[row]: given for row, given in self.odd_boxes.items() if row in new},
            rotations={new[row]: angle for row, angle in self.rotations.items() if row in new},
            ignored=frozenset(new[row] for row in self.ignored if row in new),
            sources=[self.sources[row] for row in kept.tolist()] if self.sources else (),
        )


def read_coco(path: str | os.PathLike[str]) -> CocoTable:
    """Read a COCO-format json.

    Raises:
        DataError: whatever is wrong with the file's structure (see `parse_coco`).
    """
    table, findings = parse_coco(path)
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        raise DataError(errors)
    return table


def parse_coco(path: str | os.PathLike[str]) -> tuple[CocoTable, list[Finding]]:
    """Read what can be read of a COCO-format json.

    Returns:
        The table without those entries of `images` and `annotations` that lack a name, an image's id or the like, and
        what was found: errors, which name every such entry, and a note on annotations that were given an id.

    Raises:
        DataError: the file is missing, isn't json, or lists no image: nothing is left to judge.
    """
    content = _read_json(Path(path))
    if not isinstance(content, dict):
        _stop(str(path), f"the json holds a {type(content).__name__} at its top level, an object is needed")
    findings: list[Finding] = []
    images, annotations, categories = (
        _sound_entries(content, key, Path(path).name, findings) for key in ("images", "annotations", "categories")
    )
    if not images:
        raise DataError(findings)
    findings += _number_annotations(annotations)
    boxes = box_array([entry.get("bbox") for entry in annotations])
    odd = np.flatnonzero(~np.isfinite(boxes).all(1)).tolist()
    table = CocoTable(
        image_ids=_integers(images, "id"),
        file_names=[entry["file_name"] for entry in images],
        sizes=np.stack([_integers(images, key) for key in ("width", "height")], axis=1),
        annotation_ids=_integers(annotations, "id"),
        annotation_images=_integers(annotations, "image_id"),
        annotation_categories=_integers(annotations, "category_id"),
        boxes=boxes,
        areas=float_array([entry.get("area") for entry in annotations]),
        crowds=np.array([entry.get("iscrowd") == 1 for entry in annotations], dtype=bool),
        categories=categories,
        odd_boxes={row: reprlib.repr(annotations[row].get("bbox")) for row in odd},
        rotations=rotations_of(annotations),
        ignored=frozenset(row for row, entry in enumerate(annotations) if entry.get("ignore")),
    )
    return table, findings


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
        array = np.asarray(boxes)
        if array.shape == (len(boxes), 4) and array.dtype.kind in "iuf":
            return array.astype(np.float64, copy=False)
    except ValueError:  # of different lengths
        pass
    return np.array([_four(box) for box in boxes], dtype=np.float64).reshape(-1, 4)


def float_array(values: Sequence[Any]) -> Floats:
    """Numbers to (G,) float64; None and what isn't a number, like a text of digits, become NaN."""
    return np.array([_number(value) for value in values], dtype=np.float64)


def flag(value: Any) -> bool:
    """Whether a mark such as `iscrowd` is set; None and what isn't there are False.

    Raises:
        ValueError: it is neither True or False nor 0 or 1.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return False
    if not isinstance(value, int | float | np.integer | np.bool_) or value not in (0, 1):
        raise ValueError(f"iscrowd of an object is {value!r}; give true or false, or 1 or 0")
    return bool(value)


def rotations_of(entries: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """The angle of each turned box by its row: from a field such as `rotation`, or from `attributes`, as of CVAT."""
    rotations = {}
    for row, entry in enumerate(entries):
        attributes = entry.get("attributes")
        if isinstance(attributes, list):  # [{"name": "rotation", "value": "90"}]
            attributes = {part.get("name"): part.get("value") for part in attributes if isinstance(part, dict)}
        for fields in (entry, attributes if isinstance(attributes, dict) else {}):
            for key in rotation_fields(tuple(fields)):
                if _turns(fields[key]):
                    rotations[row] = float(fields[key])
    return rotations


@lru_cache
def rotation_fields(names: tuple[str, ...]) -> list[str]:
    """Those of some fields that tell an angle, in any case of letters."""
    return [name for name in names if str(name).lower() in ("rotation", "angle", "theta", "rotation_angle")]


def _turns(angle: Any) -> bool:
    """True for a number, or a text of one, that is no half or whole turn: these leave a box where it is."""
    try:
        return not isinstance(angle, bool) and math.isfinite(float(angle)) and float(angle) % 180 != 0
    except (TypeError, ValueError, OverflowError):
        return False


def _number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else float("nan")
    except OverflowError:  # an integer of hundreds of digits
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
            return json.load(file, object_hook=_without_outlines)
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError, a nest of brackets
        fix = "give a COCO-format json in UTF-8; is it cut short?"
        _stop(str(path), f"the annotation file is not json: {error}", fix)
    finally:
        if collecting:
            gc.enable()


def _without_outlines(entry: dict[str, Any]) -> dict[str, Any]:
    """Most of a COCO json: thousands of numbers that nobody reads here, and more memory than all else."""
    entry.pop("segmentation", None)
    return entry


def _sound_entries(content: Mapping[str, Any], part: str, name: str, findings: list[Finding]) -> list[dict[str, Any]]:
    """The entries of a part of the json that have what they need; what is wrong is added to `findings`."""
    entries = content.get(part)
    if not isinstance(entries, list):
        missing = f"the json has no {part!r}, only {list(content)[:9]}"
        message = f"{part!r} is not a list" if part in content else missing
        findings += found("error", "json", message, _COCO, [Place(name)])
        return []
    if not entries and part != "annotations":
        findings += found("error", "json", f"{part!r} is empty", _COCO, [Place(name)])
    unsound = {row for row, entry in enumerate(entries) if not isinstance(entry, dict)}
    findings += _faulty(part, "an entry is not an object", {row: entries[row] for row in unsound})
    for key, (test, what) in _NEEDED[part].items():
        faults = {
            row: entry.get(key)
            for row, entry in enumerate(entries)
            if isinstance(entry, dict) and not test(entry.get(key))
        }
        findings += _faulty(part, f"{key!r} is not {what}", faults)
        unsound |= set(faults)
    return [entry for row, entry in enumerate(entries) if row not in unsound] if unsound else entries


def _number_annotations(annotations: list[dict[str, Any]]) -> list[Finding]:
    """Give ids to annotations that have none, beyond those that are taken; a note, if there were such."""
    rows = [row for row, entry in enumerate(annotations) if entry.get("id") is None]
    taken = max((int(entry["id"]) for entry in annotations if entry.get("id") is not None), default=0)
    for number, row in enumerate(rows, max(taken, 0) + 1):
        annotations[row] = {**annotations[row], "id": number}
    places = [Place(f"annotations[{row}]", annotations[row]["id"]) for row in rows]
    return found("note", "annotation-id", "annotations without an id were numbered", "", places)


def _faulty(part: str, message: str, values: Mapping[int, Any]) -> list[Finding]:
    places = [Place(f"{part}[{row}]", detail=reprlib.repr(value)) for row, value in sorted(values.items())]
    return found("error", "json", message, "correct these entries, or remove them", places)


def is_integer(value: Any) -> bool:
    """True for integers of 64 bits, also those written as 3.0; a bool is none."""
    if type(value) is int:
        return -(2**63) <= value < 2**63
    return type(value) is float and abs(value) < 2**63 and value == int(value)


def is_integer_or_none(value: Any) -> bool:
    """As `is_integer`; True also for None."""
    return value is None or is_integer(value)


def _is_flag(value: Any) -> bool:
    return value is None or value in (0, 1)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_COCO = "give a COCO-format json: images, annotations, categories"
_INTEGER = (is_integer, "an integer")
_NEEDED: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "images": {
        "id": _INTEGER,
        "file_name": (_is_text, "a string"),
        "width": (is_integer_or_none, "an integer"),
        "height": (is_integer_or_none, "an integer"),
    },
    "annotations": {
        "id": (is_integer_or_none, "an integer"),
        "image_id": _INTEGER,
        "category_id": _INTEGER,
        "iscrowd": (_is_flag, "0 or 1"),
    },
    "categories": {},  # judged by `sift_categories`
}


def _integers(entries: Sequence[Mapping[str, Any]], key: str) -> Ints:
    """A column of integers; 0 where there is none."""
    return np.array([entry.get(key) or 0 for entry in entries], dtype=np.int64)


def _stop(file: str, message: str, fix: str = _COCO) -> NoReturn:
    raise DataError([Finding("error", "json", message, fix, (Place(file),))])
