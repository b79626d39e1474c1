"""Pixels of 0 to 255 to what a model sees, on the device: the one place for training, evaluation and the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
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
    def of(cls, processor: Any) -> PixelFormat:
        """Read from an image processor; without normalisation mean is 0 and std 1. `mean` is in channel order."""
        rescale = processor.rescale_factor if processor.do_rescale else 1.0
        normalise = processor.do_normalize
        mean = tuple(processor.image_mean) if normalise else (0.0, 0.0, 0.0)
        std = tuple(processor.image_std) if normalise else (1.0, 1.0, 1.0)
        return cls(float(rescale), mean, std, processor.to_dict().get("channel_order", "rgb") == "bgr")


class Normalizer:
    """Finishes a batch as its image processor would have: channel order, scale, mean and standard deviation.

    Args:
        processor: The image processor; None leaves every batch as it is.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with float32 pixels and the int64 mask of image processors; the type of the pixels decides.

        Args:
            inputs: `pixel_values` (B, 3, H, W) uint8 RGB and, if there is padding, `pixel_mask` (B, H, W), 0 in the
                padding, which becomes 0. A batch of floats, as of a user's own collator, is returned as it is.
        """
        pixels, mask = inputs.get("pixel_values"), inputs.get("pixel_mask")
        if self.processor is None or not isinstance(pixels, Tensor) or pixels.dtype != torch.uint8:
            return dict(inputs)
        values = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device)  # contiguous, whatever pixels are
        at_once = 1 if pixels.device.type == "cpu" else len(pixels)  # what a processor's cache holds
        masks = [None] * len(pixels) if mask is None else mask.split(at_once)
        for made, part, inside in zip(values.split(at_once), pixels.split(at_once), masks, strict=False):
            self._finish(made, part, inside)
        return {**inputs, "pixel_values": values, **({} if mask is None else {"pixel_mask": mask.long()})}

    def _finish(self, made: Tensor, pixels: Tensor, mask: Tensor | None) -> None:
        mean, std = self._on(pixels.device)
        inside = _rectangle(mask[0]) if mask is not None and mask.device.type == "cpu" else None
        if inside is not None:  # nothing is computed of the padding
            rows, columns = inside
            made[..., rows:, :] = 0
            made[..., :rows, columns:] = 0
            made, pixels, mask = made[..., :rows, :columns], pixels[..., :rows, :columns], None
        torch.sub(pixels.flip(1) if self.source.bgr else pixels, mean, out=made).div_(std)
        if mask is not None:
            made.mul_(mask[:, None].float())

    @cached_property
    def source(self) -> PixelFormat:
        """What the processor makes; it is asked when the first uint8 pixels come."""
        return PixelFormat.of(self.processor)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation on the scale 0 to 255; they are copied to a device once."""
        if device not in self._constants:
            rows = torch.tensor([self.source.mean, self.source.std]) * (1 / self.source.rescale)
            mean, std = rows.to(device)[..., None, None]
            self._constants[device] = mean, std
        return self._constants[device]


def _rectangle(mask: Tensor) -> tuple[int, int] | None:
    """Rows and columns of the image in a mask (H, W) on the CPU; None where it isn't a rectangle in the corner."""
    rows, columns = int(mask[:, 0].count_nonzero()), int(mask[0].count_nonzero())
    counts = {rows * columns, int(mask[:rows, :columns].count_nonzero()), int(mask.count_nonzero())}
    return (rows, columns) if len(counts) == 1 else None
