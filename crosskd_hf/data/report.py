"""What a look at a data set found: findings with severity, place and fix, and their printable summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..text import lines, one_line

Severity = Literal["error", "warning", "note"]


class Place(NamedTuple):
    """Where a fault is: the file (image name, or a part of the json), maybe the annotation id, and the value."""

    file: str
    annotation: int | None = None
    detail: str = ""

    def __str__(self) -> str:
        annotation = "" if self.annotation is None else f" annotation {self.annotation}"
        return one_line(self.file) + annotation + (f": {one_line(self.detail)}" if self.detail else "")


@dataclass(frozen=True)
class Finding:
    """One kind of fault and every place where it was seen.

    `error`: training would stop or be wrong, `load_coco` refuses; `warning`: the places are left out and counted, or
    deserve a look; `note`: it is handled and nothing is lost.
    """

    severity: Severity
    kind: str
    message: str
    fix: str
    places: tuple[Place, ...] = ()

    def describe(self, most: int | None = 5) -> str:
        """Message, count, the first `most` places (None: all of them) and the fix, over several lines."""
        count = f" ({len(self.places):,}x)" if len(self.places) > 1 else ""
        shown = self.places if most is None else self.places[:most]
        said = [f"{self.severity}: {self.kind}{count}: {lines(self.message)}"]
        said += [f"    {place}" for place in shown]
        if len(shown) < len(self.places):
            said.append(f"    and {len(self.places) - len(shown):,} more")
        return "\n".join([*said, f"    fix: {one_line(self.fix, None)}"] if self.fix else said)


class DataError(ValueError):
    """A data set that can't be trained on; `findings` holds every reason that was found, not only the first."""

    def __init__(self, findings: Sequence[Finding]):
        self.findings = tuple(findings)
        super().__init__("\n".join(finding.describe() for finding in self.findings))


@dataclass(frozen=True)
class DataReport:
    """The counts of a data set as it was read, and what was found on the way.

    Args:
        images: images, those without objects included.
        objects: annotations kept, crowd regions included.
        crowds: crowd regions, which evaluation ignores and training labels leave out.
        empty_images: images without an object to learn (none at all, or crowd regions only).
        findings: errors first, then warnings, then notes.
    """

    images: int
    objects: int
    crowds: int
    empty_images: int
    findings: tuple[Finding, ...] = ()

    @property
    def ok(self) -> bool:
        """True if training on it is right: no finding is an error."""
        return not any(finding.severity == "error" for finding in self.findings)

    @property
    def dropped(self) -> tuple[Place, ...]:
        """Every annotation that was left out because its box is degenerate, with file and annotation id."""
        kinds = [finding.places for finding in self.findings if finding.kind == DEGENERATE_BOX]
        return tuple(place for places in kinds for place in places)

    def describe(self, most: int | None = 5) -> str:
        """The summary as text; `most` places of each finding are shown (None: all)."""
        counts = (
            f"{self.images:,} images ({self.empty_images:,} without objects), {self.objects:,} objects "
            f"({self.crowds:,} crowd regions), {len(self.dropped):,} degenerate boxes dropped"
        )
        return "\n".join([counts, *(finding.describe(most) for finding in self.findings)])

    def __str__(self) -> str:
        return self.describe()


DEGENERATE_BOX = "degenerate-box"
_ORDER: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}


def by_severity(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Errors, then warnings, then notes; the order inside each is kept."""
    return tuple(sorted(findings, key=lambda finding: _ORDER[finding.severity]))


def found(severity: Severity, kind: str, message: str, fix: str, places: Sequence[Place]) -> list[Finding]:
    """A list of one finding, or of none if there are no places."""
    return [Finding(severity, kind, message, fix, tuple(places))] if places else []
