"""Per-channel statistics of feature maps, and what aligns a map by them. Always in float32."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Statistics = Literal["image", "batch"]
AXES: dict[Statistics, tuple[int, ...]] = {"image": (2, 3), "batch": (0, 2, 3)}
_SMALLEST = 1e-6  # deviation: its square is added to every variance
_FEW = 16  # elements below which a map is aligned by `_standardised`


def count(feature: Tensor, statistics: Statistics) -> int:
    """Elements per channel of a (B, C, H, W) map."""
    return math.prod(feature.shape[axis] for axis in AXES[statistics])


def standardise(feature: Tensor, statistics: Statistics) -> Tensor:
    """Zero mean and unit (unbiased) deviation per channel; constant channels and single elements become zero, not NaN.

    Args:
        feature: (B, C, H, W).
        statistics: "image" takes them over (H, W), "batch" over (B, H, W) as the authors' code does.
    """
    elements = count(feature, statistics)
    if elements == 1:
        return feature.float() * 0
    return _standardised(feature.float(), AXES[statistics], elements)


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
    axes = AXES[statistics]
    target = reference.detach().float()
    mean = target.mean(axes, keepdim=True)
    # The deviation of the centred map: `torch.std_mean` takes three times as long on a CPU with channels last.
    variance = (target - mean).square().sum(axes) / (others - 1)
    if elements < _FEW:
        found, per_channel = _standardised(feature.float(), axes, elements), (-1, feature.shape[1], 1, 1)
        return torch.addcmul(mean, found, variance.sqrt().view(per_channel))
    scale = (variance * ((elements - 1) / elements)).sqrt()
    return _normalised(feature, statistics, scale.flatten(), mean.flatten())


def _normalised(feature: Tensor, statistics: Statistics, scale: Tensor, shift: Tensor) -> Tensor:
    """The map with zero mean and unit biased deviation, times `scale` plus `shift`: one kernel each way.

    The kernel is that of batch norm, for which the channels of all images are channels of one image.
    """
    rows = feature.float()
    if statistics == "image":
        rows = rows.reshape(1, -1, *rows.shape[2:])
    return F.batch_norm(rows, None, None, scale, shift, training=True, eps=_SMALLEST**2).reshape(feature.shape)


def _standardised(rows: Tensor, axes: tuple[int, ...], elements: int) -> Tensor:
    """The map with zero mean and unit unbiased deviation, to which 1e-6 is added as in the authors' code.

    Of two elements the results are always the same, and in a channel that is nearly constant the deviation is hardly
    more than what is added: there it decides the gradient. The clamp gives the deviation of a constant channel no
    gradient, as `torch.std` does.
    """
    centered = rows - rows.mean(axes, keepdim=True)
    variance = centered.square().sum(axes, keepdim=True) / (elements - 1)
    return centered / (variance.clamp(min=1e-30).sqrt() + _SMALLEST)
