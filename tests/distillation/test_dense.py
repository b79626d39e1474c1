"""Distillation between dense detectors, whatever their heads: pairs, batches, normalizers."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from crosskd_hf.distillation import DenseDistiller, DistillationConfig, make_distiller
from crosskd_hf.distillation.mimic import WEIGHTS, Rows, mimic
from crosskd_hf.models import DenseDetector
from crosskd_hf.models.assigners import Assignment
from crosskd_hf.models.dense import Predictions
from crosskd_hf.models.losses import LossPart, divide
from tests.tiny_dense import KINDS, make_batch, make_detector

METHODS = [("crosskd",), ("kd",), ("pkd",), ("crosskd", "pkd"), ("crosskd", "kd")]


def parts_of(student: DenseDetector, distiller: DenseDistiller, batch: dict[str, Any]) -> dict[str, LossPart]:
    outputs = student(**batch, **distiller.student_request)
    return {**outputs.loss_parts, **distiller(outputs, batch)}


def total_of(parts: dict[str, LossPart]) -> Tensor:
    return torch.stack(list(divide(parts).values())).sum()


def make_pair(kind: str = "gfl", teacher_kind: str | None = None) -> tuple[DenseDetector, DenseDetector]:
    return make_detector(kind).train(), make_detector(teacher_kind or kind, seed=1)


@pytest.mark.parametrize("methods", METHODS, ids="+".join)
@pytest.mark.parametrize(("student_kind", "teacher_kind"), list(itertools.product(KINDS, KINDS)))
def test_any_teacher_for_any_student(student_kind: str, teacher_kind: str, methods: tuple[str, ...]) -> None:
    student, teacher = make_pair(student_kind, teacher_kind)
    if methods == ("crosskd", "kd") and student_kind != teacher_kind:
        with pytest.raises(ValueError, match="different normalizers"):
            make_distiller(student, teacher, DistillationConfig(methods=methods))
        return
    distiller = make_distiller(student, teacher, DistillationConfig(methods=methods))
    losses = divide(distiller(student(**(batch := make_batch()), **distiller.student_request), batch))
    total = torch.stack(list(losses.values())).sum()
    distiller.check_gradients(student, total)
    assert all(loss.isfinite() for loss in losses.values())
    assert ("loss_feat_kd" in losses) == ("pkd" in methods)
    assert ("loss_reg_kd" in losses) == (methods != ("pkd",))
    assert all(parameter.grad is None for parameter in student.head.parameters())
    assert total > 0


@pytest.mark.parametrize("methods", METHODS, ids="+".join)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [(0, 0), (0, 2)])
def test_images_without_objects(kind: str, methods: tuple[str, ...], counts: tuple[int, int]) -> None:
    student, teacher = make_pair(kind)
    distiller = make_distiller(student, teacher, DistillationConfig(methods=methods))
    total = total_of(parts_of(student, distiller, make_batch(counts=counts)))
    total.backward()
    assert total.isfinite()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_do_not_depend_on_how_a_batch_is_split(kind: str) -> None:
    student, teacher = make_pair(kind)
    config = DistillationConfig(methods=("crosskd", "kd", "pkd"), statistics="image")
    distiller = make_distiller(student, teacher, config)
    whole = make_batch(((64, 64), (48, 56), (64, 40), (33, 64)), (3, 1, 0, 5))
    halves = [{key: value[half] for key, value in whole.items()} for half in (slice(2), slice(2, 4))]
    expected = parts_of(student, distiller, whole)
    first, second = (parts_of(student, distiller, half) for half in halves)
    assert expected.keys() == first.keys()
    for key, part in expected.items():
        torch.testing.assert_close(first[key].total + second[key].total, part.total, rtol=1e-4, atol=1e-6, msg=key)
        together = (first[key].normalizer + second[key].normalizer).float()
        torch.testing.assert_close(together, part.normalizer.float(), rtol=1e-4, atol=1e-6, msg=key)


def test_statistics_of_the_batch_depend_on_the_split() -> None:
    student, teacher = make_pair()
    distiller = make_distiller(student, teacher, DistillationConfig(statistics="batch"))
    whole = make_batch()
    halves = [{key: value[half] for key, value in whole.items()} for half in (slice(1), slice(1, 2))]
    sums = [sum(parts_of(student, distiller, b)["loss_cls_kd"].total for b in batches) for batches in ([whole], halves)]
    assert abs(sums[0] - sums[1]) > 1e-3 * sums[0]


class TestFloor:
    @pytest.mark.parametrize("methods", [("crosskd",), ("kd",)])
    def test_fcos_without_objects_divides_by_one(self, methods: tuple[str, ...]) -> None:
        student, teacher = make_pair("fcos")
        batch = make_batch(counts=(0, 0))
        distiller = make_distiller(student, teacher, DistillationConfig(methods=methods))
        for key, part in distiller(student(**batch, **distiller.student_request), batch).items():
            assert part.normalizer == 0
            assert divide({key: part})[key] == part.total

    def test_the_authors_floor_can_be_had(self) -> None:
        student, teacher = make_pair("fcos")
        batch = make_batch(counts=(0, 0))
        distiller = make_distiller(student, teacher, DistillationConfig(normalizer_floor=1e-6))
        part = distiller(student(**batch, **distiller.student_request), batch)["loss_cls_kd"]
        assert divide({"a": part})["a"].item() == pytest.approx(1e6 * part.total.item(), rel=1e-5)


class TestMimic:
    """Distances of predictions that don't come from features."""

    @staticmethod
    def rows(kind: str, normalizer: float = 4.0) -> tuple[DenseDetector, Predictions, Predictions, Rows]:
        model = make_detector(kind)
        head, batch = model.head, 2
        priors = head.priors([(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)], torch.device("cpu"))
        count = len(priors.boxes)
        predictions = [
            Predictions(
                torch.randn(batch, count, 3),
                torch.randn(batch, count, head.regression_width),
                torch.randn(batch, count) if head.centerness is not None else None,
            )
            for _ in range(2)
        ]
        weight = (torch.rand(batch, count) > 0.3).float()
        assignment = Assignment(
            (torch.rand(batch, count) > 0.8) & weight.bool(),
            weight,
            torch.zeros(batch, count, 4),
            torch.zeros(batch, count, dtype=torch.long),
        )
        return model, *predictions, Rows(priors, assignment, torch.tensor(normalizer), 1.0)

    @pytest.mark.parametrize("kind", KINDS)
    def test_rows_of_weight_zero_contribute_nothing(self, kind: str) -> None:
        model, predictions, target, rows = self.rows(kind)
        weights = WEIGHTS[model.head.regression_kind]
        expected = divide(mimic(model.head, predictions, target, rows, weights))
        out = rows.assignment.weight == 0
        noise = [
            p._replace(
                logits=torch.where(out[..., None], torch.randn_like(p.logits), p.logits),
                regression=torch.where(out[..., None], torch.randn_like(p.regression), p.regression),
            )
            for p in (predictions, target)
        ]
        got = divide(mimic(model.head, *noise, rows, weights))
        assert got.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(got[key], expected[key])

    @pytest.mark.parametrize("kind", KINDS)
    def test_twice_the_positives_halve_the_loss(self, kind: str) -> None:
        model, predictions, target, rows = self.rows(kind)
        weights = WEIGHTS[model.head.regression_kind]
        one, two = (
            divide(mimic(model.head, predictions, target, rows._replace(normalizer=torch.tensor(n)), weights))
            for n in (4.0, 8.0)
        )
        torch.testing.assert_close(two["loss_cls_kd"] * 2, one["loss_cls_kd"])
        factor = 1 if kind == "gfl" else 2  # GFL's boxes are divided by the teacher's confidence
        torch.testing.assert_close(two["loss_reg_kd"] * factor, one["loss_reg_kd"])

    def test_distributions_are_divided_by_the_teachers_confidence(self) -> None:
        model, predictions, target, rows = self.rows("gfl")
        weights = WEIGHTS["distribution"]
        sure = target._replace(logits=torch.full_like(target.logits, 5.0))
        unsure = target._replace(logits=torch.full_like(target.logits, -5.0))
        losses = [divide(mimic(model.head, predictions, t, rows, weights))["loss_reg_kd"] for t in (sure, unsure)]
        torch.testing.assert_close(*losses)

    @pytest.mark.parametrize("kind", KINDS)
    def test_no_gradient_reaches_the_target(self, kind: str) -> None:
        model, predictions, target, rows = self.rows(kind)
        target = Predictions(*(t if t is None else t.requires_grad_() for t in target))
        parts = mimic(model.head, predictions, target, rows, WEIGHTS[model.head.regression_kind])
        assert not any(part.total.requires_grad for part in parts.values())

    @pytest.mark.parametrize("value", [100.0, -100.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kind", KINDS)
    def test_extreme_predictions_are_finite(self, kind: str, dtype: torch.dtype, value: float) -> None:
        model, predictions, target, rows = self.rows(kind)
        extreme = [t if t is None else torch.full_like(t, value).requires_grad_() for t in predictions]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            parts = mimic(model.head, Predictions(*extreme), target, rows, WEIGHTS[model.head.regression_kind])
            total = total_of(parts)
        total.backward()
        assert total.isfinite()
        assert all(tensor.grad is None or tensor.grad.isfinite().all() for tensor in extreme if tensor is not None)

    def test_a_weight_of_zero_leaves_the_loss_out(self) -> None:
        model, predictions, target, rows = self.rows("atss")
        weights = {"loss_cls_kd": 0.0, "loss_reg_kd": 1.0, "loss_centerness_kd": 0.0}
        assert list(mimic(model.head, predictions, target, rows, weights)) == ["loss_reg_kd"]


class TestNormalizer:
    def test_of_the_teacher_counts_the_teachers_positives(self) -> None:
        student, teacher = make_pair("gfl", "retinanet")
        batch = make_batch()
        part = self.part(student, teacher, batch, "teacher")
        own = teacher(**batch, cut=0).assignment
        assert part.normalizer == own.count_positives()

    def test_of_the_student(self) -> None:
        student, teacher = make_pair("gfl", "retinanet")
        batch = make_batch()
        assert (
            self.part(student, teacher, batch, "student").normalizer
            == student(**batch, cut=0).assignment.count_positives()
        )

    def test_score_sum(self) -> None:
        student, teacher = make_pair("gfl", "retinanet")
        batch = make_batch()
        got = teacher(**batch, cut=0)
        expected = (got.logits.sigmoid().amax(-1) * got.assignment.weight).sum()
        torch.testing.assert_close(self.part(student, teacher, batch, "score_sum").normalizer, expected)

    @staticmethod
    def part(student: DenseDetector, teacher: DenseDetector, batch: dict[str, Any], normalizer: Any) -> LossPart:
        distiller = make_distiller(student, teacher, DistillationConfig(normalizer=normalizer))
        return distiller(student(**batch, **distiller.student_request), batch)["loss_cls_kd"]


class TestClasses:
    @staticmethod
    def named(kind: str, names: tuple[str, ...], seed: int) -> DenseDetector:
        model = make_detector(kind, seed, num_labels=len(names))
        model.config.id2label = dict(enumerate(names))
        return model

    @pytest.mark.parametrize("methods", [("crosskd",), ("kd",)])
    def test_classes_the_teacher_does_not_know_are_left_alone(self, methods: tuple[str, ...]) -> None:
        student = self.named("gfl", ("cow", "unicorn", "dog"), 0).train()
        teacher = self.named("gfl", ("dog", "cat", "cow", "bird"), 1)
        distiller = make_distiller(student, teacher, DistillationConfig(methods=methods))
        batch = make_batch()
        total_of(distiller(student(**batch, **distiller.student_request), batch)).backward()
        assert distiller.describe()["classes"] == {"teacher": [2, 0], "student": [0, 2]}
        assert distiller.describe()["classes_not_distilled"] == ["unicorn"]
        gradient = student.head.classifier.bias.grad
        if methods == ("kd",):
            assert gradient[[0, 2]].all()
            assert gradient[1] == 0
        else:
            assert gradient is None

    def test_classes_in_another_order_are_the_same(self) -> None:
        student, teacher = self.named("gfl", ("a", "b", "c"), 0), self.named("gfl", ("c", "a", "b"), 0)
        order = [1, 2, 0]  # of the student's classes in the teacher
        with torch.no_grad():
            for parameter in student.head.classifier.parameters():
                parameter.copy_(parameter[order])
        distiller = make_distiller(student, teacher, DistillationConfig(methods=("kd",)))
        batch = make_batch()
        losses = divide(distiller(student(**batch, **distiller.student_request), batch))
        assert all(loss.abs() < 1e-5 for loss in losses.values())

    def test_no_shared_class(self) -> None:
        with pytest.raises(ValueError, match="share no class name"):
            make_distiller(self.named("gfl", ("a",), 0), self.named("gfl", ("b",), 0), DistillationConfig())


class TestRefusals:
    def test_other_strides(self) -> None:
        coarse = make_detector("gfl", strides=(16, 32, 64), backbone_strides=(16, 32))
        with pytest.raises(ValueError, match=r"strides \(16, 32, 64\), the teacher's \(8, 16, 32, 64, 128\)"):
            make_distiller(coarse, make_detector("gfl"), DistillationConfig())

    def test_centerness_that_the_teacher_lacks(self) -> None:
        with pytest.raises(ValueError, match="predicts no centerness"):
            make_distiller(*make_pair("atss", "gfl"), DistillationConfig(loss_weights={"loss_centerness_kd": 1.0}))
        assert make_distiller(*make_pair("atss", "gfl"), DistillationConfig()).weights["loss_centerness_kd"] == 0

    def test_outputs_without_what_was_requested(self) -> None:
        student, teacher = make_pair()
        distiller = make_distiller(student, teacher, DistillationConfig(methods=("crosskd", "pkd")))
        batch = make_batch()
        with pytest.raises(ValueError, match="no taps"):
            distiller(student(**batch, output_features=True), batch | {"labels": None})
        unlabelled = batch | {"labels": None}
        with pytest.raises(ValueError, match="no targets"):
            distiller(student(**unlabelled, **distiller.student_request), unlabelled)

    def test_another_number_of_levels(self) -> None:
        short = make_detector("gfl", strides=(8, 16, 32, 64))
        with pytest.raises(ValueError, match="same levels"):
            make_distiller(short, make_detector("gfl"), DistillationConfig())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("methods", [("crosskd", "pkd"), ("kd",)], ids="+".join)
def test_under_bfloat16_autocast(kind: str, methods: tuple[str, ...]) -> None:
    student, teacher = make_pair(kind)
    distiller = make_distiller(student, teacher, DistillationConfig(methods=methods))
    # Large enough that no strided convolution sees a single pixel: oneDNN's bfloat16 weight gradients fail there.
    batch = make_batch(((128, 128), (96, 112)))
    plain = total_of(parts_of(student, distiller, batch))
    with torch.autocast("cpu", torch.bfloat16):
        total = total_of(parts_of(student, distiller, batch))
    total.backward()
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(plain.item(), rel=0.1)
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


def test_pixels_are_converted_for_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = make_pair()
    distiller = make_distiller(student, teacher, DistillationConfig())
    seen: list[Tensor] = []
    forward: Callable[..., Any] = teacher.forward

    def record(pixels: Tensor, *rest: Any, **named: Any) -> Any:
        seen.append(pixels)
        return forward(pixels, *rest, **named)

    monkeypatch.setattr(teacher, "forward", record)
    distiller.pixels = lambda pixels, mask: pixels * 2 * mask[:, None]
    batch = make_batch()
    distiller(student(**batch, **distiller.student_request), batch)
    assert torch.equal(seen[0], batch["pixel_values"] * 2)
