"""Per-channel statistics of feature maps, shared by the alignment of taps and by PKD. Always in float32."""

import math

from torch import Tensor

from .config import Statistics

AXES: dict[Statistics, tuple[int, ...]] = {"image": (2, 3), "batch": (0, 2, 3)}


def count(feature: Tensor, statistics: Statistics) -> int:
    """Elements per channel of a (B, C, H, W) map."""
    return math.prod(feature.shape[axis] for axis in AXES[statistics])


def center(feature: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor, Tensor]:
    """The map without its mean, the mean, and the unbiased deviation of each channel.

    From the centered map the deviation costs one more pass; `torch.std` is several times slower on the CPU. The clamp
    keeps the root differentiable for a channel that is constant, or that has a single element: its deviation is 1e-6.

    Args:
        feature: (B, C, H, W).
        statistics: "image" takes them over (H, W), "batch" over (B, H, W) as the authors' code does.
    """
    axes = AXES[statistics]
    feature = feature.float()
    mean = feature.mean(axes, keepdim=True)
    centered = feature - mean
    variance = centered.square().sum(axes, keepdim=True) / max(count(feature, statistics) - 1, 1)
    return centered, mean, variance.clamp(min=1e-12).sqrt()


def standardise(feature: Tensor, statistics: Statistics) -> Tensor:
    """Zero mean and unit deviation per channel; constant channels and single elements become zero, not NaN."""
    centered, _, deviation = center(feature, statistics)
    return centered / (deviation + 1e-6)
