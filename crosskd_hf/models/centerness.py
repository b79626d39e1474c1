"""Centerness (FCOS, ICCV 2019, section 3.4): how near a prior lies to the middle of its box."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .assigners import Assignment, Priors
from .boxes import encode_distance
from .losses import LossPart, focal_loss


def centerness_targets(priors: Priors, assignment: Assignment) -> Tensor:
    """sqrt of (nearer / farther side) over both axes (FCOS, eq. 3), (B, N) in [0, 1]; 0 where not positive."""
    left, top, right, bottom = encode_distance(priors.centers, assignment.boxes).clamp(min=0).unbind(-1)
    horizontal = torch.minimum(left, right) / torch.maximum(left, right).clamp(min=1e-6)
    vertical = torch.minimum(top, bottom) / torch.maximum(top, bottom).clamp(min=1e-6)
    return (horizontal * vertical).sqrt() * assignment.positive


def centerness_loss(logits: Tensor, centerness: Tensor, assignment: Assignment) -> Tensor:
    """Binary cross entropy over the positives, summed (FCOS, section 3.4).

    Args:
        logits: (B, N), predicted.
        centerness: (B, N) in [0, 1], the targets.
    """
    rows = F.binary_cross_entropy_with_logits(logits, centerness, reduction="none")
    return (rows * assignment.positive).sum()


def losses_with_centerness(
    logits: tuple[Tensor, Tensor],
    distances: Tensor,
    centerness: Tensor,
    assignment: Assignment,
    count: Tensor,
    weights: Mapping[str, float],
    floor: float = 1.0,
) -> dict[str, LossPart]:
    """Focal loss of the classes, distances of the boxes weighed by centerness, and the loss of centerness itself.

    Args:
        logits: Of the classes (B, N, K) and of centerness (B, N).
        distances: (B, N) between predicted and assigned boxes.
        centerness: (B, N) in [0, 1], the targets.
        count: What the first and the last are divided by.
        weights: Of each loss, by its name.
        floor: Smallest divisor of the distances.
    """
    classes, own = logits
    return {
        "loss_cls": LossPart(weights["loss_cls"] * focal_loss(classes, assignment), count),
        "loss_bbox": LossPart(weights["loss_bbox"] * (distances * centerness).sum(), centerness.sum(), floor),
        "loss_centerness": LossPart(weights["loss_centerness"] * centerness_loss(own, centerness, assignment), count),
    }
