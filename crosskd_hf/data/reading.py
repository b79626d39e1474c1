"""Which format a data set has, and what its reader finds: the splits, before anything of them is judged."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from ..text import one_line
from .box_formats import plain_name
from .formats import ALIASES, FORMATS, Folder, Format, ReadOptions
from .formats.folder import SPLITS
from .formats.hub import demand_on_hub, looks_like_hub_id, read_hub
from .formats.raw import RawSplit
from .formats.unknown import describe_unknown
from .kept import KeptFolder
from .objects_column import demand_droppable
from .report import DataError, Finding, Place, found
from .splits import DetectionSplits

DataPath: TypeAlias = str | os.PathLike[str]


@dataclass
class RawData:
    """The splits of one root, read and not judged."""

    splits: dict[str, RawSplit]
    source: str
    format: str
    alone: bool
    notes: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def errors(self) -> list[Finding]:
        """What readers found that stops everything."""
        every = [*self.findings, *(finding for split in self.splits.values() for finding in split.findings)]
        return [finding for finding in every if finding.severity == "error"]


@dataclass(frozen=True)
class Wanted:
    """How folders shall be read; arguments as of `load_detection_dataset`."""

    format: Format | None
    options: ReadOptions
    fraction: float
    seed: int

    @classmethod
    def of(cls, format: str | None, options: ReadOptions, fraction: float, seed: int) -> Wanted:
        """Raise a ValueError for what is out of its range."""
        if not 0 < fraction < 1:
            raise ValueError(f"val_fraction={fraction} must lie between 0 and 1.")
        if options.difficult not in ("ignore", "keep"):
            raise ValueError(f"difficult={options.difficult!r}; give 'ignore' or 'keep'.")
        demand_droppable(options.drop)
        options = replace(options, bbox_format=plain_name(options.bbox_format), drop=tuple(options.drop))
        return cls(_known(format), options, fraction, seed)

    @property
    def others(self) -> tuple[str | None, float, int]:
        """What beside the options decides on the splits."""
        return None if self.format is None else self.format.name, self.fraction, self.seed


@dataclass(frozen=True)
class Source:
    """One path of a data set, not yet read.

    Args:
        root: as it was given.
        wanted: how it is read.
        kept: its place in the cache; None if it isn't there.
    """

    root: DataPath
    wanted: Wanted
    kept: KeptFolder | None

    @classmethod
    def of(cls, root: DataPath, wanted: Wanted, decode: bool) -> Source:
        """Look what is there."""
        path = Path(os.fspath(root)).expanduser()
        kept = KeptFolder.of(Folder(path), wanted.options, decode, *wanted.others) if path.exists() else None
        return cls(root, wanted, kept)

    def known(self) -> DetectionSplits | None:
        """What was read before, if nothing has changed."""
        found = None if self.kept is None else self.kept.read()
        if found is None:
            return None
        splits, format, notes = found
        for data in splits.values():
            data.tell()
        return DetectionSplits(splits, self._told(format), notes)

    def raw(self) -> RawData:
        """Read it, and draw a validation split where there is none."""
        raw = self._read()
        _hold_out(raw, self.wanted.fraction, self.wanted.seed)
        _check_overlap(raw)
        return raw

    def keep(self, made: DetectionSplits, raw: RawData) -> DetectionSplits:
        """The splits that were made of `raw`, kept for the next start."""
        if self.kept is None or not raw.alone:
            return made
        return replace(made, splits=self.kept.write(made.splits, raw.format, made.notes))

    def _told(self, format: str) -> str:
        return f"{Path(os.fspath(self.root)).expanduser()} ({format})"

    def _read(self) -> RawData:
        format, options = self.wanted.format, self.wanted.options
        if self.kept is None:
            return _read_from_hub(os.fspath(self.root), format, options, isinstance(self.root, str))
        folder, path = self.kept.folder, self.kept.folder.given
        chosen = _recognised(folder) if format is None else format
        if format is not None and not format.seen(folder):
            raise _layout_error(f"{path} holds nothing of the format {format.name}", folder)
        _check_options(chosen, options)
        reading = chosen.read(folder, options)
        if not any(len(split.names) for split in reading.splits.values()):
            errors = [f for split in reading.splits.values() for f in split.findings if f.severity == "error"]
            message = f"{path} holds no image of the format {chosen.name}"
            raise DataError(errors) if errors else _layout_error(message, folder)
        return RawData(reading.splits, self._told(chosen.name), chosen.name, reading.alone, list(reading.notes))


def roots_of(path: DataPath | Sequence[DataPath]) -> list[DataPath]:
    """One path or several as a list. Raises ValueError if there is none, or what is given is no path."""
    several = isinstance(path, Sequence) and not isinstance(path, str)
    roots: list[DataPath] = [*path] if several else [path]  # type: ignore[list-item, misc]
    if not roots:
        raise ValueError("No path of a data set is given.")
    for root in roots:
        if not isinstance(root, str | os.PathLike):
            raise ValueError(
                f"A {type(root).__name__} is given as the path of a data set. Give a folder, a file or an id of the "
                "Hub; a datasets.Dataset is read by load_objects."
            )
    return roots


def _known(format: str | None) -> Format | None:
    if format is None:
        return None
    name = ALIASES.get(format.lower(), format.lower())
    if name not in FORMATS:
        near = difflib.get_close_matches(name, [*FORMATS, *ALIASES], n=1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"format={format!r} is not known.{meant} Give one of {', '.join(FORMATS)}.")
    return FORMATS[name]


def _recognised(folder: Folder) -> Format:
    """The one format of a folder; formats that only show in others' files don't count beside these."""
    seen = {name: what for name, known in FORMATS.items() if (what := known.seen(folder))}
    if not seen:
        raise _layout_error("", folder)
    if len(seen) > 1:
        what = " and ".join(f"{name} ({shown})" for name, shown in seen.items())
        choices = " or ".join(f"format={name!r}" for name in seen)
        message = f"the folder holds several formats: {what}"
        raise DataError(found("error", "several-formats", message, f"say which: {choices}", [Place(str(folder.given))]))
    return FORMATS[next(iter(seen))]


def _layout_error(message: str, folder: Folder) -> DataError:
    text = describe_unknown(folder, FORMATS)
    fix = "bring the data into one of these layouts, or give the folder that has it"
    return DataError([Finding("error", "layout", f"{message}; {text}" if message else text, fix)])


def _check_options(format: Format, options: ReadOptions) -> None:
    """Refuse options that have no effect."""
    default = ReadOptions()
    for name in ("one_based", "difficult", "bbox_format", "drop"):
        if getattr(options, name) != getattr(default, name) and name not in format.options:
            users = ", ".join(known.name for known in FORMATS.values() if name in known.options)
            raise ValueError(
                f"{name} has no effect on data of the format {format.name}, only on {users}; leave it out."
            )


def _read_from_hub(text: str, format: Format | None, options: ReadOptions, may_be_id: bool) -> RawData:
    """A path that is not there: an id of the Hub, unless it looks like a slip of the pen."""
    parent = Path(text).expanduser().parent
    siblings = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    near = difflib.get_close_matches(Path(text).name, siblings, n=3)
    hub = text.removeprefix("hf://datasets/")
    saved = FORMATS["datasets"]
    is_id = may_be_id and (hub != text or (not near and looks_like_hub_id(text)))
    if not is_id or format not in (None, saved):
        meant = f" Did you mean {' or '.join(str(parent / name) for name in near)}?" if near else ""
        nearest = next((up for up in Path(text).expanduser().parents if up.is_dir()), Path("."))
        there = (
            "" if near else f" {nearest} is there and holds {', '.join(sorted(os.listdir(nearest))[:5]) or 'nothing'}."
        )
        raise FileNotFoundError(f"There is no data set at {one_line(text)}.{meant}{there}")
    _check_options(saved, options)
    try:
        demand_on_hub(hub)
        reading = read_hub(hub, options)
    except Exception as error:
        if isinstance(error, ValueError) and "the data set needs columns" in str(error):
            raise
        raise FileNotFoundError(
            f"There is no folder {one_line(text)} here, and the Hub has no data set of that name that can be read: "
            f"{one_line(str(error).splitlines()[0] if str(error) else type(error).__name__, 300)}"
        ) from error
    return RawData(reading.splits, f"{hub} (Hub)", "Hub", False, list(reading.notes))


# ---- Splits ----


def _hold_out(raw: RawData, fraction: float, seed: int) -> None:
    """Draw a validation split, if there are images to train on and none to validate."""
    splits = raw.splits
    if "all" in splits and "train" not in splits:
        splits["train"] = splits.pop("all")
    raw.findings = [finding for split in splits.values() if not len(split.names) for finding in split.findings]
    raw.findings += _left_out(splits.pop("all", None))
    raw.splits = {name: splits[name] for name in SPLITS if name in splits and len(splits[name].names)}
    if "train" not in raw.splits or "val" in raw.splits or raw.errors:
        return
    whole = raw.splits["train"]
    train, val = _drawn(whole.names, fraction, seed)
    parts = whole.select(train), whole.select(val)
    parts[0].findings = whole.findings
    raw.splits = {"train": parts[0], "val": parts[1], **{k: v for k, v in raw.splits.items() if k == "test"}}
    raw.notes.append(
        f"no validation split: {len(val):,} of {len(whole.names):,} images were drawn for one "
        f"(val_fraction={fraction:g}, seed={seed})"
    )


def _left_out(split: RawSplit | None) -> list[Finding]:
    """Of images beside the splits, of which nothing tells to which they belong: no split is a guess."""
    if split is None or not len(split.names):
        return []
    message = "images belong to no split, where others are in train: they are left out"
    fix = "put them into the folder or the list of a split"
    told = found("warning", "no-split", message, fix, [Place(name) for name in split.names])
    return [*told, *(finding for finding in split.findings if finding.severity != "note")]


def _drawn(names: Sequence[str], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Rows for training and for validation. Roboflow's augmented copies of one photograph stay together."""
    if len(names) < 2:
        message = "one image alone can't be split into training and validation images"
        raise DataError(found("error", "too-few-images", message, "add images", [Place(name) for name in names]))
    groups: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        groups.setdefault(re.sub(r"\.rf\.[0-9a-f]+$", "", PurePosixPath(Path(name).as_posix()).stem), []).append(row)
    order = sorted(
        groups, key=lambda group: hashlib.sha256(f"{seed}:{group}".encode("utf-8", "surrogatepass")).digest()
    )
    wanted, val = max(1, round(fraction * len(names))), list[int]()
    for group in order:
        if len(val) >= wanted or len(val) + len(groups[group]) >= len(names):
            break
        val += groups[group]
    if not val:
        message = "all images are augmented copies of one photograph, which can't be split"
        raise DataError(found("error", "too-few-images", message, "add images", [Place(names[0])]))
    return sorted(set(range(len(names))) - set(val)), sorted(val)


def _check_overlap(raw: RawData) -> None:
    """Images that are in the training split and in another one."""
    train = set(raw.splits["train"].names) if "train" in raw.splits else set()
    for name, split in raw.splits.items():
        both = [image for image in split.names if image in train] if name != "train" else []
        message = f"images are in the training split and in {name}: AP there tells what was learnt by heart"
        fix = "give each image to one split"
        split.findings = [*split.findings, *found("warning", "split-overlap", message, fix, [Place(i) for i in both])]
