"""A small COCO-format data set of rendered shapes on clutter: the synthetic data of the example and the tests."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
import PIL.ImageDraw
from numpy.typing import NDArray

CLASSES = {1: "circle", 3: "square", 4: "triangle", 7: "star"}
"""Raw category id -> name; with gaps, as real data has."""

# Typical RGB of a class. Colours vary around it, and clutter has the same ones: they help to find a class, no more.
_COLOURS = {"circle": (200, 60, 60), "square": (60, 170, 70), "triangle": (70, 80, 210), "star": (225, 190, 40)}
_COLOUR_SPREAD = 28.0

_SUPERSAMPLING = 2
_EMPTY_SHARE = 0.08  # images without objects
_MOST_OBJECTS = 5
_LEAST_VISIBLE = 0.5  # share of an object that later ones leave uncovered
_SIZES = (0.14, 0.5)  # diameter of an object as a share of the image's longer side
_OUTER = {"square": 4, "triangle": 3, "star": 5}  # corners

Pixels: TypeAlias = NDArray[np.float32]
Points: TypeAlias = list[tuple[float, float]]


@dataclass(frozen=True)
class ShapesPaths:
    """Where the two splits of a synthetic data set are."""

    train_images: Path
    train_annotations: Path
    val_images: Path
    val_annotations: Path

    @classmethod
    def below(cls, folder: str | os.PathLike[str]) -> ShapesPaths:
        """The paths that `make_shapes(folder)` writes to."""
        root = Path(folder)
        names = root / "annotations"
        return cls(root / "train", names / "instances_train.json", root / "val", names / "instances_val.json")


def make_shapes(
    folder: str | os.PathLike[str], num_train: int = 200, num_val: int = 50, size: int = 160, seed: int = 0
) -> ShapesPaths:
    """Write `train/` and `val/` PNGs and `annotations/instances_{train,val}.json` below `folder`.

    Filled circles, squares, triangles and stars of any rotation and size (14 to 50 % of the image's longer side), each
    class around a colour of its own, lie on a patterned ground, overlap each other, and stand among lines, outlines of
    the same shapes and specks that are not to be found. Some images have no object, some are portrait or landscape. An
    image depends on the seed, its split and its number only, and is the same byte for byte every time.

    Args:
        folder: is made if it doesn't exist; files of the same names are overwritten.
        num_train, num_val: images of each split.
        size: longer side of every image in px, at least 32.
        seed: of everything.
    """
    if size < 32 or num_train < 1 or num_val < 1:
        raise ValueError(f"needs size >= 32 and an image in each split; got {size=}, {num_train=}, {num_val=}")
    paths = ShapesPaths.below(folder)
    train, val = (paths.train_images, paths.train_annotations), (paths.val_images, paths.val_annotations)
    for number, ((images, truth), count) in enumerate(((train, num_train), (val, num_val))):
        images.mkdir(parents=True, exist_ok=True)
        truth.parent.mkdir(exist_ok=True)
        truth.write_text(json.dumps(_write_split(images, count, size, (seed, number))))
    return paths


def _write_split(folder: Path, count: int, size: int, seed: tuple[int, int]) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(count):
        rng = np.random.default_rng([*seed, number])
        pixels, objects = render(rng, size)
        name = f"{number:05d}.png"
        PIL.Image.fromarray(pixels).save(folder / name, compress_level=1)
        image_id = 10 * number + 1
        images.append({"id": image_id, "file_name": name, "height": pixels.shape[0], "width": pixels.shape[1]})
        for entry in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "iscrowd": 0, **entry})
    categories = [{"id": raw, "name": name, "supercategory": "shape"} for raw, name in CLASSES.items()]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def render(rng: np.random.Generator, size: int) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
    """Draw one image (H, W, 3); return it with its objects' `category_id`, `bbox` (xywh px) and visible `area` (px)."""
    shorter = round(size * 0.75)
    width, height = ((size, size), (size, shorter), (shorter, size))[rng.integers(3)]
    pixels = _ground(rng, width, height)
    for _ in range(rng.integers(2, 6)):
        _draw_clutter(rng, pixels, size)
    masks: list[tuple[int, NDArray[np.bool_]]] = []
    empty = rng.random() < _EMPTY_SHARE
    for _ in range(0 if empty else rng.integers(1, _MOST_OBJECTS + 1)):
        _draw_object(rng, pixels, size, masks)
    pixels += rng.normal(0, rng.uniform(2, 10), pixels.shape).astype(np.float32)
    return pixels.clip(0, 255).astype(np.uint8), _objects(masks)


def _ground(rng: np.random.Generator, width: int, height: int) -> Pixels:
    """A patterned ground: coarse colour blotches with a finer grey texture on top."""
    colour = rng.uniform(85, 170, 3)
    coarse = colour + rng.normal(0, 20, (rng.integers(2, 5), rng.integers(2, 5), 3))
    fine = np.repeat(rng.normal(0, rng.uniform(4, 14), (height // 6 + 1, width // 6 + 1, 1)), 3, axis=2)
    return _stretched(coarse, width, height) + _stretched(fine, width, height)


def _stretched(values: NDArray[np.float64], width: int, height: int) -> Pixels:
    channels = [
        np.asarray(PIL.Image.fromarray(channel).resize((width, height), PIL.Image.Resampling.BICUBIC))
        for channel in np.moveaxis(values.astype(np.float32), -1, 0)
    ]
    return np.stack(channels, axis=-1)


def _draw_clutter(rng: np.random.Generator, pixels: Pixels, size: int) -> None:
    """A line, the outline of a shape, or a speck: what a detector has to leave alone."""
    height, width = pixels.shape[:2]
    kind = rng.integers(3)
    centre = (rng.uniform(0, width), rng.uniform(0, height))
    stroke = rng.uniform(1, 3)
    if kind == 0:
        end = (rng.uniform(0, width), rng.uniform(0, height))
        cover = _cover((width, height), [centre, end], stroke)
    else:
        name = list(CLASSES.values())[rng.integers(len(CLASSES))]
        radius = size * (rng.uniform(0.08, 0.25) if kind == 1 else rng.uniform(0.01, 0.025))
        points = _outline(name, centre, radius, rng.uniform(0, 2 * math.pi))
        cover = _cover((width, height), [*points, points[0]], stroke if kind == 1 else None)
    _paint(pixels, cover, _colour(rng, list(CLASSES.values())[rng.integers(len(CLASSES))]))


def _draw_object(
    rng: np.random.Generator, pixels: Pixels, size: int, masks: list[tuple[int, NDArray[np.bool_]]]
) -> None:
    """Draw a shape where it hides no earlier one too much, if a few tries find such a place."""
    height, width = pixels.shape[:2]
    raw = list(CLASSES)[rng.integers(len(CLASSES))]
    for _ in range(8):
        radius = size * math.exp(rng.uniform(math.log(_SIZES[0]), math.log(_SIZES[1]))) / 2
        centre = (rng.uniform(0.6 * radius, width - 0.6 * radius), rng.uniform(0.6 * radius, height - 0.6 * radius))
        points = _outline(CLASSES[raw], centre, radius, rng.uniform(0, 2 * math.pi))
        cover = _cover((width, height), points, None)
        mask = cover > 0.5
        if not mask.any() or any((full & mask).sum() > (1 - _LEAST_VISIBLE) * full.sum() for _, full in masks):
            continue
        ground = pixels[mask].mean(axis=0)
        colour = _colour(rng, CLASSES[raw])
        while np.abs(colour - ground).max() < 45:
            colour = _colour(rng, CLASSES[raw])
        _paint(pixels, cover, colour + rng.normal(0, rng.uniform(0, 12), (height, width, 1)))
        masks.append((raw, mask))
        return


def _colour(rng: np.random.Generator, name: str) -> NDArray[np.float64]:
    return np.clip(rng.normal(_COLOURS[name], _COLOUR_SPREAD), 0, 255)


def _outline(name: str, centre: tuple[float, float], radius: float, turn: float) -> Points:
    """The corners of a shape that fits a circle of `radius` px."""
    if name == "circle":
        corners, radii = 48, [radius]
    elif name == "star":
        corners, radii = 2 * _OUTER[name], [radius, 0.45 * radius]
    else:
        corners, radii = _OUTER[name], [radius]
    angles = [turn + 2 * math.pi * corner / corners for corner in range(corners)]
    return [
        (centre[0] + radii[i % len(radii)] * math.cos(angle), centre[1] + radii[i % len(radii)] * math.sin(angle))
        for i, angle in enumerate(angles)
    ]


def _cover(size: tuple[int, int], points: Points, stroke: float | None) -> Pixels:
    """(H, W) share of each pixel that a polygon covers, or a line of width `stroke` along the points."""
    factor = _SUPERSAMPLING
    canvas = PIL.Image.new("L", (size[0] * factor, size[1] * factor))
    draw = PIL.ImageDraw.Draw(canvas)
    scaled = [(x * factor, y * factor) for x, y in points]
    if stroke is None:
        draw.polygon(scaled, fill=255)
    else:
        draw.line(scaled, fill=255, width=max(1, round(stroke * factor)))
    return np.asarray(canvas.reduce(factor), dtype=np.float32) / np.float32(255)


def _paint(pixels: Pixels, cover: Pixels, colour: NDArray[np.float64]) -> None:
    alpha = cover[..., None]
    pixels[:] = (1 - alpha) * pixels + alpha * colour


def _objects(masks: list[tuple[int, NDArray[np.bool_]]]) -> list[dict[str, Any]]:
    """Boxes around whole shapes inside the image, areas of what later shapes leave to see."""
    objects = []
    for number, (raw, mask) in enumerate(masks):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        left, top = int(columns[0]), int(rows[0])
        box = [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]
        later = [other for _, other in masks[number + 1 :]]
        visible = mask & ~np.any(later, axis=0) if later else mask
        objects.append({"category_id": raw, "bbox": [float(value) for value in box], "area": float(visible.sum())})
    return objects
