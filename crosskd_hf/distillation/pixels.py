"""The teacher sees the student's pixels, normalised its own way."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class PixelFormat(NamedTuple):
    """How an image processor makes pixel values of 0..255 RGB: (rgb * rescale - mean) / std, maybe reversed to BGR."""

    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool

    @classmethod
    def of(cls, processor: Any) -> "PixelFormat":
        """Read from an image processor; without normalisation mean is 0 and std 1. `mean` is in channel order."""
        rescale = processor.rescale_factor if processor.do_rescale else 1.0
        normalise = processor.do_normalize
        mean = tuple(processor.image_mean) if normalise else (0.0, 0.0, 0.0)
        std = tuple(processor.image_std) if normalise else (1.0, 1.0, 1.0)
        return cls(float(rescale), mean, std, processor.to_dict().get("channel_order", "rgb") == "bgr")


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
