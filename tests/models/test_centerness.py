"""Centerness by its closed form (FCOS, eq. 3)."""

from typing import Any

import pytest
import torch

from crosskd_hf.models.assigners import Assignment, Priors
from crosskd_hf.models.centerness import centerness_loss, centerness_targets
from tests.tiny_dense import make_detector


def scene() -> tuple[Priors, Assignment]:
    """Points at (2, 2) and (5, 5), both of a box of 10 x 20 pixels; a third one, outside, is negative."""
    points = torch.tensor([[2.0, 2], [5, 5], [50, 50]])
    priors = Priors(points.repeat(1, 2), points, points, torch.full((3,), 8.0), (3,))
    boxes = torch.tensor([0.0, 0, 10, 20]).expand(1, 3, 4)
    positive = torch.tensor([[True, True, False]])
    return priors, Assignment(positive, positive.float(), boxes, torch.zeros(1, 3, dtype=torch.long))


def test_root_of_the_products_of_nearer_to_farther_sides() -> None:
    expected = torch.tensor([[(2 / 8 * 2 / 18) ** 0.5, (5 / 5 * 5 / 15) ** 0.5, 0.0]])
    torch.testing.assert_close(centerness_targets(*scene()), expected)


def test_loss_counts_positives_alone() -> None:
    _, assignment = scene()
    loss = centerness_loss(torch.tensor([[0.0, 0.0, 9.0]]), torch.tensor([[0.5, 1.0, 0.0]]), assignment)
    torch.testing.assert_close(loss, torch.tensor(2.0).log() * 2)


@pytest.mark.parametrize(
    ("kind", "changes", "tower"),
    [
        ("fcos", {}, "cls_tower"),  # as in the paper
        ("fcos", {"centerness_on_reg": True}, "reg_tower"),
        ("atss", {}, "reg_tower"),
    ],
)
def test_the_tower_that_predicts_it(kind: str, changes: dict[str, Any], tower: str) -> None:
    head = make_detector(kind, **changes).head
    features = [torch.randn(1, 16, 128 // stride, 128 // stride) for stride in head.config.strides]
    head(features).centerness.sum().backward()
    for name in ("cls_tower", "reg_tower"):
        assert any(p.grad is not None for p in getattr(head, name).parameters()) == (name == tower)
