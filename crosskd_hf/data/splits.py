"""The splits of a data set, and what was found in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from ..text import one_line
from .categories import CategoryMap
from .dataset import DetectionData
from .report import DataReport


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


def _described(source: str, notes: Sequence[str], reports: Mapping[str, DataReport], most: int | None) -> str:
    lines = [one_line(source, None), *(f"  {one_line(note, None)}" for note in notes)]
    for name, report in reports.items():
        first, *rest = report.describe(most).split("\n")
        lines += [f"{name}: {first}", *(f"  {line}" for line in rest)]
    return "\n".join(lines)
