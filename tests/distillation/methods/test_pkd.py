"""PKD: blind to scale and offset, the closed form for opposite maps, and where features are taken."""

import pytest
import torch

from crosskd_hf.distillation import PKD, Distiller
from crosskd_hf.distillation.method import Method
from crosskd_hf.models.losses import divide
from tests.distillation.step import distilled_losses
from tests.distillation.stubs import build_method, empty_batch, maps_pass
from tests.tiny_dense import make_batch, make_detector

SHAPES = [(8, 6), (4, 3), (2, 2)]


def pyramid(seed: int, channels: int = 4, batch: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, channels, *shape, generator=generator) for shape in SHAPES]


def make(statistics: str = "image", student: int = 4, weight: float = 6.0) -> Method:
    return build_method(PKD(weight=weight, statistics=statistics), student, 4, len(SHAPES))


def loss_of(pkd: Method, student: list[torch.Tensor], teacher: list[torch.Tensor]) -> torch.Tensor:
    parts = pkd(maps_pass(student), maps_pass(teacher), empty_batch(len(student[0])))
    return pkd.config.weight * divide(parts)["features"]


@pytest.mark.parametrize("statistics", ["image", "batch"])
def test_affine_maps_cost_nothing(statistics: str) -> None:
    teacher = pyramid(0)
    student = [feature * 3.5 - 2 for feature in teacher]
    assert loss_of(make(statistics), student, teacher).item() < 1e-8


@pytest.mark.parametrize("statistics", ["image", "batch"])
def test_opposite_maps_cost_two_of_n_minus_one_over_n(statistics: str) -> None:
    teacher = pyramid(0)
    counts = [h * w * (3 if statistics == "batch" else 1) for h, w in SHAPES]
    expected = sum(2 * 6.0 * (n - 1) / n for n in counts)
    loss = loss_of(make(statistics), [-2 * feature for feature in teacher], teacher)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_is_one_minus_pearsons_correlation() -> None:
    student, teacher = pyramid(0), pyramid(1)
    expected = 0.0
    for s, t, (h, w) in zip(student, teacher, SHAPES, strict=True):
        pairs = zip(s.reshape(-1, h * w), t.reshape(-1, h * w), strict=True)
        correlation = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).mean().item()
        expected += (h * w - 1) / (h * w) * (1 - correlation)
    assert loss_of(make(weight=1.0), student, teacher).item() == pytest.approx(expected, rel=1e-4)


def test_single_elements_cost_nothing_and_are_finite() -> None:
    student = torch.randn(1, 4, 1, 1, requires_grad=True)
    pkd = build_method(PKD(weight=6.0), 4, 4, 1)
    loss = loss_of(pkd, [student], [torch.randn(1, 4, 1, 1)])
    loss.backward()
    assert loss == 0
    assert not student.grad.any()


def test_gradient_knows_no_constant_direction() -> None:
    student = [feature.requires_grad_() for feature in pyramid(0)]
    loss_of(make(), student, pyramid(1)).backward()
    for feature in student:
        assert feature.grad.any()
        torch.testing.assert_close(feature.grad.sum((2, 3)), torch.zeros(3, 4), rtol=0, atol=1e-5)


def test_other_sizes_are_resized_to_the_teachers() -> None:
    student = [torch.randn(3, 4, 2 * h, 2 * w) for h, w in SHAPES]
    assert loss_of(make(), student, pyramid(1)) > 0


def test_other_widths_are_adapted() -> None:
    pkd = make(student=2)
    loss_of(pkd, pyramid(0, channels=2), pyramid(1)).backward()
    assert [name for name, _ in pkd.named_parameters()] == ["adapters.2_to_4.weight", "adapters.2_to_4.bias"]
    assert all(parameter.grad.any() for parameter in pkd.parameters())


def test_no_gradient_reaches_the_teacher() -> None:
    teacher = [feature.requires_grad_() for feature in pyramid(1)]
    assert not loss_of(make(), pyramid(0), teacher).requires_grad


class TestLocation:
    @pytest.mark.parametrize("location", ["cls", "reg", "cls+reg"])
    def test_of_the_towers_reaches_their_first_three_convolutions(self, location: str) -> None:
        student, teacher = make_detector("gfl").train(), make_detector("retinanet", seed=1)
        distiller = Distiller(student, teacher, [PKD(location=location)])
        batch = make_batch()
        losses = distilled_losses(distiller, student, batch)
        losses["pkd/features"].backward()
        for name, tower in (("cls", student.head.cls_tower), ("reg", student.head.reg_tower)):
            reached = [layer.conv.weight.grad is not None for layer in tower]
            assert reached == ([True] * 3 + [False] if name in location else [False] * 4)
        assert student.neck.output[0].weight.grad.any()

    def test_both_towers_are_the_sum_of_each(self) -> None:
        student, teacher = make_detector("gfl").train(), make_detector("gfl", seed=1)
        batch, found = make_batch(), {}
        for location in ("cls", "reg", "cls+reg"):
            distiller = Distiller(student, teacher, [PKD(location=location)])
            outputs = student(**batch, **distiller.student_request)
            found[location] = divide(distiller(outputs, batch))["pkd/features"].item()
        assert found["cls"] + found["reg"] == pytest.approx(found["cls+reg"], rel=1e-5)

    def test_towers_that_are_too_short(self) -> None:
        with pytest.raises(ValueError, match="location needs 3 convolutions in the towers, but the student's have 2"):
            Distiller(make_detector("gfl", num_convs=2), make_detector("gfl"), [PKD(location="cls")])
