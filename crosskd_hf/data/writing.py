"""A data set that was read, as COCO jsons with the images beside them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from ..text import strict_json
from .dataset import DetectionData
from .framed_image import FramedImage
from .splits import DetectionSplits

_ENDINGS = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"BM": ".bmp", b"GI": ".gif", b"RI": ".webp"}


def write_coco(data: DetectionSplits, folder: str | os.PathLike[str], images: str = "link") -> list[Path]:
    """Write `annotations/instances_SPLIT.json`, and the images into a folder of each split's name.

    Names of images in the jsons are relative to `folder`: `load_detection_dataset(folder)` reads it, and so does
    `load_coco(json, folder)`.

    Args:
        data: The data set.
        folder: A new or empty folder.
        images: "link" for hard links, or copies where these are not possible; "copy".

    Returns:
        The jsons.

    Raises:
        FileExistsError: There is something in the folder.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty; give a new folder.")
    written = []
    for split, part in data.items():
        names = list(_write_images(part, folder, split, images))
        path = folder / f"annotations/instances_{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(strict_json(coco_content(part, names)) + "\n", encoding="utf-8")
        written.append(path)
    return written


def coco_content(data: DetectionData, names: Sequence[str]) -> dict[str, Any]:
    """A split as the content of a COCO json, with these file names."""
    rows = data.dataset.remove_columns("image").with_format(None)
    images, annotations = [], []
    for row, name in zip(rows, names, strict=True):
        images.append({"id": row["image_id"], "file_name": name, "width": row["width"], "height": row["height"]})
        ignored = row["objects"].get("ignore") or [0] * len(row["objects"]["id"])
        annotations += [
            {
                "id": number,
                "image_id": row["image_id"],
                "category_id": data.categories.to_raw(label),
                "bbox": box,
                "area": area,
                "iscrowd": crowd,
                **({"ignore": 1} if ignore else {}),
            }
            for number, label, box, area, crowd, ignore in zip(
                *(row["objects"][key] for key in ("id", "category", "bbox", "area", "iscrowd")), ignored, strict=True
            )
        ]
    pairs = zip(data.categories.raw_ids, data.categories.names, strict=True)
    categories = [{"id": raw, "name": name} for raw, name in pairs]
    return {"images": images, "annotations": annotations, "categories": categories}


def _write_images(data: DetectionData, folder: Path, split: str, how: str) -> Iterator[str]:
    """Link or copy the images of a split; hand on their names relative to the folder."""
    feature = data.dataset.features["image"]
    plain = FramedImage(decode=False) if isinstance(feature, FramedImage) else datasets.Image(decode=False)
    stored: list[Mapping[str, Any]] = data.dataset.cast_column("image", plain)["image"][:]
    paths = [Path(entry["path"]) for entry in stored if entry["bytes"] is None]
    root = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
    for entry, number in zip(stored, data.dataset["image_id"], strict=True):
        if entry["bytes"] is None:
            target = folder / split / Path(entry["path"]).relative_to(root)
        else:
            target = folder / split / f"{number:012d}{_ENDINGS.get(bytes(entry['bytes'][:2]), '.png')}"
        target.parent.mkdir(parents=True, exist_ok=True)
        if entry["bytes"] is None:
            _link(Path(entry["path"]), target, how)
        else:
            target.write_bytes(entry["bytes"])
        yield target.relative_to(folder).as_posix()


def _link(source: Path, target: Path, how: str) -> None:
    if target.exists():  # an image that the data set has twice
        return
    try:
        if how == "link":
            os.link(os.path.realpath(source), target)
            return
    except OSError:  # another disk, or a file system without links
        pass
    shutil.copyfile(source, target)
