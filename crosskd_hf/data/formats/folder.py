"""What lies in a data set's folder: its images, found by the names that annotations call them, and its other files."""

from __future__ import annotations

import codecs
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath

import PIL.Image

from ...models.pixels import FORMATS
from ..report import DataError, Place, found

IMAGE_SUFFIXES = frozenset(suffix for suffix, kind in PIL.Image.registered_extensions().items() if kind in FORMATS)
SPLITS = ("train", "val", "test")
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "trainval": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "minival": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


def split_of(path: str) -> str | None:
    """The split that a path speaks of: "train", "val" or "test"; what stands nearest to its end counts."""
    for part in reversed(PurePosixPath(path).parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return None


class Folder:
    """The files below a folder; hidden ones, and what macOS adds to archives, are left out.

    Args:
        path: the folder; or one annotation file, which then is the only one that is read. Images are those below its
            folder, or below the folder above that if there are none.
    """

    def __init__(self, path: Path):
        self.given = path
        self.root = path.parent if path.is_file() else path
        names = list(_names(self.root))
        if path.is_file() and not any(map(_is_image, names)) and len(path.absolute().parents) > 2:
            self.root = path.absolute().parent.parent
            names = list(_names(self.root))
        self.images = [name for name in names if _is_image(name)]
        self.others: dict[str, list[str]] = defaultdict(list)
        for name in names:
            suffix = PurePosixPath(name).suffix.lower()
            if suffix not in IMAGE_SUFFIXES and (not path.is_file() or suffix == ".txt"):
                self.others[suffix].append(name)
        if path.is_file():
            self.others[path.suffix.lower()] = [path.absolute().relative_to(self.root.absolute()).as_posix()]

    def path(self, name: str) -> Path:
        """The path of a file by its name relative to the folder."""
        return self.root / name

    def files(self, *suffixes: str) -> list[str]:
        """The files with one of some endings (lower case, with the dot), which are no images."""
        return [name for suffix in suffixes for name in self.others.get(suffix, ())]

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        return _grouped(self.images, lambda path: path.name)

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        return _grouped(self.images, lambda path: path.stem)

    @cached_property
    def image_folders(self) -> frozenset[str]:
        """The folders that hold images, relative to the root."""
        return frozenset(str(PurePosixPath(name).parent) for name in self.images)

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.images)

    def locate(self, name: str, near: str = "", split: str | None = None) -> tuple[str | None, str]:
        """Find the image that an annotation names, wherever in the folder it lies.

        Args:
            name: as the annotation spells it: maybe with folders that are not there, or without an ending.
            near: folder of the annotation, relative to the root.
            split: images of another split are not meant.

        Returns:
            Its name relative to the root, or None, and then why.
        """
        wanted = PurePosixPath(name.replace("\\", "/"))
        for full in (str(PurePosixPath(near) / wanted), str(wanted)):
            if full in self._known:
                return full, ""
        found = self._by_name.get(_key(wanted.name), []) or self._by_stem.get(_key(wanted.name), [])
        if not found and wanted.suffix.lower() in IMAGE_SUFFIXES:
            found = self._by_stem.get(_key(wanted.stem), [])
        if split is not None:
            found = [image for image in found if split_of(str(PurePosixPath(image).parent)) in (None, split)]
        if not found:
            return None, "no such image"
        ranked = sorted(found, key=lambda image: _nearness(image, wanted, near), reverse=True)
        if len(ranked) > 1 and _nearness(ranked[0], wanted, near) == _nearness(ranked[1], wanted, near):
            return None, f"may be {ranked[0]} or {ranked[1]}"
        return ranked[0], ""


def encoding_of(path: Path) -> str:
    """UTF-16 for a file that begins with its mark, as PowerShell and Excel write it; otherwise UTF-8."""
    with path.open("rb") as file:
        return _encoding(file.read(2))


def read_text(path: Path) -> str:
    """The text of a file; what is not text becomes marks of replacement."""
    content = path.read_bytes()
    return content.decode(_encoding(content[:2]), "replace").replace("\r\n", "\n")


def demand_text(path: Path, called: str) -> None:
    """Find a file of which names would be read wrongly.

    Args:
        path: the file.
        called: what messages call it.

    Raises:
        DataError: it is not in UTF-8 or UTF-16; with the line.
    """
    line = 0
    try:
        if encoding_of(path) == "utf-16":
            path.read_text(encoding="utf-16")
            return
        with path.open("rb") as file:
            for content in file:
                line += 1
                content.decode("utf-8")
    except UnicodeError as error:
        fix = "save it in UTF-8 (in Excel: CSV UTF-8), so that names are what they were"
        message = "the file is neither in UTF-8 nor in UTF-16"
        place = Place(f"{called}:{max(line, 1)}", detail=str(error))
        raise DataError(found("error", "annotation-file", message, fix, [place])) from error


def _encoding(head: bytes) -> str:
    return "utf-16" if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


class Claims:
    """Which image files annotations have found, and by which names: two images are never read from one file."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def other(self, found: str, wanted: str) -> str | None:
        """The name of another image by which `found` was found before `wanted`; None if there is none."""
        before = self._names.setdefault(found, wanted)
        return None if before == wanted or _may_be_one(before, wanted) else before


def _may_be_one(first: str, second: str) -> bool:
    """Whether two names may be one image's: the same from the end, as far as both have folders."""
    one, other = (PurePosixPath(_key(name.replace("\\", "/"))) for name in (first, second))
    same = one.name == other.name or (one.stem == other.stem and "" in (one.suffix, other.suffix))
    folders = zip(reversed(one.parent.parts), reversed(other.parent.parts), strict=False)
    return same and all(left == right for left, right in folders)


def _names(root: Path) -> Iterator[str]:
    """Files below the folder, relative to it, in order; links are followed, each folder is visited once."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = sorted(name for name in folders if not _is_hidden(name)) if real not in seen else []
        if real in seen:
            continue
        seen.add(real)
        below = PurePosixPath(Path(folder).relative_to(root).as_posix())
        yield from (str(below / name) for name in sorted(files) if not _is_hidden(name))


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _grouped(names: list[str], part: object) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[_key(part(PurePosixPath(name)))].append(name)  # type: ignore[operator]
    return dict(groups)


def _nearness(image: str, wanted: PurePosixPath, near: str) -> tuple[int, int, int, bool]:
    """How well an image fits: folders in common with the wanted name, then with the annotation; then the same split."""
    folders = PurePosixPath(image).parent.parts
    near_parts = PurePosixPath(near).parts
    tail = _in_common(reversed(folders), reversed(wanted.parent.parts))
    head = _in_common(folders, near_parts)
    split = split_of(near) is not None and split_of(near) == split_of(str(PurePosixPath(image).parent))
    return tail, int(split), head, PurePosixPath(image).suffix == wanted.suffix


def _in_common(first: object, second: object) -> int:
    count = 0
    for one, other in zip(first, second, strict=False):  # type: ignore[call-overload]
        if one != other:
            break
        count += 1
    return count
