"""`crosskd-hf methods` and `check-pair`: what can be distilled, and from which teacher."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .command import Add, Commands, add_command
from .data_options import add_format, chosen_split, how_to_read

if TYPE_CHECKING:
    from ..data.dataset import DetectionData


def _add_methods(commands: Commands, name: str, text: str) -> None:
    parser = add_command(commands, name, _methods, text, "example: crosskd-hf methods crosskd")
    parser.add_argument("name", nargs="?", help="one of them, or a class of your own as my_package.my_module:MyConfig")


def _add_check_pair(commands: Commands, name: str, text: str) -> None:
    parser = add_command(
        commands,
        name,
        _check_pair,
        text,
        "examples: crosskd-hf check-pair student-folder teacher-folder\n"
        "          crosskd-hf check-pair gfl:resnet18 teacher-folder --data photos/",
    )
    parser.add_argument("student", help="folder or Hub id, or a new one such as gfl:resnet18")
    parser.add_argument("teacher", help="folder or Hub id")
    parser.add_argument("--methods", nargs="+", default=["crosskd"], help="what is distilled (default: crosskd)")
    parser.add_argument("--data", nargs="+", help="data set in any known format: the teacher is evaluated on it")
    add_format(parser)
    parser.add_argument("--annotations", type=Path, help="COCO-format json, instead of --data")
    parser.add_argument("--images", type=Path, help="folder of its images")
    parser.add_argument("--number", type=int, default=100, help="so many of them (default: 100)")


def _methods(arguments: argparse.Namespace) -> int:
    from ..distillation.reference import reference

    print(reference(arguments.name))
    return 0


def _check_pair(arguments: argparse.Namespace) -> int:
    from ..create import create_detector, is_new
    from ..data.class_names import class_names
    from ..experiments.check_pair import check_pair
    from ..inference.loading import load_detector

    data = _data(arguments)
    teacher, teacher_processor = load_detector(arguments.teacher)
    classes = class_names(teacher.config) if data is None and is_new(arguments.student) else data
    student, processor = create_detector(arguments.student, classes, backbone_weights=None)
    chosen = arguments.methods
    report = check_pair(student, teacher, chosen, processor, teacher_processor, data, arguments.number)
    print(report)
    return 0 if report.ok else 1


def _data(arguments: argparse.Namespace) -> "DetectionData | None":
    """What a teacher is evaluated on; None if nothing was given."""
    from ..data.dataset import load_coco
    from ..data.loading import load_detection_dataset

    if (arguments.annotations is None) != (arguments.images is None):
        raise ValueError("Give both of --annotations and --images, or neither.")
    if arguments.data and arguments.annotations:
        raise ValueError("Give --data or --annotations, not both.")
    if arguments.data:
        return chosen_split(load_detection_dataset(arguments.data, **how_to_read(arguments)))[1]
    return None if arguments.annotations is None else load_coco(arguments.annotations, arguments.images)


ADD: dict[str, Add] = {"methods": _add_methods, "check-pair": _add_check_pair}
