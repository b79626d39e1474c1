"""Pictures of every kind to 8-bit RGB: the one conversion of training, evaluation, prediction and pipelines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
from numpy.typing import NDArray

PixelRange: TypeAlias = Sequence[float] | None
"""(lowest, highest) value of 16-bit, integer and float pixels that become 0 and 255; values beyond are clipped.

None: 0 and 65535 of integers, and of floats the lowest and highest finite value of each image."""

PIL.Image.init()
_RASTER = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
FORMATS = tuple(name for name in _RASTER if name in PIL.Image.OPEN)
"""What is read, whatever a file is called. Of PIL's other formats EPS would be run as a program, by Ghostscript."""

_SIXTEEN_BIT = (0, 65535)
_LEAST_SPAN = float(np.finfo(np.float32).tiny)  # float pixels that differ by less are all alike
_STRIP = 1 << 20  # pixels that are converted at once, so that a huge image doesn't need a multiple of its memory


def check_pixel_range(pixel_range: PixelRange) -> None:
    """Raise a ValueError unless `pixel_range` is None or two finite numbers, the lower one first."""
    if pixel_range is None:
        return
    values = np.asarray(pixel_range)
    if values.shape != (2,) or values.dtype.kind not in "iuf" or not values[0] < values[1] or np.isinf(values).any():
        raise ValueError(f"pixel_range is {pixel_range!r}; give the lowest and the highest pixel value, as (0, 4095)")


def is_deep(image: PIL.Image.Image) -> bool:
    """True for grey images of more than 8 bits: integers (mode I, I;16, ...) and floats (F)."""
    return image.mode.startswith(("I", "F"))


def to_rgb(image: PIL.Image.Image, pixel_range: PixelRange = None) -> PIL.Image.Image:
    """A PIL image of any mode as 8-bit RGB, without metadata; EXIF orientation is left to the caller.

    Transparency, also that of palettes, is laid on white; more than 8 bits are scaled by `pixel_range`.
    """
    if is_deep(image):
        rgb = _scaled(image, pixel_range).convert("RGB")
    elif image.has_transparency_data:
        rgb = PIL.Image.new("RGB", image.size)
        for top, strip in strips(image):
            canvas = PIL.Image.new("RGBA", strip.size, "white")
            canvas.alpha_composite(strip.convert("RGBA"))
            rgb.paste(canvas.convert("RGB"), (0, top))
    else:
        rgb = image.convert("RGB")
    rgb.info.clear()  # above all EXIF, which others would apply once more
    return rgb


def strips(image: PIL.Image.Image) -> Iterator[tuple[int, PIL.Image.Image]]:
    """The image in strips of full width: the first row of each, and its pixels."""
    rows = max(1, _STRIP // max(1, image.width))
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def array_to_8_bit(values: NDArray[Any], pixel_range: PixelRange = None) -> NDArray[Any]:
    """The pixels of an array, of any shape, on the scale 0 to 255: uint8, or floats that are left as they are.

    Bools become 0 and 255; uint16 is scaled by `pixel_range`, and so is every other type where a range is given.

    Raises:
        ValueError: without a range, other integers outside of 0 to 255, and floats that are not on this scale: outside
            of it, or all in [0, 1].
    """
    kind = values.dtype.kind
    if kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype == np.uint8 or not values.size:
        return values
    if pixel_range is not None or values.dtype == np.uint16:
        low, high = pixel_range or _SIXTEEN_BIT
        return _onto_255(values, low, high)
    low, high = values.min(), values.max()
    if kind == "f" and 0 < high <= 1 and low >= 0:
        raise ValueError(
            f"The image is {values.dtype} in [0, 1], and would be divided by 255 once more. Give uint8, "
            "or do_rescale=False for images in [0, 1]."
        )
    if not (low >= 0 and high <= 255):
        raise ValueError(
            f"The image is {values.dtype} with values from {low:g} to {high:g}; needed is the scale 0 to 255. Give "
            "uint8, or the range that these pixels have: pixel_range=(lowest, highest)."
        )
    return values if kind == "f" else values.astype(np.uint8)


def _scaled(image: PIL.Image.Image, pixel_range: PixelRange) -> PIL.Image.Image:
    """The grey 8-bit image of a deep one."""
    low, high = pixel_range or (_finite_range(image) if image.mode == "F" else _SIXTEEN_BIT)
    grey = np.empty((image.height, image.width), dtype=np.uint8)
    for top, strip in strips(image):
        grey[top : top + strip.height] = _onto_255(np.asarray(strip), low, high)
    return PIL.Image.fromarray(grey)


def _onto_255(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """`values` with [low, high] spread over 0 to 255; of 16-bit integers that is the high byte."""
    steps = values.astype(np.float64) - low
    span = high - low
    if values.dtype.kind == "f":
        steps = np.nan_to_num(steps, nan=0.0, posinf=span, neginf=0.0) * (255 / span if span > _LEAST_SPAN else 0.0)
    else:
        steps *= 256 / (span + 1)
    return np.asarray(steps.clip(0, 255).astype(np.uint8))


def _finite_range(image: PIL.Image.Image) -> tuple[float, float]:
    """Lowest and highest finite value; (0, 0) if there is none."""
    ends = []
    for _, strip in strips(image):
        values = np.asarray(strip)
        finite = values[np.isfinite(values)]
        ends += [float(finite.min()), float(finite.max())] if finite.size else []
    return (min(ends), max(ends)) if ends else (0.0, 0.0)
