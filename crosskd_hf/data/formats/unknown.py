"""A folder of no known format: what was seen there, what is missing, and how the known formats look."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ...text import one_line
from .folder import Folder
from .raw import Format

_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")
_HEAD = 1 << 20


def describe_unknown(folder: Folder, formats: Mapping[str, Format]) -> str:
    """Several lines: what the folder holds, the nearest miss, and the layout of every format."""
    counts = {f"{len(folder.images):,} images": len(folder.images)}
    counts |= {
        f"{len(names):,} {suffix or 'files without an ending'}": len(names) for suffix, names in folder.others.items()
    }
    seen = ", ".join(text for text, count in counts.items() if count) or "nothing"
    layouts = [f"    {name}: {known.layout}" for name, known in formats.items()]
    advice = "\n".join(f"  {one_line(line, None)}" for line in _near_misses(folder))
    return (
        f"{one_line(str(folder.given), None)} is no detection data set of a known format.\n"
        f"  seen: {one_line(seen, None)}\n{advice}\n"
        "  expected one of:\n" + "\n".join(layouts)
    )


def _near_misses(folder: Folder) -> list[str]:
    """Sentences on what the folder seems to be."""
    archives = folder.files(*_ARCHIVES)
    misses = [f"{archives[0]} is an archive: unpack it" for _ in archives[:1]]
    misses += [_of_json(folder.path(name), name) for name in folder.files(".json")[:3]]
    misses += [_of_csv(folder.path(name), name) for name in folder.files(".csv", ".tsv")[:3]]
    texts = folder.files(".txt", ".xml", ".yaml", ".yml")
    if folder.images and not misses:
        subfolders = {PurePosixPath(name).parent.name for name in folder.images}
        by_class = len(subfolders) > 1 and not texts
        where = f", in folders {sorted(subfolders)[:4]}: classification, not detection" if by_class else ""
        misses.append(f"images but no annotations{where}")
    elif texts and not folder.images:
        misses.append("annotations but no images: put them into one folder with their images, or give the folder above")
    if folder.images and folder.files(".xml"):
        misses.append("the xml files hold no <annotation>, as PASCAL VOC's do")
    if folder.images and folder.files(".txt"):
        misses.append("the .txt files neither have the names of the images nor lie below `labels`, as YOLO's do")
    return misses or ["the folder is empty" if not folder.others else "neither images nor annotations"]


def _of_json(path: Path, name: str) -> str:
    if path.stat().st_size > _HEAD:
        return f"{name} has none of COCO's keys images, annotations, categories in its beginning"
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        return f"{name} is not json: {error}"
    return f"{name} is {_kind_of_json(content)}"


def _kind_of_json(content: Any) -> str:
    if isinstance(content, list):
        entry = content[0] if content and isinstance(content[0], dict) else {}
        if "annotations" in entry and "image" in entry:
            return "of CreateML: export it as COCO"
        if "image_id" in entry and "score" in entry:
            return "a list of detections, as COCO's results: annotations are needed"
        return "a list; COCO's json is an object with images, annotations and categories"
    if not isinstance(content, dict):
        return f"a {type(content).__name__}; COCO's json is an object with images, annotations and categories"
    keys = set(content)
    if {"shapes", "imagePath"} <= keys:
        return "of LabelMe, one for each image: export them as COCO or VOC"
    if any(isinstance(value, dict) and "regions" in value for value in content.values()):
        return "of VGG Image Annotator: export it as csv or COCO"
    missing = [key for key in ("images", "annotations", "categories") if key not in keys]
    return f"no COCO json: it has {sorted(map(str, keys))[:6]} and lacks {', '.join(missing)}"


def _of_csv(path: Path, name: str) -> str:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        header = file.readline().strip()
    needed = "columns for the image, the box (xmin, ymin, xmax, ymax) and the class are needed"
    return f"{name} begins with {header[:80]!r}: {needed}"
