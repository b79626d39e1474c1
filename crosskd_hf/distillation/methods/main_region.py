"""Main-region imitation: features at the student's positives (a row of the comparison in LD, CVPR 2022)."""

from dataclasses import dataclass

from torch import Tensor

from ..method import option
from ..passes import Batch, Pass
from ..regions import positives
from .imitation import LD, LD_CODE, Imitation, ImitationConfig


class MainRegionMethod(Imitation):
    """See :class:`MainRegion`."""

    name = "main_region"
    needs = frozenset({"features", "assignment"})
    paper = LD
    families = "dense detectors and Faster R-CNN as students, of any teacher with features"

    def regions(self, student: Pass, teacher: Pass, batch: Batch) -> list[Tensor]:
        """Locations that the student's own rule assigns to an object."""
        return [positives(feature, student).float() for feature in student.features]


@dataclass(frozen=True)
class MainRegion(ImitationConfig):
    """Mean squared error at the locations that are assigned to an object.

    Args:
        weight: 2 in LD's comparison.
        adapter: See :class:`ImitationConfig`. LD has none; None: only between different widths.
    """

    method = MainRegionMethod

    weight: float | None = option(2.0, "Factor on the whole method.", LD_CODE, least=0)
