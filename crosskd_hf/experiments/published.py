"""What a run of a preset aims at, and how far it came: text for people, a row for `benchmarks/results.csv`."""

from __future__ import annotations

import csv
import datetime
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from .presets import CAFFE, Preset, preset
from .run_file import commit_of

IOUS = (50, 60, 70, 80, 90)  # percent, of `Preset.ap_by_iou`


def aim(experiment: Preset, checkpoint: str | None = None) -> str:
    """Before step 0: which published AP is aimed at, with what, and what differs.

    Args:
        experiment: What is run.
        checkpoint: A file of backbone weights that was given for it.
    """
    rows = f" ({', '.join(experiment.rows)})" if experiment.rows else ""
    published = "an AP that was not published" if experiment.ap is None else f"AP {experiment.ap}{rows}"
    lines = [f"{experiment.name} aims at {published}.", f"Training: {experiment.training.source}."]
    if experiment.losses is not None and experiment.teacher is not None:
        known = "not published" if experiment.teacher.ap is None else experiment.teacher.ap
        lines.append(f"Teacher: {experiment.teacher.origin}, AP {known}. Losses: {experiment.losses.source}.")
    if experiment.note:
        lines.append(experiment.note)
    if experiment.student.backbone_weights == CAFFE and checkpoint is None:
        lines.append(
            "Without --backbone_checkpoint FILE the student is a ResNet of torchvision's kind, with torchvision's "
            "weights and RGB pixels, which is not what was published."
        )
    return "\n".join(lines)


def outcome(experiment: Preset, metrics: Mapping[str, float]) -> str:
    """After the run: the published AP and ours, in percent, and AP at single IoUs where that was published.

    Args:
        experiment: What was run.
        metrics: As of `CocoEvaluator.compute`, in [0, 1].
    """
    ours = 100 * metrics["map"]
    if experiment.ap is None:
        return f"{experiment.name}: AP {ours:.1f}; none was published"
    lines = [f"{experiment.name}: {_beside('AP', ours, experiment.ap)}"]
    for percent, published in zip(IOUS, experiment.ap_by_iou, strict=False):
        lines.append(f"  {_beside(f'AP{percent}', 100 * metrics[f'map_{percent}'], published)}")
    return "\n".join(lines)


def _beside(name: str, ours: float, published: float) -> str:
    return f"{name} {ours:.1f}, published {published:.1f}, difference {ours - published:+.1f}"


def announce(name: str | None, checkpoint: str | None, args: TrainingArguments) -> None:
    """Print :func:`aim` of a preset, if one is run, in the first process."""
    if name is not None and args.process_index == 0:
        print(aim(preset(name), checkpoint), flush=True)


def conclude(name: str | None, results: Mapping[str, Mapping[str, float]], args: TrainingArguments, path: Path) -> None:
    """Print :func:`outcome` of a preset, if one was run, and append the row of a whole run.

    Args:
        name: Of the preset.
        results: Metrics of each run; the last one is the student's.
        args: Of the run.
        path: The csv file of results.
    """
    if name is None or args.process_index != 0 or not results:
        return
    experiment, metrics = preset(name), [*results.values()][-1]
    print(outcome(experiment, metrics))
    if is_whole(experiment, args):
        record(path, experiment, metrics, args)
        print(f"Row appended to {path}")
    else:
        print(f"No row in {path.name}: the published run has {experiment.training.resolved_schedule.epochs} epochs.")


def is_whole(experiment: Preset, args: TrainingArguments) -> bool:
    """Whether a run is as long as published: a shorter one gets no row."""
    return args.max_steps <= 0 and args.num_train_epochs == experiment.training.resolved_schedule.epochs


def record(path: Path, experiment: Preset, metrics: Mapping[str, float], args: TrainingArguments) -> None:
    """Append a row to a csv file of results; columns that its first line doesn't name are left out.

    Args:
        path: The file; with the columns of `benchmarks/results.csv` if it is new.
        experiment: Its name goes into the column `run`.
        metrics: AP values in [0, 1], as `Comparison.results` holds them.
        args: Seed and epochs of the run.
    """
    row: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": commit_of(path.parent),
        "hardware": f"{args.world_size} x {_hardware()}",
        "data": experiment.training.data,
        "seed": args.seed,
        "run": experiment.name,
        "model": f"{experiment.student.architecture}:{experiment.student.backbone}",
        "teacher": "" if experiment.teacher is None else experiment.teacher.origin,
        "methods": "" if experiment.losses is None else "+".join(experiment.losses.methods),
        "epochs": args.num_train_epochs,
        **{key: f"{100 * metrics[key]:.2f}" for key in ("map", "map_50", "map_75")},
    }
    columns = list(row)
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            columns = next(csv.reader(file))
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def _hardware() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
