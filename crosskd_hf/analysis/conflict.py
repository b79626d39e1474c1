"""Where a teacher contradicts the labels (CrossKD, Fig. 3)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..create import Detector
from ..data.dataset import DetectionData
from ..inference.drawing import COLOURS
from .pictures import save, write_csv
from .probe import LocationScores, Probe, batches

THRESHOLDS = tuple(np.round(np.arange(0, 1, 0.05), 2).tolist())


def conflicts(scores: LocationScores, thresholds: tuple[float, ...] = THRESHOLDS) -> tuple[Tensor, int]:
    """Count locations where some class's score differs from the labels' target by more than a threshold.

    Returns:
        Counts (T,) among the locations at which labels or teacher see an object, and the number of these.
    """
    seen = scores.foreground
    difference = (scores.labels - scores.teacher).abs().amax(-1)[seen]  # (n,)
    return (difference[:, None] > torch.tensor(thresholds)).sum(0), int(seen.sum())


def conflict(
    student: Detector,
    teachers: Mapping[str, Detector],
    data: DetectionData,
    out: Path,
    number: int = 64,
    adapters: Path | None = None,
) -> list[Path]:
    """Write `conflict.png` and `conflict.csv`: the share of conflicts against the threshold, a line for each teacher.

    Args:
        student: Its assigner says what the labels want where.
        teachers: By the names in the picture.
        data: The images, of which the first `number` with objects count.
        out: Folder.
        adapters: As of `Probe`.
    """
    rows = []
    for name, teacher in teachers.items():
        counts, total = torch.zeros(len(THRESHOLDS), dtype=torch.long), 0
        with Probe(student, teacher, adapters) as probe:
            for inputs in batches(student, data, number):
                found, seen = conflicts(probe.scores(inputs))
                counts, total = counts + found, total + seen
        shares = (counts / max(total, 1)).tolist()
        rows += [
            {"teacher": name, "threshold": threshold, "share": round(share, 6), "locations": total}
            for threshold, share in zip(THRESHOLDS, shares, strict=True)
        ]
    return [save(draw(rows), out / "conflict.png"), write_csv(out / "conflict.csv", rows)]


def draw(rows: list[dict[str, float | str]]) -> Figure:
    """Share against threshold."""
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(dict.fromkeys(row["teacher"] for row in rows)):
        line = [(row["threshold"], 100 * float(row["share"])) for row in rows if row["teacher"] == name]
        axes.plot(*zip(*line, strict=True), label=str(name), color=COLOURS[index % len(COLOURS)], marker=".")
    axes.set(xlabel="smallest difference that counts", ylabel="locations in conflict, %", xlim=(0, 1), ylim=(0, None))
    axes.set_title("Teacher's class scores against labels' targets", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(title="teacher")
    return figure
