"""Frames of video files and videos of frames, by PyAV, which is an extra: pip install 'crosskd_hf[video]'."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image

VIDEO_SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ogv")
)
# Of the containers that FFmpeg reads, no lists of other files or addresses, such as HLS, and no devices.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm,mpeg,mpegvideo,mpegts,asf,flv,ogg"
_SAFE = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
_ENCODERS = ("libx264", "libopenh264", "mpeg4")  # the first that this build of FFmpeg has


class Frame(NamedTuple):
    """A frame as a person sees it, its time in seconds, and how many there are a second."""

    image: PIL.Image.Image
    time: float
    rate: Fraction


def read_frames(path: Path) -> Iterator[Frame]:
    """The frames of a video file, one after the other, turned as the camera says.

    Raises:
        OSError: PyAV is not installed, or the file is no video that it reads.
    """
    av = _pyav()
    try:
        with av.open(str(path.absolute()), options=_SAFE) as container:
            if not container.streams.video:
                raise OSError("there is no picture in it")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = Fraction(stream.average_rate or 25)
            for number, frame in enumerate(container.decode(stream)):
                image = frame.to_image()
                turned = image.rotate(frame.rotation, expand=True) if frame.rotation else image
                yield Frame(turned, float(number / rate if frame.time is None else frame.time), rate)
    except (av.FFmpegError, OSError) as error:
        raise OSError(f"video {path} can't be decoded: {error}") from error


class VideoWriter(contextlib.AbstractContextManager["VideoWriter"]):
    """Pictures of one size as a video file.

    Args:
        path: Of the file; its ending chooses the container.
        rate: Pictures a second.
    """

    def __init__(self, path: Path, rate: Fraction):
        self._container = _pyav().open(str(path), "w")
        self._rate = rate
        self._stream: Any = None

    def write(self, picture: PIL.Image.Image) -> None:
        """Add a picture."""
        av = _pyav()
        if self._stream is None:
            encoder = next(name for name in _ENCODERS if name in av.codecs_available)
            self._stream = self._container.add_stream(encoder, rate=self._rate)
            self._stream.width, self._stream.height = (side + side % 2 for side in picture.size)
            self._stream.pix_fmt = "yuv420p"  # which has even sides, and which every player knows
        size = self._stream.width, self._stream.height
        if picture.size != size:
            canvas = PIL.Image.new("RGB", size)
            canvas.paste(picture)
            picture = canvas
        self._container.mux(self._stream.encode(av.VideoFrame.from_image(picture)))

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise OSError(
            "Videos are read by PyAV, which is not installed: pip install 'crosskd_hf[video]', from a clone "
            "pip install '.[video]'."
        ) from error
    return av
