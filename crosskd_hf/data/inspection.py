"""Every fault of a detection data set, found before training: behind `load_coco` and `crosskd-hf check-data`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .categories import CategoryMap
from .check_boxes import JudgedBoxes, annotation_places
from .check_categories import check_categories
from .check_images import check_files, check_names
from .coco_json import Bools, CocoTable, Floats, Ints, parse_coco, positions
from .report import DataError, DataReport, Finding, Place, by_severity, found


def check_data(
    annotations: str | os.PathLike[str], images: str | os.PathLike[str], categories: CategoryMap | None = None
) -> DataReport:
    """Check an annotation file and all of its images, each of which is decoded in full.

    Args:
        annotations: path of a COCO-format json.
        images: the folder that its file names are relative to.
        categories: the map of the training split, where another split is checked.

    Returns:
        The report, with every fault that was found; `report.ok` is False where `load_coco` would refuse the data.
        Nothing is raised for faulty data.
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
        listed: (G,) False for annotations without four finite numbers: all others are the truth of the evaluation.
        areas: (G,) px; width x height where the annotations say none.
        sizes: (I, 2) width and height in px, taken from the image file where the annotations don't say.
        findings: what was found, in the order of the checks.
    """

    table: CocoTable
    categories: CategoryMap
    image_rows: Ints
    labels: Ints
    keep: Bools
    listed: Bools
    areas: Floats
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
    decode: bool = True,
) -> Inspection:
    """Read and judge a COCO json and the image files it names: all of each file, or without `decode` its ends.

    Raises:
        DataError: the json leaves nothing to judge (see `parse_coco`).
    """
    table, structure = parse_coco(annotations)
    names, sources = check_names(table.file_names, Path(images))
    sizes, files = check_files(table.file_names, table.sizes, sources, decode)
    return inspect_table(table, sizes, categories, [*structure, *names, *files])


def inspect_table(
    table: CocoTable, sizes: Ints, categories: CategoryMap | None, findings: Sequence[Finding] = ()
) -> Inspection:
    """Judge ids, categories and boxes of a table whose images have `sizes` (I, 2); `findings` are put first.

    Without `categories` it is judged as a training split, which needs objects.
    """
    image_rows = positions(table.image_ids, table.annotation_images)
    judged = check_categories(table, image_rows, categories)
    boxes = JudgedBoxes.of(table, sizes, image_rows)
    every = [*findings, *_check_ids(table, image_rows), *judged.findings, *boxes.findings(categories is None)]
    marks = boxes.keep, boxes.listed
    return Inspection(table, judged.categories, image_rows, judged.labels, *marks, boxes.areas, sizes, tuple(every))


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
            annotation_places(table, image_rows, twice_annotations),
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
