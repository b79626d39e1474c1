"""Predictions of two dense heads made comparable, where their rows mean different boxes.

CrossKD needs none of this, for both its operands come from the teacher's head. Plain mimicking does: class scores as
they are, boxes decoded to pixels or as distributions over the student's bins, nine anchors of a location against one.
No published code does it; the choices are this project's.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..models.assigners import Priors
from ..models.boxes import aligned_iou, encode_distance
from ..models.losses import distribution_focal
from .passes import Pass, Prediction

Reduce = Literal["best", "max"]


class RowTargets(NamedTuple):
    """What the student's rows learn, one target for each row, without gradient.

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


@torch.no_grad()
def row_targets(
    student: Pass,
    teacher: Pass,
    prediction: Prediction,
    weight: Tensor,
    anchors: tuple[int, int],
    reduce: Reduce = "best",
    broadcast: bool = False,
    joint_quality: bool = False,
) -> RowTargets:
    """The teacher's predictions at the student's rows.

    Args:
        student, teacher: Passes of two heads on the same maps.
        prediction: The teacher's, of the compared classes.
        weight: (B, N) of the student's rows.
        anchors: Rows at each location, of student and teacher; one of both is 1, or both have the same priors.
        reduce: Several rows of the teacher for one of the student: "best" takes scores and box of the row with the
            highest score; "max" takes each class's highest score over the rows, and the box of the best one.
        broadcast: One row of the teacher for several of the student: all rows of the location learn the class scores,
            instead of the one that overlaps the teacher's box most. Boxes are learnt by that one in any case.
        joint_quality: Multiply class scores by the teacher's centerness, if it has one: GFL's scores are joint ones.

    Raises:
        ValueError: The two heads saw maps of different sizes.
    """
    assert student.priors is not None
    assert teacher.priors is not None
    assert teacher.decode is not None
    _check_levels(student.priors, teacher.priors, anchors)
    scores = prediction.logits.sigmoid()  # (B, N_t, K)
    if joint_quality and prediction.centerness is not None:
        scores = scores * prediction.centerness.sigmoid()[..., None]
    boxes = teacher.decode(prediction.regression)
    if anchors[0] == anchors[1]:
        return RowTargets(scores, scores.amax(-1) * weight, boxes, weight)
    if anchors[1] > 1:
        scores, confidence, boxes = reduce_rows(scores, boxes, anchors[1], reduce)
        return RowTargets(scores, confidence * weight, boxes, weight)
    return _spread(scores, boxes, student.priors, weight, anchors[0], broadcast)


def _spread(scores: Tensor, boxes: Tensor, priors: Priors, weight: Tensor, anchors: int, broadcast: bool) -> RowTargets:
    """One teacher's row of a location to the student's anchor that overlaps its box most."""
    scores, boxes = (rows.repeat_interleave(anchors, 1) for rows in (scores, boxes))
    overlap = aligned_iou(priors.boxes, boxes).unflatten(1, (-1, anchors))  # (B, locations, A)
    best = torch.zeros_like(overlap).scatter_(2, overlap.argmax(2, keepdim=True), 1.0).flatten(1) * weight
    return RowTargets(scores, scores.amax(-1) * best, boxes, weight if broadcast else best)


def reduce_rows(scores: Tensor, boxes: Tensor, anchors: int, reduce: Reduce) -> tuple[Tensor, Tensor, Tensor]:
    """From A rows at each location to one: scores (B, L * A, K) and boxes (B, L * A, 4).

    Returns:
        Scores (B, L, K), the highest score of each location (B, L), and boxes (B, L, 4).
    """
    scores, boxes = (rows.unflatten(1, (-1, anchors)) for rows in (scores, boxes))  # (B, L, A, ...)
    confidence, best = scores.amax(-1).max(2)  # (B, L)
    box = boxes.gather(2, best[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]
    if reduce == "max":
        return scores.amax(2), confidence, box
    index = best[..., None, None].expand(-1, -1, 1, scores.shape[-1])
    return scores.gather(2, index)[:, :, 0], confidence, box


def distance_to_boxes(student: Pass, regression: Tensor, boxes: Tensor, as_distribution: bool) -> Tensor:
    """(B, N): 1 - GIoU of the student's decoded boxes, or KL of its bins from the two bins around each distance.

    Not published: a choice of this project.
    """
    assert student.priors is not None
    assert student.decode is not None
    if not as_distribution:
        return 1 - aligned_iou(student.decode(regression), boxes, generalized=True)
    logits = regression.unflatten(-1, (4, -1))  # (B, N, 4, M)
    distances = encode_distance(student.priors.centers, boxes) / student.priors.strides[:, None]
    return two_bin_kl(logits, distances.clamp(0, logits.shape[-1] - 1 - 1e-3)).mean(-1)


def two_bin_kl(logits: Tensor, distances: Tensor) -> Tensor:
    """KL of (..., M) bins from the two bins around each distance (...) that have it as their mean, to (...)."""
    right = distances - distances.floor()
    entropy = -torch.xlogy(right, right) - torch.xlogy(1 - right, 1 - right)
    return distribution_focal(logits, distances) - entropy


def _check_levels(student: Priors, teacher: Priors, anchors: tuple[int, int]) -> None:
    own = [length // anchors[0] for length in student.level_lengths]
    other = [length // anchors[1] for length in teacher.level_lengths]
    if own != other:
        raise ValueError(
            f"The student's maps have {own} locations per level, the teacher's {other}. Plain KD needs the same input "
            "and the same strides for both."
        )
