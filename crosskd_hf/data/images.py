"""Image files to the RGB that a person sees: the one place where images are opened."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import PIL.ExifTags
import PIL.Image

from ..models.pixels import FORMATS, PixelRange, is_deep, strips, to_rgb

MAX_PIXELS = 178_956_970
"""Images with more pixels are refused before they are decoded (twice PIL's warning limit, where PIL refuses too).
To read larger ones raise both this and `PIL.Image.MAX_IMAGE_PIXELS`."""

ImageSource: TypeAlias = PIL.Image.Image | str | Path | Mapping[str, Any]
"""A PIL image, a path, or the `{"path", "bytes"}` of a `datasets.Image(decode=False)` column."""

_Turn = PIL.Image.Transpose
_UPRIGHT = {  # EXIF orientation -> what makes the image upright; the last four swap width and height
    2: _Turn.FLIP_LEFT_RIGHT,
    3: _Turn.ROTATE_180,
    4: _Turn.FLIP_TOP_BOTTOM,
    5: _Turn.TRANSPOSE,
    6: _Turn.ROTATE_270,
    7: _Turn.TRANSVERSE,
    8: _Turn.ROTATE_90,
}
_SIDEWAYS = frozenset({_Turn.TRANSPOSE, _Turn.ROTATE_270, _Turn.TRANSVERSE, _Turn.ROTATE_90})
_BACK = {_Turn.ROTATE_270: _Turn.ROTATE_90, _Turn.ROTATE_90: _Turn.ROTATE_270}  # the others are their own inverse
_JPEG_END = b"\xff\xd9"


@dataclass(frozen=True)
class ImageHeader:
    """What an image file says of itself: format ("JPEG", ...), PIL mode, stored and upright (width, height) in px.

    `turned`: whether EXIF asks for a rotation or a reflection. `deep`: whether a channel has more than 8 bits.
    `values`: of a decoded grey image with more than 8 bits its lowest and its highest value, and two more that only a
    thousandth of the pixels lie below or above. `checked`: False if the file was left because of its size.
    """

    format: str
    mode: str
    size: tuple[int, int]
    upright_size: tuple[int, int]
    turned: bool
    animated: bool
    deep: bool = False
    values: tuple[float, float, float, float] | None = None
    checked: bool = True


def open_image(
    source: ImageSource, size: tuple[int, int] | None = None, pixel_range: PixelRange = None
) -> PIL.Image.Image:
    """Decode an image to 8-bit RGB as a person sees it: `open_upright`, and then `models.pixels.to_rgb`.

    The EXIF orientation is applied, 16-bit values are scaled to 8 bits, transparency is laid on white, of an animation
    the first frame is taken.

    Args:
        source: PIL image, path, or `{"path", "bytes"}`.
        size: the (width, height) px that annotations were made for. If it fits the stored pixels and not the upright
            image, the annotations ignore the EXIF orientation, and so does the decoding.
        pixel_range: of images with more than 8 bits, see `models.pixels.PixelRange`; that of the image processor.

    Raises:
        PIL.Image.DecompressionBombError: more than `MAX_PIXELS` pixels.
        OSError: the file is missing, not an image or broken.
        ValueError: `size` fits neither the upright nor the stored pixels. Every message names the image.
    """
    if type(source) is PIL.Image.Image and source.mode == "RGB" and not source.info and size in (None, source.size):
        return source  # as this function leaves an image
    image = open_upright(source, size)
    return to_rgb(image, pixel_range) if is_deep(image) else image


def open_upright(source: ImageSource, size: tuple[int, int] | None = None) -> PIL.Image.Image:
    """As `open_image`, but images of more than 8 bits (`is_deep`) keep their values, which image processors scale."""
    with _opened(source) as image:
        frames = _Frames.of(image)
        upright = frames.upright
        if size is None or size in (upright, frames.stored):
            pixels = image.copy() if is_deep(image) else to_rgb(image)
            pixels.info.clear()
            return frames.turned(pixels, size in (None, upright))
    raise ValueError(
        f"image {_name(source)} has {upright[0]}x{upright[1]} pixels (width x height), its annotations are for "
        f"{size}; correct width and height in the annotations, or scale the boxes to the image"
    )


@dataclass(frozen=True)
class _Frames:
    """The two ways to see an image: as it is stored, and upright.

    stored, upright: (width, height) px. turn: what makes the first the second, None if they are one. done: whether PIL
    does so while it decodes, as of TIFF.
    """

    stored: tuple[int, int]
    upright: tuple[int, int]
    turn: PIL.Image.Transpose | None
    done: bool = False

    @classmethod
    def of(cls, image: PIL.Image.Image) -> _Frames:
        """Those of an opened image. A TIFF that asks for a turn is decoded, which loses the mark."""
        turn = _turn(image)
        done = turn is not None and image.format == "TIFF"
        if done:
            image.load()
        other = (image.height, image.width) if turn in _SIDEWAYS else image.size
        return cls(other, image.size, turn, True) if done else cls(image.size, other, turn)

    def turned(self, pixels: PIL.Image.Image, upright: bool) -> PIL.Image.Image:
        """Decoded pixels, upright or as they are stored."""
        if self.turn is None or upright == self.done:
            return pixels
        return pixels.transpose(_BACK.get(self.turn, self.turn) if self.done else self.turn)


def probe_image(source: ImageSource, decode: bool = False, most_bytes: int | None = None) -> ImageHeader:
    """Read an image file's header and check the file: with `decode` by decoding all of it.

    Without, a JPEG is taken for whole if its end marker is there and a PNG if its checksums are right; all others are
    decoded. Decoding tells more: of JPEGs damaged in the middle, more than half of those that no decoder takes have
    their end marker. An image that takes more than `most_bytes` of memory is not decoded, and the header says so.

    Raises:
        PIL.Image.DecompressionBombError, OSError: as `open_image`.
    """
    with _opened(source) as image:
        header = _header(image)
        if header.format == "PNG" and not decode:
            image.verify()
        elif decode or header.format not in ("JPEG", "MPO") or not _ends_with(source, _JPEG_END):
            if most_bytes is not None and _decoding_bytes(image) > most_bytes:
                return replace(header, checked=False)
            image.draft(None, (1, 1))  # reads all of a JPEG, but computes an eighth of its width and height only
            image.load()
            to_rgb(image.crop((0, 0, 1, 1)))  # this mode can be converted; doing so to all of it would take long
            return replace(header, values=_values(image)) if is_deep(image) else header
    return header


def _header(image: PIL.Image.Image) -> ImageHeader:
    """What is known before anything is decoded."""
    stored_as = str(getattr(image, "tile", ""))  # PIL reads the high byte of 16-bit colours, in mode RGB
    frames = _Frames.of(image)
    return ImageHeader(
        format=image.format or "",
        mode=image.mode,
        size=frames.stored,
        upright_size=frames.upright,
        turned=frames.turn is not None,
        animated=_is_animated(image),
        deep=is_deep(image) or "RGB;16" in stored_as or "RGBA;16" in stored_as,
    )


def _values(image: PIL.Image.Image) -> tuple[float, float, float, float] | None:
    """Lowest and highest finite value, and the first and last thousandth; None if there is none."""
    step = max(1, image.width * image.height // _SAMPLED)
    ends, samples = [], []
    for _, strip in strips(image):
        values = np.asarray(strip).ravel()
        if values.dtype.kind == "f":
            values = values[np.isfinite(values)]
        if values.size:
            ends += [values.min(), values.max()]
            samples.append(values[::step].copy())  # a view would keep the whole strip
    if not ends:
        return None
    low, high = np.percentile(np.concatenate(samples), (0.1, 99.9))
    return float(min(ends)), float(max(ends)), float(low), float(high)


_SAMPLED = 1 << 20  # pixels of an image that its thousandths are taken from
_DECODERS = {"WEBP": 4, "JPEG2000": 5, "AVIF": 5}  # memory of a decoder in images (measured); of the others 1


def _decoding_bytes(image: PIL.Image.Image) -> int:
    """About so many bytes are in use while the image is decoded."""
    a_pixel = 1 if image.mode in ("1", "L", "P") else 2 if image.mode.startswith("I;16") else 4
    return image.width * image.height * a_pixel * _DECODERS.get(image.format or "", 1)


def _name(source: ImageSource) -> str:
    if isinstance(source, PIL.Image.Image):
        return f"<{source.mode} image in memory>"
    return str(source.get("path") or "<bytes>") if isinstance(source, Mapping) else str(source)


@contextmanager
def _opened(source: ImageSource) -> Iterator[PIL.Image.Image]:
    """Open lazily, refuse bombs, and name the file in whatever a decoder raises."""
    try:
        with _open(source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise PIL.Image.DecompressionBombError(f"{image.size} pixels, the limit is {MAX_PIXELS}")
            yield image
    except PIL.Image.DecompressionBombError as error:
        raise PIL.Image.DecompressionBombError(f"image {_name(source)} is refused: {error}") from error
    except Exception as error:  # PIL's decoders raise a dozen different ones on broken files
        raise OSError(f"image {_name(source)} can't be decoded: {error or type(error).__name__}") from error


def _open(source: ImageSource) -> AbstractContextManager[PIL.Image.Image]:
    if isinstance(source, PIL.Image.Image):
        return nullcontext(source)
    if isinstance(source, Mapping):
        data = source.get("bytes")
        return _open(source["path"]) if data is None else PIL.Image.open(io.BytesIO(data), formats=FORMATS)
    if os.path.exists(source) and not os.path.isfile(source):
        raise OSError("it is no regular file")  # a pipe, for one, would be waited for
    return PIL.Image.open(source, formats=FORMATS)


def _turn(image: PIL.Image.Image) -> PIL.Image.Transpose | None:
    # the base class's method: that of PNG would decode the whole file to look for EXIF behind the pixels
    return _UPRIGHT.get(PIL.Image.Image.getexif(image).get(PIL.ExifTags.Base.Orientation, 1))


def _is_animated(image: PIL.Image.Image) -> bool:
    try:
        image.seek(1)
    except EOFError:
        return False
    image.seek(0)
    return True


def _ends_with(source: ImageSource, marker: bytes) -> bool:
    if isinstance(source, PIL.Image.Image):
        return False
    if isinstance(source, Mapping) and source.get("bytes") is not None:
        return bytes(source["bytes"][-len(marker) :]) == marker
    path: str | Path = source["path"] if isinstance(source, Mapping) else source
    with open(path, "rb") as file:
        file.seek(-len(marker), os.SEEK_END)
        return file.read() == marker
