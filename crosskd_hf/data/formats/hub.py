"""Data sets of the `datasets` library: saved ones, parquet folders, and those of the Hugging Face Hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import datasets
from huggingface_hub import HfApi, constants

from ..objects_column import category_values
from ..schema import class_label
from .folder import SPLITS, Folder, split_of
from .raw import ObjectsSplit, RawSplit, Reading, ReadOptions

_PATIENCE = 10.0  # seconds
_MARKS = ("dataset_dict.json", "state.json")


class Saved:
    """See the module."""

    name = "datasets"
    layout = (
        "a folder of Dataset.save_to_disk, or data/train-*.parquet, with columns image and objects {bbox, category}"
    )
    options = frozenset({"bbox_format", "drop"})

    def seen(self, folder: Folder) -> str:
        """What `datasets` writes."""
        marks = [name for name in folder.files(".json") if PurePosixPath(name).name in _MARKS]
        if marks:
            return f"a saved data set, {marks[0]}"
        tables = folder.files(".parquet")
        return f"parquet files, such as {tables[0]}" if tables else ""

    def read(self, folder: Folder, options: ReadOptions) -> Reading:
        """Open it; images are read when they are needed."""
        marks = sorted(
            (name for name in folder.files(".json") if PurePosixPath(name).name in _MARKS),
            key=lambda name: (len(PurePosixPath(name).parts), name),
        )
        if marks:
            return read_splits(datasets.load_from_disk(str(folder.path(marks[0]).parent)), options, str(folder.root))
        files: dict[str, list[str]] = {}
        for name in folder.files(".parquet"):
            files.setdefault(split_of(name) or "train", []).append(str(folder.path(name)))
        return read_splits(datasets.load_dataset("parquet", data_files=files), options, str(folder.root))


def demand_on_hub(name: str) -> None:
    """Ask the Hub once whether it has a data set, before the library does, which goes on asking for a minute.

    Raises:
        Exception: it has none, or doesn't answer; whatever its client raises.
    """
    if not constants.HF_HUB_OFFLINE:
        HfApi().dataset_info(name, timeout=_PATIENCE)


def read_hub(name: str, options: ReadOptions) -> Reading:
    """A data set of the Hub by its id; what the library says of a missing one is passed on."""
    return read_splits(datasets.load_dataset(name), options, name)


def read_splits(given: Any, options: ReadOptions, source: str) -> Reading:
    """The splits of a `DatasetDict`, or one `Dataset`.

    Raises:
        ValueError: there is no image or no objects column.
    """
    parts: Mapping[str, datasets.Dataset] = given if isinstance(given, Mapping) else {"all": given}
    for name, part in parts.items():
        if not {"image", "objects"} <= set(part.column_names):
            raise ValueError(
                f"{source}, split {name}: the data set needs columns image and objects, it has {part.column_names}; "
                "rename them, or put boxes and classes into `objects`: {'bbox': [...], 'category': [...]}"
            )
    label = class_label(next(iter(parts.values())).features["objects"])
    names = None if label is not None else _occurring(parts)
    splits: dict[str, RawSplit] = {}
    for name, part in parts.items():
        split = split_of(str(name)) or "all"
        splits[split if split not in splits else str(name)] = ObjectsSplit(
            part, options, names, source=f"{source} {name}"
        )
    ordered = {split: splits[split] for split in (*SPLITS, "all") if split in splits}
    left = [str(name) for name in splits if name not in ordered]
    unused = [f"splits {', '.join(left)} are not used"] if left else []
    return Reading(ordered, [f"splits {', '.join(map(str, parts))}", *unused], alone=False)  # it has its own cache


def _occurring(parts: Mapping[str, datasets.Dataset]) -> list[str] | None:
    """The classes that occur in any split, sorted, where they are texts."""
    values = {value for part in parts.values() for value in category_values(part)} - {None}
    return sorted(values) if values and all(isinstance(value, str) for value in values) else None


def looks_like_hub_id(text: str) -> bool:
    """Whether a text may be the id of a set on the Hub: NAME or OWNER/NAME, where no local folder is called OWNER."""
    parts = text.split("/")
    plain = all(part and not part.startswith((".", "~")) and "\\" not in part for part in parts)
    return plain and len(parts) <= 2 and not (len(parts) == 2 and os.path.isdir(parts[0]))
