"""Hugging Face's imagefolder: images, and a metadata.jsonl or metadata.csv with `file_name` and `objects`."""

from __future__ import annotations

import ast
import csv
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from ..coco_json import flag, is_integer
from ..objects_column import CORNERS_FIX
from ..schema import canonical_fields
from .folder import Claims, Folder, demand_text, encoding_of, split_of
from .raw import Box, Reading, ReadOptions, SplitBuilder, as_place, build_named, builders_by_split, number, whole

_FILES = ("metadata.jsonl", "metadata.csv", "metadata.json")
_NAMES = ("file_name", "image_file_name", "image", "filename")


class ImageFolder:
    """See the module."""

    name = "imagefolder"
    layout = (
        "train/metadata.jsonl beside train/*.jpg, rows {file_name, objects: {bbox: [[x, y, w, h]], category: [...]}}"
    )
    options = frozenset({"bbox_format"})

    def seen(self, folder: Folder) -> str:
        """A metadata file of which the first row has objects."""
        files = _files(folder)
        return f"metadata with objects: {', '.join(files[:3])}" if files else ""

    def read(self, folder: Folder, options: ReadOptions) -> Reading:
        """Read every row of every metadata file."""
        builders, claims = builders_by_split(), Claims()
        for name in _files(folder):
            demand_text(folder.path(name), name)
            for line, row in _rows(folder, name):
                _read(folder, name, line, row, options, builders, claims)
        quiet = frozenset({"size-missing", "area-missing", "category-ids"})
        splits = build_named(builders, quiet=quiet, fixes={"corner-boxes": CORNERS_FIX})
        told = "splits by folder" if set(builders) - {"all"} else "no splits"
        return Reading(splits, [f"rows of {', '.join(_files(folder))}", told])


def _files(folder: Folder) -> list[str]:
    names = [name for name in folder.files(".jsonl", ".csv") if PurePosixPath(name).name in _FILES]
    return [name for name in names if "objects" in next((row for _, row in _rows(folder, name)), {})]


def _rows(folder: Folder, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row); a line that is no json is a row without anything."""
    with folder.path(name).open(encoding=encoding_of(folder.path(name)), errors="replace", newline="") as file:
        if name.endswith(".csv"):
            reader = csv.DictReader(file)
            try:
                for row in reader:
                    yield reader.line_num, {str(key): value for key, value in row.items()}
            except csv.Error as error:  # such as a cell of more than 131,072 characters
                yield reader.line_num, {"fault": str(error), "objects": None}
            return
        for line, text in enumerate(file, 1):
            if text.strip():
                try:
                    content = json.loads(text)
                except ValueError as error:
                    content = {"fault": f"no json: {error}", "objects": None}
                yield line, content if isinstance(content, dict) else {"fault": "no object", "objects": None}


def _read(
    folder: Folder,
    name: str,
    line: int,
    row: dict[str, Any],
    options: ReadOptions,
    builders: dict[str, SplitBuilder],
    claims: Claims,
) -> None:
    near = str(PurePosixPath(name).parent)
    given = next((row[key] for key in _NAMES if isinstance(row.get(key), str)), None)
    split = split_of(str(row["split"])) if isinstance(row.get("split"), str) else None
    split = split or split_of(str(PurePosixPath(near) / str(PurePosixPath(given or "x").parent))) or "all"
    builder = builders[split]
    if given is None:
        builder.faults.add("metadata-row", as_place(name, line, row.get("fault", "no file_name")))
        return
    image, why = folder.locate(given, near)
    if image is None:
        kind = "ambiguous-image" if why.startswith("may be") else "missing-image"
        builder.faults.add(kind, as_place(name, line, f"{given}: {why}"))
        return
    if (other := claims.other(image, given)) is not None:
        builder.faults.add("shared-image", as_place(name, line, f"{other} and {given}: {image}"))
    image_id = row.get("image_id")
    size = whole(row.get("width")), whole(row.get("height"))
    number_of_image = builder.image(
        image,
        folder.path(image),
        size if min(size) > 0 else (0, 0),
        int(image_id) if is_integer(image_id) and image_id is not None else None,
    )
    try:
        objects = _entries(row["objects"]) if "objects" in row else []
    except ValueError as error:
        builder.faults.add("metadata-row", as_place(name, line, str(error)))
        return
    if objects is None:
        builder.faults.add("metadata-row", as_place(name, line, f"objects: {row['objects']!r}"[:80]))
        return
    for entry in objects:
        _object(builder, number_of_image, entry, options, name, line)


def _entries(objects: Any) -> list[dict[str, Any]] | None:
    """Objects one by one, whichever way they are written; None if that can't be told."""
    if isinstance(objects, str):
        try:
            objects = json.loads(objects) if objects.strip() else []
        except ValueError:
            try:
                objects = ast.literal_eval(objects)  # as Python prints a dict
            except (ValueError, SyntaxError, RecursionError):
                return None
    if objects is None:
        return []
    if isinstance(objects, list):
        whole_entries = all(isinstance(entry, Mapping) for entry in objects)
        return list(map(_canonical, objects)) if whole_entries else None
    if not isinstance(objects, Mapping):
        return None
    fields = {key: value for key, value in _canonical(objects).items() if isinstance(value, list)}
    needed = [len(fields.get(key, ())) for key in ("bbox", "category")]
    count = needed[0]
    if needed[0] != needed[1] or any(len(values) not in (0, count) for values in fields.values()):
        return None
    return [{key: values[i] for key, values in fields.items() if values} for i in range(count)]


def _canonical(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {field: entry[key] for field, key in canonical_fields(entry).items()}


def _object(builder: SplitBuilder, row: int, entry: dict[str, Any], options: ReadOptions, name: str, line: int) -> None:
    category = entry.get("category")
    if category is not None and is_integer(category):
        category = int(category)
    elif not isinstance(category, str):
        builder.faults.add("metadata-row", as_place(name, line, f"category {category!r}"))
        return
    values = entry.get("bbox")
    four = [number(value) for value in values] if isinstance(values, list) and len(values) == 4 else [math.nan] * 4
    box: Box = (four[0], four[1], four[2], four[3])
    if options.bbox_format == "xyxy":
        box = (four[0], four[1], four[2] - four[0], four[3] - four[1])
    try:
        crowd = flag(entry.get("iscrowd"))
    except ValueError as error:
        builder.faults.add("metadata-row", as_place(name, line, str(error)))
        return
    builder.add(row, category, box, f"{name}:{line}", number(entry.get("area")), crowd)
    if not all(map(math.isfinite, four)):
        builder.odd(values)
