"""Where methods move the features that the student's head reads (CrossKD, Fig. 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..create import Detector
from ..data.dataset import DetectionData
from ..distillation import PKD, Distiller, MethodConfig
from ..distillation.passes import Batch, FeatureMap
from ..models.losses import divide
from .pictures import boxes_of, draw_maps, image_size, inside, overlay, picture, save, write_csv
from .probe import batches

Norms = dict[str, list[Tensor]]


def feature_gradients(distiller: Distiller, inputs: Mapping[str, Any]) -> tuple[list[FeatureMap], Norms]:
    """Length over the channels of each method's gradient at every location of the features.

    Args:
        distiller: Some method of it reads features.

    Returns:
        The student's features, and by the name of a method one (B, H, W) map for each of them.
    """
    student = distiller.pair.student
    outputs = student.model(**inputs, **distiller.student_request)
    batch = Batch(inputs["pixel_values"], inputs["pixel_mask"], inputs["labels"])
    own, teacher = student.read(outputs, batch), distiller.pair.teacher.teacher_pass(batch)
    features = [feature.values for feature in own.features]
    found: Norms = {}
    for name, method in distiller.named_methods.items():
        losses = divide(method(own, teacher, batch))
        weights = method.config.terms
        total = torch.stack([weights[term] * loss.sum() for term, loss in losses.items() if term in weights]).sum()
        gradients: Sequence[Tensor | None] = [None] * len(features)
        if total.requires_grad:
            gradients = torch.autograd.grad(total, features, retain_graph=True, allow_unused=True)
        found[name] = [
            values.new_zeros(values[:, 0].shape) if gradient is None else gradient.detach().norm(dim=1)
            for values, gradient in zip(features, gradients, strict=True)
        ]
    return own.features, found


def share_inside(norms: Sequence[Tensor], boxes: Tensor, strides: Sequence[int], size: tuple[int, int]) -> list[float]:
    """Share of the gradient that lies in boxes, and the boxes' share of the locations.

    Args:
        norms: (H, W) of one image, level by level.
        boxes: (n, 4) xyxy pixels.
        strides: Of the levels.
        size: Height and width of the image without padding; the padding doesn't count.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    whole = torch.tensor([[0.0, 0.0, size[1], size[0]]])
    for norm, stride in zip(norms, strides, strict=True):
        shape = tuple(norm.shape)
        image, objects = (inside(each, shape, stride) for each in (whole, boxes))  # type: ignore[arg-type]
        norm = norm.double().cpu()
        sums += torch.stack([norm[objects & image].sum(), norm[image].sum(), (objects & image).sum(), image.sum()])
    return [float(sums[0] / sums[1]) if sums[1] else 0.0, float(sums[2] / sums[3].clamp(min=1))]


def gradients(
    student: Detector,
    teacher: Detector,
    data: DetectionData,
    out: Path,
    number: int = 4,
    methods: Sequence[MethodConfig | str] = ("pkd", "crosskd"),
) -> list[Path]:
    """Write `gradients.png`, heat maps of each method on each image, and `gradients.csv`, their shares in the objects.

    Args:
        student, teacher: Any pair that the methods take.
        data: The images, of which the first `number` with objects are shown.
        out: Folder.
        methods: What is compared. Adapters between different widths are new.
    """
    student.model.eval()
    configs = MethodConfig.parse_all(methods)
    names = [config.name for config in configs]
    reading = configs if any("features" in config.method.needs for config in configs) else [*configs, PKD()]
    lines: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    with Distiller(student.model, teacher.model, reading, student.processor, teacher.processor) as distiller:
        for inputs in batches(student, data, number):
            features, norms = feature_gradients(distiller, inputs)
            strides = [feature.stride for feature in features]
            for row in range(len(inputs["labels"])):
                maps = {name: [level[row] for level in norms[name]] for name in names}
                rows += _shares(inputs, row, maps, strides, len(lines))
                lines.append(_line(inputs, row, maps))
    return [save(draw(lines), out / "gradients.png"), write_csv(out / "gradients.csv", rows)]


def _shares(inputs: Mapping[str, Any], row: int, maps: Norms, strides: list[int], number: int) -> list[dict[str, Any]]:
    boxes, size = boxes_of(inputs, row), image_size(inputs, row)
    shares = {name: share_inside(levels, boxes, strides, size) for name, levels in maps.items()}
    return [
        {"image": number, "method": name, "gradient_in_boxes": round(inner, 6), "area_of_boxes": round(area, 6)}
        for name, (inner, area) in shares.items()
    ]


def _line(inputs: Mapping[str, Any], row: int, maps: Norms) -> dict[str, Any]:
    padded, size = tuple(inputs["pixel_values"].shape[-2:]), image_size(inputs, row)
    heat = {name: overlay(levels, padded, size, density=True) for name, levels in maps.items()}  # type: ignore[arg-type]
    return {"image": picture(inputs, row), "boxes": boxes_of(inputs, row), "maps": heat}


def draw(lines: list[dict[str, Any]]) -> Figure:
    """Images with boxes, and each method's gradient per pixel; the strongest pixel of a map is the brightest."""
    return draw_maps(lines, (2.6, 2.7), own_scale=True)
