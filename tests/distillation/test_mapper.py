"""Plain KD across heads on predictions made by hand."""

import pytest
import torch
from torch import Tensor

from crosskd_hf.distillation import DenseDistiller, DistillationConfig, make_distiller
from crosskd_hf.distillation.config import MapperOptions
from crosskd_hf.distillation.mapper import CrossHeadMapper, reduce_anchors, same_coding, two_bin_kl
from crosskd_hf.distillation.mimic import WEIGHTS, Rows
from crosskd_hf.models.assigners import Assignment, Priors
from crosskd_hf.models.boxes import aligned_iou, encode_distance
from crosskd_hf.models.dense import DenseHead, Predictions
from crosskd_hf.models.losses import divide, integral
from tests.tiny_dense import KINDS, make_batch, make_detector

SHAPES = [(4, 4), (2, 2), (1, 1), (1, 1), (1, 1)]
WEIGHTS_OF_BOXES = WEIGHTS["delta"]


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


def rows_of(priors: Priors) -> Rows:
    return Rows(priors, everything_counts(priors), torch.tensor(1.0), 1.0)


def regression_of(kind: str, head: DenseHead, priors: Priors, boxes: Tensor) -> Tensor:
    """Regression rows by which a head predicts these boxes."""
    if kind in ("retinanet", "atss"):
        return head.coder.encode(boxes, priors)
    distances = encode_distance(priors.centers, boxes)
    if kind == "fcos":
        return distances.log()
    bins = distances / priors.strides[:, None]  # (B, N, 4)
    left, right = bins.floor().long(), bins - bins.floor()
    logits = torch.full((*bins.shape, head.config.reg_max + 1), -1e4)
    logits.scatter_(-1, left[..., None], (1 - right).log()[..., None])
    return logits.scatter_(-1, left[..., None] + 1, right.log()[..., None]).flatten(-2)


def around(priors: Priors) -> Tensor:
    """A box around the centre of each prior's place that every coder can express."""
    generator = torch.Generator().manual_seed(5)
    sides = torch.rand(1, len(priors.boxes), 4, generator=generator) * 3 + 1
    centers = priors.cells + priors.strides[:, None] / 4
    sides = sides * priors.strides[:, None]
    return torch.cat([centers - sides[..., :2], centers + sides[..., 2:]], -1)


class TestNineToOne:
    SCORES = torch.tensor([[[0.1, 0.7], [0.6, 0.2], [0.3, 0.3], [0.2, 0.1]]])  # (1, 2 places x 2 anchors, 2)
    BOXES = torch.arange(16.0).reshape(1, 4, 4)

    def test_best_takes_scores_and_box_of_the_surest_anchor(self) -> None:
        scores, confidence, boxes = reduce_anchors(self.SCORES, self.BOXES, 2, "best")
        assert torch.equal(scores, self.SCORES[:, [0, 2]])
        assert torch.equal(confidence, torch.tensor([[0.7, 0.3]]))
        assert torch.equal(boxes, self.BOXES[:, [0, 2]])

    def test_max_takes_every_classs_highest_score(self) -> None:
        scores, confidence, boxes = reduce_anchors(self.SCORES, self.BOXES, 2, "max")
        assert torch.equal(scores, torch.tensor([[[0.6, 0.7], [0.3, 0.3]]]))
        assert torch.equal(confidence, torch.tensor([[0.7, 0.3]]))
        assert torch.equal(boxes, self.BOXES[:, [0, 2]])

    @pytest.mark.parametrize("reduce", ["best", "max"])
    def test_the_order_of_the_anchors_does_not_matter(self, reduce: str) -> None:
        scores, boxes = torch.rand(2, 5 * 9, 3), torch.rand(2, 5 * 9, 4)
        order = torch.randperm(9)
        mixed = [rows.unflatten(1, (5, 9))[:, :, order].flatten(1, 2) for rows in (scores, boxes)]
        for expected, got in zip(
            reduce_anchors(scores, boxes, 9, reduce), reduce_anchors(*mixed, 9, reduce), strict=True
        ):
            assert torch.equal(expected, got)

    def test_goals_of_a_gfl_student(self) -> None:
        (student, priors), (teacher, anchors) = make_head("gfl"), make_head("retinanet")
        target = Predictions(torch.randn(1, len(anchors.boxes), 3), torch.randn(1, len(anchors.boxes), 4))
        goals = CrossHeadMapper(student, teacher, MapperOptions()).goals(
            target, anchors, priors, everything_counts(priors)
        )
        decoded = teacher.decode(target.regression, anchors)
        for place in range(len(priors.boxes)):
            rows = range(9 * place, 9 * place + 9)
            best = max(rows, key=lambda row: target.logits[0, row].max().item())
            torch.testing.assert_close(goals.scores[0, place], target.logits[0, best].sigmoid())
            assert torch.equal(goals.boxes[0, place], decoded[0, best])


class TestOneToNine:
    def setup_method(self) -> None:
        (self.student, self.anchors), (self.teacher, self.priors) = make_head("retinanet"), make_head("atss")
        count = len(self.priors.boxes)
        self.target = Predictions(torch.randn(1, count, 3), torch.randn(1, count, 4) * 3, torch.randn(1, count))

    def goals(self, **options: bool) -> object:
        mapper = CrossHeadMapper(self.student, self.teacher, MapperOptions(**options))
        return mapper.goals(self.target, self.priors, self.anchors, everything_counts(self.anchors))

    def test_the_anchor_that_overlaps_the_teachers_box_most_learns_it(self) -> None:
        goals = self.goals()
        decoded = self.teacher.decode(self.target.regression, self.priors)[0]
        for place, box in enumerate(decoded):
            rows = slice(9 * place, 9 * place + 9)
            iou = aligned_iou(self.anchors.boxes[rows], box)
            expected = torch.zeros(9)
            expected[iou.argmax()] = 1
            assert torch.equal(goals.weight[0, rows], expected)
            confidence = self.target.logits[0, place].sigmoid().max()
            torch.testing.assert_close(goals.confidence[0, rows], expected * confidence)
            assert torch.equal(goals.boxes[0, rows], box.expand(9, 4))

    def test_broadcast_teaches_the_scores_to_all_anchors(self) -> None:
        goals, broadcast = self.goals(), self.goals(broadcast=True)
        assert broadcast.weight.all()
        assert torch.equal(broadcast.confidence, goals.confidence)

    def test_joint_quality_multiplies_the_centerness_in(self) -> None:
        expected = self.goals().scores * self.target.centerness.sigmoid().repeat_interleave(9, 1)[..., None]
        torch.testing.assert_close(self.goals(joint_quality=True).scores, expected)

    def test_rows_of_weight_zero_stay_out(self) -> None:
        assignment = everything_counts(self.anchors)
        assignment.weight[:, :90] = 0
        goals = CrossHeadMapper(self.student, self.teacher, MapperOptions()).goals(
            self.target, self.priors, self.anchors, assignment
        )
        assert not goals.weight[:, :90].any()
        assert not goals.confidence[:, :90].any()
        assert goals.weight[:, 90:].any()


@pytest.mark.parametrize("teacher_kind", ["gfl", "fcos", "atss"])
@pytest.mark.parametrize("student_kind", ["gfl", "fcos", "atss"])
def test_same_boxes_and_scores_cost_nothing(student_kind: str, teacher_kind: str) -> None:
    (student, priors), (teacher, teacher_priors) = make_head(student_kind), make_head(teacher_kind)
    boxes = around(priors)
    logits = torch.randn(1, len(priors.boxes), 3)
    own = Predictions(logits, regression_of(student_kind, student, priors, boxes))
    target = Predictions(logits, regression_of(teacher_kind, teacher, teacher_priors, boxes))
    mapper = CrossHeadMapper(student, teacher, MapperOptions())
    goals = mapper.goals(target, teacher_priors, priors, everything_counts(priors))
    losses = divide(mapper.mimic(own, goals, rows_of(priors), WEIGHTS_OF_BOXES))
    assert losses.keys() == {"loss_cls_kd", "loss_reg_kd"}
    assert all(loss.abs() < 2e-3 for loss in losses.values())
    other = goals._replace(boxes=goals.boxes + 8)
    assert mapper.mimic(own, other, rows_of(priors), WEIGHTS_OF_BOXES)["loss_reg_kd"].total > 0.5


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
        mapper = CrossHeadMapper(student, teacher, MapperOptions(as_distribution=True))
        target = Predictions(logits, regression_of("fcos", teacher, teacher_priors, boxes))
        goals = mapper.goals(target, teacher_priors, priors, everything_counts(priors))
        own = Predictions(logits, regression_of("gfl", student, priors, boxes))
        part = mapper.mimic(own, goals, rows_of(priors), WEIGHTS["distribution"])["loss_reg_kd"]
        torch.testing.assert_close(part.normalizer, goals.confidence.sum())
        assert abs(divide({"a": part})["a"]) < 1e-3

    def test_needs_a_student_with_distributions(self) -> None:
        with pytest.raises(ValueError, match=r"as_distribution=True.*reg_max=16"):
            CrossHeadMapper(make_head("atss")[0], make_head("gfl")[0], MapperOptions(as_distribution=True))


class TestSameCoding:
    """Where rows mean the same, plain KD is that of one kind of head, without a mapper."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_head_and_its_like(self, kind: str) -> None:
        student, teacher = make_detector(kind), make_detector(kind, seed=1)
        assert same_coding(student.head, teacher.head)
        assert make_distiller(student, teacher, DistillationConfig(methods=("kd",))).mapper is None

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
    def test_other_boxes_need_the_mapper(self, student: tuple, teacher: tuple) -> None:
        models = make_detector(student[0], **student[1]).train(), make_detector(teacher[0], seed=1, **teacher[1])
        distiller = make_distiller(*models, DistillationConfig(methods=("kd",)))
        assert distiller.mapper is not None
        batch = make_batch()
        losses = divide(distiller(models[0](**batch, **distiller.student_request), batch))
        assert all(loss.isfinite() and loss > 0 for loss in losses.values())
        assert distiller.describe()["mapping"]["reduce"] == "best"

    def test_gfl_and_atss_with_distributions_are_alike(self) -> None:
        assert same_coding(make_detector("gfl").head, make_detector("atss", reg_max=16).head)

    def test_nine_anchors_and_nine_others(self) -> None:
        models = make_detector("retinanet"), make_detector("retinanet", anchor_scale=2.0)
        with pytest.raises(ValueError, match="cannot match the student's 9 anchors"):
            make_distiller(*models, DistillationConfig(methods=("kd",)))


class TestInTheDistiller:
    @pytest.mark.parametrize(("student_kind", "teacher_kind"), [("gfl", "retinanet"), ("retinanet", "fcos")])
    def test_teaches_predictors_and_trunk(self, student_kind: str, teacher_kind: str) -> None:
        student, teacher = make_detector(student_kind).train(), make_detector(teacher_kind, seed=1)
        distiller = make_distiller(student, teacher, DistillationConfig(methods=("kd",)))
        batch = make_batch()
        torch.stack(list(divide(distiller(student(**batch, cut=0), batch)).values())).sum().backward()
        for module in (student.head.classifier, student.head.regressor, student.neck.lateral[0]):
            assert module.weight.grad.any()
        assert all(p.grad is None for p in teacher.parameters())
        assert not distiller.state_dict()

    def test_is_divided_by_the_students_positives(self) -> None:
        student, teacher = make_detector("gfl").train(), make_detector("retinanet", seed=1)
        distiller = make_distiller(student, teacher, DistillationConfig(methods=("kd",)))
        outputs = student(**(batch := make_batch()), cut=0)
        assert {part.normalizer.item() for part in distiller(outputs, batch).values()} == {
            outputs.assignment.count_positives().item()
        }

    def test_weights_go_by_what_is_compared(self) -> None:
        student, teacher = make_detector("gfl"), make_detector("fcos", seed=1)
        boxes = DenseDistiller(student, teacher, DistillationConfig(methods=("kd",)))
        config = DistillationConfig(methods=("kd",), mapping={"as_distribution": True})
        bins = DenseDistiller(student, teacher, config)
        assert bins.describe()["mapping"] == {**boxes.describe()["mapping"], "as_distribution": True}
        assert (boxes.weights["loss_cls_kd"], boxes.weights["loss_reg_kd"]) == (1.0, 1.0)
        assert (bins.weights["loss_cls_kd"], bins.weights["loss_reg_kd"]) == (1.0, 4.0)
        given = DistillationConfig(methods=("kd",), loss_weights={"loss_reg_kd": 0.5})
        assert DenseDistiller(student, teacher, given).weights["loss_reg_kd"] == 0.5

    def test_maps_of_other_sizes_are_refused(self) -> None:
        (student, priors), (teacher, _) = make_head("gfl"), make_head("atss")
        other = teacher.priors([(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)], torch.device("cpu"))
        target = Predictions(torch.randn(1, len(other.boxes), 3), torch.randn(1, len(other.boxes), 4))
        with pytest.raises(ValueError, match="same input"):
            CrossHeadMapper(student, teacher, MapperOptions()).goals(target, other, priors, everything_counts(priors))
