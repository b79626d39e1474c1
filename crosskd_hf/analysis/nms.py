"""Detections of one model at several NMS thresholds, side by side (LD, Fig. 2)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
from matplotlib.figure import Figure
from torch import Tensor

from ..create import Detector
from ..data.class_names import class_names
from ..data.images import open_image
from ..inference.detection import detect
from ..inference.drawing import draw_objects
from ..inference.files import ImageFiles, is_video
from .pictures import save, write_csv

Found = dict[float, Mapping[str, Tensor]]


def with_nms(detector: Detector, threshold: float) -> Detector:
    """The same detector with another NMS threshold.

    Raises:
        ValueError: The threshold is not in [0, 1], or the detector has no NMS.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"--nms {threshold} must lie in [0, 1].")
    if not hasattr(detector.processor, "nms_threshold"):
        raise ValueError(
            f"--nms has no effect on a {type(detector.model).__name__}: it finds each object once and has no NMS."
        )
    processor = copy.copy(detector.processor)
    processor.nms_threshold = threshold
    return Detector(detector.model, processor)


def side_by_side(
    detector: Detector, files: ImageFiles, out: Path, nms: Sequence[float], threshold: float = 0.5
) -> list[Path]:
    """Write `nms.png`, a line for each image, and `nms.csv`, a row for each box.

    Args:
        detector: One that has an NMS.
        files: Images; videos are left out.
        out: Folder.
        nms: IoU above which the lower of two boxes goes, a column each.
        threshold: Lowest score that is shown.

    Raises:
        ValueError: As of :func:`with_nms`, or there is no image.
    """
    names = dict(enumerate(class_names(detector.model.config)))
    columns = {each: with_nms(detector, each) for each in nms}
    lines, rows = [], []
    for path in (path for path in files.files if not is_video(path)):
        image = open_image(path, pixel_range=getattr(detector.processor, "pixel_range", None))
        found: Found = {each: detect(*own, [image], threshold)[0] for each, own in columns.items()}
        lines.append((image, found))
        rows += [row for each, result in found.items() for row in _rows(str(files.name_of(path)), each, result, names)]
    if not lines:
        raise ValueError("--nms compares images, and there is none among what was given.")
    empty = [{"file": "", "nms": "", "label": "", "score": "", "x1": "", "y1": "", "x2": "", "y2": ""}]
    return [save(draw(lines, names), out / "nms.png"), write_csv(out / "nms.csv", rows or empty)]


def _rows(file: str, nms: float, result: Mapping[str, Tensor], names: Mapping[int, str]) -> list[dict[str, Any]]:
    found = zip(*(result[key].tolist() for key in ("labels", "scores", "boxes")), strict=True)
    return [
        {"file": file, "nms": nms, "label": names[label], "score": round(score, 5)}
        | dict(zip(("x1", "y1", "x2", "y2"), (round(edge, 2) for edge in box), strict=True))
        for label, score, box in found
    ]


def draw(lines: Sequence[tuple[PIL.Image.Image, Found]], names: Mapping[int, str]) -> Figure:
    """A column for each threshold, with the number of boxes."""
    columns = list(lines[0][1])
    figure = Figure(figsize=(3.2 * len(columns), 3.3 * len(lines)), layout="constrained")
    grid = figure.subplots(len(lines), len(columns), squeeze=False)
    for line, (image, found) in zip(grid, lines, strict=True):
        for axes, nms in zip(line, columns, strict=True):
            axes.imshow(draw_objects(image, {key: value.cpu() for key, value in found[nms].items()}, names))
            axes.set_title(f"NMS {nms:g}: {len(found[nms]['labels'])} boxes", fontsize=10)
            axes.set_axis_off()
    return figure
