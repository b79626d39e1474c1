"""PKD: blind to scale and offset, and the closed form for opposite maps."""

import pytest
import torch

from crosskd_hf.distillation.pkd import PearsonKD
from crosskd_hf.models.losses import divide

SHAPES = [(8, 6), (4, 3), (2, 2)]


def pyramid(seed: int, channels: int = 4, batch: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, channels, *shape, generator=generator) for shape in SHAPES]


def loss_of(pkd: PearsonKD, student: list[torch.Tensor], teacher: list[torch.Tensor]) -> float:
    return divide({"loss_feat_kd": pkd(student, teacher)})["loss_feat_kd"].item()


@pytest.mark.parametrize("statistics", ["image", "batch"])
def test_affine_maps_cost_nothing(statistics: str) -> None:
    teacher = pyramid(0)
    student = [feature * 3.5 - 2 for feature in teacher]
    assert loss_of(PearsonKD(4, 4, 6.0, statistics), student, teacher) < 1e-8


@pytest.mark.parametrize("statistics", ["image", "batch"])
def test_opposite_maps_cost_two_of_n_minus_one_over_n(statistics: str) -> None:
    teacher = pyramid(0)
    counts = [h * w * (3 if statistics == "batch" else 1) for h, w in SHAPES]
    expected = sum(2 * 6.0 * (n - 1) / n for n in counts)
    loss = loss_of(PearsonKD(4, 4, 6.0, statistics), [-2 * feature for feature in teacher], teacher)
    assert loss == pytest.approx(expected, rel=1e-4)


def test_is_one_minus_pearsons_correlation() -> None:
    student, teacher = pyramid(0), pyramid(1)
    expected = 0.0
    for s, t, (h, w) in zip(student, teacher, SHAPES, strict=True):
        pairs = zip(s.reshape(-1, h * w), t.reshape(-1, h * w), strict=True)
        correlation = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).mean().item()
        expected += (h * w - 1) / (h * w) * (1 - correlation)
    assert loss_of(PearsonKD(4, 4, 1.0, "image"), student, teacher) == pytest.approx(expected, rel=1e-4)


def test_single_elements_cost_nothing_and_are_finite() -> None:
    student = torch.randn(1, 4, 1, 1, requires_grad=True)
    part = PearsonKD(4, 4, 6.0, "image")([student], [torch.randn(1, 4, 1, 1)])
    part.total.backward()
    assert part.total == 0
    assert not student.grad.any()


def test_gradient_knows_no_constant_direction() -> None:
    student = [feature.requires_grad_() for feature in pyramid(0)]
    PearsonKD(4, 4, 6.0, "image")(student, pyramid(1)).total.backward()
    for feature in student:
        assert feature.grad.any()
        torch.testing.assert_close(feature.grad.sum((2, 3)), torch.zeros(3, 4), rtol=0, atol=1e-5)


def test_other_sizes_are_resized_to_the_teachers() -> None:
    student = [torch.randn(3, 4, 2 * h, 2 * w) for h, w in SHAPES]
    assert loss_of(PearsonKD(4, 4, 6.0, "image"), student, pyramid(1)) > 0


def test_other_widths_are_adapted() -> None:
    pkd = PearsonKD(2, 4, 6.0, "image")
    pkd(pyramid(0, channels=2), pyramid(1)).total.backward()
    assert pkd.adapter.weight.grad.any()


def test_no_gradient_reaches_the_teacher() -> None:
    teacher = [feature.requires_grad_() for feature in pyramid(1)]
    assert not PearsonKD(4, 4, 6.0, "image")(pyramid(0), teacher).total.requires_grad
