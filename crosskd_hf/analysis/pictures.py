"""What the figures share: csv files, images of a batch, heat maps over them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ..models.boxes import to_absolute

DPI = 110


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A table with the keys of its first row as columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def save(figure: Figure, path: Path) -> Path:
    """A figure as png."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path


def image_size(inputs: Mapping[str, Any], row: int) -> tuple[int, int]:
    """Height and width of an image of a batch without its padding, pixels."""
    mask = inputs["pixel_mask"][row]
    return int(mask.any(1).sum()), int(mask.any(0).sum())


def picture(inputs: Mapping[str, Any], row: int) -> Tensor:
    """(H, W, 3) in [0, 1], without padding; brightness is spread over what the image has."""
    height, width = image_size(inputs, row)
    pixels = inputs["pixel_values"][row, :, :height, :width].detach().cpu().float()
    low, high = pixels.amin((1, 2), keepdim=True), pixels.amax((1, 2), keepdim=True)
    return ((pixels - low) / (high - low).clamp(min=1e-6)).permute(1, 2, 0)


def boxes_of(inputs: Mapping[str, Any], row: int) -> Tensor:
    """(n, 4) xyxy pixels of an image's objects."""
    size = torch.tensor([image_size(inputs, row)], dtype=torch.float32)
    return to_absolute(inputs["labels"][row]["boxes"][None].cpu().float(), size)[0]


def inside(boxes: Tensor, shape: tuple[int, int], stride: int) -> Tensor:
    """(H, W) bool: cells of a map whose centre lies in a box.

    Args:
        boxes: (n, 4) xyxy pixels.
        shape: Height and width of the map.
        stride: Pixels per cell.
    """
    y, x = ((torch.arange(count) + 0.5) * stride for count in shape)
    across = (x > boxes[:, 0:1]) & (x < boxes[:, 2:3])  # (n, W)
    down = (y > boxes[:, 1:2]) & (y < boxes[:, 3:4])  # (n, H)
    return (down[:, :, None] & across[:, None]).any(0)


def overlay(levels: Sequence[Tensor], padded: tuple[int, int], size: tuple[int, int], density: bool = False) -> Tensor:
    """(H, W) of an image: at each pixel the highest number of any level's (h, w) map.

    Args:
        levels: Maps of the padded image.
        padded, size: Height and width with and without padding, pixels.
        density: Spread each number evenly over the pixels of its cell, and add up the levels.
    """
    grown = [F.interpolate(level[None, None].float(), size=padded, mode="nearest")[0, 0] for level in levels]
    if density:
        shares = [level.numel() / (padded[0] * padded[1]) for level in levels]
        summed = torch.stack([share * each for share, each in zip(shares, grown, strict=True)]).sum(0)
        return summed[: size[0], : size[1]]
    return torch.stack(grown).amax(0)[: size[0], : size[1]]


def show_image(axes: Axes, image: Tensor, boxes: Tensor) -> None:
    """An image with the boxes of its objects."""
    axes.imshow(image.numpy())
    frame(axes, boxes)


def show_heat(axes: Axes, image: Tensor, heat: Tensor, boxes: Tensor, highest: float = 1.0) -> None:
    """A map over a grey image; `highest` is the number that is shown brightest."""
    axes.imshow(image.mean(-1).numpy(), cmap="gray", vmin=-0.3, vmax=1.6)
    axes.imshow(heat.numpy(), cmap="inferno", vmin=0, vmax=max(highest, 1e-12), alpha=0.75)
    frame(axes, boxes)


def frame(axes: Axes, boxes: Tensor) -> None:
    """Objects' boxes; no ticks."""
    for left, top, right, bottom in boxes.tolist():
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="white", linewidth=1.2))
    axes.set_axis_off()


def draw_maps(lines: Sequence[Mapping[str, Any]], cell: tuple[float, float], own_scale: bool = False) -> Figure:
    """A row for each image: the image with its boxes, then its heat maps.

    Args:
        lines: `image`, `boxes` and `maps` by their titles, the same ones in every line.
        cell: Width and height of a picture in inches.
        own_scale: The strongest pixel of each map is the brightest; otherwise 1 is.
    """
    names = list(lines[0]["maps"])
    figure = Figure(figsize=(cell[0] * (len(names) + 1), cell[1] * len(lines)), layout="constrained")
    grid = figure.subplots(len(lines), len(names) + 1, squeeze=False)
    for axes, line in zip(grid, lines, strict=True):
        show_image(axes[0], line["image"], line["boxes"])
        for each, name in zip(axes[1:], names, strict=True):
            heat = line["maps"][name]
            show_heat(each, line["image"], heat, line["boxes"], float(heat.max()) if own_scale else 1.0)
    for axes, name in zip(grid[0], ["image", *names], strict=True):
        axes.set_title(name, fontsize=10)
    return figure
