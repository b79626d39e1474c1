"""csv: a row for each object, with a header or as keras-retinanet wrote it; VGG Image Annotator's files too."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from ..coco_json import box_array
from ..report import DataError, Finding, Place
from .faults import Faults
from .folder import IMAGE_SUFFIXES, Claims, Folder, demand_text, encoding_of, split_of
from .raw import (
    Box,
    RawSplit,
    Reading,
    ReadOptions,
    SplitBuilder,
    as_place,
    build_named,
    builders_by_split,
    number,
    whole,
)  # fmt: skip

_IMAGE = ("filename", "imagefilename", "imagename", "imagepath", "image", "file", "path", "imageid", "img", "name")
_CLASS = ("class", "classname", "label", "labelname", "category", "categoryname", "classid", "categoryid", "target",
          "object", "species", "type")  # fmt: skip
_CORNERS = (
    ("xmin", "ymin", "xmax", "ymax"), ("x1", "y1", "x2", "y2"), ("left", "top", "right", "bottom"),
    ("xtl", "ytl", "xbr", "ybr"), ("bboxxmin", "bboxymin", "bboxxmax", "bboxymax"), ("x0", "y0", "x1", "y1"),
    ("bboxx1", "bboxy1", "bboxx2", "bboxy2"), ("xupperleft", "yupperleft", "xlowerright", "ylowerright"),
)  # fmt: skip
_SIDES = (  # w and h before width and height, which beside these are the image's
    ("x", "y", "w", "h"), ("bboxx", "bboxy", "bboxwidth", "bboxheight"), ("bboxx", "bboxy", "bboxw", "bboxh"),
    ("xmin", "ymin", "w", "h"), ("left", "top", "w", "h"),
    ("x", "y", "width", "height"), ("left", "top", "width", "height"), ("xmin", "ymin", "width", "height"),
)  # fmt: skip
_CENTRES = (
    ("xcenter", "ycenter", "w", "h"), ("cx", "cy", "w", "h"), ("xc", "yc", "w", "h"),
    ("bboxxcenter", "bboxycenter", "bboxwidth", "bboxheight"), ("xcenter", "ycenter", "width", "height"),
    ("xcentre", "ycentre", "width", "height"), ("centerx", "centery", "width", "height"),
    ("cx", "cy", "width", "height"),
)  # fmt: skip
_BOXES = ("bbox", "box", "boundingbox")
_CROWD = ("iscrowd", "isgroupof", "crowd")
_FLAGS = {"": False, "0": False, "0.0": False, "-1": False, "false": False, "1": True, "1.0": True, "true": True}
_SPLIT = ("split", "set", "subset", "usage", "partition")
_FIXES = {
    "unknown-category": "use the class names of the training split",
    "size-mismatch": "correct width and height; if the image was resized, scale the boxes too",
    "broken-image": "replace the image, or remove it and its rows",
}
_VIA = ("regionshapeattributes", "regionattributes")


@dataclass(frozen=True)
class _Columns:
    """Which column holds what; `box` are four columns, or one with a list."""

    image: int
    label: int
    box: tuple[int, ...]
    corners: bool
    size: tuple[int, int] | None = None
    split: int | None = None
    via: bool = False
    centre: bool = False
    crowd: int | None = None


@dataclass
class _Images:
    """Images that rows named: (split, image) -> its row in the split's builder."""

    rows: dict[tuple[str, str], int] = field(default_factory=dict)
    claims: Claims = field(default_factory=Claims)


class Csv:
    """See the module."""

    name = "csv"
    layout = "annotations.csv (filename,xmin,ymin,xmax,ymax,class) beside the images, or train.csv and val.csv"
    options = frozenset({"bbox_format"})

    def seen(self, folder: Folder) -> str:
        """A csv with an image, a box and a class in a row."""
        found = _tables(folder)
        return f"csv with boxes: {', '.join(found[:3])}" if found else ""

    def read(self, folder: Folder, options: ReadOptions) -> Reading:
        """Read all rows of all files; images that no row names are left out."""
        builders = builders_by_split()
        images = _Images()
        for name in _chosen(_tables(folder)):
            demand_text(folder.path(name), name)
            try:
                _read(folder, name, options, builders, images)
            except csv.Error as error:
                faults = Faults()
                faults.add("annotation-file", as_place(name, detail=str(error)))
                raise DataError(faults.findings()) from error
        named = {image for _, image in images.rows}
        first = next(iter(builders.values()), SplitBuilder())
        for image in folder.images:
            if image not in named:
                first.faults.add("unannotated", as_place(image))
        quiet = frozenset({"area-missing", "category-ids", "size-missing"})
        splits = build_named(builders, quiet=quiet, fixes=_FIXES)
        fractions = _are_fractions(splits)
        for split in splits.values():
            split.fractions = fractions  # type: ignore[attr-defined]
        told = "boxes are fractions of their image" if fractions else "boxes are pixels"
        return Reading(splits, [f"rows of {', '.join(_chosen(_tables(folder)))}", told])


def _are_fractions(splits: Mapping[str, RawSplit]) -> bool:
    """Whether all boxes lie in [0, 1], as those of Open Images: then they are no pixels."""
    boxes = np.concatenate([box_array(split.table.boxes) for split in splits.values()] or [np.zeros((0, 4))])  # type: ignore[attr-defined]
    boxes = boxes[np.isfinite(boxes).all(1)]
    ends = boxes[:, :2] + boxes[:, 2:]
    return bool(len(boxes)) and bool((boxes >= 0).all() and (ends <= 1.0001).all())


def _tables(folder: Folder) -> list[str]:
    return [name for name in folder.files(".csv", ".tsv") if _header(folder.path(name)) is not None]


def _chosen(tables: Sequence[str]) -> list[str]:
    """All files, if each is of a split of its own; otherwise it isn't clear what belongs together."""
    splits = [split_of(name) for name in tables]
    if len(tables) > 1 and len(set(splits)) < len(tables):
        fix = "name them by split (train.csv, val.csv), or give the path of one of them"
        places = tuple(Place(name) for name in tables)
        raise DataError([Finding("error", "several-files", "several csv files of one split", fix, places)])
    return list(tables)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each row that isn't empty."""
    with path.open(encoding=encoding_of(path), errors="replace", newline="") as file:
        sample = file.read(4096)
        file.seek(0)
        head = sample.split("\n")[0]
        delimiter = max(",;\t|", key=head.count)
        reader = csv.reader(file, delimiter=delimiter)
        for cells in reader:
            if any(cell.strip() for cell in cells):
                stripped = [cell.strip() for cell in cells]
                yield reader.line_num, stripped if delimiter == "," else list(map(_with_a_point, stripped))


def _with_a_point(cell: str) -> str:
    """A number as 12.5, where a table that is not separated by commas may have 12,5."""
    return cell.replace(",", ".") if re.fullmatch(r"-?\d+,\d+", cell) else cell


def _header(path: Path) -> tuple[_Columns, bool] | None:
    """The columns, and whether the first row names them; None if it is no table of boxes."""
    try:
        _, cells = next(_rows(path))
    except (StopIteration, csv.Error):
        return None
    names = [re.sub(r"[^a-z0-9]", "", cell.lower()) for cell in cells]
    columns = _named_columns(names)
    if columns is not None:
        return columns, True
    suffix = PurePosixPath(cells[0].replace("\\", "/")).suffix.lower()
    if len(cells) == 6 and suffix in IMAGE_SUFFIXES:  # keras-retinanet: path,x1,y1,x2,y2,class
        return _Columns(image=0, label=5, box=(1, 2, 3, 4), corners=True), False
    return None


def _named_columns(names: Sequence[str]) -> _Columns | None:
    image = _first(names, _IMAGE)
    if image is None:
        return None
    if set(_VIA) <= set(names):
        return _Columns(image, names.index(_VIA[1]), (names.index(_VIA[0]),), corners=False, via=True)
    label = next((place for name in _CLASS if (place := _first(names, (name,))) not in (None, image)), None)
    if label is None:
        return None
    split, crowd = _first(names, _SPLIT), _first(names, _CROWD)
    size = _pair(names, (("imagewidth", "imageheight"), ("imgwidth", "imgheight")))
    for kinds in (_CORNERS, _SIDES, _CENTRES):
        for kind in kinds:
            if set(kind) <= set(names):
                box = tuple(names.index(part) for part in kind)
                own = size or (_pair(names, (("width", "height"),)) if "width" not in kind else None)
                return _Columns(image, label, box, kinds is _CORNERS, own, split, centre=kinds is _CENTRES, crowd=crowd)
    one = _first(names, _BOXES)
    size = size or _pair(names, (("width", "height"),))
    return None if one is None else _Columns(image, label, (one,), corners=False, size=size, split=split, crowd=crowd)


def _first(names: Sequence[str], wanted: Sequence[str]) -> int | None:
    return next((names.index(name) for name in wanted if name in names), None)


def _pair(names: Sequence[str], pairs: Sequence[tuple[str, str]]) -> tuple[int, int] | None:
    return next(((names.index(w), names.index(h)) for w, h in pairs if w in names and h in names), None)


def _read(
    folder: Folder,
    name: str,
    options: ReadOptions,
    builders: dict[str, SplitBuilder],
    images: _Images,
) -> None:
    header = _header(folder.path(name))
    if header is None:
        return
    columns, named = header
    near = str(PurePosixPath(name).parent)
    of_file = split_of(name)
    for number_of_row, (line, cells) in enumerate(_rows(folder.path(name))):
        if named and number_of_row == 0:
            continue
        cells += [""] * (1 + max(columns.image, columns.label, *columns.box) - len(cells))
        split = split_of(cells[columns.split]) if columns.split is not None and columns.split < len(cells) else of_file
        image, why = folder.locate(cells[columns.image], near, of_file) if cells[columns.image] else (None, "no name")
        split = split or (None if image is None else split_of(str(PurePosixPath(image).parent))) or "all"
        builder = builders[split]
        if image is None:
            kind = "ambiguous-image" if why.startswith("may be") else "missing-image"
            builder.faults.add(kind, as_place(name, line, f"{cells[columns.image]}: {why}"))
            continue
        if (other := images.claims.other(image, cells[columns.image])) is not None:
            detail = f"{other} and {cells[columns.image]}: {image}"
            builder.faults.add("shared-image", as_place(name, line, detail))
        key = (split, image)
        if key not in images.rows:
            images.rows[key] = builder.image(image, folder.path(image), _size(cells, columns))
        _object(builder, images.rows[key], cells, columns, options, f"{name}:{line}")


def _size(cells: Sequence[str], columns: _Columns) -> tuple[int, int]:
    if columns.size is None or max(columns.size) >= len(cells):
        return 0, 0
    sides = whole(cells[columns.size[0]]), whole(cells[columns.size[1]])
    return sides if min(sides) > 0 else (0, 0)


def _object(
    builder: SplitBuilder, row: int, cells: Sequence[str], columns: _Columns, options: ReadOptions, source: str
) -> None:
    """Add the row's object, if it has one."""
    given = [cells[place] for place in columns.box]
    label = _via_label(cells[columns.label]) if columns.via else cells[columns.label]
    if not any(given) or (columns.via and given[0] in ("{}", "")):
        if label and not columns.via and label.lower() not in ("background", "none", "negative"):
            builder.faults.add("csv-row", as_place(source, detail=f"class {label}, no box"))
        return
    box = _via_box(given[0]) if columns.via else _box(given, columns, options)
    if not label:
        builder.faults.add("csv-row", as_place(source, detail=f"box {', '.join(given)}, no class"))
        return
    builder.add(row, label, box, source, crowd=_is_crowd(builder, cells, columns, source))
    if not all(map(math.isfinite, box)):
        builder.odd(", ".join(given))


def _is_crowd(builder: SplitBuilder, cells: Sequence[str], columns: _Columns, source: str) -> bool:
    """Whether a row is marked as a crowd region (of Open Images: a group)."""
    text = "" if columns.crowd is None or columns.crowd >= len(cells) else cells[columns.crowd].lower()
    if text not in _FLAGS:
        builder.faults.add("csv-row", as_place(source, detail=f"crowd {text}; needed is 0 or 1"))
    return _FLAGS.get(text, False)


def _box(given: Sequence[str], columns: _Columns, options: ReadOptions) -> Box:
    texts = re.split(r"[\s,;]+", given[0].strip("[]() ")) if len(given) == 1 else given
    values = [number(text) for text in texts]
    if len(values) != 4:
        return (math.nan,) * 4
    a, b, c, d = values
    if columns.centre:
        return a - c / 2, b - d / 2, c, d
    corners = columns.corners or (len(given) == 1 and options.bbox_format == "xyxy")
    return (a, b, c - a, d - b) if corners else (a, b, c, d)


def _via_box(text: str) -> Box:
    """The upright box around a region of VGG Image Annotator."""
    try:
        shape = json.loads(text)
        if "x" in shape:
            return number(shape["x"]), number(shape["y"]), number(shape["width"]), number(shape["height"])
        if "cx" in shape:
            rx, ry = number(shape.get("rx", shape.get("r"))), number(shape.get("ry", shape.get("r")))
            return number(shape["cx"]) - rx, number(shape["cy"]) - ry, 2 * rx, 2 * ry
        xs, ys = list(map(number, shape["all_points_x"])), list(map(number, shape["all_points_y"]))
        return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
    except (ValueError, KeyError, TypeError, AttributeError):
        return (math.nan,) * 4


def _via_label(text: str) -> str:
    """The class among the attributes of a region: by a usual name, or the only one."""
    try:
        attributes = json.loads(text or "{}")
    except ValueError:
        return ""
    if not isinstance(attributes, dict):
        return ""
    by_name = {str(key).lower(): value for key, value in attributes.items()}
    value = next(
        (by_name[key] for key in ("class", "label", "name", "category", "type", "object") if key in by_name), None
    )
    if value is None and len(attributes) == 1:
        value = next(iter(attributes.values()))
    if isinstance(value, dict):  # of a checkbox
        value = next((key for key, chosen in value.items() if chosen), "")
    return str(value or "").strip()
