"""The image files of a folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import PIL.Image

from ..models.pixels import FORMATS

SUFFIXES = frozenset(suffix for suffix, kind in PIL.Image.registered_extensions().items() if kind in FORMATS)
_BY_CONTENT = tuple(kind for kind in FORMATS if kind != "TGA")  # which has no mark that tells it from other files


@dataclass(frozen=True)
class ImageFiles:
    """What was found at a path.

    Args:
        root: The folder that names are relative to.
        files: The images below it, in order.
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


def find_images(source: str | os.PathLike[str], without: str | os.PathLike[str] | None = None) -> ImageFiles:
    """The image at a path, or all images below it.

    Images have an ending of the formats that are opened, or no ending and such a format inside. Names that begin with a
    dot are hidden, and so is what macOS adds to archives (`__MACOSX`).

    Args:
        source: A file, of whatever name, or a folder.
        without: A folder whose files are left out, such as that of earlier results.

    Raises:
        FileNotFoundError: There is no such file, or no image in the folder.
    """
    source = Path(source)
    if source.is_file():
        return ImageFiles(source.parent, (source,))
    own = None if without is None else Path(without).resolve()
    paths = [path for path in source.rglob("*") if not path.is_dir() and (own is None or own not in _parents(path))]
    hidden = [path for path in paths if any(_is_hidden(part) for part in path.relative_to(source).parts)]
    seen = sorted(set(paths).difference(hidden))
    files = tuple(path for path in seen if _is_image(path))
    found = ImageFiles(source, files, len(hidden), len(seen) - len(files))
    if not files:
        told = f" ({found.skipped})" if found.skipped else ""
        raise FileNotFoundError(
            f"{source} is no image and no folder with images{told}. Opened are {', '.join(FORMATS)}."
        )
    return found


def _parents(path: Path) -> tuple[Path, ...]:
    return tuple(path.parent.resolve().joinpath(path.name).parents)


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part == "__MACOSX"


def _is_image(path: Path) -> bool:
    if path.suffix:
        return path.suffix.lower() in SUFFIXES
    try:
        with PIL.Image.open(path, formats=_BY_CONTENT):
            return path.is_file()
    except Exception:  # decoders raise a dozen different ones on what is no image
        return False
