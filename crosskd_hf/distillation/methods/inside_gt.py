"""Inside-GT imitation: features inside of the boxes of objects (a row of the comparison in LD, CVPR 2022)."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..method import option
from ..passes import Batch, Needs, Pair, Pass
from ..regions import centers, inside_boxes
from .imitation import LD, LD_CODE, Imitation, ImitationConfig, on_positive_levels


class InsideGTMethod(Imitation):
    """See :class:`InsideGT`."""

    name = "inside_gt"
    paper = LD
    families = "all; positive_levels needs a detector whose locations are assigned to objects"

    @property
    def wanted(self) -> Needs:
        return frozenset({"assignment" if self.config.positive_levels else "priors"})

    def regions(self, student: Pass, teacher: Pass, batch: Batch) -> list[Tensor]:
        """Locations strictly inside of any box."""
        regions = [
            inside_boxes(centers(feature, student), batch.targets).unflatten(1, feature.values.shape[-2:]).float()
            for feature in student.features
        ]
        return on_positive_levels(regions, student) if self.config.positive_levels else regions


@dataclass(frozen=True)
class InsideGT(ImitationConfig):
    """Mean squared error at the locations inside of any box, on every level.

    Args:
        weight: 2 in LD's comparison.
        adapter: See :class:`ImitationConfig`. LD has none; None: only between different widths.
        positive_levels: Whether levels without any positive of the student stay out, as in LD's code. Where a batch is
            split, such levels may differ from part to part.
    """

    method = InsideGTMethod

    weight: float | None = option(2.0, "Factor on the whole method.", LD_CODE, least=0)
    positive_levels: bool | None = option(None, "Levels without any positive stay out.", LD_CODE)

    def defaults(self, pair: Pair) -> dict[str, Any]:
        """Levels without positives count, unless it is asked for and the student assigns locations to objects."""
        return super().defaults(pair) | self.gate(pair)
