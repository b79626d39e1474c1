"""The checks of a data set's image files: names, headers, sizes, and decoding."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import PIL.Image

from . import cache
from . import images as image_files
from .coco_json import Ints
from .images import ImageHeader, ImageSource, probe_image
from .report import Finding, Place, Severity, found

_MOST_THREADS = 8
_MOST_BYTES = 1 << 27  # of an image that is decoded beside others
_AT_ONCE = 64  # images; a data set may hold the files themselves
_SIXTEEN_BIT = 65535
_FEW_LEVELS = 128  # grey levels of 256
_MOST_ELONGATED = 100  # longer side over shorter side
_LONGEST = 1333  # px; the usual limit of the longer side in training

_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".jpg", ".jpeg", ".mpo"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
}


def check_names(names: Sequence[str], folder: Path) -> tuple[list[Finding], list[Path | None]]:
    """Look for the files of `names` in `folder`; return the findings and the paths (None: not there, or outside)."""
    if not folder.is_dir():
        fix = "give the folder that the json's file names are relative to"
        place = Place(str(folder))
        return found("error", "image-folder", "the image folder does not exist", fix, [place]), [None] * len(names)
    inside = [_stays_inside(name) for name in names]
    there = [fine and os.path.isfile(folder / name) for name, fine in zip(names, inside, strict=True)]
    pairs = list(zip(names, inside, there, strict=True))
    escaping = [Place(repr(name)) for name, fine, _ in pairs if not fine]
    missing = [Place(name) for name, fine, exists in pairs if fine and not exists]
    counts = Counter(os.path.normpath(name) for name in names)
    empty = missing and not any(folder.iterdir())
    fix = "give the folder that the json's file names are relative to, or remove these entries from the json"
    slashes = '; folders are separated by "/"' if any("\\" in place.file for place in missing) else ""
    return [
        *found("error", "file-name", "the file name leaves the image folder", "use names relative to it", escaping),
        *found(
            "error",
            "missing-image",
            f"{len(missing)} of {len(pairs)} images are not in {folder}" + (", which is empty" if empty else ""),
            fix + slashes,
            missing,
        ),
        *found(
            "warning",
            "duplicate-file",
            "several images of the json are the same file",
            "keep one entry, and its annotations under one image id",
            [Place(name, detail=f"{count} entries") for name, count in counts.items() if count > 1],
        ),
    ], [folder / name if exists else None for name, exists in zip(names, there, strict=True)]


def _stays_inside(name: str) -> bool:
    windows = PureWindowsPath(name)
    if not name or "\0" in name or windows.drive or windows.root or PurePosixPath(name).is_absolute():
        return False
    return ".." not in windows.parts  # a Windows path is split at both kinds of slash


def check_files(
    names: Sequence[str], sizes: Ints, sources: Iterable[ImageSource | None], decode: bool, identity: str = ""
) -> tuple[Ints, list[Finding]]:
    """Look into image files (None: not there) and compare them with the sizes that the annotations say.

    Files that were decoded once and found sound aren't decoded again until they change. `identity` is another one if
    images that are no files have changed; without, they are decoded each time.

    Returns:
        sizes (I, 2) with the zeros filled in from the files, and the findings.
    """
    paths = [source for source in sources if isinstance(source, str | Path)] if isinstance(sources, list) else []
    if not identity and (not paths or len(paths) < len(names)):
        return _looked_into(names, sizes, sources, decode)
    try:
        seen = identity.encode() or cache.stamps(paths)
        name = cache.digest(list(names), list(map(str, paths)), sizes.tobytes(), seen)
    except OSError:
        return _looked_into(names, sizes, sources, decode)
    with cache.alone(name):
        known = cache.read_json(name)
        if known is not None:
            return np.array(known["sizes"], dtype=np.int64), list(cache.findings_of(known["findings"]))
        sizes, findings = _looked_into(names, sizes, sources, decode)
        if decode and not any(finding.severity == "error" for finding in findings):
            with contextlib.suppress(OSError):
                cache.write_json(name, {"sizes": sizes.tolist(), "findings": cache.plain_findings(findings)})
    return sizes, findings


def _looked_into(
    names: Sequence[str], sizes: Ints, sources: Iterable[ImageSource | None], decode: bool
) -> tuple[Ints, list[Finding]]:
    sizes = sizes.copy()
    absurd = (sizes < 0).any(1) | (sizes.astype(np.float64).prod(1) > image_files.MAX_PIXELS)
    places: dict[str, list[Place]] = {kind: [] for kind in _FILE_FINDINGS}
    ranges: list[tuple[Place, ImageHeader]] = []
    for row, (name, header) in enumerate(zip(names, _probed(sources, decode), strict=True)):
        width, height = (int(value) for value in sizes[row])
        if not _is_text(name):
            places["name-encoding"].append(Place(name))
        if absurd[row]:
            places["image-size"].append(Place(name, detail=f"{width}x{height}"))
        if isinstance(header, str):
            places["broken-image"].append(Place(name, detail=header))
        if header is None or isinstance(header, str) or absurd[row]:
            continue
        if width == 0 or height == 0:
            places["size-missing"].append(Place(name))
            sizes[row] = header.upright_size
        for kind, detail in _header_faults(name, header, (width, height)):
            places[kind].append(Place(name, detail=detail))
        if header.values is not None:
            ranges.append((Place(name, detail="{:g} to {:g}".format(*header.values)), header))
    findings = [
        finding
        for kind, (severity, message, fix) in _FILE_FINDINGS.items()
        for finding in found(severity, kind, message, fix, places[kind])
    ]
    return sizes, [*findings, *_check_ranges(ranges)]


def _is_text(name: str) -> bool:
    """False for a file's name of which the bytes are in another encoding than UTF-8: no table can hold it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_ranges(ranges: Sequence[tuple[Place, ImageHeader]]) -> list[Finding]:
    """Whether the values of images with more than 8 bits, (place, header) each, suit the scale that they are put on."""
    floats = [(place, header.values) for place, header in ranges if header.mode == "F" and header.values]
    integers = [(place, header.values) for place, header in ranges if header.mode != "F" and header.values]
    findings = []
    low, high = _ends([values for _, values in floats])
    if low < high:
        message = (
            f"float values ({low:g} to {high:g}) have no scale of their own: each image is stretched to its own range"
        )
        fix = f"give the image processor pixel_range=({low:g}, {high:g}), for one scale of all images"
        findings += found("warning", "float-pixels", message, fix, [place for place, _ in floats])
    low, high = _ends([values for _, values in integers])
    if low < high:
        inside = low >= 0 and high <= _SIXTEEN_BIT
        most = ""
        if inside and _levels(low, high) >= _FEW_LEVELS:  # a few dead pixels or a caption may hide a narrow range
            low, high = _ends([values[2:] for _, values in integers])
            most = " but for a thousandth"
        if not inside or _levels(low, high) < _FEW_LEVELS:
            message = (
                f"values lie between {low:g} and {high:g}{most}; the scale is 0 to {_SIXTEEN_BIT}, of which that is "
                f"{_levels(low, high)} of 256 grey levels"
            )
            fix = f"give the image processor pixel_range=({low:g}, {high:g})"
            findings += found("warning", "pixel-range", message, fix, [place for place, _ in integers])
    return findings


def _ends(values: Sequence[Sequence[float]]) -> tuple[float, float]:
    return min((value[0] for value in values), default=0.0), max((value[1] for value in values), default=0.0)


def _levels(low: float, high: float) -> int:
    """So many grey levels of 8 bits are left between two values of 16 bits."""
    return int(min(high, _SIXTEEN_BIT)) // 256 - int(max(low, 0)) // 256 + 1


def _probed(sources: Iterable[ImageSource | None], decode: bool) -> Iterator[ImageHeader | str | None]:
    """Header of each image, or why it can't be read; in threads, since decoders let others run.

    Huge images are decoded by the calling thread, one after the other: every thread keeps what it once allocated.
    """
    rest = iter(sources)
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        while some := list(islice(rest, _AT_ONCE)):
            headers = pool.map(lambda source: _probe(source, decode, _MOST_BYTES), some)
            for source, header in zip(some, headers, strict=True):
                left = isinstance(header, ImageHeader) and not header.checked
                yield _probe(source, decode) if left else header


def _probe(source: ImageSource | None, decode: bool, most_bytes: int | None = None) -> ImageHeader | str | None:
    try:
        return None if source is None else probe_image(source, decode, most_bytes)
    except (OSError, PIL.Image.DecompressionBombError) as error:
        return _instead_of_an_image(source) or str(error.__cause__ or error)


def _instead_of_an_image(source: ImageSource | None) -> str:
    """What often lies in an image's place; empty if it is something else."""
    path = source.get("path") if isinstance(source, Mapping) else source
    if not isinstance(path, str | Path) or not os.path.isfile(path):
        return ""
    with open(path, "rb") as file:
        head = file.read(100).lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "it is the pointer of a file that Git LFS holds: git lfs pull"
    return "it is a web page" if head.startswith((b"<!doctype html", b"<html")) else ""


_FILE_FINDINGS: dict[str, tuple[Severity, str, str]] = {
    "image-size": (
        "error",
        "the annotations say an impossible width x height",
        "write the image's own width and height into the annotations",
    ),
    "name-encoding": (
        "error",
        "the name of the file is not in UTF-8, as of an archive of another system: a data set can't hold it",
        "rename the files, such as by convmv -r -f latin1 -t utf8 --notest FOLDER",
    ),
    "broken-image": (
        "error",
        "the image file can't be decoded",
        "replace the file, or remove the image and its annotations",
    ),
    "size-mismatch": (
        "error",
        "width and height of the annotations don't fit the image file",
        "correct width and height in the annotations; if the image was resized, scale the boxes too",
    ),
    "elongated": (
        "error",
        f"one side is more than {_MOST_ELONGATED} times the other: resized to {_LONGEST} px, it would be at most "
        f"{_LONGEST // _MOST_ELONGATED} px wide or high, too little to see anything in",
        "cut the image into pieces, or remove it and its annotations",
    ),
    "exif-unsure": (
        "warning",
        "the image is turned by its EXIF orientation, and nothing tells whether the boxes were made for it as turned",
        "look at the boxes; if they are wrong, remove the EXIF orientation from the file",
    ),
    "wrong-extension": ("note", "the file is of another format than its name says; it is read by content", "rename it"),
    "size-missing": ("note", "the annotations don't say width and height; they are taken from the file", ""),
    "exif-ignored": (
        "note",
        "the annotations were made for the image without its EXIF rotation; it is read without rotation, too",
        "if the boxes look wrong, swap width and height in the annotations",
    ),
    "exif-rotated": ("note", "the image is turned by its EXIF orientation, which the annotations agree with", ""),
    "sixteen-bit": ("note", "more than 8 bits a channel are scaled to 8", ""),
    "animated": ("note", "the file holds several frames; the first one is used", ""),
    "cmyk": ("note", "CMYK is converted to RGB", ""),
}


def _header_faults(name: str, header: ImageHeader, size: tuple[int, int]) -> list[tuple[str, str]]:
    """The (kind, detail) of what a readable header shows."""
    faults = []
    suffixes = _SUFFIXES.get(header.format)
    if suffixes is not None and Path(name).suffix and not name.lower().endswith(suffixes):
        faults.append(("wrong-extension", f"is {header.format}"))
    if min(size) > 0 and size not in (header.upright_size, header.size):
        width, height = header.upright_size
        faults.append(("size-mismatch", f"annotations {size[0]}x{size[1]}, file {width}x{height}"))
    elif header.turned and (min(size) == 0 or header.upright_size == header.size):
        faults.append(("exif-unsure", ""))
    elif header.turned:
        faults.append(("exif-ignored" if size == header.size else "exif-rotated", ""))
    if max(header.size) > _MOST_ELONGATED * min(header.size):
        faults.append(("elongated", f"{header.size[0]}x{header.size[1]}"))
    if header.deep:
        faults.append(("sixteen-bit", f"mode {header.mode}"))
    if header.animated:
        faults.append(("animated", header.format))
    if header.mode == "CMYK":
        faults.append(("cmyk", ""))
    return faults
