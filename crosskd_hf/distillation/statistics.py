"""Per-channel statistics of feature maps, and what aligns a map by them. Always in float32."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Statistics = Literal["image", "batch"]
AXES: dict[Statistics, tuple[int, ...]] = {"image": (2, 3), "batch": (0, 2, 3)}
_SMALLEST = 1e-6  # deviation: its square is added to every variance
_FEW = 16  # elements below which a map is normalised as the authors do, see `_of_few`


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
    return _normalised(feature, statistics) * math.sqrt((elements - 1) / elements)


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
    variance = (target - mean).square().sum(axes) * ((elements - 1) / elements / (others - 1))
    return _normalised(feature, statistics, variance.sqrt().flatten(), mean.flatten())


def _normalised(
    feature: Tensor, statistics: Statistics, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """The map with zero mean and unit biased deviation, times `scale` plus `shift`: one kernel each way.

    The kernel is that of batch norm, for which the channels of all images are channels of one image.
    """
    rows, elements = feature.float(), count(feature, statistics)
    if elements < _FEW:
        found = _of_few(rows, AXES[statistics], elements)
        if scale is None or shift is None:
            return found
        per_channel = (-1, rows.shape[1], 1, 1)
        return torch.addcmul(shift.view(per_channel), found, scale.view(per_channel))
    if statistics == "image":
        rows = rows.reshape(1, -1, *rows.shape[2:])
    return F.batch_norm(rows, None, None, scale, shift, training=True, eps=_SMALLEST**2).reshape(feature.shape)


def _of_few(rows: Tensor, axes: tuple[int, ...], elements: int) -> Tensor:
    """As :func:`_normalised`, but with 1e-6 added to the unbiased deviation, as in the authors' code.

    Of two elements the normalised values are always the same, and what is added decides the gradient. The clamp gives
    the deviation of a constant channel no gradient, as `torch.std` does.
    """
    centered = rows - rows.mean(axes, keepdim=True)
    root = centered.square().sum(axes, keepdim=True).clamp(min=1e-30).sqrt()
    return centered / (root / math.sqrt(elements - 1) + _SMALLEST) * math.sqrt(elements / (elements - 1))
