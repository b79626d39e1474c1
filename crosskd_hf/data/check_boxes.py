"""The checks of a data set's boxes: which of them can be learned, and whether all are written as they should be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .coco_json import Bools, CocoTable, Floats, Ints
from .report import DEGENERATE_BOX, Finding, Place, Severity, found

_LEAST_SIDE = 1e-3  # px; below, a box may vanish in the float32 of training
_MANY = 20  # so many boxes don't look like corners by chance


@dataclass(frozen=True)
class JudgedBoxes:
    """The boxes (G, 4) of a table beside the sizes of their images.

    Args:
        table: the annotation file as columns.
        image_rows: (G,) row of each annotation's image; -1 if there is none.
        limits: (G, 2) width and height of that image; infinite where they aren't known.
        keep: (G,) which boxes can be learned.
        beyond: (G,) which of these leave their image by more than a pixel.
        possible: (G,) which of the table's areas can be true.
    """

    table: CocoTable
    image_rows: Ints
    limits: Floats
    keep: Bools
    beyond: Bools
    possible: Bools

    @classmethod
    def of(cls, table: CocoTable, sizes: Ints, image_rows: Ints) -> JudgedBoxes:
        """Judge each box; those of unlisted images are only looked at by themselves."""
        known = (image_rows >= 0) & (sizes[image_rows] > 0).all(1)
        limits = np.where(known[:, None], sizes[image_rows], np.inf)
        with np.errstate(invalid="ignore", over="ignore"):
            corners, sides = np.split(table.boxes.astype(np.float32), 2, axis=1)  # as training computes
            ends = corners + sides
            inside = np.minimum(ends, limits) - np.maximum(corners, 0)
            keep = np.isfinite(table.boxes).all(1) & (inside > _LEAST_SIDE).all(1)
            beyond = (corners < -1).any(1) | (ends > limits + 1).any(1)
            possible = np.isfinite(table.areas) & (table.areas > 0) & (table.areas <= limits.prod(1))
        return cls(table, image_rows, limits, keep, beyond & keep, possible)

    @property
    def areas(self) -> Floats:
        """(G,) px; width x height where the table says nothing possible."""
        with np.errstate(invalid="ignore", over="ignore"):
            return np.where(self.possible, self.table.areas, self.table.boxes[:, 2:].prod(1))

    def findings(self, training: bool) -> list[Finding]:
        """What is wrong with the boxes and what is done about it; `training`: of a split that is learned from."""
        return [*self._dropped(), *self._wrong_as_a_whole(training), *self._notes()]

    def _dropped(self) -> list[Finding]:
        rows = np.flatnonzero(~self.keep)
        places = [
            place._replace(detail=f"{self._given(row)} {self._reason(row)}")
            for place, row in zip(self._places(~self.keep), rows.tolist(), strict=True)
        ]
        fix = "correct or remove these annotations; until then they are left out of training and evaluation"
        return found("warning", DEGENERATE_BOX, "the box has no area inside its image", fix, places)

    def _reason(self, row: int) -> str:
        box = self.table.boxes[row]
        if not np.isfinite(box).all():
            return "not four finite numbers"
        if box[2:].min() <= 0:
            return "no positive width and height"
        return f"narrower than {_LEAST_SIDE} px" if box[2:].min() <= _LEAST_SIDE else "outside"

    def _given(self, row: int) -> str:
        return self.table.odd_boxes.get(row, str(self.table.boxes[row].tolist()))

    def _wrong_as_a_whole(self, training: bool) -> list[Finding]:
        boxes, limits = self.table.boxes[self.keep], self.limits[self.keep]
        if not len(boxes):
            fix = "give a json with boxes; to evaluate or predict only, give the categories of the training split, too"
            severity: Severity = "error" if training else "warning"
            return [Finding(severity, "no-objects", "not a single box is left to learn or to evaluate", fix)]
        fix = "write boxes as [left, top, width, height] in px"
        if ((boxes <= 1).all(1) & (limits > 2).all(1)).mean() > 0.5:
            return [Finding("error", "relative-boxes", "boxes lie in [0, 1]: fractions, not pixels", fix)]
        if self.beyond.sum() > 0.2 * len(boxes) and (boxes[:, 2:] > boxes[:, :2]).all():
            severity = "error" if len(boxes) >= _MANY else "warning"
            return [Finding(severity, "corner-boxes", "boxes look like [x1, y1, x2, y2]", fix)]
        return []

    def _notes(self) -> list[Finding]:
        outside = "the box leaves its image by more than a pixel; it is clipped for training, not for evaluation"
        crowd = "crowd regions are left out of training labels; evaluation ignores detections in them"
        area = "no area, or an impossible one; width x height is taken"
        return [
            *found("note", "box-partly-outside", outside, "", self._places(self.beyond)),
            *found("note", "crowd", crowd, "", self._places(self.table.crowds & self.keep)),
            *found("note", "area-missing", area, "", self._places(~self.possible & self.keep)),
        ]

    def _places(self, which: Bools) -> list[Place]:
        return annotation_places(self.table, self.image_rows, np.flatnonzero(which))


def annotation_places(table: CocoTable, image_rows: Ints, rows: Ints) -> list[Place]:
    """File and annotation id of annotation rows."""
    images = image_rows[rows].tolist()
    ids = table.annotation_ids[rows].tolist()
    return [
        Place(table.file_names[image] if image >= 0 else "annotations", annotation)
        for image, annotation in zip(images, ids, strict=True)
    ]
