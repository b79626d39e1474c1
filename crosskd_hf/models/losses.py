"""Loss functions of dense detectors: pure and in float32; those of an element leave weighing and summing to the caller.

Every term of a training loss leaves its head as a :class:`LossPart`, a sum and what it is divided by. Keeping the
two apart until :func:`divide` makes a loss independent of how a batch is spread over processes and micro-batches.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torchvision.ops import sigmoid_focal_loss

from .assigners import Assignment

_STEEP = 1e-6  # smaller differences of scores are rounding, and their powers below 1 steep beyond use


class LossPart(NamedTuple):
    """One term of a loss before its division.

    A term may be a sum of several quotients, such as one of each decoder layer or pyramid level: then `total` and
    `normalizer` hold one element of each.

    Args:
        total: Scalar or (P,) with gradient, the weighted sums over this process's rows.
        normalizer: Same shape without gradient, this process's share of what `total` is divided by.
        floor: Each normalizer, added up over all processes, counts at least this much.
    """

    total: Tensor
    normalizer: Tensor
    floor: float = 1.0


def sum_normalizers(parts: dict[str, LossPart]) -> Tensor:
    """Normalizers of all `parts`, added up over processes in one all-reduce. Returns one row of all their elements."""
    normalizers = torch.cat([part.normalizer.detach().float().reshape(-1) for part in parts.values()])
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(normalizers)
    return normalizers


def by_part(parts: Mapping[str, LossPart], normalizers: Tensor) -> dict[str, Tensor]:
    """The elements of each part in a row from :func:`sum_normalizers`, by its key."""
    sizes = [part.normalizer.numel() for part in parts.values()]
    return dict(zip(parts, normalizers.split(sizes), strict=True))


def divide(
    parts: dict[str, LossPart], normalizers: Tensor | None = None, averaged: int | None = None
) -> dict[str, Tensor]:
    """Divide every part by its normalizer over all processes (and micro-batches).

    Args:
        parts: The terms; every process must pass the same keys in the same order.
        normalizers: From :func:`sum_normalizers`, added up over micro-batches where there are several.
            Computed from `parts` if not given.
        averaged: How many such losses are averaged later into one gradient: processes times micro-batches.
            Defaults to the number of processes, which is what `DistributedDataParallel` averages over.

    Returns:
        Scalars of the same keys. Their average over processes and micro-batches is sum / normalizer of the whole batch.
    """
    if not parts:
        return {}
    if normalizers is None:
        normalizers = sum_normalizers(parts)
    if averaged is None:
        ready = distributed.is_available() and distributed.is_initialized()
        averaged = distributed.get_world_size() if ready else 1
    floors = torch.cat([part.total.new_full((part.normalizer.numel(),), part.floor) for part in parts.values()])
    scales = by_part(parts, averaged / normalizers.maximum(floors.float()))
    return {name: (part.total * scales[name]).sum() for name, part in parts.items()}


def focal_loss(logits: Tensor, assignment: Assignment) -> Tensor:
    """Focal loss with alpha .25 and gamma 2 (RetinaNet, ICCV 2017, eq. 5), summed over classes and weighted rows.

    Args:
        logits: (B, N, K).
        assignment: What the rows have to predict, and their weight.
    """
    target = assignment.class_scores(assignment.positive.float(), logits.shape[-1])
    return (sigmoid_focal_loss(logits, target).sum(-1) * assignment.weight).sum()


def quality_focal(logits: Tensor, target: Tensor, beta: float = 2.0) -> Tensor:
    """Quality focal loss, |target - sigmoid(logits)|^beta * BCE (Generalized Focal Loss, NeurIPS 2020, eq. 5).

    With soft targets of a teacher and `beta=1` this is CrossKD's classification distance.

    Args:
        logits, target: Same shape; `target` in [0, 1]. Gradient flows through the modulating factor too.
        beta: At least 0. Below 1 the power has an infinite slope where the scores agree: there it is continued by a
            straight line (differences below 1e-6), so that loss and gradient of equal scores are 0.

    Returns:
        The loss of every element, same shape.
    """
    logits = logits.float()
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    if beta == 0:
        return loss
    difference = (target - logits.sigmoid()).abs()
    if beta >= 1:
        return loss * difference.pow(beta)
    line = difference * _STEEP ** (beta - 1)
    return loss * torch.where(difference < _STEEP, line, difference.clamp(min=_STEEP).pow(beta))


def distribution_focal(logits: Tensor, target: Tensor) -> Tensor:
    """Distribution focal loss (Generalized Focal Loss, NeurIPS 2020, eq. 6).

    Args:
        logits: (..., M) over the bins 0..M-1.
        target: (...) continuous distances in [0, M - 1).

    Returns:
        The loss of every distance, shape (...).
    """
    left = target.floor()
    right_weight = target - left
    log_probabilities = logits.float().log_softmax(-1)
    at_left = log_probabilities.gather(-1, left.long()[..., None])[..., 0]
    at_right = log_probabilities.gather(-1, left.long()[..., None] + 1)[..., 0]
    return -(1 - right_weight) * at_left - right_weight * at_right


def distribution_kl(logits: Tensor, target_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * KL(softmax(target / T) || softmax(logits / T)), summed over the last axis. (..., M) to (...)."""
    log_student = (logits.float() / temperature).log_softmax(-1)
    log_target = (target_logits.detach().float() / temperature).log_softmax(-1)
    return temperature**2 * (log_target.exp() * (log_target - log_student)).sum(-1)


def integral(logits: Tensor) -> Tensor:
    """Expected bin of softmax(logits): (..., M) to (...), in [0, M - 1] (Generalized Focal Loss, eq. 4)."""
    bins = torch.arange(logits.shape[-1], dtype=torch.float32, device=logits.device)
    with torch.autocast(logits.device.type, enabled=False):  # a distance has more digits than bfloat16
        return logits.float().softmax(-1) @ bins


def logit_of(log_score: Tensor) -> Tensor:
    """Logits of scores that are known by their logarithm: log(s / (1 - s)), finite with finite gradients for s to 1."""
    log_score = log_score.clamp(max=-1e-7)
    return log_score - (-log_score.expm1()).log()
