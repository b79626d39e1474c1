"""`crosskd-hf analyse`: the papers' figures."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .command import Add, Commands, Run, add_command, print_paths
from .data_options import add_format, add_split, chosen_split, how_to_read

if TYPE_CHECKING:
    from ..create import Detector
    from ..data.dataset import DetectionData
    from ..data.splits import DetectionSplits


def _add_analyse(commands: Commands, name: str, text: str) -> None:
    figures = commands.add_parser(name, help=text, description=text).add_subparsers(metavar="FIGURE", required=True)
    for figure, (run, what, number) in FIGURES.items():
        example = f"example: crosskd-hf analyse {figure} STUDENT TEACHER --data photos/"
        parser = add_command(figures, figure, run, what, example)
        word = "folder or Hub id" + (", or a new one such as gfl:resnet18" if figure == "curves" else "")
        parser.add_argument("student", help=word)
        several = "+" if figure == "conflict" else None
        parser.add_argument("teacher", nargs=several, help="folder or Hub id", metavar="TEACHER")
        parser.add_argument(
            "--data", nargs="+", required=True, help="folder, data.yaml, csv, json or Hub id of a data set"
        )
        add_format(parser)
        parser.add_argument("--number", type=int, default=number, help=f"images with objects (default: {number})")
        parser.add_argument("--out", type=Path, default=Path("figures"), help="folder to write (default: figures)")
    _add_own_options(figures.choices)


def _add_own_options(figures: Mapping[str, argparse.ArgumentParser]) -> None:
    for name in ("conflict", "targets", "gradients"):
        add_split(figures[name])
    figures["targets"].add_argument("--plain-kd", help="the same student trained with plain KD: one more column")
    figures["gradients"].add_argument(
        "--methods", nargs="+", default=["pkd", "crosskd"], help="a column each (default: pkd crosskd)"
    )
    curves = figures["curves"]
    curves.add_argument(
        "--methods", nargs="+", default=["kd", "crosskd"], help="a run each, or 'baseline' (default: kd crosskd)"
    )
    curves.add_argument("--epochs", type=float, help="of each run (default: as crosskd-hf train)")
    curves.add_argument("--width", type=int, default=256, help="channels of a new student (default: 256)")
    curves.add_argument("--longest-edge", type=int, help="longest side of images in px, for a new student")
    curves.add_argument("--seed", type=int, default=42, help="of all runs (default: 42)")


def _conflict(arguments: argparse.Namespace) -> int:
    from ..analysis.conflict import conflict

    teachers = {Path(source).name: _detector(source) for source in arguments.teacher}
    if len(teachers) < len(arguments.teacher):
        teachers = {source: _detector(source) for source in arguments.teacher}
    student, adapters = _detector(arguments.student), _adapters(arguments.student)
    return print_paths(conflict(student, teachers, _split(arguments), arguments.out, arguments.number, adapters))


def _targets(arguments: argparse.Namespace) -> int:
    from ..analysis.targets import targets

    plain = None if arguments.plain_kd is None else _detector(arguments.plain_kd)
    pair, adapters = (_detector(arguments.student), _detector(arguments.teacher)), _adapters(arguments.student)
    return print_paths(targets(*pair, _split(arguments), arguments.out, arguments.number, plain, adapters))


def _gradients(arguments: argparse.Namespace) -> int:
    from ..analysis.gradients import gradients

    pair = _detector(arguments.student), _detector(arguments.teacher)
    return print_paths(gradients(*pair, _split(arguments), arguments.out, arguments.number, arguments.methods))


def _curves(arguments: argparse.Namespace) -> int:
    from ..create import ImageSize
    from ..experiments.curves import curves

    splits = _splits(arguments)
    if splits.val is None:
        raise ValueError(f"{splits.source} has no validation split, on which the curves are measured.")
    settings = {} if arguments.epochs is None else {"num_train_epochs": arguments.epochs}
    return print_paths(
        curves(
            arguments.student,
            _detector(arguments.teacher),
            splits.train,
            splits.val,
            arguments.out,
            arguments.methods,
            arguments.number,
            width=arguments.width,
            image_size=ImageSize.of(None, arguments.longest_edge),
            seed=arguments.seed,
            **settings,
        )
    )


def _splits(arguments: argparse.Namespace) -> "DetectionSplits":
    from ..data.loading import load_detection_dataset

    if arguments.number < 1:
        raise ValueError(f"--number {arguments.number} must be at least 1.")
    return load_detection_dataset(arguments.data, **how_to_read(arguments))


def _split(arguments: argparse.Namespace) -> "DetectionData":
    """The data of a figure."""
    return chosen_split(_splits(arguments), arguments.split)[1]


def _detector(source: str) -> "Detector":
    from ..create import Detector
    from ..inference.loading import load_detector

    return Detector(*load_detector(source))


def _adapters(student: str) -> Path:
    """Where a student's trained adapters lie, if there are any."""
    from ..training.adapters import FILE

    return Path(student) / FILE


# Each figure with its function, what it shows, and of how many images by default.
FIGURES: dict[str, tuple[Run, str, int]] = {
    "conflict": (_conflict, "Share of locations where teachers contradict the labels, against the threshold.", 64),
    "targets": (_targets, "Heat maps: labels' targets, teacher, the student's own scores, cross-head scores.", 4),
    "gradients": (_gradients, "Heat maps: where methods move the features that the student's head reads.", 4),
    "curves": (_curves, "Train by several methods: L1(student, teacher), L1(student, labels), AP by epoch.", 16),
}
ADD: dict[str, Add] = {"analyse": _add_analyse}
