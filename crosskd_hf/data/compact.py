"""Batches of uint8 pixels and a bool mask, a fifth of the bytes of normalised ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BaseImageProcessor

from ..models.image_processing import DetectionImageProcessor
from ..models.normalization import Normalizer

_PROBES = ((24, 40), (40, 24))  # height and width of images that tell what a processor does
_EXACT = 1e-5


class CompactPixels:
    """What an image processor does before it normalises: resize and pad, in uint8.

    Args:
        processor: One that :func:`is_compactable`.
    """

    def __init__(self, processor: BaseImageProcessor) -> None:
        self.processor = processor
        self._options = {"do_rescale": False, "do_normalize": False, "do_pad": False, "return_tensors": "pt"}
        if isinstance(processor, DetectionImageProcessor):
            self._options["channel_order"] = "rgb"  # it is reversed on the device

    def resized(self, images: Sequence[Tensor], **options: bool) -> list[Tensor]:
        """(3, H_i, W_i) uint8 images at the processor's size, or at their own with `do_resize=False`."""
        return [self.processor(images=[image], **self._options, **options)["pixel_values"][0] for image in images]

    def canvas(self, images: Sequence[Tensor]) -> tuple[int, int]:
        """Height and width of a batch of resized images, padded by the processor's rules."""
        settings: Any = self.processor
        sizes = [max(image.shape[axis] for image in images) for axis in (-2, -1)]
        if not settings.do_pad:
            if len({image.shape for image in images}) > 1:
                torch.stack(list(images))  # raises, as the processor would
            return sizes[0], sizes[1]
        least = dict(getattr(settings, "pad_size", None) or {})
        divisor = getattr(settings, "size_divisor", None) or 1
        height, width = (max(edge, least.get(key) or 0) for edge, key in zip(sizes, ("height", "width"), strict=True))
        return math.ceil(height / divisor) * divisor, math.ceil(width / divisor) * divisor


def stacked(images: Sequence[Tensor], canvas: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """`pixel_values` (B, 3, H, W) uint8, images in the top left and 0 beside them, and `pixel_mask` (B, H, W) bool."""
    values = torch.zeros(len(images), 3, *canvas, dtype=torch.uint8)
    mask = torch.zeros(len(images), *canvas, dtype=torch.bool)
    for row, image in enumerate(images):
        height, width = image.shape[-2:]
        values[row, :, :height, :width] = image
        mask[row, :height, :width] = True
    return values, mask


def is_compactable(processor: BaseImageProcessor) -> bool:
    """Whether batches of uint8 pixels, normalised on the device, are what a processor makes: it is tried once."""
    try:
        key = type(processor), processor.to_json_string()
        if key not in _known:
            _known[key] = _same(processor)
        return _known[key]
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, RuntimeError):  # a processor of its own kind
        return False


_known: dict[tuple[type, str], bool] = {}


def _same(processor: BaseImageProcessor) -> bool:
    compact, normalize = CompactPixels(processor), Normalizer(processor)
    generator = torch.Generator().manual_seed(0)
    shapes = _PROBES if processor.do_pad else _PROBES[:1] * 2
    images = [torch.randint(256, (3, *shape), dtype=torch.uint8, generator=generator) for shape in shapes]
    wanted = processor(images=images, return_tensors="pt")
    resized = compact.resized(images)
    if any(image.dtype != torch.uint8 for image in resized):
        return False
    values, mask = stacked(resized, compact.canvas(resized))
    made = normalize({"pixel_values": values, "pixel_mask": mask})
    found, expected = made["pixel_values"], wanted["pixel_values"]
    expected_mask = wanted.get("pixel_mask", torch.ones_like(made["pixel_mask"]))
    same = found.shape == expected.shape and torch.equal(made["pixel_mask"], expected_mask)
    return same and bool((found - expected).abs().max() < _EXACT)
