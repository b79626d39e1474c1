"""Plain KD between different heads: which of the student's predictions answers for which of the teacher's boxes.

CrossKD needs none of this, for both its operands come from the teacher's head. Here predictions of two heads have to be
made comparable: class scores as they are, boxes decoded to pixels or as distributions over the student's bins, nine
anchors of a place against one. No published code does it; the choices below are this project's.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from crosskd_hf.models.assigners import Assignment, Priors
from crosskd_hf.models.boxes import aligned_iou, encode_distance
from crosskd_hf.models.dense import DenseHead, Predictions
from crosskd_hf.models.losses import LossPart, distribution_focal

from .config import MapperOptions, Reduce
from .mimic import Rows, mimic_scores


class Goals(NamedTuple):
    """What the student's rows shall predict, one goal per row, without gradient.

    Args:
        scores: (B, N, K) class scores in [0, 1].
        confidence: (B, N) in [0, 1], the teacher's highest score for the box.
        boxes: (B, N, 4) xyxy pixels.
        weight: (B, N), 0 for rows that take no part.
    """

    scores: Tensor
    confidence: Tensor
    boxes: Tensor
    weight: Tensor


class CrossHeadMapper:
    """Brings a teacher's predictions to the rows of a student's head on the same strides.

    Args:
        student, teacher: The heads.
        options: What to choose where there is a choice.

    Raises:
        ValueError: Both heads have several, but different anchors per place; `as_distribution` with a student that
            predicts no distributions.
    """

    def __init__(self, student: DenseHead, teacher: DenseHead, options: MapperOptions):
        anchors = student.priors_per_location, teacher.priors_per_location
        if 1 not in anchors and not same_priors(student, teacher):
            raise ValueError(
                f"Plain KD cannot match the student's {anchors[0]} anchors per place to {anchors[1]} others of the "
                f"teacher. Give both the same anchors, or use methods=('crosskd',), which works across heads."
            )
        if options.as_distribution and student.regression_kind != "distribution":
            raise ValueError(
                f"as_distribution=True, but the student regresses by {student.regression_kind}. Leave it False to "
                f"compare decoded boxes, or give the student distributions with reg_max=16 in its configuration."
            )
        self.student, self.teacher, self.anchors = student, teacher, anchors
        self.options = options

    @torch.no_grad()
    def goals(
        self, target: Predictions, teacher_priors: Priors, student_priors: Priors, assignment: Assignment
    ) -> Goals:
        """Goals of the student's rows.

        Args:
            target: The teacher's predictions with the distilled classes only.
            teacher_priors, student_priors: Of the two heads on the same maps.
            assignment: The student's, whose `weight` leaves rows out.

        Raises:
            ValueError: The two heads saw maps of different sizes.
        """
        _check_levels(teacher_priors, student_priors, self.anchors)
        scores = target.logits.sigmoid()  # (B, N_t, K)
        if self.options.joint_quality and target.centerness is not None:
            scores = scores * target.centerness.sigmoid()[..., None]
        boxes = self.teacher.decode(target.regression, teacher_priors)
        weight = assignment.weight
        if self.anchors[0] == self.anchors[1]:
            return Goals(scores, scores.amax(-1) * weight, boxes, weight)
        if self.anchors[1] > 1:
            scores, confidence, boxes = reduce_anchors(scores, boxes, self.anchors[1], self.options.reduce)
            return Goals(scores, confidence * weight, boxes, weight)
        return self._spread(scores, boxes, student_priors, weight)

    def _spread(self, scores: Tensor, boxes: Tensor, priors: Priors, weight: Tensor) -> Goals:
        """One teacher prior per place to the student's anchor that overlaps its box most."""
        anchors = self.anchors[0]
        scores, boxes = (rows.repeat_interleave(anchors, 1) for rows in (scores, boxes))
        overlap = aligned_iou(priors.boxes, boxes).unflatten(1, (-1, anchors))  # (B, places, A)
        best = torch.zeros_like(overlap).scatter_(2, overlap.argmax(2, keepdim=True), 1.0).flatten(1) * weight
        return Goals(scores, scores.amax(-1) * best, boxes, weight if self.options.broadcast else best)

    def mimic(
        self,
        predictions: Predictions,
        goals: Goals,
        rows: Rows,
        weights: dict[str, float],
        beta: float = 1.0,
    ) -> dict[str, LossPart]:
        """Distances of the student's `predictions` from their goals; keys and weights as of cross-head distillation.

        Args:
            predictions: The student's own, with the distilled classes only.
            rows: The student's.
            beta: Exponent of the quality focal loss.
        """
        parts: dict[str, LossPart] = {}
        if weights["loss_cls_kd"]:
            scores = predictions.logits, goals.scores, goals.weight
            parts["loss_cls_kd"] = mimic_scores(*scores, rows, weights["loss_cls_kd"], beta)
        if weights["loss_reg_kd"]:
            distance = self._distance(predictions, goals, rows.priors) * goals.confidence
            total = weights["loss_reg_kd"] * distance.sum()
            if self.options.as_distribution:
                parts["loss_reg_kd"] = LossPart(total, goals.confidence.sum(), floor=1e-7)
            else:
                parts["loss_reg_kd"] = LossPart(total, rows.normalizer, rows.floor)
        return parts

    def _distance(self, predictions: Predictions, goals: Goals, priors: Priors) -> Tensor:
        if not self.options.as_distribution:
            boxes = self.student.decode(predictions.regression, priors)
            return 1 - aligned_iou(boxes, goals.boxes, generalized=True)
        logits = predictions.regression.unflatten(-1, (4, -1))  # (B, N, 4, M)
        distances = encode_distance(priors.centers, goals.boxes) / priors.strides[:, None]
        distances = distances.clamp(0, logits.shape[-1] - 1 - 1e-3)
        return two_bin_kl(logits, distances).mean(-1)


def two_bin_kl(logits: Tensor, distances: Tensor) -> Tensor:
    """KL of (..., M) bins from the two bins around each distance (...) that have it as their mean, to (...)."""
    right = distances - distances.floor()
    entropy = -torch.xlogy(right, right) - torch.xlogy(1 - right, 1 - right)
    return distribution_focal(logits, distances) - entropy


def reduce_anchors(scores: Tensor, boxes: Tensor, anchors: int, reduce: Reduce) -> tuple[Tensor, Tensor, Tensor]:
    """From A anchors per place to one: scores (B, P * A, K) and boxes (B, P * A, 4).

    Returns:
        Scores (B, P, K), the highest score of each place (B, P), and boxes (B, P, 4).
    """
    scores, boxes = (rows.unflatten(1, (-1, anchors)) for rows in (scores, boxes))  # (B, P, A, ...)
    confidence, best = scores.amax(-1).max(2)  # (B, P)
    box = boxes.gather(2, best[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]
    if reduce == "max":
        return scores.amax(2), confidence, box
    index = best[..., None, None].expand(-1, -1, 1, scores.shape[-1])
    return scores.gather(2, index)[:, :, 0], confidence, box


def same_priors(student: DenseHead, teacher: DenseHead) -> bool:
    """Whether two heads on the same strides have the same priors at every place."""
    pairs = [(student.prior_boxes(stride), teacher.prior_boxes(stride)) for stride in student.config.strides]
    return all(torch.equal(own, other) for own, other in pairs)


def same_coding(student: DenseHead, teacher: DenseHead) -> bool:
    """Whether a row of either head's regression means the same box, so that rows can be compared as they are."""
    if (student.regression_kind, student.regression_width) != (teacher.regression_kind, teacher.regression_width):
        return False
    if student.priors_per_location != teacher.priors_per_location:
        return False
    shapes = [(2, 2)] * len(student.config.strides)
    own, other = (head.priors(shapes, torch.device("cpu")) for head in (student, teacher))
    probe = torch.linspace(-2, 2, student.regression_width).expand(1, len(own.boxes), -1)
    return torch.equal(student.decode(probe, own), teacher.decode(probe, other))


def _check_levels(teacher: Priors, student: Priors, anchors: tuple[int, int]) -> None:
    places = [length // anchors[0] for length in student.level_lengths]
    teacher_places = [length // anchors[1] for length in teacher.level_lengths]
    if places != teacher_places:
        raise ValueError(
            f"The student's maps have {places} places per level, the teacher's {teacher_places}. Plain KD needs the "
            f"same input and the same strides for both."
        )
