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
        "--difficult", choices=("ignore", "keep"), default="ignore",
        help="VOC: difficult objects become crowd regions, or stay objects (default: ignore)",
    )  # fmt: skip
    parser.add_argument(
        "--bbox-format", "--bbox_format", default="xywh",
        help="csv with one column for the box, imagefolder, datasets: xywh or xyxy, in px (default: xywh)",
    )  # fmt: skip
    parser.add_argument(
        "--drop", nargs="+", default=[], metavar="KIND",
        help="datasets: leave out rows with these faults, such as size-mismatch or broken-image",
    )  # fmt: skip
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
    given = how_to_read(arguments)
    del given["val_fraction"]
    if list(given.values()) != [None, None, "ignore", "xywh", []]:
        raise ValueError(
            "--data-format, --one-based, --difficult, --bbox-format and --drop have no effect beside a COCO json and "
            "its image folder."
        )
    return []


def how_to_read(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_format` as arguments of `load_detection_dataset`."""
    return {
        "format": arguments.data_format,
        "one_based": arguments.one_based,
        "difficult": arguments.difficult,
        "bbox_format": arguments.bbox_format,
        "drop": arguments.drop,
        "val_fraction": arguments.val_fraction,
    }


def chosen_split(splits: "DetectionSplits", name: str | None = None) -> tuple[str, "DetectionData"]:
    """The split `name` of a data set, by default "val", or the first one if there is no such split."""
    name = name or ("val" if "val" in splits else next(iter(splits)))
    if name not in splits:
        raise ValueError(f"{splits.source} has no split {name}, only {', '.join(splits)}.")
    return name, splits[name]
