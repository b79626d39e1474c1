"""Main-region imitation: features at the student's positives (a row of the comparison in LD, CVPR 2022)."""

from dataclasses import dataclass

from torch import Tensor

from ..passes import Batch, Needs, Pass
from ..regions import positives
from .imitation import Imitation, ImitationConfig
from .inside_gt import LD


class MainRegionMethod(Imitation):
    """See :class:`MainRegion`."""

    name = "main_region"
    needs = frozenset({"features", "assignment"})
    paper = LD
    families = "dense detectors and Faster R-CNN as students, of any teacher with features"

    @property
    def teacher_needs(self) -> Needs:
        return frozenset({"features"})

    def region(self, level: int, student: Pass, teacher: Pass, batch: Batch) -> Tensor:
        """Locations that the student's own rule assigns to an object."""
        return positives(student.features[level], student).float()


@dataclass(frozen=True)
class MainRegion(ImitationConfig):
    """Mean squared error at the locations that are assigned to an object.

    Args:
        weight: 2 in LD's comparison.
        adapter: See :class:`ImitationConfig`. LD has none.
    """

    method = MainRegionMethod
