"""Folders that were read once: the next start maps their splits, until a file of the folder is another one.

As `load_coco` does for a json, for data of any format whose images are files. An entry holds as long as every file
below the folder, images and annotations, has its size and its times of change, and none has come or gone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from . import cache
from .dataset import DetectionData, image_paths
from .formats import Folder, ReadOptions

logger = logging.getLogger(__name__)

Splits: TypeAlias = Mapping[str, DetectionData]


@dataclass(frozen=True)
class KeptFolder:
    """The place in the cache of one folder, read in one way.

    Args:
        name: of the entry.
        folder: what is read.
        files: digest of names, sizes and times of all files below it; "" if one can't be looked at: nothing is kept.
        decode: whether images are decoded.
    """

    name: str
    folder: Folder
    files: str
    decode: bool

    @classmethod
    def of(cls, folder: Folder, options: ReadOptions, decode: bool, *others: Any) -> KeptFolder:
        """With everything that what is read depends on; `others` as json holds them."""
        chosen = {**asdict(options), "drop": sorted(options.drop), "bbox_format": str(options.bbox_format)}
        name = cache.digest("folder", [str(folder.given), os.path.abspath(folder.given)], chosen, list(others))
        return cls(name, folder, _digest(folder), decode)

    def read(self) -> tuple[dict[str, DetectionData], str, tuple[str, ...]] | None:
        """Splits, format and notes, if they were kept and no file has changed."""
        entry = cache.read_json(self.name)
        try:
            if not entry or entry["files"] != self.files or (self.decode and not entry["decoded"]):
                return None
            splits = {}
            for name, kept in entry["splits"].items():
                report, categories = cache.report_of(kept)
                splits[name] = DetectionData(cache.read_table(kept["table"]), categories, report)
            return splits, entry["format"], tuple(entry["notes"])
        except (OSError, KeyError, TypeError, ValueError, AttributeError):  # files are gone, or the entry is damaged
            return None

    def write(self, splits: Splits, format: str, notes: tuple[str, ...]) -> dict[str, DetectionData]:
        """The same splits, mapped from the cache, if all of their images lie in the folder and it can be written."""
        if not self.files or not all(_lies_in(data, self.folder.root) for data in splits.values()):
            return dict(splits)
        before = (cache.read_json(self.name) or {}).get("splits") or {}
        try:
            entries = {
                name: {"table": cache.write_table(f"{self.name}.{name}", data.dataset)}
                | cache.plain_report(data.report, data.categories)
                for name, data in splits.items()
            }
            entry = {"files": self.files, "decoded": self.decode, "format": format, "notes": notes, "splits": entries}
            cache.write_json(self.name, entry)
            tables = {name: cache.read_table(kept["table"]) for name, kept in entries.items()}
        except OSError as error:
            logger.warning("The checked data set can't be kept for the next start: %s", error)
            return dict(splits)
        for kept in before.values():
            cache.forget(kept.get("table"))
        return {name: replace(data, dataset=tables[name]) for name, data in splits.items()}


def _digest(folder: Folder) -> str:
    names = [*folder.images, *(name for names in folder.others.values() for name in names)]
    try:
        found = [os.stat(folder.path(name)) for name in names]
    except OSError:
        return ""
    # the time of the file's node can't be set back, as that of its content can
    stamps = np.array([(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in found], dtype=np.int64)
    return cache.digest(names, stamps.tobytes())


def _lies_in(data: DetectionData, root: Path) -> bool:
    inside = os.path.join(os.path.abspath(root), "")
    return all(os.path.abspath(path).startswith(inside) for path in image_paths(data.dataset))
