"""Distances between two sets of predictions of one dense head, chosen by what the head predicts."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from crosskd_hf.models.assigners import Assignment, Priors
from crosskd_hf.models.box_coders import RegressionKind
from crosskd_hf.models.boxes import aligned_iou
from crosskd_hf.models.dense import DenseHead, Predictions
from crosskd_hf.models.losses import LossPart, distribution_kl, quality_focal

# Published weights by what the teacher's head regresses (the authors' configurations of GFL, ATSS and RetinaNet, FCOS).
WEIGHTS: dict[RegressionKind, dict[str, float]] = {
    "distribution": {"loss_cls_kd": 1.0, "loss_reg_kd": 4.0, "loss_centerness_kd": 1.0},
    "delta": {"loss_cls_kd": 1.0, "loss_reg_kd": 1.0, "loss_centerness_kd": 1.0},
    "distance": {"loss_cls_kd": 0.4, "loss_reg_kd": 0.75, "loss_centerness_kd": 0.0},
}


class Rows(NamedTuple):
    """What is known about the rows of a pair of predictions.

    Args:
        priors: Of the head that both predictions come from.
        assignment: Its `weight` leaves rows out of the classification; `positive` bears the centerness.
        normalizer: Scalar that the losses are divided by.
        floor: Smallest normalizer.
    """

    priors: Priors
    assignment: Assignment
    normalizer: Tensor
    floor: float


def mimic(
    head: DenseHead,
    predictions: Predictions,
    target: Predictions,
    rows: Rows,
    weights: dict[str, float],
    beta: float = 1.0,
    temperature: float = 1.0,
) -> dict[str, LossPart]:
    """Distances of `predictions` from the teacher's `target`, both made by `head` (CrossKD, eq. 4 and 5).

    Both hold the classes that are distilled, and no others. Box rows count by the teacher's highest class score. No
    gradient flows into the target.
    """
    scores = target.logits.detach().sigmoid()  # (B, N, K)
    confidence = scores.amax(-1) * rows.assignment.weight  # (B, N)
    parts: dict[str, LossPart] = {}
    if weights["loss_cls_kd"]:
        counts = rows.assignment.weight
        parts["loss_cls_kd"] = mimic_scores(predictions.logits, scores, counts, rows, weights["loss_cls_kd"], beta)
    if weights["loss_reg_kd"]:
        parts["loss_reg_kd"] = _mimic_boxes(
            head, predictions, target, rows, confidence, weights["loss_reg_kd"], temperature
        )
    if weights["loss_centerness_kd"] and predictions.centerness is not None and target.centerness is not None:
        distance = F.binary_cross_entropy_with_logits(
            predictions.centerness, target.centerness.detach().sigmoid(), reduction="none"
        )
        total = weights["loss_centerness_kd"] * (distance * rows.assignment.positive).sum()
        parts["loss_centerness_kd"] = LossPart(total, rows.normalizer, rows.floor)
    return parts


def mimic_scores(logits: Tensor, scores: Tensor, counts: Tensor, rows: Rows, weight: float, beta: float) -> LossPart:
    """Quality focal loss between logits and class `scores`, both (B, N, K); each row counts by `counts` (B, N)."""
    total = (quality_focal(logits, scores, beta).sum(-1) * counts).sum()
    return LossPart(weight * total, rows.normalizer, rows.floor)


def _mimic_boxes(
    head: DenseHead,
    predictions: Predictions,
    target: Predictions,
    rows: Rows,
    confidence: Tensor,
    weight: float,
    temperature: float,
) -> LossPart:
    if head.regression_kind == "distribution":
        sides = (predictions.regression.unflatten(-1, (4, -1)), target.regression.detach().unflatten(-1, (4, -1)))
        distance = distribution_kl(*sides, temperature).mean(-1)  # (B, N)
        return LossPart(weight * (distance * confidence).sum(), confidence.sum(), floor=1e-7)
    boxes = head.decode(predictions.regression, rows.priors)
    target_boxes = head.decode(target.regression.detach(), rows.priors)
    if head.regression_kind == "delta":
        distance = 1 - aligned_iou(boxes, target_boxes, generalized=True)
    else:
        distance = -aligned_iou(boxes, target_boxes).clamp(min=1e-6).log()
    return LossPart(weight * (distance * confidence).sum(), rows.normalizer, rows.floor)
