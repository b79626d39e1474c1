"""Per-channel statistics of feature maps, and what aligns a map by them. Always in float32."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

Statistics = Literal["image", "batch"]
AXES: dict[Statistics, tuple[int, ...]] = {"image": (2, 3), "batch": (0, 2, 3)}
_SMALLEST = 1e-6  # added to every deviation


def count(feature: Tensor, statistics: Statistics) -> int:
    """Elements per channel of a (B, C, H, W) map."""
    return math.prod(feature.shape[axis] for axis in AXES[statistics])


def standardise(feature: Tensor, statistics: Statistics) -> Tensor:
    """Zero mean and unit (unbiased) deviation per channel; constant channels and single elements become zero, not NaN.

    Args:
        feature: (B, C, H, W).
        statistics: "image" takes them over (H, W), "batch" over (B, H, W) as the authors' code does.
    """
    if count(feature, statistics) == 1:
        return feature.float() * 0
    return _standardised(feature.float(), AXES[statistics])


def align(feature: Tensor, reference: Tensor, statistics: Statistics = "image") -> Tensor:
    """Give `feature` the mean and standard deviation of `reference`, channel by channel.

    Gradient flows through the statistics of `feature`, not through those of `reference`. A map of a single element has
    no deviation and is returned as it is.

    Args:
        feature, reference: (B, C, H, W); the maps may differ in size.
        statistics: "image" takes them over (H, W), "batch" over (B, H, W) as the authors' code does.
    """
    elements, others = count(feature, statistics), count(reference, statistics)
    if min(elements, others) == 1:
        return feature.float()
    deviation, mean = torch.std_mean(reference.detach().float(), AXES[statistics], keepdim=True)
    return _Align.apply(feature.float(), mean, deviation, AXES[statistics], elements)


def _standardised(rows: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The map with zero mean and unit unbiased deviation, to which 1e-6 is added as in the authors' code.

    Mean and deviation are taken apart, by torch's own operations, as there: of two elements the results are always the
    same, and in a channel that is nearly constant the deviation is hardly more than what is added. There the rounding
    of each operation decides the gradient.
    """
    return (rows - rows.mean(axes, keepdim=True)) / (rows.std(axes, keepdim=True) + _SMALLEST)


class _Align(torch.autograd.Function):
    """The map as of :func:`_standardised`, times `scale` plus `shift`, which are constants.

    Its gradient is written down because autograd takes twice as many kernels for it, ten times in a step. With the
    centred map c, its deviation s and f = scale / (s + 1e-6), the gradient g becomes
    f g - mean(f g) - c f sum(g c) / ((s + 1e-6) s (elements - 1)).
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, shift: Tensor, scale: Tensor, axes: tuple[int, ...], elements: int) -> Tensor:
        centered = rows - rows.mean(axes, keepdim=True)
        deviation = torch.linalg.vector_norm(centered, dim=axes, keepdim=True) / math.sqrt(elements - 1)
        divisor = deviation + _SMALLEST
        factor = scale / divisor
        ctx.save_for_backward(centered, deviation, divisor, factor)
        ctx.axes, ctx.elements = axes, elements
        return torch.addcmul(shift, centered, factor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        centered, deviation, divisor, factor = ctx.saved_tensors
        product = (gradient * centered).sum(ctx.axes, keepdim=True)
        # In a constant channel the product is zero, and so is the gradient of its deviation.
        slope = product * factor / (divisor * deviation.clamp(min=1e-20) * (ctx.elements - 1))
        own = gradient * factor
        own = own - own.mean(ctx.axes, keepdim=True)
        return torch.addcmul(own, centered, slope, value=-1), None, None, None, None
