"""Losses and gradients of the DETRs of transformers stay finite, in float32 and under bfloat16 autocast, whatever the
images and boxes are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from crosskd_hf.distillation import Distiller
from crosskd_hf.models.losses import divide
from crosskd_hf.training.supervision import prepare, supervised_parts
from tests.distillation.detr_zoo import CLASSES, MODELS, build
from tests.tiny_dense import make_batch

PIXEL = 1 / 64
ONE = [[0.5, 0.5, 0.4, 0.3]]
BOXES: dict[str, list[list[float]]] = {
    "one": ONE,
    "of a pixel": [[0.5, 0.5, PIXEL, PIXEL], [PIXEL / 2, PIXEL / 2, PIXEL, PIXEL], [0.3, 0.7, 0.008, 0.008]],
    "without area": [[0.5, 0.5, 0.0, 0.0], [0.2, 0.2, 0.0, 0.3], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]],
    "over the border": [[0.05, 0.05, 0.3, 0.3], [0.98, 0.98, 0.2, 0.2], [0.5, 0.5, 3.0, 3.0], [1.0, 0.5, 1e-4, 0.2]],
    "equal": ONE * 12,
    "whole images": [[0.5, 0.5, 1.0, 1.0]] * 5,
}


def labels(boxes: list[list[float]]) -> dict[str, Tensor]:
    return {"class_labels": torch.arange(len(boxes)) % CLASSES, "boxes": torch.tensor(boxes).reshape(-1, 4)}


def many(number: int) -> list[list[float]]:
    generator = torch.Generator().manual_seed(1)
    sides = torch.rand(number, 2, generator=generator) * 0.5 + 0.01
    return torch.cat([torch.rand(number, 2, generator=generator) * (1 - sides) + sides / 2, sides], dim=1).tolist()


def inputs_of(case: str) -> dict[str, Any]:
    """Two images of 64 px, the second one padded unless the case has sizes of its own."""
    sizes = {"a row and a pixel": ((1, 64), (1, 1))}.get(case, ((64, 64), (48, 56)))
    batch = make_batch(sizes=sizes, counts=(0, 0))
    first, second = {
        "no object": ([], []),
        "an empty image": (ONE, []),
        "1000": (many(1000), many(1000)),
        "a row and a pixel": (ONE, ONE),
    }.get(case, (BOXES.get(case, ONE),) * 2)
    return batch | {"labels": [labels(first), labels(second)]}


CASES = (*BOXES, "no object", "an empty image", "1000", "a row and a pixel")
QUICK = ("deformable_detr", "rt_detr", "detr")  # of the kinds of losses


def every_case() -> Iterator[Any]:
    """Family, case and precision; the most of them are slow together."""
    for family, case, precision in itertools.product(MODELS, CASES, ("float32", "bfloat16")):
        quick = family in QUICK and case != "1000" and precision == "bfloat16"
        yield pytest.param(family, case, precision, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("family", "case", "precision"), list(every_case()))
def test_losses_and_gradients_are_finite(family: str, case: str, precision: str) -> None:
    student, teacher = build(family, 2), build(family, 1)
    prepare(student, None)
    distiller = Distiller(student.train(), teacher, ["crosskd"])
    distiller.prepare_student()
    batch = inputs_of(case)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        outputs = student(**batch, **distiller.student_request)
        parts = divide(supervised_parts(student, outputs, batch) | distiller(outputs, batch))
    torch.stack(list(parts.values())).sum().backward()
    assert {name.partition("/")[0] for name in parts if "/" in name} == {"crosskd"}
    wrong = {name: part for name, part in parts.items() if not part.isfinite() or part.dtype != torch.float32}
    assert not wrong
    gradients = {name: p.grad for name, p in [*student.named_parameters(), *distiller.named_parameters()]}
    assert any(gradient is not None and gradient.any() for gradient in gradients.values())
    assert not [name for name, gradient in gradients.items() if gradient is not None and not gradient.isfinite().all()]
