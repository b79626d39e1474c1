"""The checks of a data set's boxes: which of them can be learned, and whether all are written as they should be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .coco_json import Bools, CocoTable, Floats, Ints
from .report import DEGENERATE_BOX, Finding, Place, Severity, found

_HUGE = 1e30  # px; what is above can't be reckoned with in float32
_LEAST_SIDE = 1e-3  # px; below, a box may vanish in the float32 of training
_MANY = 20  # so many boxes don't look like corners, or lie outside of their images, by chance
_SHARE = 0.2  # of the boxes of a file; more with one fault means that the file is wrong, not some boxes
_NEARLY_ALL = 0.95
_COUNTED = 100  # detections of an image and a class that COCO's AP counts, and of an image that processors hand on


@dataclass(frozen=True)
class JudgedBoxes:
    """The boxes (G, 4) of a table beside the sizes of their images.

    Args:
        table: the annotation file as columns.
        image_rows: (G,) row of each annotation's image; -1 if there is none.
        limits: (G, 2) width and height of that image; infinite where they aren't known.
        keep: (G,) which boxes can be learned.
        beyond: (G,) which of these leave their image by more than a pixel.
    """

    table: CocoTable
    image_rows: Ints
    limits: Floats
    keep: Bools
    beyond: Bools

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
        return cls(table, image_rows, limits, keep, beyond & keep)

    @property
    def areas(self) -> Floats:
        """(G,) px as the table has them; width x height where it says nothing, or has nothing above 0 anywhere."""
        with np.errstate(invalid="ignore", over="ignore"):
            return np.where(self.given, self.table.areas, self.table.boxes[:, 2:].prod(1))

    @property
    def given(self) -> Bools:
        """(G,) areas that the table tells."""
        with np.errstate(invalid="ignore"):
            return (np.abs(self.table.areas) < _HUGE) & bool((self.table.areas > 0).any())

    @property
    def listed(self) -> Bools:
        """(G,) boxes of four finite numbers in a listed image: the truth of the evaluation, whatever can be learned."""
        with np.errstate(invalid="ignore"):
            return (np.abs(self.table.boxes) < _HUGE).all(1) & (self.image_rows >= 0)

    def findings(self, training: bool) -> list[Finding]:
        """What is wrong with the boxes and what is done about it; `training`: of a split that is learned from."""
        return [
            *self._dropped(),
            *self._wrong_as_a_whole(training),
            *(self._nothing_to_learn() if training else ()),
            *self._rotated(),
            *self._repeated(),
            *self._more_than_are_counted(),
            *self._notes(),
        ]

    def _dropped(self) -> list[Finding]:
        rows = np.flatnonzero(~self.keep)
        places = [
            place._replace(detail=f"{self._given(row)} {self._reason(row)}")
            for place, row in zip(self._places(~self.keep), rows.tolist(), strict=True)
        ]
        if len(self.keep) >= _MANY and len(rows) > _SHARE * len(self.keep):
            message = f"{len(rows):,} of {len(self.keep):,} boxes can't be read, or have no area inside their image"
            fix = "write boxes as four numbers, [left, top, width, height] in px; remove annotations that have none"
            return found("error", DEGENERATE_BOX, message, fix, places)
        fix = "correct or remove these annotations; until then they are not trained on, and AP counts them as not found"
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
            fix = "give annotations with boxes; to evaluate or predict only, give the training split's categories, too"
            severity: Severity = "error" if training else "warning"
            lost = tuple(place for finding in self._dropped() for place in finding.places)
            return [Finding(severity, "no-objects", "not a single box is left to learn or to evaluate", fix, lost)]
        fix = "write boxes as [left, top, width, height] in px"
        if ((boxes <= 1).all(1) & (limits > 2).all(1)).mean() > _SHARE:
            return [Finding("error", "relative-boxes", "boxes lie in [0, 1]: fractions, not pixels", fix)]
        sure, places = self._as_corners(), self._places(self.beyond)
        if sure is not None:
            return [Finding(sure, "corner-boxes", "boxes look like [x1, y1, x2, y2]", fix)]
        if len(boxes) >= _MANY and len(places) > _SHARE * len(boxes):
            message = f"{len(places):,} of {len(boxes):,} boxes leave their image by more than a pixel"
            again = f"are they for images of another size, or written in another way? {fix}"
            return found("warning", "boxes-outside", message, again, places)
        return []

    def _nothing_to_learn(self) -> list[Finding]:
        """Boxes that are all left out of training: crowd regions, marked `ignore`, or without an area."""
        rows = self.keep & (self.table.crowds | self._untrained)
        if not self.keep.any() or not (rows | ~self.keep).all():
            return []
        message = "not a single box is trained on: all are crowd regions, marked `ignore`, or have no area above 0"
        fix = "look at iscrowd, ignore and area; iscrowd is 0 for an object, also if its mask is run-length encoded"
        return found("error", "no-objects", message, fix, self._places(rows))

    @property
    def _untrained(self) -> Bools:
        """(G,) boxes that training leaves out, crowd regions aside."""
        marked = np.isin(np.arange(len(self.keep)), list(self.table.ignored))
        return np.asarray((self.areas <= 0) | (self.table.boxes[:, 2:] < 1).any(1) | marked)

    def _as_corners(self) -> Severity | None:
        """How sure it is that the boxes are [x1, y1, x2, y2]; None: they aren't, or nothing tells.

        Read as sides, corners often leave the image. Where they don't, as of small objects in the upper left, areas
        that fit corners tell, or that a box is the wider the farther it lies to the right, and the higher the lower it
        lies. Of sides it is the other way round: big objects begin near the edge. Boxes that begin in the corner of
        their image, as those of whole images do, are the same in both ways.
        """
        keep = self.keep & self.table.boxes[:, :2].any(1)
        boxes, limits = self.table.boxes[keep], self.limits[keep]
        if not len(boxes):
            return None
        beyond = np.asarray((boxes[:, :2] + boxes[:, 2:] > limits + 1).any(1))
        like_corners = np.asarray((boxes[:, 2:] >= boxes[:, :2]).all(1))
        if len(boxes) < _MANY:
            return "warning" if beyond.mean() > _SHARE and like_corners.all() else None
        if beyond.mean() > _SHARE and like_corners[beyond].mean() >= _NEARLY_ALL:
            return "error"
        if like_corners.mean() < _NEARLY_ALL:
            return None
        areas = self.table.areas[keep]
        if _share_near(areas, (boxes[:, 2:] - boxes[:, :2]).prod(1)) > 0.5:
            return "error"
        least = min(_correlation(*(boxes[:, [axis, axis + 2]] / limits[:, [axis]]).T) for axis in (0, 1))
        by_chance = len(boxes) ** -0.5  # standard deviation of a correlation that isn't there
        sure = least > max(0.3, 3 * by_chance)
        if _share_near(areas, boxes[:, 2:].prod(1)) > 0.5:  # areas of sides; or computed from wrong boxes
            return "warning" if sure else None
        return "error" if sure else "warning" if least > by_chance else None

    def _rotated(self) -> list[Finding]:
        rows = np.array(sorted(self.table.rotations), dtype=np.int64)
        places = [
            place._replace(detail=f"rotation {self.table.rotations[row]:g}")
            for place, row in zip(annotation_places(self.table, self.image_rows, rows), rows.tolist(), strict=True)
        ]
        message = "the box is turned by an angle that training doesn't know: the object isn't where the box is"
        fix = "write the upright box around the turned one (export polygons and take their bounds), or remove it"
        return found("warning", "rotated-box", message, fix, places)

    def _repeated(self) -> list[Finding]:
        """Objects that an image has twice: the same box and class."""
        rows = np.flatnonzero(self.keep & self.listed & ~self.table.crowds)
        columns = [self.image_rows[rows], self.table.annotation_categories[rows], *self.table.boxes[rows].T]
        order = np.lexsort(columns)
        same = np.ones(max(len(rows) - 1, 0), dtype=bool)
        for column in columns:
            same &= column[order[1:]] == column[order[:-1]]
        again = np.sort(rows[order[1:][same]])
        many = len(rows) >= _MANY and len(again) > _SHARE * len(rows)
        message = "an image has the same box and class twice: AP counts all but one as not found"
        fix = "remove them; were two exports of the same images joined?"
        places = annotation_places(self.table, self.image_rows, again)
        return found("warning" if many else "note", "duplicate-object", message, fix, places)

    def _more_than_are_counted(self) -> list[Finding]:
        rows = self.image_rows[self.keep & ~self.table.crowds]
        counts = np.bincount(rows[rows >= 0], minlength=len(self.table.file_names))
        places = [
            Place(self.table.file_names[row], detail=f"{counts[row]} objects")
            for row in np.flatnonzero(counts > _COUNTED)
        ]
        message = (
            f"more than {_COUNTED} objects in an image: of an image and class COCO's AP counts the {_COUNTED} "
            f"highest-scoring detections, and an image processor hands on max_detections ({_COUNTED}) of an image"
        )
        fix = (
            "raise the image processor's max_detections; evaluate with --max-detections, which lets AP count as many, "
            "or AP stays below 1 for classes with more objects"
        )
        return found("warning", "many-objects", message, fix, places)

    def _notes(self) -> list[Finding]:
        outside = "the box leaves its image by more than a pixel; it is clipped for training, not for evaluation"
        crowd = "crowd regions are left out of training labels; evaluation ignores detections in them"
        area = "no area; width x height is taken"
        small = "no area above 0, a side below 1 px or the mark `ignore`: not trained on, but a part of the evaluation"
        crowds = self.table.crowds & self.keep
        most = len(crowds) >= _MANY and 2 * crowds.sum() > self.keep.sum()
        look = "look whether they are: iscrowd is 0 for an object, also if its mask is run-length encoded"
        return [
            *found("note", "box-partly-outside", outside, "", self._places(self.beyond)),
            *found("warning" if most else "note", "crowd", crowd, look if most else "", self._places(crowds)),
            *found("note", "area-missing", area, "", self._places(~self.given & self.keep)),
            *found("note", "not-trained-on", small, "", self._places(self._untrained & self.keep)),
        ]

    def _places(self, which: Bools) -> list[Place]:
        return annotation_places(self.table, self.image_rows, np.flatnonzero(which))


def _share_near(values: Floats, others: Floats) -> float:
    """Share of `values` that are within 2 % of `others`."""
    return float(np.isclose(values, others, rtol=0.02, atol=0).mean())


def _correlation(first: Floats, second: Floats) -> float:
    """Pearson's; 0 where one of the two is constant."""
    if not (np.ptp(first) > 0 and np.ptp(second) > 0):
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def annotation_places(table: CocoTable, image_rows: Ints, rows: Ints) -> list[Place]:
    """File and line of annotation rows; of a json, whose lines tell nothing, image and annotation id."""
    if table.sources:
        return [Place(table.sources[row]) for row in rows.tolist()]
    images = image_rows[rows].tolist()
    ids = table.annotation_ids[rows].tolist()
    return [
        Place(table.file_names[image] if image >= 0 else "annotations", annotation)
        for image, annotation in zip(images, ids, strict=True)
    ]
