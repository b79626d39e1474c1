"""Detections as boxes in files of other tools: COCO json, YOLO txt and csv. All can be read as data sets again."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml

from ..data.categories import CategoryMap
from ..text import strict_json

Records = Sequence[dict[str, Any]]
"""As of `predict`; those of files that couldn't be read have no `detections`."""


def write_coco(records: Records, classes: CategoryMap, folder: Path) -> None:
    """`coco.json`: images, categories with the ids of the model's training data, and annotations with a `score`.

    The annotations alone are what `COCO.loadRes` of pycocotools takes.
    """
    images, annotations = [], list[dict[str, Any]]()
    raw_ids = dict(zip(classes.names, classes.raw_ids, strict=True))
    for number, record in enumerate(_read(records), start=1):
        size = {"width": record["width"], "height": record["height"]}
        images.append({"id": number, "file_name": _name(record).as_posix(), **size})
        for found in record["detections"]:
            x1, y1, x2, y2 = found["box"]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": raw_ids[found["label"]],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                    "score": found["score"],
                }
            )
    categories = [{"id": raw, "name": name} for name, raw in raw_ids.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "coco.json").write_text(strict_json(content) + "\n", encoding="utf-8")


def write_yolo(records: Records, classes: CategoryMap, folder: Path) -> None:
    """`data.yaml` with the classes, and for each image a `labels/NAME.txt` with "class x y width height score" a line.

    Centre and sides are fractions of the image. An image without objects has an empty file.
    """
    labels = {name: number for number, name in enumerate(classes.names)}
    for record in _read(records):
        lines = []
        for found in record["detections"]:
            x1, y1, x2, y2 = found["box"]
            width, height = record["width"], record["height"]
            box = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
            numbers = " ".join(f"{value:.6f}" for value in (*box, found["score"]))
            lines.append(f"{labels[found['label']]} {numbers}\n")
        path = (folder / "labels" / _name(record)).with_suffix(".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")
    names = yaml.safe_dump({"names": dict(enumerate(classes.names))}, allow_unicode=True, sort_keys=False)
    (folder / "data.yaml").write_text(names, encoding="utf-8")


def write_csv(records: Records, classes: CategoryMap, folder: Path) -> None:
    """`boxes.csv`: a row for each object, corners in px."""
    with (folder / "boxes.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["filename", "width", "height", "class", "score", "xmin", "ymin", "xmax", "ymax"])
        for record in _read(records):
            before = _name(record).as_posix(), record["width"], record["height"]
            writer.writerows([*before, found["label"], found["score"], *found["box"]] for found in record["detections"])


BOX_FORMATS: dict[str, Callable[[Records, CategoryMap, Path], None]] = {
    "coco": write_coco,
    "yolo": write_yolo,
    "csv": write_csv,
}


def _read(records: Records) -> list[dict[str, Any]]:
    return [record for record in records if "detections" in record]


def _name(record: dict[str, Any]) -> PurePath:
    """The image's; frames of a video count as images of a folder with the video's name."""
    frame = record.get("frame")
    return PurePath(record["file"]) if frame is None else PurePath(record["file"], f"{frame:06d}.png")
