"""Plain KD: the student's own predictions mimic the teacher's, row by row (rows "KD" and "LD" of CrossKD's tables)."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...models.losses import LossPart, quality_focal
from ..classes import ClassMap
from ..distances import Normalizer, box_distances, class_distance, counted, mimic, stack
from ..mapping import Reduce, distance_to_boxes, row_targets
from ..matching import Matches, clipped, match, match_cost, rows_of
from ..method import Method, MethodConfig, Paper, option
from ..passes import (
    Batch,
    ComparableHead,
    Comparison,
    DetectorView,
    Needs,
    Pair,
    Pass,
    Prediction,
    shared_classes,
)
from .crosskd import PUBLISHED, effective

OURS = "not published"
DETRDISTILL = "BIVLab-USTC/DETRDistill"
QUERIES: dict[str, Any] = {"unmatched": "drop", "terms": {"cls": 1.0, "reg": 5.0, "iou": 2.0}}


class KDMethod(Method):
    """See :class:`KD`."""

    name = "kd"
    terms = ("cls", "reg", "iou", "centerness")
    paper = Paper(
        "CrossKD: Cross-Head Knowledge Distillation for Object Detection (baseline of prediction mimicking)",
        "CVPR 2024",
        "https://arxiv.org/abs/2306.11369",
    )
    families = "dense detectors of any two heads, Faster R-CNN, DETR family; student and teacher of the same family"

    def __init__(self, config: "KD", student: DetectorView, teacher: DetectorView):
        super().__init__(config, student, teacher)
        self.matched = of_queries(Pair(student, teacher))
        self.softmax = student.softmax
        if not self.matched:
            self.views = comparable_heads(Pair(student, teacher))
            self.mapped = not self.views[1].same_rows(student)
            self.anchors = self.views[0].priors_per_location, self.views[1].priors_per_location
        self.classes: ClassMap = shared_classes(student, teacher)

    @property
    def student_needs(self) -> Needs:
        return frozenset({"predictions"}) if self.matched else self.views[0].compared

    @property
    def teacher_needs(self) -> Needs:
        return frozenset({"predictions"}) if self.matched else self.views[1].compared

    def forward(self, student: Pass, teacher: Pass, batch: Batch) -> dict[str, LossPart]:
        """Distances of the student's own predictions from the teacher's."""
        if self.matched:
            return self._matched(student, teacher, batch)
        if self.mapped:
            return self._mapped(student, teacher, batch)
        pair = self.views[1].compare(student, teacher, self.classes)
        pair = counted(pair, self.config, student, teacher, batch)
        return mimic([pair], self.config.terms, self.config.beta or 0.0, self.config.temperature or 1.0)

    # ---- Queries ----

    def layers(self, student: Pass, teacher: Pass, batch: Batch) -> list[tuple[Prediction, Prediction]]:
        """The shared classes and the boxes of each decoder layer, counted from the last one."""
        count = min(len(student.predictions), len(teacher.predictions))
        maps = self.classes.student, self.classes.teacher
        own, target = (
            [each.of_classes(self._with_background(each, classes)) for each in found.predictions[-count:]]
            for found, classes in zip((student, teacher), maps, strict=True)
        )
        target = [each._replace(regression=clipped(each.regression, batch.sizes)) for each in target]
        return list(zip(own, target, strict=True))

    def _with_background(self, prediction: Prediction, classes: list[int]) -> list[int]:
        return [*classes, prediction.logits.shape[-1] - 1] if self.softmax else classes

    def matches(self, pairs: list[tuple[Prediction, Prediction]], batch: Batch) -> list[Matches]:
        """The cheapest one-to-one pairs of queries, layer by layer."""
        return match([match_cost(*pair, batch.sizes, self.softmax) for pair in pairs])

    def _matched(self, student: Pass, teacher: Pass, batch: Batch) -> dict[str, LossPart]:
        """Distances of matched queries, divided by their number; one quotient for each decoder layer."""
        pairs = self.layers(student, teacher, batch)
        found: dict[str, list[LossPart]] = {}
        for (own, target), rows in zip(pairs, self.matches(pairs, batch), strict=True):
            count = own.logits.new_tensor(float(rows.student.numel()), dtype=torch.float32)
            for name, total in self._distances(own, target, rows, student).items():
                found.setdefault(name, []).append(LossPart(total, count))
        return {name: stack(parts) for name, parts in found.items() if self.wants(name)}

    def _distances(self, own: Prediction, target: Prediction, rows: Matches, student: Pass) -> dict[str, Tensor]:
        assert student.decode is not None
        config, nothing = self.config, own.logits.new_zeros(())
        near, goal = rows_of(own, rows.student), rows_of(target, rows.teacher)
        goal = Prediction(goal.logits.detach(), goal.regression.detach())
        pair = Comparison(near, goal, "queries", self.softmax, student.decode, nothing, None, nothing)
        found = {name: each.sum() for name, each in box_distances(pair, 1.0, "l1+giou").items()}
        found["cls"] = class_distance(pair, config.beta or 0.0, config.temperature or 1.0).sum()
        if config.unmatched == "released":  # a target of K in every class of the queries that are left over
            left = own.logits.new_ones(own.logits.shape[:2]).scatter(1, rows.student, 0.0)
            filled = torch.full_like(own.logits, float(own.logits.shape[-1]))
            found["cls"] = found["cls"] + (quality_focal(own.logits, filled, 0.0).sum(-1) * left).sum()
        return found

    # ---- Priors that mean different boxes ----

    def _mapped(self, student: Pass, teacher: Pass, batch: Batch) -> dict[str, LossPart]:
        """Between rows that mean different boxes: over the student's rows."""
        config = self.config
        own = student.predictions[-1].of_classes(self.classes.student)
        assert student.assignment is not None
        weight = student.assignment.weight
        if not config.mask_padding:
            assert student.valid is not None
            weight = weight.masked_fill(~student.valid, 1.0)
        choices = bool(config.broadcast), bool(config.joint_quality)
        prediction = teacher.predictions[-1].of_classes(self.classes.teacher)
        targets = row_targets(student, teacher, prediction, weight, self.anchors, config.reduce or "best", *choices)
        normalizer = {"teacher": teacher.normalizer, "student": student.normalizer}.get(config.normalizer)
        normalizer = targets.confidence.sum() if normalizer is None else normalizer
        parts: dict[str, LossPart] = {}
        if self.wants("cls"):
            distance = quality_focal(own.logits, targets.scores, config.beta).sum(-1) * targets.weight
            parts["cls"] = LossPart(distance.sum(), normalizer, config.normalizer_floor)
        if self.wants("reg"):
            bins = bool(config.as_distribution)
            distance = distance_to_boxes(student, own.regression, targets.boxes, bins) * targets.confidence
            divisor = (targets.confidence.sum(), 1e-7) if bins else (normalizer, config.normalizer_floor)
            parts["reg"] = LossPart(distance.sum(), *divisor)
        return parts


@dataclass(frozen=True)
class KD(MethodConfig):
    """Prediction mimicking with the distances and weights of CrossKD. None stands for what fits the pair.

    Queries of a DETR-type student are matched one to one to the predictions of its teacher, in every decoder layer, as
    in DETRDistill (ICCV 2023): cross entropy of classes (`cls`), L1 of relative boxes (`reg`) and 1 - GIoU (`iou`),
    each divided by the number of pairs.

    Rows of two dense heads of different kinds are made comparable by choices of this project. `reduce`, `broadcast`,
    `joint_quality` and `as_distribution` are these choices; no publication makes them.

    Args:
        beta: Exponent of the quality focal loss between class scores.
        temperature: Of softmax distributions: of box sides, or of classes that compete.
        normalizer: Whose positives the losses are divided by; "score_sum" divides by the teacher's confidence.
        normalizer_floor: Smallest normalizer.
        mask_padding: Whether rows in the padding of an image stay out.
        reduce: Several anchors of the teacher for one of the student: "best" takes scores and box of the anchor with
            the highest score; "max" takes each class's highest score over the anchors, and the box of the best one.
        broadcast: One row of the teacher for several anchors of the student: all anchors of the location learn the
            class scores, instead of the one that overlaps the teacher's box most.
        joint_quality: Multiply class scores by the teacher's centerness: GFL's scores are joint ones.
        as_distribution: A student with box distributions learns the teacher's distances as soft targets of two bins,
            instead of by the generalized IoU of the decoded boxes.
        unmatched: Queries of a student that has more of them than its teacher. "drop" leaves them out; the "released"
            code of DETRDistill has the number of classes as their target in every class.

    Raises:
        ValueError:
            "kd can't compare the predictions of": The two detectors have no rows in common.
            "cannot match the student's": Both heads have several, but different anchors at each location.
    """

    method = KDMethod

    beta: float | None = option(None, "Exponent of the quality focal loss; 0 is BCE.", "paper, eq. 5", least=0)
    temperature: float | None = option(None, "Softmax temperature.", least=1e-6)
    normalizer: Normalizer | None = option(None, "Whose positives divide the losses.")
    normalizer_floor: float | None = option(None, "Smallest normalizer.", least=0)
    mask_padding: bool | None = option(None, "Rows in the padding stay out.")
    reduce: Reduce | None = option(None, "Several anchors of the teacher for one of the student.", OURS)
    broadcast: bool | None = option(None, "All anchors of a location learn the class scores.", OURS)
    joint_quality: bool | None = option(None, "Class scores times the teacher's centerness.", OURS)
    as_distribution: bool | None = option(None, "Distances as soft targets of two bins.", OURS)
    unmatched: Literal["drop", "released"] | None = option(None, "Queries without a partner.", DETRDISTILL)

    def defaults(self, pair: Pair) -> dict[str, Any]:
        """By what the rows of both heads mean."""
        if of_queries(pair):
            distance = {"temperature": 1.0} if pair.teacher.softmax else {"beta": 0.0}
            left_out = ("unmatched",) * pair.teacher.softmax
            numbers = {name: value for name, value in QUERIES.items() if name not in left_out} | distance
            return effective(numbers, self.terms, "queries")
        student, teacher = comparable_heads(pair)
        if not teacher.same_rows(student):
            return self._mapped_defaults(student, teacher)
        published = PUBLISHED[teacher.kind]
        known: dict[str, Any] = {
            name: published[name] for name in ("beta", "temperature", "terms") if name in published
        }
        if teacher.kind != "regions":
            known |= {"normalizer": "teacher", "normalizer_floor": 1.0, "mask_padding": True}
        if not teacher.has_centerness:
            known["terms"] = {name: weight for name, weight in known["terms"].items() if name != "centerness"}
        return effective(known, self.terms, teacher.kind)

    def _mapped_defaults(self, student: ComparableHead, teacher: ComparableHead) -> dict[str, Any]:
        anchors = student.priors_per_location, teacher.priors_per_location
        if 1 not in anchors and not teacher.same_priors(student):
            raise ValueError(
                f"Plain KD cannot match the student's {anchors[0]} anchors per location to {anchors[1]} others of the "
                f"teacher. Give both the same anchors, or use crosskd, which works across heads."
            )
        known: dict[str, Any] = {"beta": 1.0, "normalizer": "student", "normalizer_floor": 1.0, "mask_padding": True}
        if anchors[1] > anchors[0]:
            known["reduce"] = "best"
        if anchors[0] > anchors[1]:
            known["broadcast"] = False
        if teacher.has_centerness:
            known["joint_quality"] = False
        if student.kind == "distribution":
            known["as_distribution"] = False
        compared = PUBLISHED["distribution" if self.as_distribution else "delta"]["terms"]
        known["terms"] = {name: compared[name] for name in ("cls", "reg")}
        return effective(known, self.terms, "distribution" if self.as_distribution else "delta")


def of_queries(pair: Pair) -> bool:
    """Whether both models are of the DETR family, and their scores of one kind."""
    student, teacher = pair
    return student.kind == teacher.kind == "queries" and student.softmax == teacher.softmax


def comparable_heads(pair: Pair) -> tuple[ComparableHead, ComparableHead]:
    """Both views, if their predictions can be compared. Raises ValueError if they can't."""
    student, teacher = pair
    if not (
        isinstance(student, ComparableHead)
        and isinstance(teacher, ComparableHead)
        and student.family == teacher.family
        and (teacher.same_rows(student) or student.kind != "regions")
    ):
        raise ValueError(
            f"kd can't compare the predictions of {pair} row by row: regions of class-agnostic heads have no "
            "classes, queries of softmax and of sigmoid classes no common distance, and detectors of different "
            "families no rows in common. Use crosskd for two models of one family, or a method that compares "
            "features, such as pkd."
        )
    return student, teacher
