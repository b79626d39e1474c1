"""Rows that the low-quality rule of an assigner takes or leaves by a rounding: those of a file in the place of ours.

A box's best anchors are those whose float32 IoU equals the highest. Anchors of equal exact IoU (nested ones, say) come
and go with rounding. Where ours differ from a file's in such anchors alone, the file's are adopted; any other
difference stays, and fails.
"""

from typing import Any

import torch
from torch import Tensor

from crosskd_hf.models.assigners import Assignment, Priors, Targets
from crosskd_hf.models.boxes import pairwise_iou

CLOSE = 1e-5
"""Relative distance from a box's best IoU from which on an anchor is no tie."""


def tied(priors: Priors, targets: Targets) -> tuple[Tensor, Tensor]:
    """(B, N) anchors that are about as near to some box as its best one, and the last such box."""
    overlap = pairwise_iou(targets.boxes.double(), priors.boxes.double()) * targets.mask[..., None]  # (B, G, N)
    best = overlap.amax(-1, keepdim=True)
    near = (overlap >= best * (1 - CLOSE)) & (best > 0)
    order = torch.arange(1, near.shape[1] + 1)[:, None]
    last = (near * order).amax(1)
    return near.any(1), (last - 1).clamp(min=0)


def listed_rows(figures: list[dict[str, Any]], count: int) -> Tensor | None:
    """(B, count) bool of the rows that a file lists for each image; None if it doesn't list all."""
    if any(figure.get("truncated") for figure in figures):
        return None
    rows = torch.zeros(len(figures), count, dtype=torch.bool)
    for row, figure in zip(rows, figures, strict=True):
        row[figure["indices"]] = True
    return rows


def adopted(ours: Tensor, theirs: Tensor | None, ties: Tensor) -> Tensor:
    """The file's rows, if they differ from ours in ties alone; else ours. All (B, N) bool."""
    if theirs is None or ((theirs != ours) & ~ties).any():
        return ours
    return theirs


def adopted_assignment(
    assignment: Assignment, theirs: Tensor | None, priors: Priors, targets: Targets, negative_iou: float = 0.4
) -> Assignment:
    """An assignment with the file's positives, as :func:`adopted`; what is positive no more is negative or ignored."""
    ties, last = tied(priors, targets)
    positive = adopted(assignment.positive, theirs, ties)
    new, gone = positive & ~assignment.positive, assignment.positive & ~positive
    overlap = (pairwise_iou(targets.boxes, priors.boxes) * targets.mask[..., None]).amax(1)
    weight = torch.where(new, 1.0, torch.where(gone, (overlap < negative_iou).float(), assignment.weight))
    boxes = targets.boxes.gather(1, last[..., None].expand(-1, -1, 4))
    return assignment._replace(
        positive=positive,
        weight=weight,
        boxes=torch.where(new[..., None], boxes, assignment.boxes),
        labels=torch.where(new, targets.labels.gather(1, last), assignment.labels),
    )
