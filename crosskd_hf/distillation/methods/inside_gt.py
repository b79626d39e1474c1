"""Inside-GT imitation: features inside of the boxes of objects (a row of the comparison in LD, CVPR 2022)."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..method import Paper, option
from ..passes import Batch, DetectorView, Needs, Pair, Pass
from ..regions import centers, inside_boxes, positives
from .imitation import Imitation, ImitationConfig

LD = Paper("Localization Distillation for Dense Object Detection", "CVPR 2022", "https://arxiv.org/abs/2102.12252")
SOURCE = "HikariTJU/LD"


class InsideGTMethod(Imitation):
    """See :class:`InsideGT`."""

    name = "inside_gt"
    paper = LD
    families = "all; positive_levels needs a detector whose locations are assigned to objects"

    def __init__(self, config: "InsideGT", student: DetectorView, teacher: DetectorView):
        super().__init__(config, student, teacher)
        wanted: Needs = frozenset({"features", "assignment" if config.positive_levels else "priors"})
        self._student_needs = wanted & student.offers

    @property
    def student_needs(self) -> Needs:
        return self._student_needs

    def region(self, level: int, student: Pass, teacher: Pass, batch: Batch) -> Tensor:
        """Locations strictly inside of any box."""
        feature = student.features[level]
        region = inside_boxes(centers(feature, student), batch.targets).unflatten(1, feature.values.shape[-2:])
        if self.config.positive_levels:
            region = region & positives(feature, student).any()
        return region.float()


@dataclass(frozen=True)
class InsideGT(ImitationConfig):
    """Mean squared error at the locations inside of any box, on every level.

    Args:
        weight: 2 in LD's comparison.
        adapter: See :class:`ImitationConfig`. LD has none.
        positive_levels: Whether levels without any positive of the student stay out, as in LD's code. Where a batch is
            split, such levels may differ from part to part.
    """

    method = InsideGTMethod

    positive_levels: bool | None = option(None, "Levels without any positive stay out.", SOURCE)

    def defaults(self, pair: Pair) -> dict[str, Any]:
        """Levels without positives count, unless it is asked for and the student assigns locations to objects."""
        known = super().defaults(pair)
        return known | {"positive_levels": False} if "assignment" in pair.student.offers else known
