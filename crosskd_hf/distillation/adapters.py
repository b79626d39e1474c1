"""Trainable convolutions that take a student's features to the teacher's width. They are no part of the student."""

import torch.nn.functional as F
from torch import Tensor, nn


class Adapter(nn.Conv2d):
    """A 1x1 convolution on maps (B, C, H, W) or on sequences (B, S, C).

    Args:
        source, target: Channels before and after.
    """

    def __init__(self, source: int, target: int):
        super().__init__(source, target, 1)

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim == 3:
            return F.linear(input, self.weight[..., 0, 0], self.bias)
        return super().forward(input)


def adapter(source: int, target: int, always: bool = False) -> nn.Module:
    """An :class:`Adapter` where the widths differ (or `always`), otherwise nothing that changes anything."""
    return Adapter(source, target) if always or source != target else nn.Identity()


class Mixer(nn.Sequential):
    """A 3x3 convolution on maps (B, C, H, W), which begins close to zero, and if wanted a ReLU.

    Args:
        source, target: Channels before and after.
        rectified: With the ReLU.
        std: Of the truncated normal distribution that the weights are drawn from.
    """

    def __init__(self, source: int, target: int, rectified: bool, std: float = 1e-4):
        convolution = nn.Conv2d(source, target, 3, padding=1)
        nn.init.trunc_normal_(convolution.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        super().__init__(convolution, *[nn.ReLU()] * rectified)
