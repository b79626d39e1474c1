"""`load_detection_dataset`: a folder, a file or a Hub id to the splits of a data set, whatever its format."""

from __future__ import annotations

import enum
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np

from . import cache
from .formats import ReadOptions
from .formats.folder import SPLITS
from .inspection import Inspection
from .joining import join, union
from .reading import DataPath, RawData, Source, Wanted, roots_of
from .report import DataError, DataReport, Finding, Place, found
from .splits import DetectionSplits, SplitReports


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
    wanted = Wanted.of(format, ReadOptions(one_based, difficult, bbox_format, drop), val_fraction, seed)
    sources = [Source.of(root, wanted, decode) for root in roots_of(path)]
    with ExitStack() as locks:
        for name in sorted({source.kept.name for source in sources if source.kept is not None}):
            locks.enter_context(cache.alone(name))
        read = [source.known() or source.raw() for source in sources]
        judged = [_Judged.of(one, decode) if isinstance(one, RawData) else one for one in read]
        every = [finding for one in judged if isinstance(one, _Judged) for finding in one.findings]
        errors = [finding for finding in every if finding.severity == "error"]
        if errors:
            raise DataError(errors)
        parts = [
            source.keep(one.finish(), one.raw) if isinstance(one, _Judged) else one
            for source, one in zip(sources, judged, strict=True)
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
    wanted = Wanted.of(format, ReadOptions(one_based, difficult, bbox_format, drop), val_fraction, seed)
    try:
        judged = [_Judged.of(Source.of(root, wanted, True).raw(), True) for root in roots_of(path)]
    except DataError as error:
        return SplitReports({"all": DataReport(0, 0, 0, 0, error.findings)}, str(path))
    many = len(judged) > 1
    reports = {
        f"{one.raw.source}: {name}" if many else name: inspection.report()
        for one in judged
        for name, inspection in one.inspections.items()
    }
    return SplitReports(
        reports, ", ".join(one.raw.source for one in judged), tuple(n for j in judged for n in j.raw.notes)
    )


# ---- What is judged ----


@dataclass
class _Judged:
    """The splits of one root with what was found in them."""

    raw: RawData
    inspections: dict[str, Inspection]

    @classmethod
    def of(cls, raw: RawData, decode: bool) -> _Judged:
        """Judge the training split first, whose classes are those of all."""
        inspections: dict[str, Inspection] = {}
        categories, learnt = None, np.zeros(0, dtype=np.int64)
        for name, split in raw.splits.items():
            inspection = split.inspect(categories if inspections else None, decode)
            if not inspections:
                categories, learnt = inspection.categories, np.unique(inspection.labels[inspection.keep])
            elif "train" in inspections:
                inspection = _with_untrained(inspection, learnt, name)
            inspections[name] = inspection
        first = next(iter(inspections))
        inspections[first] = replace(inspections[first], findings=(*inspections[first].findings, *raw.findings))
        return cls(raw, inspections)

    @property
    def findings(self) -> list[Finding]:
        """Of all splits."""
        return [finding for inspection in self.inspections.values() for finding in inspection.findings]

    def finish(self) -> DetectionSplits:
        """The data set, found sound."""
        splits = {name: self.raw.splits[name].finish(inspection) for name, inspection in self.inspections.items()}
        return DetectionSplits(splits, self.raw.source, tuple(self.raw.notes))


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
