"""Queries of a student matched one to one to a teacher's, whose order means nothing (DETRDistill, ICCV 2023)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..models.boxes import aligned_iou, to_absolute, to_relative
from .passes import Prediction

BOX_COST, IOU_COST = 5.0, 2.0  # beside 1 of the classes


class Matches(NamedTuple):
    """Pairs of queries, as many for each image as the model with fewer queries has, M.

    Args:
        student, teacher: (B, M) rows.
    """

    student: Tensor
    teacher: Tensor


def clipped(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes (B, Q, 4), cxcywh relative to `sizes` (B, 2), cut off at the borders of their image."""
    limit = sizes.flip(-1).repeat(1, 2)[:, None]
    return to_relative(to_absolute(boxes.float(), sizes).clamp(min=0).minimum(limit), sizes)


@torch.no_grad()
def match_cost(student: Prediction, teacher: Prediction, sizes: Tensor, softmax: bool) -> Tensor:
    """(B, Q_s, Q_t): cross entropy of the classes, 5 times the L1 distance of relative boxes, -2 times their GIoU."""
    logits, target = student.logits.float(), teacher.logits.float()
    if softmax:
        cost = -logits.log_softmax(-1) @ target.softmax(-1).mT
    else:
        cost = F.softplus(logits).sum(-1, keepdim=True) - logits @ target.sigmoid().mT
    own, goal = student.regression.float(), teacher.regression.float()
    cost += BOX_COST * torch.cdist(own, goal, p=1)
    own, goal = (to_absolute(boxes, sizes) for boxes in (own, goal))
    own, goal = torch.broadcast_tensors(own[:, :, None], goal[:, None])
    return cost - IOU_COST * aligned_iou(own, goal, generalized=True)


def match(costs: list[Tensor]) -> list[Matches]:
    """The cheapest pairs of each cost matrix (B, Q_s, Q_t); all layers wait for the device once.

    Raises:
        ValueError: A cost is not finite.
    """
    device = costs[0].device
    if not costs[0].numel():
        nothing = torch.zeros(len(costs[0]), 0, dtype=torch.long, device=device)
        return [Matches(nothing, nothing)] * len(costs)
    given = torch.stack(costs).double().cpu().nan_to_num(nan=1e9, posinf=1e9, neginf=-1e9).numpy()
    rows = [[linear_sum_assignment(image) for image in layer] for layer in given]
    found = torch.tensor([[[*map(list, pair)] for pair in layer] for layer in rows]).to(device)  # (L, B, 2, M)
    return [Matches(layer[:, 0], layer[:, 1]) for layer in found]


def rows_of(prediction: Prediction, rows: Tensor) -> Prediction:
    """The rows (B, M) of a prediction of queries."""
    logits, boxes = prediction.logits, prediction.regression
    return Prediction(
        logits.gather(1, rows[..., None].expand(-1, -1, logits.shape[-1])),
        boxes.gather(1, rows[..., None].expand(-1, -1, 4)),
    )
