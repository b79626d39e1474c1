"""A head of two towers: one row of convolutions for classes, one for boxes (RetinaNet, ICCV 2017, and later heads).

:class:`SquareAnchorHead` is what GFL and ATSS share beyond that.
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from .assigners import Assignment, Priors, Targets, assign_atss
from .box_coders import BoxCoder, DistributionCoder
from .boxes import square_around_origin
from .configuration import SquareAnchorConfig, TwoTowerConfig
from .dense import DenseHead, Predictions, Taps
from .layers import Conv, Scale, Tower, maps_to_rows, prior_bias


class TwoTowerHead(DenseHead):
    """Two towers of convolutions and their predictors, shared by all levels.

    A child says what it regresses without `reg_max` (:meth:`number_coder`); with it, every head predicts distributions.
    """

    config: TwoTowerConfig
    has_scales: ClassVar[bool] = True
    has_centerness: ClassVar[bool] = False

    def __init__(self, config: TwoTowerConfig):
        super().__init__(config)
        width, anchors = config.head_channels, self.priors_per_location
        tower = config.fpn_channels, width, config.num_convs, config.norm_groups, config.conv_bias
        self.cls_tower, self.reg_tower = Tower(*tower), Tower(*tower)
        feature_width = width if config.num_convs else config.fpn_channels
        bias = prior_bias(config.prior_probability)
        self.classifier = Conv(feature_width, anchors * self.num_labels, 3, bias_value=bias)
        self.regressor = Conv(feature_width, anchors * self.coder.width, 3)
        self.centerness = Conv(feature_width, anchors, 3) if self.has_centerness else None
        self.scales = nn.ModuleList(Scale() for _ in config.strides) if self.has_scales else None

    @classmethod
    def box_coder(cls, config: Any) -> BoxCoder:
        """Distributions with `reg_max`, else the numbers of :meth:`number_coder`."""
        return cls.number_coder(config) if config.reg_max is None else DistributionCoder(config.reg_max)

    @classmethod
    def number_coder(cls, config: Any) -> BoxCoder:
        """The coder of a head that regresses four numbers."""
        raise NotImplementedError

    @property
    def centerness_on_reg(self) -> bool:
        """Whether centerness is predicted from the regression tower."""
        return True

    def tap(self, features: list[Tensor], cut: int, activated: bool = True) -> Taps:
        """See :meth:`DenseHead.tap`: both towers up to convolution `cut`."""
        self.check_cut(cut)
        return Taps(
            [self.cls_tower(feature, stop=cut, activated=activated) for feature in features],
            [self.reg_tower(feature, stop=cut, activated=activated) for feature in features],
        )

    def finish(self, taps: Taps, cut: int) -> Predictions:
        """See :meth:`DenseHead.finish`."""
        cls_maps = [self.cls_tower(feature, start=cut) for feature in taps.cls]
        reg_maps = [self.reg_tower(feature, start=cut) for feature in taps.reg]
        regression = [self.regressor(feature) for feature in reg_maps]
        if self.scales is not None:
            regression = [scale(feature) for scale, feature in zip(self.scales, regression, strict=True)]
        centerness = None
        if self.centerness is not None:
            source = reg_maps if self.centerness_on_reg else cls_maps
            centerness = maps_to_rows([self.centerness(feature) for feature in source], 1)[..., 0]
        logits = maps_to_rows([self.classifier(feature) for feature in cls_maps], self.num_labels)
        return Predictions(logits, maps_to_rows(regression, self.coder.width), centerness)

    def tap_width(self, cut: int) -> int:
        """See :meth:`DenseHead.tap_width`."""
        return self.config.fpn_channels if cut == 0 else self.config.head_channels

    def modules_before(self, cut: int) -> list[nn.Module]:
        """See :meth:`DenseHead.modules_before`."""
        return [*list(self.cls_tower)[:cut], *list(self.reg_tower)[:cut]]


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
