"""The teacher sees the student's pixels, normalised its own way."""

import torch
from torch import Tensor

from ..models.normalization import PixelFormat

__all__ = ["PixelAdapter", "PixelFormat"]


class PixelAdapter:
    """Turns pixel values of one format into those of another; exact up to rounding, padding stays zero."""

    def __init__(self, source: PixelFormat, target: PixelFormat):
        mean, std = torch.tensor(source.mean), torch.tensor(source.std)
        ratio = target.rescale / source.rescale
        self.flip = source.bgr != target.bgr
        if self.flip:
            mean, std = mean.flip(0), std.flip(0)
        target_mean, target_std = torch.tensor(target.mean), torch.tensor(target.std)
        self.scale = (std * ratio / target_std)[:, None, None]
        self.offset = ((mean * ratio - target_mean) / target_std)[:, None, None]
        self.identity = source == target

    def __call__(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> Tensor:
        """(B, 3, H, W) of the student's format to the teacher's; `pixel_mask` (B, H, W) is 0 in the padding."""
        if self.identity:
            return pixel_values
        pixels = pixel_values.flip(1) if self.flip else pixel_values
        pixels = pixels * self.scale.to(pixels) + self.offset.to(pixels)
        return pixels if pixel_mask is None else pixels * pixel_mask[:, None].to(pixels)
