"""Plain KD of DETR-type models: queries are matched one to one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from crosskd_hf.distillation import KD, Distiller
from crosskd_hf.distillation.matching import clipped, match, match_cost
from crosskd_hf.distillation.passes import Batch, Pass, Prediction
from crosskd_hf.models.boxes import to_absolute
from crosskd_hf.models.losses import divide
from tests.distillation.detr_zoo import batch, build
from tests.distillation.step import distilled_parts
from tests.parity.drawn import CLASSES, DrawnView
from tests.parity.drawn import build as build_method

SIZES = torch.tensor([[64.0, 48]])


def queries(count: int, seed: int = 0) -> Prediction:
    torch.manual_seed(seed)
    boxes = torch.rand(1, count, 4) * 0.4 + 0.3
    return Prediction(torch.randn(1, count, CLASSES), boxes)


def losses(student: Prediction, teacher: Prediction, **options: Any) -> dict[str, Tensor]:
    view = DrawnView(1, kind="queries"), DrawnView(1, "teacher", "queries")
    method = build_method(KD(**options), *view)
    seen = Batch(torch.zeros(1, 3, 64, 48), None, [])
    passes = [Pass(predictions=[each], decode=lambda boxes: to_absolute(boxes, SIZES)) for each in (student, teacher)]
    return divide(method(*passes, seen))


class TestMatching:
    @pytest.mark.parametrize("softmax", [False, True])
    def test_shuffled_queries_find_themselves(self, softmax: bool) -> None:
        own = queries(7)
        order = torch.randperm(7)
        other = Prediction(own.logits[:, order], own.regression[:, order])
        (rows,) = match([match_cost(own, other, SIZES, softmax)])
        assert torch.equal(order[rows.teacher[0]], rows.student[0])

    def test_the_smaller_model_has_all_its_queries_matched(self) -> None:
        (rows,) = match([match_cost(queries(7), queries(4, 1), SIZES, False)])
        assert rows.student.shape == (1, 4)
        assert rows.teacher.sort().values.tolist() == [[0, 1, 2, 3]]

    def test_boxes_of_a_teacher_end_with_the_image(self) -> None:
        found = clipped(torch.tensor([[[0.0, 0.5, 0.5, 1.5]]]), SIZES)
        torch.testing.assert_close(found, torch.tensor([[[0.125, 0.5, 0.25, 1.0]]]))


class TestLoss:
    def test_the_order_of_queries_makes_no_difference(self) -> None:
        student, teacher = queries(6), queries(6, 1)
        order = torch.randperm(6)
        shuffled = Prediction(teacher.logits[:, order], teacher.regression[:, order])
        torch.testing.assert_close(losses(student, teacher), losses(student, shuffled))

    def test_equal_predictions(self) -> None:
        found = losses(queries(6), queries(6), beta=1)
        assert all(loss.item() == pytest.approx(0, abs=1e-5) for loss in found.values())

    def test_queries_without_a_partner_have_no_loss_unless_as_released(self) -> None:
        student, teacher = queries(6), queries(4, 1)
        student.logits.requires_grad_()
        (gradient,) = torch.autograd.grad(losses(student, teacher)["cls"], student.logits)
        assert (gradient.abs().sum(-1) == 0).sum() == 2
        (filled,) = torch.autograd.grad(losses(student, teacher, unmatched="released")["cls"], student.logits)
        assert (filled.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("family", ["detr", "deformable_detr"])
def test_every_layer_of_the_students_decoder_learns(family: str) -> None:
    student, inputs = build(family), batch()
    distiller = Distiller(student, build(family, 1), ["kd"])
    parts = distilled_parts(distiller, student, inputs)
    assert set(parts) == {"kd/cls", "kd/reg", "kd/iou"}
    assert all(part.total.shape == (student.config.decoder_layers,) for part in parts.values())
    torch.stack(list(divide(parts).values())).sum().backward()
    for layer in student.model.decoder.layers:
        assert any(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_classes_of_two_kinds_have_no_distance() -> None:
    with pytest.raises(ValueError, match="queries of softmax and of sigmoid classes no common distance"):
        Distiller(build("detr"), build("deformable_detr", 1), ["kd"])
