"""Plain KD: trains the predictors; between heads of different kinds, on predictions made by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor

from crosskd_hf.distillation import KD, Distiller
from crosskd_hf.distillation.detectors import view
from crosskd_hf.distillation.mapping import RowTargets, reduce_rows, row_targets, two_bin_kl
from crosskd_hf.distillation.passes import ClassMap, Pass, Prediction
from crosskd_hf.models.assigners import Assignment, Priors
from crosskd_hf.models.boxes import aligned_iou, encode_delta, encode_distance
from crosskd_hf.models.dense import DenseHead
from crosskd_hf.models.losses import divide, integral
from tests.distillation.step import distilled_losses
from tests.tiny_dense import KINDS, make_batch, make_detector

SHAPES = [(4, 4), (2, 2), (1, 1), (1, 1), (1, 1)]


def make_head(kind: str, **changes: object) -> tuple[DenseHead, Priors]:
    head = make_detector(kind, **changes).head
    return head, head.priors(SHAPES, torch.device("cpu"))


def everything_counts(priors: Priors, batch: int = 1) -> Assignment:
    count = len(priors.boxes)
    return Assignment(
        torch.zeros(batch, count, dtype=torch.bool),
        torch.ones(batch, count),
        torch.zeros(batch, count, 4),
        torch.zeros(batch, count, dtype=torch.long),
    )


def pass_of(head: DenseHead, priors: Priors, prediction: Prediction | None = None) -> Pass:
    return Pass(
        predictions=[] if prediction is None else [prediction],
        decode=lambda regression: head.decode(regression, priors),
        priors=priors,
        assignment=everything_counts(priors),
        normalizer=torch.tensor(1.0),
    )


def regression_of(kind: str, head: DenseHead, priors: Priors, boxes: Tensor) -> Tensor:
    """Regression rows by which a head predicts these boxes."""
    if kind in ("retinanet", "atss"):
        return encode_delta(priors.boxes, boxes, head.coder.std)
    distances = encode_distance(priors.centers, boxes)
    if kind == "fcos":
        return distances.log()
    bins = distances / priors.strides[:, None]  # (B, N, 4)
    left, right = bins.floor().long(), bins - bins.floor()
    logits = torch.full((*bins.shape, head.config.reg_max + 1), -1e4)
    logits.scatter_(-1, left[..., None], (1 - right).log()[..., None])
    return logits.scatter_(-1, left[..., None] + 1, right.log()[..., None]).flatten(-2)


def around(priors: Priors) -> Tensor:
    """A box around the centre of each prior's location that every coder can express."""
    generator = torch.Generator().manual_seed(5)
    sides = torch.rand(1, len(priors.boxes), 4, generator=generator) * 3 + 1
    centers = priors.cells + priors.strides[:, None] / 4
    sides = sides * priors.strides[:, None]
    return torch.cat([centers - sides[..., :2], centers + sides[..., 2:]], -1)


def mapped(student: str, teacher: str, own: Prediction, target: Prediction, **options: Any) -> dict[str, Tensor]:
    """Losses of predictions made by hand, without weights."""
    models = make_detector(student), make_detector(teacher, seed=1)
    distiller = Distiller(*models, [KD(**options)])
    passes = [
        pass_of(model.head, model.head.priors(SHAPES, torch.device("cpu")), prediction)
        for model, prediction in zip(models, (own, target), strict=True)
    ]
    method = distiller.named_methods["kd"]
    method.classes = ClassMap([0, 1, 2], [0, 1, 2], [])
    return divide(method._mapped(*passes, None))


class TestNineToOne:
    SCORES = torch.tensor([[[0.1, 0.7], [0.6, 0.2], [0.3, 0.3], [0.2, 0.1]]])  # (1, 2 locations x 2 anchors, 2)
    BOXES = torch.arange(16.0).reshape(1, 4, 4)

    def test_best_takes_scores_and_box_of_the_highest_scoring_anchor(self) -> None:
        scores, confidence, boxes = reduce_rows(self.SCORES, self.BOXES, 2, "best")
        assert torch.equal(scores, self.SCORES[:, [0, 2]])
        assert torch.equal(confidence, torch.tensor([[0.7, 0.3]]))
        assert torch.equal(boxes, self.BOXES[:, [0, 2]])

    def test_max_takes_every_classs_highest_score(self) -> None:
        scores, confidence, boxes = reduce_rows(self.SCORES, self.BOXES, 2, "max")
        assert torch.equal(scores, torch.tensor([[[0.6, 0.7], [0.3, 0.3]]]))
        assert torch.equal(confidence, torch.tensor([[0.7, 0.3]]))
        assert torch.equal(boxes, self.BOXES[:, [0, 2]])

    @pytest.mark.parametrize("reduce", ["best", "max"])
    def test_the_order_of_the_anchors_does_not_matter(self, reduce: str) -> None:
        scores, boxes = torch.rand(2, 5 * 9, 3), torch.rand(2, 5 * 9, 4)
        order = torch.randperm(9)
        mixed = [rows.unflatten(1, (5, 9))[:, :, order].flatten(1, 2) for rows in (scores, boxes)]
        for expected, got in zip(reduce_rows(scores, boxes, 9, reduce), reduce_rows(*mixed, 9, reduce), strict=True):
            assert torch.equal(expected, got)

    def test_targets_of_a_gfl_student(self) -> None:
        (student, priors), (teacher, anchors) = make_head("gfl"), make_head("retinanet")
        target = Prediction(torch.randn(1, len(anchors.boxes), 3), torch.randn(1, len(anchors.boxes), 4))
        passes = pass_of(student, priors), pass_of(teacher, anchors)
        found = row_targets(*passes, target, torch.ones(1, len(priors.boxes)), (1, 9))
        decoded = teacher.decode(target.regression, anchors)
        for location in range(len(priors.boxes)):
            rows = range(9 * location, 9 * location + 9)
            best = max(rows, key=lambda row: target.logits[0, row].max().item())
            torch.testing.assert_close(found.scores[0, location], target.logits[0, best].sigmoid())
            assert torch.equal(found.boxes[0, location], decoded[0, best])


class TestOneToNine:
    def setup_method(self) -> None:
        (self.student, self.anchors), (self.teacher, self.priors) = make_head("retinanet"), make_head("atss")
        count = len(self.priors.boxes)
        self.target = Prediction(torch.randn(1, count, 3), torch.randn(1, count, 4) * 3, torch.randn(1, count))

    def targets(self, weight: Tensor | None = None, **options: bool) -> RowTargets:
        passes = pass_of(self.student, self.anchors), pass_of(self.teacher, self.priors)
        weight = torch.ones(1, len(self.anchors.boxes)) if weight is None else weight
        return row_targets(*passes, self.target, weight, (9, 1), **options)

    def test_the_anchor_that_overlaps_the_teachers_box_most_learns_it(self) -> None:
        found = self.targets()
        decoded = self.teacher.decode(self.target.regression, self.priors)[0]
        for location, box in enumerate(decoded):
            rows = slice(9 * location, 9 * location + 9)
            iou = aligned_iou(self.anchors.boxes[rows], box)
            expected = torch.zeros(9)
            expected[iou.argmax()] = 1
            assert torch.equal(found.weight[0, rows], expected)
            confidence = self.target.logits[0, location].sigmoid().max()
            torch.testing.assert_close(found.confidence[0, rows], expected * confidence)
            assert torch.equal(found.boxes[0, rows], box.expand(9, 4))

    def test_broadcast_teaches_the_scores_to_all_anchors(self) -> None:
        found, broadcast = self.targets(), self.targets(broadcast=True)
        assert broadcast.weight.all()
        assert torch.equal(broadcast.confidence, found.confidence)

    def test_joint_quality_multiplies_the_centerness_in(self) -> None:
        expected = self.targets().scores * self.target.centerness.sigmoid().repeat_interleave(9, 1)[..., None]
        torch.testing.assert_close(self.targets(joint_quality=True).scores, expected)

    def test_rows_of_weight_zero_stay_out(self) -> None:
        weight = torch.ones(1, len(self.anchors.boxes))
        weight[:, :90] = 0
        found = self.targets(weight)
        assert not found.weight[:, :90].any()
        assert not found.confidence[:, :90].any()
        assert found.weight[:, 90:].any()


@pytest.mark.parametrize("teacher_kind", ["gfl", "fcos", "atss"])
@pytest.mark.parametrize("student_kind", ["gfl", "fcos", "atss"])
def test_same_boxes_and_scores_cost_nothing(student_kind: str, teacher_kind: str) -> None:
    if student_kind == teacher_kind:
        return
    (student, priors), (teacher, teacher_priors) = make_head(student_kind), make_head(teacher_kind)
    boxes = around(priors)
    logits = torch.randn(1, len(priors.boxes), 3)
    own = Prediction(logits, regression_of(student_kind, student, priors, boxes))
    target = Prediction(logits, regression_of(teacher_kind, teacher, teacher_priors, boxes))
    losses = mapped(student_kind, teacher_kind, own, target)
    assert losses.keys() == {"cls", "reg"}
    assert all(loss.abs() < 2e-3 for loss in losses.values())
    other = Prediction(logits, regression_of(teacher_kind, teacher, teacher_priors, boxes + 0.2))
    assert mapped(student_kind, teacher_kind, own, other)["reg"] > losses["reg"]


class TestAsDistribution:
    def test_two_bins_around_the_distance(self) -> None:
        distances = torch.tensor([0.0, 1.25, 3.5, 15.999])
        bins = torch.arange(17.0)
        logits = (1 - (bins - distances[:, None]).abs()).clamp(min=1e-30).log()
        torch.testing.assert_close(integral(logits), distances, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(two_bin_kl(logits, distances), torch.zeros(4), rtol=0, atol=1e-4)
        assert (two_bin_kl(torch.zeros(4, 17), distances) > 1).all()

    def test_a_teachers_distances_become_a_gfl_students_bins(self) -> None:
        (student, priors), (teacher, teacher_priors) = make_head("gfl"), make_head("fcos")
        boxes = around(priors)
        logits = torch.randn(1, len(priors.boxes), 3)
        target = Prediction(logits, regression_of("fcos", teacher, teacher_priors, boxes))
        own = Prediction(logits, regression_of("gfl", student, priors, boxes))
        assert abs(mapped("gfl", "fcos", own, target, as_distribution=True)["reg"]) < 1e-3

    def test_needs_a_student_with_distributions(self) -> None:
        with pytest.raises(ValueError, match="as_distribution=True has no effect on an? ATSS.* learns from a GFL"):
            Distiller(make_detector("atss"), make_detector("gfl"), [KD(as_distribution=True)])


class TestSameRows:
    """Where rows mean the same, plain KD is that of one kind of head, without any mapping."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_head_and_its_like(self, kind: str) -> None:
        student, teacher = make_detector(kind), make_detector(kind, seed=1)
        assert view(teacher, "teacher").same_rows(view(student, "student"))
        assert not Distiller(student, teacher, ["kd"]).named_methods["kd"].mapped

    @pytest.mark.parametrize(
        ("student", "teacher"),
        [
            (("gfl", {}), ("atss", {})),
            (("atss", {}), ("retinanet", {})),
            (("fcos", {}), ("fcos", {"norm_on_bbox": True})),
            (("atss", {}), ("atss", {"anchor_scale": 4.0})),
            (("gfl", {}), ("fcos", {"reg_max": 16})),
            (("gfl", {}), ("gfl", {"reg_max": 8})),
            (("retinanet", {}), ("retinanet", {"reg_max": 16})),
        ],
    )
    def test_other_boxes_are_mapped(self, student: tuple, teacher: tuple) -> None:
        models = make_detector(student[0], **student[1]).train(), make_detector(teacher[0], seed=1, **teacher[1])
        distiller = Distiller(*models, ["kd"])
        assert distiller.named_methods["kd"].mapped
        batch = make_batch()
        losses = distilled_losses(distiller, models[0], batch)
        assert all(loss.isfinite() and loss > 0 for loss in losses.values())
        described = distiller.describe()["methods"]["kd"]
        assert described.get("reduce") == ("best" if (student[0], teacher[0]) == ("atss", "retinanet") else None)

    def test_gfl_and_atss_with_distributions_are_alike(self) -> None:
        teacher = view(make_detector("atss", reg_max=16), "teacher")
        assert teacher.same_rows(view(make_detector("gfl"), "student"))

    def test_nine_anchors_and_nine_others(self) -> None:
        models = make_detector("retinanet"), make_detector("retinanet", anchor_scale=2.0)
        with pytest.raises(ValueError, match="cannot match the student's 9 anchors"):
            Distiller(*models, ["kd"])


class TestInTheDistiller:
    @pytest.mark.parametrize("kind", KINDS)
    def test_trains_the_predictors(self, kind: str) -> None:
        student, teacher = make_detector(kind).train(), make_detector(kind, seed=1)
        distiller, batch = Distiller(student, teacher, ["kd"]), make_batch()
        losses = distilled_losses(distiller, student, batch)
        torch.stack(list(losses.values())).sum().backward()
        assert student.head.classifier.weight.grad.any()
        assert student.head.regressor.weight.grad.any()
        assert distiller.named_methods["kd"].unreached(distiller.pair.student) == []

    @pytest.mark.parametrize(("student_kind", "teacher_kind"), [("gfl", "retinanet"), ("retinanet", "fcos")])
    def test_teaches_predictors_and_trunk(self, student_kind: str, teacher_kind: str) -> None:
        student, teacher = make_detector(student_kind).train(), make_detector(teacher_kind, seed=1)
        distiller, batch = Distiller(student, teacher, ["kd"]), make_batch()
        outputs = student(**batch, **distiller.student_request)
        torch.stack(list(divide(distiller(outputs, batch)).values())).sum().backward()
        for module in (student.head.classifier, student.head.regressor, student.neck.lateral[0]):
            assert module.weight.grad.any()
        assert all(p.grad is None for p in teacher.parameters())
        assert not distiller.state_dict()

    @pytest.mark.parametrize("normalizer", ["student", "teacher"])
    def test_is_divided_by_the_positives_of_one_of_both(self, normalizer: str) -> None:
        student, teacher = make_detector("gfl").train(), make_detector("retinanet", seed=1)
        distiller, batch = Distiller(student, teacher, [KD(normalizer=normalizer)]), make_batch()
        outputs = student(**batch, **distiller.student_request)
        whose = outputs if normalizer == "student" else teacher(**batch, cut=0)
        assert {part.normalizer.item() for part in distiller(outputs, batch).values()} == {
            whose.assignment.count_positives().item()
        }

    def test_weights_go_by_what_is_compared(self) -> None:
        student, teacher = make_detector("gfl"), make_detector("fcos", seed=1)

        def terms(**options: Any) -> dict[str, float]:
            return Distiller(student, teacher, [KD(**options)]).describe()["methods"]["kd"]["terms"]

        assert terms() == {"cls": 1.0, "reg": 1.0}
        assert terms(as_distribution=True) == {"cls": 1.0, "reg": 4.0}
        assert terms(terms={"reg": 0.5}) == {"cls": 1.0, "reg": 0.5}

    def test_maps_of_other_sizes_are_refused(self) -> None:
        (student, priors), (teacher, _) = make_head("gfl"), make_head("atss")
        other = teacher.priors([(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)], torch.device("cpu"))
        target = Prediction(torch.randn(1, len(other.boxes), 3), torch.randn(1, len(other.boxes), 4))
        passes = pass_of(student, priors), pass_of(teacher, other)
        with pytest.raises(ValueError, match="same input"):
            row_targets(*passes, target, torch.ones(1, len(priors.boxes)), (1, 1))
