"""Drawn passes: features and head outputs that both sides draw, in the passes that views hand to methods."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from crosskd_hf.distillation.method import Method, MethodConfig
from crosskd_hf.distillation.passes import (
    Batch,
    ComparableHead,
    FeatureMap,
    Needs,
    Pair,
    Pass,
    Prediction,
    rows_of_levels,
)
from crosskd_hf.models.assigners import Priors, Targets
from crosskd_hf.models.dense import DenseHead, Predictions
from crosskd_hf.models.layers import maps_to_rows
from crosskd_hf.models.losses import divide
from tests.distillation.stubs import STRIDES, MapsView
from tests.golden.methods import seeded_methods as sm

CLASSES = 12
SHOWN = 400  # so many rows of a region stand in a file


def drawn_batch(case: dict[str, Any], multiple: int = 32) -> Batch:
    """The batch of a case. Images are valid inside their size rounded up to a multiple, but not beyond the padding."""
    pad = torch.tensor(case["pad_shape"])
    sizes = [[min(math.ceil(e / multiple) * multiple, int(p)) for e, p in zip(s, pad, strict=True)]
             for s in case["image_shapes"]]  # fmt: skip
    mask = torch.zeros(len(sizes), *pad.tolist())
    for image, (height, width) in zip(mask, sizes, strict=True):
        image[:height, :width] = 1
    found = sm.seeded_boxes(case, CLASSES)
    labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in found]
    batch = Batch(torch.zeros(len(sizes), 3, *pad.tolist()), mask, labels)
    counts = torch.tensor([len(target["labels"]) for target in found])
    boxes = pad_sequence([torch.cat([target["boxes"], torch.zeros(1, 4)]) for target in found], batch_first=True)
    classes = pad_sequence([torch.cat([t["labels"], torch.zeros(1).long()]) for t in found], batch_first=True)
    # pixels, as drawn: not by way of relative boxes, which would round them
    batch.__dict__["targets"] = Targets(boxes, classes, torch.arange(boxes.shape[1]) < counts[:, None])
    return batch


class DrawnView(MapsView, ComparableHead):
    """Offers what the drawn passes hold."""

    offers = frozenset({"features", "predictions", "priors", "assignment"})

    def __init__(
        self, channels: int, role: Any = "student", kind: Any = "distribution", strides: tuple[int, ...] = STRIDES
    ) -> None:
        super().__init__(channels, role, strides)
        self.kind = kind
        self.model.config.id2label = {index: f"c{index}" for index in range(CLASSES)}

    def same_rows(self, student: Any) -> bool:
        return True

    def same_priors(self, student: Any) -> bool:
        return True

    def compare(self, student: Pass, own: Pass, classes: Any) -> Any:
        raise NotImplementedError


def build(config: MethodConfig, student: DrawnView, teacher: DrawnView) -> Method:
    """The method between two views, with all its numbers filled in."""
    pair = Pair(student, teacher)
    return config.method(config.published(pair), *pair)


def drawn_pass(
    batch: Batch,
    features: Sequence[Tensor],
    head: DenseHead | None = None,
    maps: dict[str, list[Tensor]] | None = None,
    needs: Needs = frozenset({"assignment"}),
    strides: Sequence[int] = STRIDES,
    anchors: Sequence[Tensor] | None = None,
) -> Pass:
    """Maps, and with a head its priors, the rows of its drawn output and what they are trained on.

    Args:
        batch: With its targets.
        features: One map for each stride; may be empty.
        head: Of a dense detector of 12 classes.
        maps: What the head's last convolutions returned: "logits", "regression" and "centerness" of each level.
        needs: Without "assignment" nothing is assigned.
        strides: Of the maps.
        anchors: (A, 4) at the first cell of each level, for a detector whose anchors alone are read.
    """
    found = Pass([FeatureMap(stride, values) for stride, values in zip(strides, features, strict=False)])
    height, width = batch.pixel_values.shape[-2:]
    shapes = [(math.ceil(height / stride), math.ceil(width / stride)) for stride in strides]
    if anchors is not None:
        found.priors = Priors.on_grid(shapes, strides, [(stride, stride) for stride in strides], anchors)
        found.rows = rows_of_levels(strides, found.priors)
    if head is None:
        return found
    found.priors = priors = head.priors(shapes, torch.device("cpu"))
    found.rows = rows_of_levels(strides, priors)
    found.decode = lambda regression: head.decode(regression, priors)
    rows, boxes = Predictions(torch.zeros(0), torch.zeros(0)), torch.zeros(0)
    if maps:
        centerness = maps_to_rows(maps["centerness"], 1)[..., 0] if "centerness" in maps else None
        rows = Predictions(
            maps_to_rows(maps["logits"], CLASSES), maps_to_rows(maps["regression"], head.coder.width), centerness
        )
        found.predictions = [Prediction(*rows)]
        boxes = head.decode(rows.regression, priors)
    if "assignment" in needs:
        found.assignment = head.assign(priors, priors.inside(batch.sizes), batch.targets, rows, boxes)
        found.normalizer = head.normalizer(priors, found.assignment)
    return found


def weighted(method: Method, student: Pass, teacher: Pass, batch: Batch) -> dict[str, Tensor]:
    """The divided terms with their weights."""
    parts, config = method(student, teacher, batch), method.config
    return {
        name: config.weight * config.terms[name] * loss for name, loss in divide(parts).items() if name in config.terms
    }


def by_level(method: Method, student: Pass, teacher: Pass, batch: Batch) -> dict[str, list[float]]:
    """The weighted quotients of each term; one for each level where the method divides level by level."""
    found = {}
    for name, part in method(student, teacher, batch).items():
        if name in method.config.terms:
            factor = method.config.weight * method.config.terms[name]
            found[name] = (factor * part.total / part.normalizer.clamp(min=part.floor)).reshape(-1).tolist()
    return found


def region_figures(region: Tensor, valued: bool = False) -> list[dict[str, Any]]:
    """What the files say of each image of (B, ...) regions."""
    found = []
    for image in region.flatten(1):
        rows = image.nonzero()[:, 0]
        figure: dict[str, Any] = {"count": len(rows), "indices": rows[:SHOWN].tolist()}
        if len(rows) > SHOWN:
            figure["truncated"] = True
        if valued and len(rows):
            figure["values"] = image[rows[:SHOWN]].tolist()
            figure["sum"] = image.double().sum().item()
        found.append(figure)
    return found


def gradient_figures(loss: Tensor, levels: Sequence[Tensor], samples: int = 6) -> dict[str, Any] | str:
    """Gradient of a loss with respect to the tensors of all levels, summarised as the files have it."""
    if not loss.requires_grad:
        return "none"
    found = torch.autograd.grad(loss, list(levels), retain_graph=True, allow_unused=True)
    if all(gradient is None for gradient in found):
        return "none"
    norms = [None if g is None or not g.any() else float(g.double().norm()) for g in found]
    if not any(norms):
        return "zero"
    first = next(level for level, norm in enumerate(norms) if norm)
    values = found[first].detach().double().reshape(-1)
    index = np.linspace(0, len(values) - 1, min(samples, len(values))).round().astype(int)
    return {
        "norm": sum(norm**2 for norm in norms if norm) ** 0.5,
        "norm_per_level": norms,
        "first_level_with_gradient": {
            "level": first,
            "shape": list(found[first].shape),
            "norm": norms[first],
            "samples": values[index].tolist(),
        },
    }
