"""A head of two towers with one square anchor per location, assigned by ATSS: what GFL and ATSS share."""

from typing import Any

from torch import Tensor

from .assigners import Assignment, Priors, Targets, assign_atss
from .boxes import square_around_origin
from .configuration import SquareAnchorConfig
from .two_towers import TwoTowerHead


class SquareAnchorHead(TwoTowerHead):
    """One square anchor per location, assigned by ATSS."""

    config: SquareAnchorConfig

    @property
    def assignment_rule(self) -> tuple[object, ...]:
        return "atss", self.grid, self.config.anchor_scale

    def prior_boxes(self, stride: int) -> Tensor:
        """(1, 4) xyxy pixels: the square of `anchor_scale` strides around the corner of the cell (ATSS, CVPR 2020)."""
        return square_around_origin(self.config.anchor_scale * stride)

    def assign(self, priors: Priors, valid: Tensor, targets: Targets, *_: Any) -> Assignment:
        """Adaptive training sample selection (ATSS, CVPR 2020, algorithm 1); see :meth:`DenseHead.assign`."""
        return assign_atss(priors, valid, targets)
