"""Per-channel statistics of feature maps, and what aligns a map by them. Always in float32."""

import math
from typing import Literal

import torch
from torch import Tensor

Statistics = Literal["image", "batch"]
AXES: dict[Statistics, tuple[int, ...]] = {"image": (2, 3), "batch": (0, 2, 3)}
_SMALLEST = 1e-6  # is added to every deviation


def count(feature: Tensor, statistics: Statistics) -> int:
    """Elements per channel of a (B, C, H, W) map."""
    return math.prod(feature.shape[axis] for axis in AXES[statistics])


def center(feature: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """The map without its mean, and the unbiased deviation of each channel plus 1e-6, (.., C, 1, 1).

    From the centered map the deviation costs one more pass; `torch.std` is several times slower on the CPU, and
    `torch.linalg.vector_norm` loses digits there. The clamp keeps the root differentiable for a channel that is
    constant, or that has a single element.

    Args:
        feature: (B, C, H, W).
        statistics: "image" takes them over (H, W), "batch" over (B, H, W) as the authors' code does.
    """
    axes = AXES[statistics]
    feature = feature.float()
    centered = feature - feature.mean(axes, keepdim=True)
    root = centered.square().sum(axes, keepdim=True).clamp(min=_SMALLEST**2).sqrt()
    return centered, root / math.sqrt(max(count(feature, statistics) - 1, 1)) + _SMALLEST


def standardise(feature: Tensor, statistics: Statistics) -> Tensor:
    """Zero mean and unit deviation per channel; constant channels and single elements become zero, not NaN."""
    centered, deviation = center(feature, statistics)
    return centered / deviation


def align(feature: Tensor, reference: Tensor, statistics: Statistics = "image") -> Tensor:
    """Give `feature` the mean and standard deviation of `reference`, channel by channel.

    Gradient flows through the statistics of `feature`, not through those of `reference`. A map of a single element has
    no deviation and is returned as it is.

    Args:
        feature, reference: (B, C, H, W); the maps may differ in size.
        statistics: "image" takes them over (H, W), "batch" over (B, H, W) as the authors' code does.
    """
    if min(count(feature, statistics), count(reference, statistics)) == 1:
        return feature.float()
    centered, deviation = center(feature, statistics)
    target, mean = torch.std_mean(reference.detach().float(), AXES[statistics], keepdim=True)
    return torch.addcmul(mean, centered, target / deviation)
