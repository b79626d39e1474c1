"""Files of the web, for who gives an address: nothing else in here downloads images."""

from __future__ import annotations

import os
import shutil
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path, PurePosixPath

TIMEOUT = 30  # s without a byte
MAX_BYTES = 4 << 30
_AGENT = "crosskd_hf"  # some servers refuse Python's own


def is_address(source: str | os.PathLike[str]) -> bool:
    """Whether a source is meant as an address of the web."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def download(address: str, folder: Path, suffix: str = "") -> Path:
    """Write the file at an address, under its own name, into a new folder with the name of its server.

    Args:
        address: `https://...` or `http://...`.
        folder: That the new folder is made in.
        suffix: Of the new folder's name.

    Raises:
        OSError: It can't be read, is larger than `MAX_BYTES`, or is a page instead of an image.
    """
    parts = urllib.parse.urlsplit(address)
    name = PurePosixPath(urllib.parse.unquote(parts.path).replace("\\", "/")).name
    path = folder / f"{parts.hostname}{suffix}" / (name or "image")
    path.parent.mkdir(parents=True)
    request = urllib.request.Request(address, headers={"User-Agent": _AGENT})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, path.open("wb") as file:
            if answer.headers.get_content_type() == "text/html":
                raise OSError("it is a page; give the address of the image itself")
            if int(answer.headers.get("Content-Length") or 0) > MAX_BYTES:
                raise OSError(f"it has more than {MAX_BYTES >> 30} GiB")
            shutil.copyfileobj(answer, file)
    except (OSError, ValueError) as error:
        reason = f"{error.code} {error.reason}" if isinstance(error, urllib.error.HTTPError) else error
        raise OSError(f"{address} can't be read: {reason}") from error
    return path
