"""Image files to the RGB that a person sees: the one place where images are opened."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import PIL.ExifTags
import PIL.Image

MAX_PIXELS = 178_956_970
"""Images with more pixels are refused before they are decoded (twice PIL's warning limit, where PIL refuses too).
To read larger ones raise both this and `PIL.Image.MAX_IMAGE_PIXELS`."""

ImageSource: TypeAlias = PIL.Image.Image | str | Path | Mapping[str, Any]
"""A PIL image, a path, or the `{"path", "bytes"}` of a `datasets.Image(decode=False)` column."""

PIL.Image.init()
_RASTER = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
FORMATS = tuple(name for name in _RASTER if name in PIL.Image.OPEN)
"""What is read, whatever a file is called. Of PIL's other formats EPS would be run as a program, by Ghostscript."""

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
_JPEG_END = b"\xff\xd9"


@dataclass(frozen=True)
class ImageHeader:
    """What an image file says of itself: format ("JPEG", ...), PIL mode, stored and upright (width, height) in px.

    `turned`: whether EXIF asks for a rotation or a reflection.
    """

    format: str
    mode: str
    size: tuple[int, int]
    upright_size: tuple[int, int]
    turned: bool
    animated: bool


def open_image(source: ImageSource, size: tuple[int, int] | None = None) -> PIL.Image.Image:
    """Decode an image to 8-bit RGB as a person sees it.

    The EXIF orientation is applied, 16-bit values are scaled to 8 bits, transparency is laid on white, of an animation
    the first frame is taken.

    Args:
        source: PIL image, path, or `{"path", "bytes"}`.
        size: the (width, height) px that annotations were made for. If it fits the stored pixels and not the upright
            image, the annotations ignore the EXIF orientation, and so does the decoding.

    Raises:
        PIL.Image.DecompressionBombError: more than `MAX_PIXELS` pixels.
        OSError: the file is missing, not an image or broken.
        ValueError: `size` fits neither the upright nor the stored pixels. Every message names the image.
    """
    with _opened(source) as image:
        stored, upright, turn = image.size, _upright_size(image), _turn(image)
        if size is None or size == upright:
            return _to_rgb(image) if turn is None else _to_rgb(image).transpose(turn)
        if size == stored:
            return _to_rgb(image)
    raise ValueError(
        f"image {_name(source)} has {upright[0]}x{upright[1]} pixels (width x height), its annotations are for "
        f"{size}; correct width and height in the annotations, or scale the boxes to the image"
    )


def probe_image(source: ImageSource, decode: bool = False) -> ImageHeader:
    """Read an image file's header and check the file: with `decode` by decoding all of it.

    Without, a JPEG is taken for whole if its end marker is there and a PNG if its checksums are right; all others are
    decoded. Decoding tells more: of JPEGs damaged in the middle, more than half of those that no decoder takes have
    their end marker.

    Raises:
        PIL.Image.DecompressionBombError, OSError: as `open_image`.
    """
    with _opened(source) as image:
        turned = _turn(image) is not None
        header = ImageHeader(
            image.format or "", image.mode, image.size, _upright_size(image), turned, _is_animated(image)
        )
        if header.format == "PNG" and not decode:
            image.verify()
        elif decode or header.format not in ("JPEG", "MPO") or not _ends_with(source, _JPEG_END):
            image.draft(None, (1, 1))  # reads all of a JPEG, but computes an eighth of its width and height only
            _to_rgb(image)
    return header


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


def _upright_size(image: PIL.Image.Image) -> tuple[int, int]:
    sideways = _turn(image) in (_Turn.TRANSPOSE, _Turn.ROTATE_270, _Turn.TRANSVERSE, _Turn.ROTATE_90)
    return (image.height, image.width) if sideways else image.size


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


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    rgb = _as_8_bit(image).convert("RGB")
    rgb.info.clear()  # above all EXIF, which others would apply once more
    return rgb


def _as_8_bit(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; PIL's own conversion would clip at 255
        return PIL.Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "F":  # no range is agreed on: stretch to what is there
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        span = max(float(np.ptp(values)), np.finfo(np.float64).tiny)
        return PIL.Image.fromarray(((values - values.min()) / span * 255).astype(np.uint8))
    if image.has_transparency_data:
        canvas = PIL.Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        return canvas
    return image
