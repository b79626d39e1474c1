"""Distillation between dense detectors, whatever their heads: pairs, batches, normalizers, classes."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou, generalized_box_iou

from crosskd_hf.distillation import CrossKD, Distiller, MethodConfig
from crosskd_hf.distillation.distances import mimic
from crosskd_hf.distillation.methods.crosskd import PUBLISHED
from crosskd_hf.distillation.passes import Comparison, Prediction
from crosskd_hf.models import DenseDetector
from crosskd_hf.models.losses import LossPart, divide
from tests.distillation.step import distilled_parts
from tests.tiny_dense import KINDS, make_batch, make_detector

METHODS = [("crosskd",), ("kd",), ("pkd",), ("crosskd", "pkd"), ("crosskd", "kd")]


def parts_of(student: DenseDetector, distiller: Distiller, batch: dict[str, Any]) -> dict[str, LossPart]:
    outputs = student(**batch, **distiller.student_request)
    return {**outputs.loss_parts, **distiller(outputs, batch)}


def kd_parts(
    student: DenseDetector, teacher: DenseDetector, method: MethodConfig | str, batch: dict[str, Any]
) -> dict[str, LossPart]:
    distiller = Distiller(student, teacher, [method])
    return distilled_parts(distiller, student, batch)


def total_of(parts: dict[str, LossPart]) -> Tensor:
    return torch.stack(list(divide(parts).values())).sum()


def make_pair(kind: str = "gfl", teacher_kind: str | None = None) -> tuple[DenseDetector, DenseDetector]:
    return make_detector(kind).train(), make_detector(teacher_kind or kind, seed=1)


@pytest.mark.parametrize("methods", METHODS, ids="+".join)
@pytest.mark.parametrize(("student_kind", "teacher_kind"), list(itertools.product(KINDS, KINDS)))
def test_any_teacher_for_any_student(student_kind: str, teacher_kind: str, methods: tuple[str, ...]) -> None:
    student, teacher = make_pair(student_kind, teacher_kind)
    distiller = Distiller(student, teacher, methods)
    losses = divide(distiller(student(**(batch := make_batch()), **distiller.student_request), batch))
    distiller.check_gradients(losses)
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    assert {key.split("/")[0] for key in losses} == {*methods}
    assert {f"{name}/reg" for name in methods if name != "pkd"} <= set(losses)
    assert all(parameter.grad is None for parameter in student.head.parameters())


@pytest.mark.parametrize("methods", METHODS, ids="+".join)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [(0, 0), (0, 2)])
def test_images_without_objects(kind: str, methods: tuple[str, ...], counts: tuple[int, int]) -> None:
    student, teacher = make_pair(kind)
    total = total_of(parts_of(student, Distiller(student, teacher, methods), make_batch(counts=counts)))
    total.backward()
    assert total.isfinite()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_do_not_depend_on_how_a_batch_is_split(kind: str) -> None:
    student, teacher = make_pair(kind)
    distiller = Distiller(student, teacher, ["crosskd", "kd", "pkd"])
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
    whole = make_batch()
    halves = [{key: value[half] for key, value in whole.items()} for half in (slice(1), slice(1, 2))]
    found = [[kd_parts(student, teacher, "crosskd:statistics=batch", b) for b in bs] for bs in ([whole], halves)]
    sums = [sum(parts["crosskd/cls"].total for parts in batches) for batches in found]
    assert abs(sums[0] - sums[1]) > 1e-3 * sums[0]


class TestFloor:
    @pytest.mark.parametrize("method", ["crosskd", "kd"])
    def test_fcos_without_objects_divides_by_one(self, method: str) -> None:
        for key, part in kd_parts(*make_pair("fcos"), method, make_batch(counts=(0, 0))).items():
            assert part.normalizer == 0
            assert divide({key: part})[key] == part.total

    def test_the_authors_floor_can_be_had(self) -> None:
        batch = make_batch(counts=(0, 0))
        part = kd_parts(*make_pair("fcos"), "crosskd:normalizer_floor=1e-6", batch)["crosskd/cls"]
        assert divide({"a": part})["a"].item() == pytest.approx(1e6 * part.total.item(), rel=1e-5)


class TestMimic:
    """Distances of predictions that don't come from features."""

    @staticmethod
    def pair(kind: str, normalizer: float = 4.0) -> Comparison:
        head, images = make_detector(kind).head, 2
        priors = head.priors([(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)], torch.device("cpu"))
        count = len(priors.boxes)
        own, target = (
            Prediction(
                torch.randn(images, count, 3),
                torch.randn(images, count, head.regression_width),
                torch.randn(images, count) if head.centerness is not None else None,
            )
            for _ in range(2)
        )
        weight = (torch.rand(images, count) > 0.3).float()
        positive = (torch.rand(images, count) > 0.8) & weight.bool()
        decode = lambda regression: head.decode(regression, priors)  # noqa: E731
        return Comparison(own, target, head.regression_kind, False, decode, weight, positive, torch.tensor(normalizer))

    @staticmethod
    def losses(pair: Comparison) -> dict[str, Tensor]:
        weights = {name: weight for name, weight in PUBLISHED[pair.kind]["terms"].items() if weight}
        return {key: weights[key] * loss for key, loss in divide(mimic([pair], weights)).items()}

    @pytest.mark.parametrize("kind", KINDS)
    def test_rows_of_weight_zero_contribute_nothing(self, kind: str) -> None:
        pair = self.pair(kind)
        expected, out = self.losses(pair), pair.weight == 0
        own, target = (
            p._replace(
                logits=torch.where(out[..., None], torch.randn_like(p.logits), p.logits),
                regression=torch.where(out[..., None], torch.randn_like(p.regression), p.regression),
            )
            for p in pair[:2]
        )
        got = self.losses(pair._replace(prediction=own, target=target))
        assert got.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(got[key], expected[key])

    def test_distributions_are_a_mean_by_the_teachers_confidence(self) -> None:
        """KL of each side, mean over the four sides, rows weighted by the teacher's highest score (CrossKD, eq. 4)."""
        pair = self.pair("gfl")
        own, target = (p.regression.unflatten(-1, (4, -1)).log_softmax(-1) for p in pair[:2])
        rows = F.kl_div(own, target, reduction="none", log_target=True).sum(-1).mean(-1)
        confidence = pair.target.logits.sigmoid().amax(-1) * pair.weight
        loss = divide(mimic([pair], {"reg": 1.0}))["reg"]
        torch.testing.assert_close(loss, (rows * confidence).sum() / confidence.sum())

    @pytest.mark.parametrize("kind", ["retinanet", "fcos", "atss"])
    def test_boxes_are_compared_by_giou_or_the_logarithm_of_iou(self, kind: str) -> None:
        """1 - GIoU of decoded deltas, -log IoU of distances, weighted by the teacher's highest score (eq. 4)."""
        pair = self.pair(kind)
        boxes, wanted = (pair.decode(p.regression).flatten(0, 1) for p in pair[:2])
        iou, giou = (measure(boxes, wanted).diagonal() for measure in (box_iou, generalized_box_iou))
        rows = -iou.clamp(min=1e-6).log() if pair.kind == "distance" else 1 - giou
        confidence = (pair.target.logits.sigmoid().amax(-1) * pair.weight).flatten()
        loss = mimic([pair], {"reg": 1.0})["reg"].total
        assert pair.kind == {"fcos": "distance"}.get(kind, "delta")
        torch.testing.assert_close(loss, (rows * confidence).sum())

    @pytest.mark.parametrize("kind", KINDS)
    def test_twice_the_positives_halve_the_loss(self, kind: str) -> None:
        pair = self.pair(kind)
        one, two = (self.losses(pair._replace(normalizer=torch.tensor(n))) for n in (4.0, 8.0))
        torch.testing.assert_close(two["cls"] * 2, one["cls"])
        factor = 1 if kind == "gfl" else 2  # GFL's boxes are divided by the teacher's confidence
        torch.testing.assert_close(two["reg"] * factor, one["reg"])

    def test_distributions_are_divided_by_the_teachers_confidence(self) -> None:
        pair = self.pair("gfl")
        targets = [pair.target._replace(logits=torch.full_like(pair.target.logits, x)) for x in (5.0, -5.0)]
        torch.testing.assert_close(*[self.losses(pair._replace(target=target))["reg"] for target in targets])

    @pytest.mark.parametrize("kind", KINDS)
    def test_no_gradient_reaches_the_target(self, kind: str) -> None:
        pair = self.pair(kind)
        for tensor in pair.target:
            if tensor is not None:
                tensor.requires_grad_()
        assert not any(loss.requires_grad for loss in self.losses(pair).values())

    @pytest.mark.parametrize("value", [100.0, -100.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kind", KINDS)
    def test_extreme_predictions_are_finite(self, kind: str, dtype: torch.dtype, value: float) -> None:
        pair = self.pair(kind)
        extreme = [t if t is None else torch.full_like(t, value).requires_grad_() for t in pair.prediction]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            total = torch.stack(list(self.losses(pair._replace(prediction=Prediction(*extreme))).values())).sum()
        total.backward()
        assert total.isfinite()
        assert all(tensor.grad is None or tensor.grad.isfinite().all() for tensor in extreme if tensor is not None)

    def test_terms_that_are_not_asked_for_are_not_there(self) -> None:
        assert list(mimic([self.pair("atss")], {"reg": 1.0})) == ["reg"]

    def test_several_layers_are_quotients_of_one_term(self) -> None:
        pairs = [self.pair("atss"), self.pair("atss")._replace(normalizer=torch.tensor(9.0))]
        single = [divide(mimic([pair], {"cls": 1.0}))["cls"] for pair in pairs]
        torch.testing.assert_close(divide(mimic(pairs, {"cls": 1.0}))["cls"], single[0] + single[1])


class TestNormalizer:
    def test_of_the_teacher_counts_the_teachers_positives(self) -> None:
        student, teacher = make_pair("gfl", "retinanet")
        batch = make_batch()
        own = teacher(**batch, cut=0).assignment
        assert self.part(student, teacher, batch, "teacher").normalizer == own.count_positives()

    def test_of_the_student(self) -> None:
        student, teacher = make_pair("gfl", "retinanet")
        batch = make_batch()
        own = student(**batch, cut=0).assignment
        assert self.part(student, teacher, batch, "student").normalizer == own.count_positives()

    def test_score_sum(self) -> None:
        student, teacher = make_pair("gfl", "retinanet")
        batch = make_batch()
        got = teacher(**batch, cut=0)
        expected = (got.logits.sigmoid().amax(-1) * got.assignment.weight).sum()
        torch.testing.assert_close(self.part(student, teacher, batch, "score_sum").normalizer, expected)

    @staticmethod
    def part(student: DenseDetector, teacher: DenseDetector, batch: dict[str, Any], normalizer: Any) -> LossPart:
        return kd_parts(student, teacher, CrossKD(normalizer=normalizer), batch)["crosskd/cls"]


class TestClasses:
    @staticmethod
    def named(kind: str, names: tuple[str, ...], seed: int) -> DenseDetector:
        model = make_detector(kind, seed, num_labels=len(names))
        model.config.id2label = dict(enumerate(names))
        return model

    @pytest.mark.parametrize("method", ["crosskd", "kd"])
    def test_classes_the_teacher_does_not_know_are_left_alone(self, method: str) -> None:
        student = self.named("gfl", ("cow", "unicorn", "dog"), 0).train()
        teacher = self.named("gfl", ("dog", "cat", "cow", "bird"), 1)
        distiller, batch = Distiller(student, teacher, [method]), make_batch()
        total_of(distilled_parts(distiller, student, batch)).backward()
        expected = {"teacher": [2, 0], "student": [0, 2], "unknown": ["unicorn"]}
        assert distiller.describe()["classes"] == expected
        gradient = student.head.classifier.bias.grad
        if method == "kd":
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
        losses = divide(kd_parts(student, teacher, "kd", make_batch()))
        assert all(loss.abs() < 1e-5 for loss in losses.values())

    def test_no_shared_class(self) -> None:
        pair = self.named("gfl", ("a",), 0), self.named("gfl", ("b",), 0)
        with pytest.raises(ValueError, match="share no class name"):
            Distiller(*pair, ["crosskd"])
        assert Distiller(*pair, ["pkd"]).describe()["classes"] is None


class TestRefusals:
    def test_other_strides(self) -> None:
        coarse = make_detector("gfl", strides=(16, 32, 64), backbone_strides=(16, 32))
        with pytest.raises(ValueError, match=r"strides \(16, 32, 64\), the teacher's \(8, 16, 32, 64, 128\)"):
            Distiller(coarse, make_detector("gfl"), ["crosskd"])
        assert Distiller(coarse, make_detector("gfl"), ["pkd"]).pair.student.strides == (16, 32, 64)

    def test_another_number_of_levels(self) -> None:
        short = make_detector("gfl", strides=(8, 16, 32, 64))
        with pytest.raises(ValueError, match="same levels"):
            Distiller(short, make_detector("gfl"), ["crosskd"])

    def test_outputs_without_what_was_requested(self) -> None:
        student, teacher = make_pair()
        distiller, batch = Distiller(student, teacher, ["crosskd", "pkd"]), make_batch()
        with pytest.raises(ValueError, match="outputs hold no taps"):
            distiller(student(**batch, output_features=True), batch)
        with pytest.raises(ValueError, match="outputs hold no features"):
            distiller(student(**batch, cut=3), batch)
        unlabelled = batch | {"labels": None}
        with pytest.raises(ValueError, match="The batch has no labels"):
            distilled_parts(distiller, student, unlabelled)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("methods", [("crosskd", "pkd"), ("kd",)], ids="+".join)
def test_under_bfloat16_autocast(kind: str, methods: tuple[str, ...]) -> None:
    student, teacher = make_pair(kind)
    distiller = Distiller(student, teacher, methods)
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
    distiller = Distiller(student, teacher, ["crosskd"])
    seen: list[Tensor] = []
    forward = teacher.forward

    def record(pixel_values: Tensor, **named: Any) -> Any:
        seen.append(pixel_values)
        return forward(pixel_values, **named)

    monkeypatch.setattr(teacher, "forward", record)
    distiller.pair.teacher.pixels = lambda pixels, mask: pixels * 2 * mask[:, None]
    batch = make_batch()
    distilled_parts(distiller, student, batch)
    assert torch.equal(seen[0], batch["pixel_values"] * 2)
