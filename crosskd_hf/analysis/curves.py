"""How near a student comes to teacher and labels while it learns (CrossKD, Fig. 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import BaseImageProcessor, TrainerCallback

from ..create import Detector
from ..inference.drawing import COLOURS
from .pictures import write_csv
from .probe import LocationScores, Probe

TITLES = {"l1_to_teacher": "L1(student, teacher)", "l1_to_labels": "L1(student, labels)", "ap": "AP, %"}


def mean_distances(scores: Sequence[LocationScores]) -> dict[str, float]:
    """L1 distances of the student's class scores from teacher and labels, summed over classes.

    Mean over the locations of all batches at which labels or teacher see an object; 0 where there is none.
    """
    sums, count = torch.zeros(2, dtype=torch.float64), 0
    for each in scores:
        seen = each.foreground
        gaps = [(each.student - target).abs().sum(-1)[seen].double().sum() for target in (each.teacher, each.labels)]
        sums, count = sums + torch.stack(gaps).cpu(), count + int(seen.sum())
    teacher, labels = (sums / max(count, 1)).tolist()
    return {"l1_to_teacher": teacher, "l1_to_labels": labels}


class DistanceCurves(TrainerCallback):
    """After every evaluation: distances of the student from teacher and labels, and its AP, as a row of a csv file.

    It works in trainings with and without a teacher; the distances are measured to the teacher that is given here.

    Args:
        processor: The student's image processor.
        teacher: What the student is compared with.
        inputs: Batches of `probe.batches`.
        path: The csv file; one of an earlier run is replaced.
        adapters: As of `Probe`.
    """

    def __init__(
        self,
        processor: BaseImageProcessor,
        teacher: Detector,
        inputs: Sequence[Mapping[str, Any]],
        path: Path,
        adapters: Path | None = None,
    ) -> None:
        self.processor, self.teacher, self.inputs = processor, teacher, list(inputs)
        self.path, self.adapters = path, adapters
        self.rows: list[dict[str, float]] = []

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Append a row."""
        if not state.is_world_process_zero:
            return
        training, device = model.training, model.device
        with Probe(Detector(model, self.processor), self.teacher, self.adapters) as probe:
            self.teacher.model.to(device)
            found = mean_distances([probe.scores(_on(device, inputs)) for inputs in self.inputs])
        model.train(training)
        average = 100 * (metrics or {}).get("eval_map", float("nan"))
        self.rows.append({"epoch": round(state.epoch or 0, 3), "update": state.global_step, **found, "ap": average})
        write_csv(self.path, self.rows)


def _on(device: torch.device, inputs: Mapping[str, Any]) -> dict[str, Any]:
    labels = [{name: value.to(device) for name, value in label.items()} for label in inputs["labels"]]
    return {"labels": labels, **{name: inputs[name].to(device) for name in ("pixel_values", "pixel_mask")}}


def draw(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Three plots over the epochs, a line for each run's rows."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(TITLES)), TITLES.items(), strict=True):
        for index, (run, rows) in enumerate(runs.items()):
            points = [(row["epoch"], row[name]) for row in rows]
            axes.plot(*zip(*points, strict=True), label=run, color=COLOURS[index % len(COLOURS)], marker=".")
        axes.set(xlabel="epoch", title=title, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    return figure
