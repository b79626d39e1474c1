"""Pictures and tables of a finished run: curves, precision over recall, confusion, images side by side, the worst."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_convert, box_iou
from torchvision.transforms.v2.functional import to_pil_image

from ..create import Detector
from ..data.collators import DetectionCollator, make_record
from ..data.dataset import DetectionData
from ..inference.coco_evaluator import CocoEvaluator
from ..inference.drawing import COLOURS, draw_objects
from ..inference.evaluation import detect_dataset
from ..text import one_line

SIDE = 640  # px of the longer side of a drawn image: captions are readable on a photo of 4000 x 3000 too
SURE = 0.3  # lowest score of a detection that is drawn or counted as a find
RUNS = ("teacher", "baseline", "distilled")
SAME = 0.5  # IoU from which a detection is the object's
MOST_CLASSES = 30  # in a confusion matrix; the rest, the rarer ones, are left out


def write_report(folder: Path, data: DetectionData, val: DetectionData, models: Mapping[str, Detector]) -> list[Path]:
    """Detect on the validation images with every model, and write all pictures.

    Args:
        folder: Of the run; its sub-folders' `trainer_state.json` hold the curves.
        data, val: The data.
        models: By the name of their run; the last one is looked at most closely.

    Returns:
        The files.
    """
    found = {
        name: detect_dataset(model, processor, val.dataset, val.categories)
        for name, (model, processor) in models.items()
    }
    last = list(found)[-1]
    _, processor = models[last]
    worst = worst_images(found[last])
    objects = [image for image, boxes in _truth(found[last]).items() if len(boxes["labels"])]
    figures = {
        "pr.png": precision_recall(found),
        "confusion.png": confusion_figure(found[last], val.categories.names, last),
        "labels.png": label_figure(data, val),
        "examples.png": side_by_side(val, found, objects[:6], processor),
        "worst.png": side_by_side(val, found, worst[:6], processor),
    }
    logs = read_logs(folder)
    if logs:
        figures["curves.png"] = curves(logs)
        write_csv(folder / "log.csv", logs)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=110)
    return [folder / name for name in figures]


# ---- Curves ----


def read_logs(folder: Path) -> dict[str, list[dict[str, float]]]:
    """What each run below a folder logged, by its name, in the order of `RUNS`; the folder itself counts as "train"."""
    paths = {"train": folder / "trainer_state.json"} if (folder / "trainer_state.json").is_file() else {}
    found = {path.parent.name: path for path in sorted(folder.glob("*/trainer_state.json"))}
    paths |= dict(sorted(found.items(), key=lambda pair: _rank(pair[0])))
    paths = {name: path for name, path in paths.items() if not name.startswith("checkpoint-")}
    return {name: json.loads(path.read_text(encoding="utf-8"))["log_history"] for name, path in paths.items()}


def _rank(run: str) -> int:
    return next((rank for rank, name in enumerate(RUNS) if run.startswith(name)), len(RUNS))


def write_csv(path: Path, logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """All logs as one table, a row for each entry."""
    columns = list(dict.fromkeys(name for entries in logs.values() for entry in entries for name in entry))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["run", *columns])
        writer.writeheader()
        for run, entries in logs.items():
            writer.writerows({"run": run, **entry} for entry in entries)


def curves(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """AP and loss over the updates, a colour for each run."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for number, (run, entries) in enumerate(logs.items()):
        colour = COLOURS[number % len(COLOURS)]
        for plot, name, scale in ((axes[0], "eval_map", 100), (axes[1], "loss", 1)):
            points: dict[float, float] = {}  # the first of an update: the best model is evaluated again after the last
            for entry in entries:
                if name in entry and "step" in entry:
                    points.setdefault(entry["step"], scale * entry[name])
            if points:
                plot.plot(list(points), list(points.values()), label=run, color=colour, marker=".")
    for plot, title in zip(axes, ("AP on the validation images, %", "training loss"), strict=True):
        plot.set_xlabel("update")
        plot.set_title(title)
        plot.grid(alpha=0.3)
        if plot.get_legend_handles_labels()[0]:
            plot.legend()
    return figure


# ---- What was found ----


def precision_recall(found: Mapping[str, CocoEvaluator]) -> Figure:
    """Mean precision of all classes over recall at IoU 0.5, a line for each model."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    for number, (name, evaluator) in enumerate(found.items()):
        precision = evaluator.precision()[0]  # (recalls, classes) at IoU 0.5
        line = np.ma.masked_less(precision, 0).mean(axis=1)
        axes.plot(np.linspace(0, 1, len(line)), line, label=name, color=COLOURS[number % len(COLOURS)])
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title="IoU 0.5, mean of all classes")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _truth(evaluator: CocoEvaluator) -> dict[int, dict[str, Tensor]]:
    """Objects of every image, without crowd regions: `boxes` (n, 4) xyxy px and `labels` (n,)."""
    objects: dict[int, list[Any]] = {image["id"]: [] for image in evaluator.truth["images"]}
    for annotation in evaluator.truth["annotations"]:
        if not annotation["iscrowd"]:
            label = evaluator.categories.to_contiguous(annotation["category_id"])
            objects[annotation["image_id"]].append([*annotation["bbox"], label])
    return {image: _boxes(np.array(rows).reshape(-1, 5)) for image, rows in objects.items()}


def _boxes(rows: NDArray[Any]) -> dict[str, Tensor]:
    table = torch.as_tensor(rows, dtype=torch.float32)
    return {"boxes": box_convert(table[:, :4], "xywh", "xyxy"), "labels": table[:, -1].long()}


def _finds(evaluator: CocoEvaluator, image: int) -> dict[str, Tensor]:
    """Detections of an image from `SURE` on, best first."""
    rows = evaluator.rows[image]
    rows = rows[rows[:, 4] >= SURE]
    rows = rows[np.argsort(-rows[:, 4], kind="stable")]
    return _boxes(rows) | {"scores": torch.as_tensor(rows[:, 4])}


def match(truth: Mapping[str, Tensor], finds: Mapping[str, Tensor]) -> list[tuple[int | None, int | None]]:
    """Pairs (object, detection), best detection first; either is None where there is no partner."""
    overlaps = box_iou(truth["boxes"], finds["boxes"])
    pairs: list[tuple[int | None, int | None]] = []
    free = set(range(len(truth["labels"])))
    for detection in range(len(finds["labels"])):
        chosen = max(free, key=lambda row: float(overlaps[row, detection]), default=None)
        if chosen is None or float(overlaps[chosen, detection]) < SAME:
            pairs.append((None, detection))
        else:
            free.discard(chosen)
            pairs.append((chosen, detection))
    return [*pairs, *((row, None) for row in sorted(free))]


def confusion(evaluator: CocoEvaluator, classes: int) -> NDArray[np.int64]:
    """(K + 1, K + 1) counts: what an object is, and what was found there; the last row and column mean nothing."""
    counts = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    for image, truth in _truth(evaluator).items():
        finds = _finds(evaluator, image)
        for row, detection in match(truth, finds):
            what = classes if row is None else int(truth["labels"][row])
            called = classes if detection is None else int(finds["labels"][detection])
            counts[what, called] += 1
    return counts


def worst_images(evaluator: CocoEvaluator) -> list[int]:
    """Ids of the images, those with most objects missed, called otherwise or invented first."""
    errors = {}
    for image, truth in _truth(evaluator).items():
        finds = _finds(evaluator, image)
        errors[image] = sum(
            row is None or detection is None or truth["labels"][row] != finds["labels"][detection]
            for row, detection in match(truth, finds)
        )
    return sorted(errors, key=lambda image: (-errors[image], image))


def confusion_figure(evaluator: CocoEvaluator, names: Sequence[str], title: str) -> Figure:
    """The confusion matrix with shares of each row as colours and counts as numbers."""
    counts = confusion(evaluator, len(names))
    common = np.sort(np.argsort(-counts[:-1].sum(axis=1), kind="stable")[:MOST_CLASSES])
    shown = [*common, len(names)]
    part = counts[np.ix_(shown, shown)]
    labels = [one_line(names[index], 16) for index in common] + ["nothing"]
    side = 2.5 + 0.45 * len(shown)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    shares = part / np.maximum(part.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(part > 0):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, f"{part[row, column]}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(labels)), labels, rotation=60, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="found", ylabel="truth", title=f"{title}: score from {SURE}, IoU from {SAME}")
    return figure


def label_figure(data: DetectionData, val: DetectionData) -> Figure:
    """Objects of each class in both splits."""
    names = data.categories.names
    figure = Figure(figsize=(7, max(2.5, 0.28 * len(names) + 1)), layout="constrained")
    axes = figure.subplots()
    height = 0.4
    for number, (title, split) in enumerate((("training", data), ("validation", val))):
        labels = [label for objects in split.dataset["objects"] for label in objects["category"]]
        counts = np.bincount(np.array(labels, dtype=np.int64), minlength=len(names))
        axes.barh(np.arange(len(names)) + (number - 0.5) * height, counts, height, label=title, color=COLOURS[number])
    axes.set_yticks(range(len(names)), [one_line(name, 24) for name in names])
    axes.invert_yaxis()
    axes.set_xscale("symlog")
    axes.set_xlabel("objects")
    figure.legend(loc="outside upper right", ncols=2)  # beside the bars, not over them
    return figure


# ---- Images ----


def side_by_side(
    val: DetectionData, found: Mapping[str, CocoEvaluator], images: Sequence[int], processor: Any
) -> Figure:
    """A row for each image: truth, then every model's finds."""
    rows = {image: row for row, image in enumerate(val.dataset["image_id"])}
    names = dict(enumerate(val.categories.names))
    truth = _truth(next(iter(found.values())))
    titles = ["truth", *found]
    count = max(len(images), 1)
    shapes = [val.dataset.select_columns(["height", "width"])[rows[image]] for image in images]
    heights = [min(2.0, shape["height"] / shape["width"]) for shape in shapes] or [1.0]
    figure = Figure(figsize=(3.6 * len(titles), 3.6 * sum(heights) + 0.6), layout="constrained")
    grid = figure.subplots(count, len(titles), squeeze=False, height_ratios=heights)
    for axes in grid.flat:
        axes.set_axis_off()
    _legend(figure, val.categories.names)
    for line, image in zip(grid, images, strict=False):
        record = make_record(val.dataset[rows[image]], getattr(processor, "pixel_range", None))
        picture = to_pil_image(record["image"].as_subclass(Tensor))
        shown = [truth[image], *(_finds(evaluator, image) for evaluator in found.values())]
        for axes, objects in zip(line, shown, strict=True):
            axes.imshow(drawn(picture, objects, names))
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title)
    return figure


def _legend(figure: Figure, names: Sequence[str]) -> None:
    """The colour of each class, below the pictures; left out where colours come twice."""
    if len(names) <= len(COLOURS):
        handles = [Patch(color=colour, label=one_line(name, 24)) for colour, name in zip(COLOURS, names, strict=False)]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(names))


def drawn(picture: PIL.Image.Image, objects: Mapping[str, Tensor], names: Mapping[int, str]) -> PIL.Image.Image:
    """A picture with its objects, made smaller first if it is large: lines and captions keep their size."""
    scale = min(1.0, SIDE / max(picture.size))
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), PIL.Image.Resampling.BILINEAR)
        objects = {**objects, "boxes": objects["boxes"] * scale}
    return draw_objects(picture, objects, names)


def first_batch(path: Path, collator: DetectionCollator, data: DetectionData, count: int = 8) -> None:
    """Write the first training images as the model sees them, augmented, with their boxes."""
    records = [collator._record(data.dataset[row]) for row in range(min(count, len(data.dataset)))]
    names = dict(enumerate(data.categories.names))
    columns = min(4, len(records))
    lines = -(-len(records) // columns)
    highest = max(min(2.0, record["image"].shape[-2] / record["image"].shape[-1]) for record in records)
    figure = Figure(figsize=(3.6 * columns, 3.6 * highest * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, record in zip(grid.flat, records, strict=False):
        picture = to_pil_image(record["image"].as_subclass(Tensor))
        axes.imshow(drawn(picture, {"boxes": record["boxes"].as_subclass(Tensor), "labels": record["labels"]}, names))
    figure.savefig(path, dpi=110)
