"""Batches of uint8 pixels and a bool mask, a fifth of the bytes of normalised ones."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BaseImageProcessor
from transformers.image_utils import SizeDict

from ..models.image_processing import DetectionImageProcessor
from ..models.normalization import Normalizer

_PROBES = ((24, 40), (40, 24))  # height and width of images that tell what a processor does
_EXACT = 1e-5
_ODD = (AttributeError, KeyError, TypeError, ValueError, IndexError, RuntimeError)


class CompactPixels:
    """What an image processor does before it normalises: resize and pad, in uint8.

    Args:
        processor: Of which :func:`compact_pixels` finds this true.
        direct: Call the processor's `resize`, which leaves pixels channels last, as they were decoded: a quarter of the
            time of a call of the processor, which lays them out anew.
    """

    def __init__(self, processor: BaseImageProcessor, direct: bool) -> None:
        self.processor, self.direct = processor, direct
        self._options = {"do_rescale": False, "do_normalize": False, "do_pad": False, "return_tensors": "pt"}
        if isinstance(processor, DetectionImageProcessor):
            self._options["channel_order"] = "rgb"  # it is reversed on the device

    def resized(self, images: Sequence[Tensor], do_resize: bool = True) -> list[Tensor]:
        """(3, H_i, W_i) uint8 images at the processor's size, or at their own with `do_resize=False`."""
        settings: Any = self.processor
        do_resize = do_resize and settings.do_resize
        if not self.direct:
            return [settings(images=[i], **self._options, do_resize=do_resize)["pixel_values"][0] for i in images]
        size, resample = SizeDict(**dict(settings.size)), settings.resample
        own = {"antialias": settings.antialias} if isinstance(settings, DetectionImageProcessor) else {}
        return [settings.resize(i, size=size, resample=resample, **own) for i in images] if do_resize else list(images)

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
    """`pixel_values` (B, 3, H, W) uint8, images in the top left and 0 beside them, and `pixel_mask` (B, H, W) bool.

    Pixels lie channels last in memory, as images are decoded and resized.
    """
    values = torch.empty(len(images), 3, *canvas, dtype=torch.uint8, memory_format=torch.channels_last)
    mask = torch.zeros(len(images), *canvas, dtype=torch.bool)
    for row, image in enumerate(images):
        height, width = image.shape[-2:]
        values[row, :, :height, :width] = image
        values[row, :, height:] = 0
        values[row, :, :height, width:] = 0
        mask[row, :height, :width] = True
    return values, mask


def compact_pixels(processor: BaseImageProcessor) -> CompactPixels | None:
    """The uint8 pixels of a processor, if they are what it makes once they are normalised: that is tried once.

    Of classes of transformers and of this package `resize` is all that happens before the normalisation, if the trial
    finds so; others are called as a whole.
    """
    with contextlib.suppress(*_ODD):  # a processor of its own kind
        key = type(processor), processor.to_json_string()
        if key not in _known:
            tried = (CompactPixels(processor, direct) for direct in _ways(processor))
            _known[key] = next((compact.direct for compact in tried if _is_right(compact)), None)
        direct = _known[key]
        return None if direct is None else CompactPixels(processor, direct)
    return None


_known: dict[tuple[type, str], bool | None] = {}


def _ways(processor: BaseImageProcessor) -> tuple[bool, ...]:
    own = type(processor).__module__.split(".")[0] in ("transformers", __name__.split(".")[0])
    return (True, False) if own and hasattr(processor, "resize") else (False,)


def _is_right(compact: CompactPixels) -> bool:
    try:
        return _same(compact)
    except _ODD:
        return False


def _same(compact: CompactPixels) -> bool:
    processor: Any = compact.processor
    generator = torch.Generator().manual_seed(0)
    shapes = _PROBES if processor.do_pad else _PROBES[:1] * 2
    images = [
        torch.randint(256, (*shape, 3), dtype=torch.uint8, generator=generator).permute(2, 0, 1) for shape in shapes
    ]
    wanted = processor(images=images, return_tensors="pt")
    resized = compact.resized(images)
    if any(image.dtype != torch.uint8 for image in resized):
        return False
    values, mask = stacked(resized, compact.canvas(resized))
    made = Normalizer(processor)({"pixel_values": values, "pixel_mask": mask})
    found, expected = made["pixel_values"], wanted["pixel_values"]
    expected_mask = wanted.get("pixel_mask", torch.ones_like(made["pixel_mask"]))
    same = found.shape == expected.shape and torch.equal(made["pixel_mask"], expected_mask)
    return same and bool((found - expected).abs().max() < _EXACT)
