"""`load_detection_dataset`: a folder, a file or a Hub id to the splits of a data set, whatever its format."""

from __future__ import annotations

import difflib
import enum
import hashlib
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TypeAlias

import numpy as np
from transformers import PreTrainedConfig

from ..text import one_line
from . import cache
from .categories import CategoryMap
from .dataset import DetectionData
from .formats import ALIASES, FORMATS, Folder, Format, ReadOptions
from .formats.folder import SPLITS
from .formats.hub import demand_on_hub, looks_like_hub_id, read_hub
from .formats.raw import RawSplit
from .formats.unknown import describe_unknown
from .inspection import Inspection
from .joining import join, union
from .kept import KeptFolder
from .report import DataError, DataReport, Finding, Place, found

logger = logging.getLogger(__name__)

DataPath: TypeAlias = str | os.PathLike[str]


@dataclass(frozen=True)
class DetectionSplits(Mapping[str, DetectionData]):
    """The splits of a data set, all with the same classes: a mapping of "train", "val" and "test", as far as there.

    Args:
        splits: by name.
        source: the path, and the format that was read.
        notes: what was decided on the way, in sentences.
    """

    splits: dict[str, DetectionData]
    source: str = ""
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> DetectionData:
        """A split; "validation" and "valid" are "val"."""
        name = {"validation": "val", "valid": "val"}.get(name, name)
        if name not in self.splits:
            raise KeyError(f"{self.source or 'the data set'} has no split {name!r}, only {', '.join(self.splits)}")
        return self.splits[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.splits)

    def __len__(self) -> int:
        return len(self.splits)

    @property
    def train(self) -> DetectionData:
        """What is learnt from."""
        return self["train"]

    @property
    def val(self) -> DetectionData:
        """What models are chosen by."""
        return self["val"]

    @property
    def categories(self) -> CategoryMap:
        """The classes of all splits."""
        return next(iter(self.splits.values())).categories

    def for_model(self, config: PreTrainedConfig, training: bool = True) -> DetectionSplits:
        """As `DetectionData.for_model`, for every split."""
        return replace(self, splits={name: data.for_model(config, training) for name, data in self.splits.items()})

    def describe(self, most: int | None = 5) -> str:
        """Source, decisions, and each split's counts and findings."""
        return _described(self.source, self.notes, {name: data.report for name, data in self.items()}, most)

    def __str__(self) -> str:
        return self.describe()


@dataclass(frozen=True)
class SplitReports:
    """What was found in each split of a data set; arguments as of `DetectionSplits`."""

    reports: dict[str, DataReport]
    source: str = ""
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True if training on it is right."""
        return all(report.ok for report in self.reports.values())

    def describe(self, most: int | None = 5) -> str:
        """As `DetectionSplits.describe`."""
        return _described(self.source, self.notes, self.reports, most)


def load_detection_dataset(
    path: DataPath | Sequence[DataPath],
    format: str | None = None,
    *,
    one_based: bool | None = None,
    difficult: str = "ignore",
    bbox_format: str | enum.Enum = "xywh",
    drop: Collection[str] = (),
    val_fraction: float = 0.2,
    seed: int = 0,
    decode: bool = True,
) -> DetectionSplits:
    """Read a data set in one of the formats coco, voc, yolo, csv, imagefolder and datasets (saved, or of the Hub).

    Splits are those of the data set. If it has none, or no validation split, one is drawn from the training images by
    their names and `seed`: the same images again, whatever is added later.

    Args:
        path: a folder; an annotation file (json, data.yaml, csv); an id of the Hub; or several of these, which are
            joined by the names of their classes.
        format: one of these formats; None: what the folder holds. "roboflow" is "coco".
        one_based: VOC: whether the first pixel has the number 1, so that 1 is subtracted; None: only in files whose
            `<database>` is PASCAL VOC's.
        difficult: VOC: "ignore" makes crowd regions of difficult objects, which PASCAL's evaluation leaves out, too;
            "keep" makes objects of them.
        bbox_format: csv with one column for the box, imagefolder, datasets: "xywh" or "xyxy", as of `load_objects`.
        drop: datasets: kinds of faulty rows to leave out, as of `load_objects`.
        val_fraction: share of the images that a drawn validation split gets, in (0, 1).
        seed: of that drawing.
        decode: as of `load_coco`.

    What was read and checked is kept as by `load_coco`, where all of it lies in the folder: the next start maps it
    until a file of the folder comes, goes or changes.

    Returns:
        The splits. `print` shows what was found and decided.

    Raises:
        FileNotFoundError: there is no such path.
        DataError: the data set is of no known format, of two, or faulty; every fault is named with file and line.
        ValueError: an option that has no effect on this format.
    """
    wanted = _Wanted.of(format, ReadOptions(one_based, difficult, bbox_format, drop), val_fraction, seed)
    sources = [_Source.of(root, wanted, decode) for root in _roots(path)]
    with ExitStack() as locks:
        for name in sorted({source.kept.name for source in sources if source.kept is not None}):
            locks.enter_context(cache.alone(name))
        read = [source.known() or source.plan() for source in sources]
        judged = [_Judged.of(one, decode) if isinstance(one, _Plan) else one for one in read]
        every = [finding for one in judged if isinstance(one, _Judged) for finding in one.findings]
        errors = [finding for finding in every if finding.severity == "error"]
        if errors:
            raise DataError(errors)
        parts = [
            source.finish(one) if isinstance(one, _Judged) else one for source, one in zip(sources, judged, strict=True)
        ]
    return parts[0] if len(parts) == 1 else _joined(parts)


def check_detection_dataset(
    path: DataPath | Sequence[DataPath],
    format: str | None = None,
    *,
    one_based: bool | None = None,
    difficult: str = "ignore",
    bbox_format: str | enum.Enum = "xywh",
    drop: Collection[str] = (),
    val_fraction: float = 0.2,
    seed: int = 0,
) -> SplitReports:
    """Every fault that `load_detection_dataset` would refuse or report, without raising for faulty data.

    Args:
        path, format, one_based, difficult, bbox_format, drop, val_fraction, seed: as there.
    """
    wanted = _Wanted.of(format, ReadOptions(one_based, difficult, bbox_format, drop), val_fraction, seed)
    try:
        plans = [_Source.of(root, wanted, True).plan() for root in _roots(path)]
        judged = [_Judged.of(plan, True) for plan in plans]
    except DataError as error:
        return SplitReports({"all": DataReport(0, 0, 0, 0, error.findings)}, str(path))
    many = len(judged) > 1
    reports = {
        f"{one.plan.source}: {name}" if many else name: inspection.report()
        for one in judged
        for name, inspection in one.inspections.items()
    }
    return SplitReports(
        reports, ", ".join(one.plan.source for one in judged), tuple(n for j in judged for n in j.plan.notes)
    )


# ---- What is read ----


@dataclass
class _Plan:
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
class _Wanted:
    """How folders shall be read; arguments as of `load_detection_dataset`."""

    format: Format | None
    options: ReadOptions
    fraction: float
    seed: int

    @classmethod
    def of(cls, format: str | None, options: ReadOptions, fraction: float, seed: int) -> _Wanted:
        """Raise a ValueError for what is out of its range."""
        if not 0 < fraction < 1:
            raise ValueError(f"val_fraction={fraction} must lie between 0 and 1.")
        if options.difficult not in ("ignore", "keep"):
            raise ValueError(f"difficult={options.difficult!r}; give 'ignore' or 'keep'.")
        return cls(_known(format), options, fraction, seed)

    @property
    def others(self) -> tuple[str | None, float, int]:
        """What beside the options decides on the splits."""
        return None if self.format is None else self.format.name, self.fraction, self.seed


@dataclass(frozen=True)
class _Source:
    """One path of a data set, not yet read.

    Args:
        root: as it was given.
        wanted: how it is read.
        kept: its place in the cache; None if it isn't there.
    """

    root: DataPath
    wanted: _Wanted
    kept: KeptFolder | None

    @classmethod
    def of(cls, root: DataPath, wanted: _Wanted, decode: bool) -> _Source:
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

    def plan(self) -> _Plan:
        """Read it, and draw a validation split where there is none."""
        plan = self._read()
        _hold_out(plan, self.wanted.fraction, self.wanted.seed)
        _check_overlap(plan)
        return plan

    def finish(self, judged: _Judged) -> DetectionSplits:
        """The splits, kept for the next start."""
        made, plan = judged.finish(), judged.plan
        if self.kept is None or not plan.alone:
            return made
        return replace(made, splits=self.kept.write(made.splits, plan.format, made.notes))

    def _told(self, format: str) -> str:
        return f"{Path(os.fspath(self.root)).expanduser()} ({format})"

    def _read(self) -> _Plan:
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
        return _Plan(reading.splits, self._told(chosen.name), chosen.name, reading.alone, list(reading.notes))


def _roots(path: DataPath | Sequence[DataPath]) -> list[DataPath]:
    roots = [path] if isinstance(path, str | os.PathLike) else list(path)
    if not roots:
        raise ValueError("No path of a data set is given.")
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


def _read_from_hub(text: str, format: Format | None, options: ReadOptions, may_be_id: bool) -> _Plan:
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
    return _Plan(reading.splits, f"{hub} (Hub)", "Hub", False, list(reading.notes))


# ---- Splits ----


def _hold_out(plan: _Plan, fraction: float, seed: int) -> None:
    """Draw a validation split, if there are images to train on and none to validate."""
    splits = plan.splits
    if "all" in splits:
        splits["train" if "train" not in splits else "val"] = splits.pop("all")
    plan.findings = [finding for split in splits.values() if not len(split.names) for finding in split.findings]
    plan.splits = {name: splits[name] for name in SPLITS if name in splits and len(splits[name].names)}
    if "train" not in plan.splits or "val" in plan.splits or plan.errors:
        return
    whole = plan.splits["train"]
    train, val = _drawn(whole.names, fraction, seed)
    parts = whole.select(train), whole.select(val)
    parts[0].findings = whole.findings
    plan.splits = {"train": parts[0], "val": parts[1], **{k: v for k, v in plan.splits.items() if k == "test"}}
    plan.notes.append(
        f"no validation split: {len(val):,} of {len(whole.names):,} images were drawn for one "
        f"(val_fraction={fraction:g}, seed={seed})"
    )


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


def _check_overlap(plan: _Plan) -> None:
    """Images that are in the training split and in another one."""
    train = set(plan.splits["train"].names) if "train" in plan.splits else set()
    for name, split in plan.splits.items():
        both = [image for image in split.names if image in train] if name != "train" else []
        message = f"images are in the training split and in {name}: AP there tells what was learnt by heart"
        fix = "give each image to one split"
        split.findings = [*split.findings, *found("warning", "split-overlap", message, fix, [Place(i) for i in both])]


# ---- What is judged ----


@dataclass
class _Judged:
    """The splits of one root with what was found in them."""

    plan: _Plan
    inspections: dict[str, Inspection]

    @classmethod
    def of(cls, plan: _Plan, decode: bool) -> _Judged:
        """Judge the training split first, whose classes are those of all."""
        inspections: dict[str, Inspection] = {}
        categories, learnt = None, np.zeros(0, dtype=np.int64)
        for name, split in plan.splits.items():
            inspection = split.inspect(categories if inspections else None, decode)
            if not inspections:
                categories, learnt = inspection.categories, np.unique(inspection.labels[inspection.keep])
            elif "train" in inspections:
                inspection = _with_untrained(inspection, learnt, name)
            inspections[name] = inspection
        first = next(iter(inspections))
        inspections[first] = replace(inspections[first], findings=(*inspections[first].findings, *plan.findings))
        return cls(plan, inspections)

    @property
    def findings(self) -> list[Finding]:
        """Of all splits."""
        return [finding for inspection in self.inspections.values() for finding in inspection.findings]

    def finish(self) -> DetectionSplits:
        """The data set, found sound."""
        splits = {name: self.plan.splits[name].finish(inspection) for name, inspection in self.inspections.items()}
        return DetectionSplits(splits, self.plan.source, tuple(self.plan.notes))


def _with_untrained(inspection: Inspection, learnt: np.ndarray, name: str) -> Inspection:
    """Note classes that no training image shows."""
    here = np.unique(inspection.labels[inspection.keep & (inspection.labels >= 0)])
    names = [inspection.categories.names[label] for label in here.tolist() if label not in learnt]
    message = f"classes of the split {name} have no object in the training split: they can't be learnt"
    fix = "add training images with these classes, or draw the splits anew"
    more = found("warning", "category-untrained", message, fix, [Place(each) for each in names])
    return replace(inspection, findings=(*inspection.findings, *more))


def _joined(parts: Sequence[DetectionSplits]) -> DetectionSplits:
    categories = union([part.categories for part in parts])
    named = {name: [part[name] for part in parts if name in part] for name in SPLITS}
    splits = {name: join(same, categories) for name, same in named.items() if same}
    notes = [f"{part.source}: {note}" for part in parts for note in part.notes]
    return DetectionSplits(splits, ", ".join(part.source for part in parts), tuple(notes))


def _described(source: str, notes: Sequence[str], reports: Mapping[str, DataReport], most: int | None) -> str:
    lines = [one_line(source, None), *(f"  {one_line(note, None)}" for note in notes)]
    for name, report in reports.items():
        first, *rest = report.describe(most).split("\n")
        lines += [f"{name}: {first}", *(f"  {line}" for line in rest)]
    return "\n".join(lines)
