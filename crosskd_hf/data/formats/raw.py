"""The splits of a data set as a format's reader hands them on: read, not yet judged."""

from __future__ import annotations

import enum
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import datasets
import numpy as np

from ..categories import CategoryMap
from ..check_images import check_files
from ..coco_json import CocoTable, Ints, box_array
from ..dataset import DetectionData, data_of_files, data_of_objects, inspect_objects
from ..inspection import Inspection, inspect_table
from ..report import Finding, Place, found
from .faults import Faults
from .folder import Folder

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class ReadOptions:
    """What a reader may be told; each format lists those that it knows (`Format.options`).

    Args:
        one_based: whether the first pixel has the number 1; None: of PASCAL VOC's own files only.
        difficult: what becomes of VOC's difficult objects, "ignore" or "keep".
        bbox_format: the way that boxes are written, "xywh" or "xyxy".
        drop: kinds of findings whose rows are left out, as of `load_objects`.
    """

    one_based: bool | None = None
    difficult: str = "ignore"
    bbox_format: str | enum.Enum = "xywh"
    drop: Collection[str] = ()


class RawSplit(Protocol):
    """One split, whichever way it is stored."""

    findings: list[Finding]

    @property
    def names(self) -> Sequence[str]:
        """What each image is called; the same name in two splits is the same image."""

    def select(self, rows: Sequence[int]) -> RawSplit:
        """Some of its images, with their objects; without findings."""

    def inspect(self, categories: CategoryMap | None, decode: bool) -> Inspection:
        """Judge it; without `categories` as a training split."""

    def finish(self, inspection: Inspection) -> DetectionData:
        """The data set of a split that was found sound."""


class Reading(NamedTuple):
    """What a format's reader found.

    Args:
        splits: by "train", "val" and "test"; "all", if nothing tells of splits.
        notes: sentences on what was decided, for whoever wants to know.
        alone: whether nothing but the files below the folder decides on what is read.
    """

    splits: dict[str, RawSplit]
    notes: list[str]
    alone: bool = True


class Format(Protocol):
    """A way to store a detection data set: one file of this package, and one entry of `FORMATS`.

    Attributes:
        name: what `format` calls it.
        layout: how such a folder looks, for those who have another one.
        options: the fields of `ReadOptions` that have an effect.
    """

    name: str
    layout: str
    options: frozenset[str]

    def seen(self, folder: Folder) -> str:
        """What in the folder tells of this format; empty if nothing does."""

    def read(self, folder: Folder, options: ReadOptions) -> Reading:
        """Read all splits; raises `DataError` where nothing is left to judge."""


@dataclass
class FileSplit:
    """A split whose images are files.

    Args:
        table: images and annotations as columns.
        paths: of each image; None if it isn't there.
        findings: what the reader saw.
        fractions: whether boxes are shares of their image's sides.
        quiet: kinds of notes that say nothing here, such as a missing size in a format that has none.
        fixes: what to change for a kind of finding, where the COCO json's words don't fit.
    """

    table: CocoTable
    paths: list[Path | None]
    findings: list[Finding] = field(default_factory=list)
    fractions: bool = False
    quiet: frozenset[str] = frozenset()
    fixes: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> Sequence[str]:
        """The images' paths; names where there are none."""
        return [str(path or name) for path, name in zip(self.paths, self.table.file_names, strict=True)]

    def select(self, rows: Sequence[int]) -> FileSplit:
        """The images `rows`, with their objects."""
        return replace(self, table=self.table.select(rows), paths=[self.paths[row] for row in rows], findings=[])

    def inspect(self, categories: CategoryMap | None, decode: bool) -> Inspection:
        """Judge it; without `categories` as a training split."""
        table = self.table
        sizes, files = check_files(table.file_names, table.sizes, self.paths, decode)
        if self.fractions:
            sides = np.maximum(_sizes_of_objects(table, sizes), 1)
            table = replace(table, boxes=table.boxes * np.tile(sides, 2))
        inspection = inspect_table(table, sizes, categories, [*self.findings, *self._repeated(), *files])
        findings = [finding for finding in inspection.findings if finding.kind not in self.quiet]
        worded = [replace(finding, fix=self.fixes.get(finding.kind, finding.fix)) for finding in findings]
        return replace(inspection, findings=tuple(worded))

    def _repeated(self) -> list[Finding]:
        """Files that are several images of the split, unless the reader has said so."""
        if any(finding.kind in ("duplicate-file", "shared-image") for finding in self.findings):
            return []
        counts = Counter(path for path in self.paths if path is not None)
        names = dict(zip(self.paths, self.table.file_names, strict=True))
        message = "an image is listed more than once: it is trained on, and counted by AP, as often"
        fix = "list it once, with all of its objects"
        places = [Place(names[path], detail=f"{count} times") for path, count in counts.items() if count > 1]
        return found("warning", "duplicate-file", message, fix, places)

    def finish(self, inspection: Inspection) -> DetectionData:
        """The data set; all images are there."""
        return data_of_files([path for path in self.paths if path is not None], inspection)


@dataclass
class ObjectsSplit:
    """A split of a `datasets.Dataset` with the columns `image` and `objects`.

    Args:
        dataset: the rows.
        options: `bbox_format` and `drop` are used.
        class_names: the classes, where the column doesn't name them.
        findings: what the reader saw.
        source: where the rows are from.
        rows: number of each row there; None: 0, 1, 2, ...
    """

    dataset: datasets.Dataset
    options: ReadOptions
    class_names: Sequence[str] | None = None
    findings: list[Finding] = field(default_factory=list)
    source: str = ""
    rows: Sequence[int] | None = None

    @property
    def names(self) -> Sequence[str]:
        """Rows have no names: none is the same in two splits."""
        return [f"{self.source} row {row}" for row in self._rows]

    @property
    def _rows(self) -> Sequence[int]:
        return range(len(self.dataset)) if self.rows is None else self.rows

    def select(self, rows: Sequence[int]) -> ObjectsSplit:
        """The rows `rows`."""
        return replace(self, dataset=self.dataset.select(rows), findings=[], rows=[self._rows[row] for row in rows])

    def inspect(self, categories: CategoryMap | None, decode: bool) -> Inspection:
        """Judge it; all images are decoded."""
        options = (self.options.bbox_format, self.options.drop, self.class_names)
        self._judged = inspect_objects(self.dataset, categories, *options, self.rows)
        inspection = self._judged[1]
        return replace(inspection, findings=(*self.findings, *inspection.findings))

    def finish(self, inspection: Inspection) -> DetectionData:
        """The data set."""
        return data_of_objects(self._judged[0], inspection)


def _sizes_of_objects(table: CocoTable, sizes: Ints) -> Ints:
    """(G, 2) width and height of each object's image."""
    order = {image: row for row, image in enumerate(table.image_ids.tolist())}
    return sizes[[order[image] for image in table.annotation_images.tolist()]].reshape(-1, 2)


class SplitBuilder:
    """Collects the images and objects of a split from files that know no ids."""

    def __init__(self) -> None:
        self.faults = Faults()
        self._names: list[str] = []
        self._paths: list[Path | None] = []
        self._sizes: list[tuple[int, int]] = []
        self._image_ids: list[int | None] = []
        self._objects: list[tuple[int, Hashable, Box, str, float, bool]] = []
        self._odd: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._names)

    def image(self, name: str, path: Path | None, size: tuple[int, int] = (0, 0), image_id: int | None = None) -> int:
        """Add an image: its name for messages, its path, (width, height) px or zeros; return its row."""
        self._names.append(name)
        self._paths.append(path)
        self._sizes.append(size)
        self._image_ids.append(image_id)
        return len(self._names) - 1

    def add(
        self, row: int, category: Hashable, box: Box, source: str, area: float = math.nan, crowd: bool = False
    ) -> None:
        """Add an object of image `row`: class, box xywh (NaN where it can't be read), and where it is written."""
        self._objects.append((row, category, box, source, area, crowd))

    def odd(self, given: object) -> None:
        """Keep what the file has in place of the box of the last object."""
        self._odd[len(self._objects) - 1] = repr(given)

    @property
    def classes(self) -> set[Hashable]:
        """The classes that occur."""
        return {entry[1] for entry in self._objects}

    def build(self, raw_ids: Mapping[Hashable, int], categories: list[dict[str, Any]], **options: Any) -> FileSplit:
        """The split.

        Args:
            raw_ids: class -> raw id; classes that it lacks are unknown (-1).
            categories: as in a COCO json.
            options: of `FileSplit`.
        """
        image_ids = np.array(self._ids(), dtype=np.int64)
        rows, classes, boxes, sources, areas, crowds = zip(*self._objects, strict=True) if self._objects else ((),) * 6
        table = CocoTable(
            image_ids=image_ids,
            file_names=self._names,
            sizes=np.array(self._sizes, dtype=np.int64).reshape(-1, 2),
            annotation_ids=np.arange(1, len(rows) + 1),
            annotation_images=image_ids[np.array(rows, dtype=np.int64)],
            annotation_categories=np.array([raw_ids.get(name, -1) for name in classes], dtype=np.int64),
            boxes=box_array(list(boxes)).reshape(-1, 4),
            areas=np.array(areas, dtype=np.float64),
            crowds=np.array(crowds, dtype=bool),
            categories=categories,
            odd_boxes=self._odd,
            sources=list(sources),
        )
        return FileSplit(table, self._paths, self.faults.findings(), **options)

    def _ids(self) -> list[int]:
        """The given ids; or the numbers in the files' names, if these differ in one number only; or 1, 2, 3, ..."""
        given = [image_id for image_id in self._image_ids if image_id is not None]
        if len(given) == len(self) == len(set(given)):
            return given
        matches = [re.fullmatch(r"(.*?)(\d{1,15})", PurePosixPath(name).stem) for name in self._names]
        if all(matches) and len({match[1] for match in matches if match}) == 1:
            numbers = [int(match[2]) for match in matches if match]
            if len(set(numbers)) == len(numbers):
                return numbers
        return list(range(1, len(self) + 1))


def build_named(builders: Mapping[str, SplitBuilder], names: Sequence[str] = (), **options: Any) -> dict[str, RawSplit]:
    """Splits of a format that names classes: those of `names` in order, then all others that occur, sorted."""
    occurring = {name for builder in builders.values() for name in builder.classes} - set(names)
    if not names and all(isinstance(name, int) for name in occurring):
        raw_ids: dict[Hashable, int] = {name: int(str(name)) for name in sorted(occurring, key=lambda n: int(str(n)))}
    else:
        raw_ids = {name: number for number, name in enumerate([*names, *sorted(occurring, key=str)], 1)}
    categories = [{"id": number, "name": str(name)} for name, number in raw_ids.items()]
    return {split: builder.build(raw_ids, categories, **options) for split, builder in builders.items()}


def as_place(name: str, line: int | None = None, detail: str = "") -> Place:
    """A file, maybe with a line."""
    return Place(name if line is None else f"{name}:{line}", detail=detail)


def builders_by_split() -> defaultdict[str, SplitBuilder]:
    """A builder for each split that is asked for."""
    return defaultdict(SplitBuilder)


def number(text: object) -> float:
    """A number, or the text of one; NaN for anything else."""
    try:
        return float(text) if isinstance(text, str | int | float) and not isinstance(text, bool) else math.nan
    except (ValueError, OverflowError):
        return math.nan


def whole(text: object) -> int:
    """A length in px; 0 for anything else."""
    value = number(text)
    return round(value) if math.isfinite(value) and 0 < value < 2**31 else 0
