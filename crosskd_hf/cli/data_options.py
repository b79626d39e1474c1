"""Where a data set lies, for all commands that read one: the options, and what they lead to."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..data.dataset import DetectionData
    from ..data.splits import DetectionSplits


def add_data(parser: argparse.ArgumentParser) -> None:
    """A data set as `PATH` or `--data`, or a COCO json and the folder of its images."""
    parser.add_argument("path", nargs="?", help="folder, data.yaml, csv, json or Hub id of a data set; or a COCO json")
    parser.add_argument("images", nargs="?", help="folder of the COCO json's images")
    parser.add_argument("--data", nargs="+", help="the same as PATH; several are joined by the names of their classes")
    add_format(parser)


def add_format(parser: argparse.ArgumentParser) -> None:
    """How a data set is read."""
    parser.add_argument(
        "--data-format", "--data_format", help="coco, voc, yolo, csv, imagefolder or datasets (default: what is there)"
    )
    parser.add_argument(
        "--one-based",
        "--one_based",
        action=argparse.BooleanOptionalAction,
        help="VOC: the first pixel has the number 1",
    )
    parser.add_argument(
        "--val-fraction", "--val_fraction", type=float, default=0.2,
        help="share of the images that is drawn for validation if there is no such split (default: 0.2)",
    )  # fmt: skip


def add_split(parser: argparse.ArgumentParser) -> None:
    """Which split of it."""
    parser.add_argument("--split", choices=("train", "val", "test"), help="of the data set (default: val, or its only)")


def data_source(arguments: argparse.Namespace) -> list[str]:
    """What `load_detection_dataset` reads; empty if a COCO json and its image folder are given."""
    if arguments.data and arguments.path:
        raise ValueError(f"Give {arguments.path} or --data, not both.")
    if not arguments.data and not arguments.path:
        raise ValueError("Give a data set: its folder, data.yaml, csv, json or Hub id.")
    if arguments.images is None:
        return arguments.data or [arguments.path]
    if arguments.data_format is not None or arguments.one_based is not None:
        raise ValueError("--data-format and --one-based have no effect beside a COCO json and its image folder.")
    return []


def how_to_read(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_format` as arguments of `load_detection_dataset`."""
    return {
        "format": arguments.data_format,
        "one_based": arguments.one_based,
        "val_fraction": arguments.val_fraction,
    }


def chosen_split(splits: "DetectionSplits", name: str | None = None) -> tuple[str, "DetectionData"]:
    """The split `name` of a data set, by default "val", or the first one if there is no such split."""
    name = name or ("val" if "val" in splits else next(iter(splits)))
    return name, splits[name]
