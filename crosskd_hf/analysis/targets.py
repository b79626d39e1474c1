"""What the student is asked for, and what it answers, location by location (CrossKD, Fig. 2)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from ..create import Detector
from ..data.dataset import DetectionData
from .pictures import boxes_of, draw_maps, image_size, overlay, picture, save, write_csv
from .probe import LocationScores, Probe, batches

LABELS, TEACHER, OWN, PLAIN, CROSS = "labels", "teacher", "student's own", "plain KD", "CrossKD (cross-head)"


def columns(scores: LocationScores, plain: LocationScores | None) -> dict[str, Tensor]:
    """(B, L, K) scores of each column of the picture."""
    own = {OWN: scores.student} if plain is None else {OWN: scores.student, PLAIN: plain.student}
    return {LABELS: scores.labels, TEACHER: scores.teacher, **own, CROSS: scores.cross}


def distances(scores: LocationScores, shown: Mapping[str, Tensor], row: int) -> list[dict[str, Any]]:
    """Of each column, the mean L1 distance to labels and teacher over the locations at which these see an object."""
    seen = scores.foreground[row]
    return [
        {
            "column": name,
            "l1_to_labels": _l1(values, scores.labels, row, seen),
            "l1_to_teacher": _l1(values, scores.teacher, row, seen),
            "locations": int(seen.sum()),
        }
        for name, values in shown.items()
    ]


def _l1(values: Tensor, target: Tensor, row: int, seen: Tensor) -> float:
    if not seen.any():
        return 0.0
    return round(float((values[row] - target[row]).abs().sum(-1)[seen].mean()), 6)


def targets(
    student: Detector,
    teacher: Detector,
    data: DetectionData,
    out: Path,
    number: int = 4,
    plain: Detector | None = None,
    adapters: Path | None = None,
) -> list[Path]:
    """Write `targets.png`, a line of heat maps for each image, and `targets.csv`, their distances.

    Args:
        student: Trained with CrossKD.
        plain: The same student trained with plain KD: its own predictions get a column.
        data: The images, of which the first `number` with objects are shown.
        out: Folder.
        adapters: As of `Probe`.
    """
    lines: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for inputs in batches(student, data, number):
        with Probe(student, teacher, adapters) as probe:
            scores = probe.scores(inputs)
        other = None
        if plain is not None:
            with Probe(plain, teacher, adapters) as probe:
                other = probe.scores(inputs)
        shown = columns(scores, other)
        for row in range(len(inputs["labels"])):
            rows += [{"image": len(lines), **each} for each in distances(scores, shown, row)]
            lines.append(_line(inputs, row, scores, shown))
    return [save(draw(lines), out / "targets.png"), write_csv(out / "targets.csv", rows)]


def _line(inputs: Mapping[str, Any], row: int, scores: LocationScores, shown: Mapping[str, Tensor]) -> dict[str, Any]:
    """Image, boxes and heat maps."""
    padded, size = tuple(inputs["pixel_values"].shape[-2:]), image_size(inputs, row)
    maps = {
        name: overlay([level[row] for level in scores.maps(values.amax(-1))], padded, size)  # type: ignore[arg-type]
        for name, values in shown.items()
    }
    return {"image": picture(inputs, row), "boxes": boxes_of(inputs, row), "maps": maps}


def draw(lines: list[dict[str, Any]]) -> Figure:
    """Images with boxes, and the highest class score at every location."""
    return draw_maps(lines, (2.3, 2.4))
