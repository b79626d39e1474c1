"""`crosskd-hf check-data` and `convert-data`."""

import argparse
from pathlib import Path

from .command import Add, Commands, add_command
from .data_options import add_data, add_format, data_source, how_to_read


def _add_check_data(commands: Commands, name: str, text: str) -> None:
    parser = add_command(
        commands,
        name,
        _check_data,
        text,
        "examples: crosskd-hf check-data photos/\n          crosskd-hf check-data instances_train.json train/",
    )
    add_data(parser)
    parser.add_argument("--train", type=Path, help="json of the training split, where a json of another one is given")
    parser.add_argument("--all", action="store_true", help="list every place of a fault, not only the first ones")


def _add_convert_data(commands: Commands, name: str, text: str) -> None:
    example = "example: crosskd-hf convert-data photos/ photos-coco/"
    parser = add_command(commands, name, _convert_data, text, example)
    parser.add_argument("path", help="folder, data.yaml, csv, json or Hub id of a data set")
    parser.add_argument("folder", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument(
        "--images", choices=("link", "copy"), default="link",
        help="hard links, which take no room and copies where these aren't possible, or always copies (default: link)",
    )  # fmt: skip
    add_format(parser)


def _check_data(arguments: argparse.Namespace) -> int:
    from ..data.categories import CategoryMap
    from ..data.coco_json import read_coco
    from ..data.inspection import check_data
    from ..data.loading import check_detection_dataset

    source, most = data_source(arguments), None if arguments.all else 5
    if source:
        if arguments.train is not None:
            raise ValueError("--train has no effect on a data set that has its own splits.")
        reports = check_detection_dataset(source, **how_to_read(arguments))
        print(reports.describe(most))
        return 0 if reports.ok else 1
    categories = None
    if arguments.train is not None:
        training = read_coco(arguments.train)
        categories = CategoryMap.from_coco(training.categories, {int(raw) for raw in training.annotation_categories})
    report = check_data(arguments.path, arguments.images, categories)
    print(report.describe(most))
    return 0 if report.ok else 1


def _convert_data(arguments: argparse.Namespace) -> int:
    from ..data.loading import load_detection_dataset
    from ..data.writing import write_coco

    data = load_detection_dataset(arguments.path, **how_to_read(arguments))
    print(data)
    for path in write_coco(data, arguments.folder, arguments.images):
        print(f"written to {path}")
    return 0


ADD: dict[str, Add] = {"check-data": _add_check_data, "convert-data": _add_convert_data}
