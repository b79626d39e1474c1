"""The images and videos that a user names: files, folders, patterns, addresses of the web."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image

from ..models.pixels import FORMATS
from .video import VIDEO_SUFFIXES
from .web import download, is_address

SUFFIXES = frozenset(suffix for suffix, kind in PIL.Image.registered_extensions().items() if kind in FORMATS)
_BY_CONTENT = tuple(kind for kind in FORMATS if kind != "TGA")  # which has no mark that tells it from other files


@dataclass(frozen=True)
class ImageFiles:
    """What was found at a path.

    Args:
        root: The folder that names are relative to.
        files: The images and videos below it, in order.
        hidden: So many hidden files were skipped, or such in hidden folders.
        others: So many other files, which are no images, were skipped.
    """

    root: Path
    files: tuple[Path, ...]
    hidden: int = 0
    others: int = 0

    @property
    def skipped(self) -> str:
        """What was skipped, in words; empty if nothing was."""
        counts = {"hidden": self.hidden, "other": self.others}
        parts = [f"{count:,} {name}" for name, count in counts.items() if count]
        return f"{' and '.join(parts)} files skipped" if parts else ""

    def name_of(self, path: Path) -> Path:
        """What a file is called below `root`; a download of several sources has the name of its server before it."""
        return path.relative_to(self.root if path.is_relative_to(self.root) else path.parents[1])

    def demand_own_stems(self) -> None:
        """Raise a ValueError if two files have one name without their endings: YOLO's label files tell them by that."""
        seen: dict[Path, Path] = {}
        for path in self.files:
            name = self.name_of(path)
            other = seen.setdefault(name.with_suffix(".txt"), path)
            if other != path:
                raise ValueError(
                    f"{other} and {path} would share the label file {name.with_suffix('.txt')} of YOLO's format: "
                    "rename one of them, or write another format."
                )


@contextlib.contextmanager
def open_sources(
    sources: Sequence[str | os.PathLike[str]], without: str | os.PathLike[str] | None = None
) -> Iterator[ImageFiles]:
    """The images and videos of several sources, for as long as the context lasts.

    Args:
        sources: As of :func:`find_images`, or addresses (`https://...`), which are downloaded into a temporary folder.
        without: As of :func:`find_images`.

    Raises:
        FileNotFoundError: Nothing is found at one of them. OSError: An address can't be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for number, source in enumerate(sources):
            if is_address(source):
                path = download(os.fspath(source), Path(folder), f"-{number}" if number else "")
                found.append(ImageFiles(path.parent, (path,)))
            else:
                found.append(find_images(source, without))
        yield found[0] if len(found) == 1 else _joined(found, Path(folder).resolve())


def _joined(found: Sequence[ImageFiles], downloads: Path) -> ImageFiles:
    """Several as one, relative to the folder that all lie in; what was downloaded seems to lie there as well."""
    files = dict.fromkeys(path.absolute() for one in found for path in one.files)
    roots = [one.root.absolute() for one in found if downloads not in one.root.resolve().parents]
    root = Path(os.path.commonpath(roots)) if roots else downloads
    return ImageFiles(root, tuple(files), sum(one.hidden for one in found), sum(one.others for one in found))


def find_images(source: str | os.PathLike[str], without: str | os.PathLike[str] | None = None) -> ImageFiles:
    """The image or video at a path, or all below it.

    Images have an ending of the formats that are opened, or no ending and such a format inside. Names that begin with a
    dot are hidden, and so is what macOS adds to archives (`__MACOSX`).

    Args:
        source: A file, of whatever name, a folder, or a pattern such as `photos/**/*.jpg`.
        without: A folder whose files are left out, such as that of earlier results.

    Raises:
        FileNotFoundError: There is no such file, or no image in the folder.
    """
    source = Path(source)
    if source.is_file():
        return ImageFiles(source.parent, (source,))
    if not source.exists() and glob.has_magic(str(source)):
        return _matching(source, without)
    own = None if without is None else Path(without).resolve()
    paths = [path for path in _below(source) if own is None or own not in _parents(path)]
    hidden = [path for path in paths if any(_is_hidden(part) for part in path.relative_to(source).parts)]
    seen = sorted(set(paths).difference(hidden))
    files = tuple(path for path in seen if _is_image(path))
    found = ImageFiles(source, files, len(hidden), len(seen) - len(files))
    if not files:
        told = f" ({found.skipped})" if found.skipped else ""
        raise FileNotFoundError(
            f"{source} is no image and no folder with images{told}. Opened are {', '.join(FORMATS)}, and videos "
            f"({', '.join(sorted(VIDEO_SUFFIXES))})."
        )
    return found


def _below(source: Path) -> Iterator[Path]:
    """What lies below a folder and is none; links are followed, and every folder is visited once."""
    seen = set()
    for folder, folders, names in os.walk(source, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(folder, name) for name in names)


def _matching(pattern: Path, without: str | os.PathLike[str] | None) -> ImageFiles:
    """What a pattern names: its files, and the images of its folders."""
    plain = itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts)
    matches = sorted(Path(match) for match in glob.glob(str(pattern), recursive=True))
    own = None if without is None else Path(without).resolve()
    files = [path for path in matches if path.is_file() and own not in _parents(path)]
    folders = [path for path in matches if path.is_dir() and "**" not in pattern.parts]
    below = [find_images(folder, without) for folder in folders]
    if not files and not below:
        raise FileNotFoundError(f"No file is called {pattern}. Patterns know *, ?, [...] and ** for any folders.")
    chosen = [path for path in files if _is_image(path)]
    every = dict.fromkeys([*chosen, *(path for one in below for path in one.files)])
    others = len(files) - len(chosen) + sum(one.others for one in below)
    if not every:
        raise FileNotFoundError(f"{len(files)} files are called {pattern}, and none of them is an image or a video.")
    return ImageFiles(Path(*plain), tuple(every), sum(one.hidden for one in below), others)


def _parents(path: Path) -> tuple[Path, ...]:
    return tuple(path.parent.resolve().joinpath(path.name).parents)


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part == "__MACOSX"


def is_video(path: Path) -> bool:
    """Whether a file's ending is that of a video."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def _is_image(path: Path) -> bool:
    if path.suffix:
        return path.suffix.lower() in SUFFIXES or is_video(path)
    try:
        with PIL.Image.open(path, formats=_BY_CONTENT):
            return path.is_file()
    except Exception:  # decoders raise a dozen different ones on what is no image
        return False
