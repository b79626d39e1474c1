"""Every fault of a detection data set, found before training: behind `load_coco` and `crosskd-hf check-data`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .categories import CategoryMap
from .check_images import check_files, check_names
from .coco_json import Bools, CocoTable, Floats, Ints, positions, read_coco
from .data_report import DEGENERATE_BOX, DataError, DataReport, Finding, Place, Severity, by_severity, found


def check_data(
    annotations: str | os.PathLike[str], images: str | os.PathLike[str], categories: CategoryMap | None = None
) -> DataReport:
    """Check an annotation file and all of its images, each of which is decoded in full.

    Args:
        annotations: path of a COCO-format json.
        images: the folder that its file names are relative to.
        categories: the map of the training split, where another split is checked.

    Returns:
        The report; `report.ok` is False where `load_coco` would refuse the data. Nothing is raised for faulty data.
    """
    try:
        return inspect_coco(annotations, images, categories, decode=True).report()
    except DataError as error:
        return DataReport(images=0, objects=0, crowds=0, empty_images=0, findings=error.findings)


@dataclass(frozen=True)
class Inspection:
    """A table, judged.

    Args:
        table: the annotation file as columns.
        categories: the map in use.
        image_rows: (G,) row of each annotation's image; -1 if there is none.
        labels: (G,) contiguous class; -1 if the category is unknown.
        keep: (G,) False for annotations with a degenerate box.
        sizes: (I, 2) width and height in px, taken from the image file where the annotations don't say.
        findings: what was found, in the order of the checks.
    """

    table: CocoTable
    categories: CategoryMap
    image_rows: Ints
    labels: Ints
    keep: Bools
    sizes: Ints
    findings: tuple[Finding, ...]

    def report(self) -> DataReport:
        """Counts and findings, errors first."""
        kept_rows = self.image_rows[self.keep & ~self.table.crowds]
        return DataReport(
            images=len(self.table.image_ids),
            objects=int(self.keep.sum()),
            crowds=int((self.keep & self.table.crowds).sum()),
            empty_images=len(self.table.image_ids) - len(np.unique(kept_rows[kept_rows >= 0])),
            findings=by_severity(self.findings),
        )

    def demand_ok(self) -> None:
        """Raise a DataError that holds every error among the findings."""
        errors = [finding for finding in self.findings if finding.severity == "error"]
        if errors:
            raise DataError(errors)


def inspect_coco(
    annotations: str | os.PathLike[str],
    images: str | os.PathLike[str],
    categories: CategoryMap | None = None,
    decode: bool = False,
) -> Inspection:
    """Read and judge a COCO json and the image files it names: their headers, or with `decode` all of them.

    Raises:
        DataError: the json's structure or the image folder leaves nothing to judge (see `read_coco`).
    """
    table = read_coco(annotations)
    folder = Path(images)
    if not folder.is_dir():
        fix = "give the folder that the json's file names are relative to"
        raise DataError(found("error", "image-folder", "the image folder does not exist", fix, [Place(str(folder))]))
    findings, sources = check_names(table.file_names, folder)
    sizes, more = check_files(table.file_names, table.sizes, sources, decode)
    return inspect_table(table, sizes, categories, [*findings, *more])


def inspect_table(
    table: CocoTable, sizes: Ints, categories: CategoryMap | None, findings: Sequence[Finding] = ()
) -> Inspection:
    """Judge ids, categories and boxes of a table whose images have `sizes` (I, 2); `findings` are put first."""
    image_rows = positions(table.image_ids, table.annotation_images)
    category_map, category_findings = _check_categories(table, categories)
    labels = positions(np.array(category_map.raw_ids, dtype=np.int64), table.annotation_categories)
    keep, box_findings = _check_boxes(table, sizes, image_rows)
    every = [*findings, *_check_ids(table, image_rows), *category_findings, *box_findings]
    return Inspection(table, category_map, image_rows, labels, keep, sizes, tuple(every))


def _check_ids(table: CocoTable, image_rows: Ints) -> list[Finding]:
    twice_images = _repeated(table.image_ids)
    twice_annotations = _repeated(table.annotation_ids)
    orphans = [
        Place("annotations", int(table.annotation_ids[row]), f"image_id {table.annotation_images[row]}")
        for row in np.flatnonzero(image_rows < 0)
    ]
    return [
        *found(
            "error",
            "duplicate-image-id",
            "several images have one id",
            "give every image an id of its own",
            [Place(table.file_names[row], detail=f"image id {table.image_ids[row]}") for row in twice_images],
        ),
        *found(
            "error",
            "duplicate-annotation-id",
            "several annotations have one id, which COCO evaluation would mix up",
            "number the annotations 1, 2, 3, ...",
            _places(table, image_rows, twice_annotations),
        ),
        *found(
            "error",
            "unknown-image",
            "the annotation names an image that is not listed",
            "remove these annotations, or add their images to 'images'",
            orphans,
        ),
    ]


def _repeated(ids: Ints) -> Ints:
    _, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    return np.flatnonzero(counts[inverse] > 1)


def _check_categories(table: CocoTable, categories: CategoryMap | None) -> tuple[CategoryMap, list[Finding]]:
    used = {int(raw) for raw in np.unique(table.annotation_categories)}
    listed = CategoryMap.from_coco(table.categories, used)
    findings: list[Finding] = []
    if categories is None:
        categories = listed
    else:
        names = dict(zip(categories.raw_ids, categories.names, strict=True))
        other = [
            Place("categories", detail=f"id {raw} is {name!r} here and {names[raw]!r} in the given map")
            for raw, name in zip(listed.raw_ids, listed.names, strict=True)
            if names.get(raw, name) != name
        ]
        fix = "use the same ids and names in both splits"
        findings += found("error", "category-name", "a category id has another name than in the given map", fix, other)
    unknown = np.flatnonzero(positions(np.array(categories.raw_ids, dtype=np.int64), table.annotation_categories) < 0)
    fix = f"list the category in 'categories' of the training json (known: {list(categories.raw_ids[:20])})"
    image_rows = positions(table.image_ids, table.annotation_images)
    places = [
        place._replace(detail=f"category_id {table.annotation_categories[row]}")
        for place, row in zip(_places(table, image_rows, unknown), unknown, strict=True)
    ]
    findings += found("error", "unknown-category", "the annotation's category is not known", fix, places)
    return categories, [*findings, *_category_notes(table, categories, used)]


def _category_notes(table: CocoTable, categories: CategoryMap, used: set[int]) -> list[Finding]:
    unused = [Place(n) for raw, n in zip(categories.raw_ids, categories.names, strict=True) if raw not in used]
    kept = {*categories.raw_ids, *used}
    parents = [Place(c["name"]) for c in table.categories if c["id"] not in kept]
    gaps = [Place("categories", detail=f"ids {list(categories.raw_ids[:20])}")]
    mapped = categories.raw_ids != tuple(range(1, len(categories) + 1))
    return [
        *found("note", "category-ids", "ids are not 1..K; they are mapped to 0..K-1", "", gaps if mapped else ()),
        *found("note", "category-unused", "no annotation has this category", "", unused),
        *found("note", "category-left-out", "the category has no annotation and is not in the map", "", parents),
    ]


def _check_boxes(table: CocoTable, sizes: Ints, image_rows: Ints) -> tuple[Bools, list[Finding]]:
    """(G,) which boxes can be learned, and the findings; boxes of unlisted images are only looked at by themselves."""
    boxes = table.boxes
    known = (image_rows >= 0) & (sizes[image_rows] > 0).all(1)
    limits = np.where(known[:, None], sizes[image_rows], np.inf)
    finite = np.isfinite(boxes).all(1)
    with np.errstate(invalid="ignore", over="ignore"):
        positive = (boxes[:, 2:] > 0).all(1)
        ends = boxes[:, :2] + boxes[:, 2:]
        inside = (np.minimum(ends, limits) - np.maximum(boxes[:, :2], 0) > 0).all(1)
        beyond: Bools = np.asarray((boxes[:, :2] < -1).any(1) | (ends > limits + 1).any(1))
    keep: Bools = np.asarray(finite & positive & inside)
    reasons = np.select([~finite, ~positive], ["not four finite numbers", "no positive width and height"], "outside")
    bad = np.flatnonzero(~keep)
    places = [
        place._replace(detail=f"{boxes[row].tolist()} {reasons[row]}")
        for place, row in zip(_places(table, image_rows, bad), bad, strict=True)
    ]
    fix = "correct or remove these annotations; until then they are left out of training and evaluation"
    findings = found("warning", DEGENERATE_BOX, "the box has no area inside its image", fix, places)
    if not keep.any():
        fix = "give a json with annotations, unless it is only for prediction"
        findings += [Finding("warning", "no-objects", "not a single box is left to learn or to evaluate", fix)]
    return keep, [*findings, *_box_notes(table, image_rows, keep, beyond & keep, limits)]


def _box_notes(table: CocoTable, image_rows: Ints, keep: Bools, beyond: Bools, limits: Floats) -> list[Finding]:
    boxes = table.boxes
    crowds = np.flatnonzero(table.crowds & keep)
    no_area = np.flatnonzero(~(table.areas > 0) & keep)
    relative = bool(keep.any()) and bool((boxes[keep] <= 1).all() and (limits[keep] > 2).all())
    corners = bool(keep.any()) and beyond.sum() > 0.2 * keep.sum() and bool((boxes[keep, 2:] > boxes[keep, :2]).all())
    outside = np.flatnonzero(beyond)
    convert = "write boxes as [left, top, width, height] in px"
    return [
        *_whole_set("error", "relative-boxes", "all boxes lie in [0, 1]: fractions, not pixels", convert, relative),
        *_whole_set("warning", "corner-boxes", "boxes look like [x1, y1, x2, y2]", convert, corners),
        *found(
            "note",
            "box-partly-outside",
            "the box leaves its image by more than a pixel; it is clipped for training, not for evaluation",
            "",
            _places(table, image_rows, outside),
        ),
        *found(
            "note",
            "crowd",
            "crowd regions are left out of training labels; evaluation ignores detections in them",
            "",
            _places(table, image_rows, crowds),
        ),
        *found(
            "note", "area-missing", "no positive area; width x height is taken", "", _places(table, image_rows, no_area)
        ),
    ]


def _whole_set(severity: Severity, kind: str, message: str, fix: str, holds: bool) -> list[Finding]:
    return [Finding(severity, kind, message, fix)] if holds else []


def _places(table: CocoTable, image_rows: Ints, rows: Ints) -> list[Place]:
    """File and annotation id of annotation rows."""
    images = image_rows[rows].tolist()
    ids = table.annotation_ids[rows].tolist()
    return [
        Place(table.file_names[image] if image >= 0 else "annotations", annotation)
        for image, annotation in zip(images, ids, strict=True)
    ]
