"""Per-channel statistics of feature maps, shared by the alignment of taps and by PKD. Always in float32."""

import math

from torch import Tensor

from .config import Statistics

AXES: dict[Statistics, tuple[int, ...]] = {"image": (2, 3), "batch": (0, 2, 3)}


def has_deviation(feature: Tensor, statistics: Statistics) -> bool:
    """Whether a (B, C, H, W) map has more than one element per channel, so that a deviation exists."""
    return math.prod(feature.shape[axis] for axis in AXES[statistics]) > 1


def standardise(feature: Tensor, statistics: Statistics) -> Tensor:
    """Zero mean and unit (unbiased) deviation per channel; a map of single elements becomes zero, not NaN.

    Args:
        feature: (B, C, H, W).
        statistics: "image" takes them over (H, W), "batch" over (B, H, W) as the authors' code does.
    """
    axes = AXES[statistics]
    feature = feature.float()
    centered = feature - feature.mean(axes, keepdim=True)
    if not has_deviation(feature, statistics):
        return centered
    return centered / (feature.std(axes, keepdim=True) + 1e-6)
