"""FCOS (ICCV 2019)."""

import itertools
from typing import Any

import torch
from torch import Tensor

from .assigners import Assignment, Priors, SizeCache, Targets, assign_points
from .box_coders import DistanceCoder
from .boxes import aligned_iou, row_of
from .centerness import centerness_targets, losses_with_centerness
from .configuration import TwoTowerConfig
from .dense import DenseDetector, Predictions
from .losses import LossPart
from .two_towers import TwoTowerHead


class FCOSConfig(TwoTowerConfig):
    """Configuration of :class:`FCOSForObjectDetection`; see :class:`TwoTowerConfig` for the shared fields.

    Args:
        reg_max: With a number, sides are predicted as distributions (localization distillation, CVPR 2022).
        regress_limits: Longest side distance in pixels up to which each level but the last regresses.
        center_radius: With center sampling, positives lie within so many strides of a box's centre; `None` = without.
        norm_on_bbox: Distances are rectified and in strides, instead of the exponent of pixels.
        centerness_on_reg: Centerness is predicted from the regression tower.
        point_offset: Position of the point in its cell, in strides.
        size_divisor: As published, points in the padding are background too.
    """

    model_type = "crosskd_fcos"

    size_divisor: int | None = None

    regress_limits: list[int] | tuple[int, ...] = (64, 128, 256, 512)
    center_radius: float | None = None
    norm_on_bbox: bool = False
    centerness_on_reg: bool = False
    point_offset: float = 0.5

    ranges = {"regress_limits": (0, 1 << 20), "center_radius": (0.01, 1024), "point_offset": (0, 1)}
    default_loss_weights = {"loss_cls": 1.0, "loss_bbox": 1.0, "loss_centerness": 1.0}

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if len(self.regress_limits) != len(self.strides) - 1:
            raise ValueError(
                f"regress_limits={tuple(self.regress_limits)} must have one number less than "
                f"strides={tuple(self.strides)}: the last level has no limit."
            )


class FCOSHead(TwoTowerHead):
    """One point per location with class scores, distances to the sides of a box, and centerness."""

    config: FCOSConfig
    has_centerness = True

    def __init__(self, config: FCOSConfig):
        super().__init__(config)
        self._known_ranges = SizeCache()

    @classmethod
    def number_coder(cls, config: Any) -> DistanceCoder:
        return DistanceCoder("positive_stride" if config.norm_on_bbox else "log_pixel")

    @property
    def centerness_on_reg(self) -> bool:
        return self.config.centerness_on_reg

    @property
    def assignment_rule(self) -> tuple[object, ...]:
        config = self.config
        return "points", self.grid, tuple(config.regress_limits), config.center_radius, config.point_offset

    def prior_boxes(self, stride: int) -> Tensor:
        """(1, 4): a point, `point_offset` strides from the corner of the cell, as a box of no size (section 3.1)."""
        return torch.full((1, 4), stride * self.config.point_offset)

    def assign(self, priors: Priors, valid: Tensor, targets: Targets, *_: Any) -> Assignment:
        """By location and size of the box (section 3.2); see :meth:`DenseHead.assign`."""
        ranges = self._known_ranges.get((priors.level_lengths, valid.device), lambda: self._ranges(priors))
        return assign_points(priors, valid, targets, ranges, self.config.center_radius)

    def _ranges(self, priors: Priors) -> Tensor:
        """(N, 2) pixels: the longest side distances that the level of each point regresses."""
        limits = [-1.0, *map(float, self.config.regress_limits), torch.inf]
        rows = [row_of(pair, priors.strides) for pair in itertools.pairwise(limits)]
        return torch.cat([row.expand(n, -1) for row, n in zip(rows, priors.level_lengths, strict=True)])

    def normalizer(self, priors: Priors, assignment: Assignment) -> Tensor:
        """Sum of the centerness targets."""
        return centerness_targets(priors, assignment).sum()

    def loss(
        self, predictions: Predictions, boxes: Tensor, priors: Priors, assignment: Assignment
    ) -> dict[str, LossPart]:
        """Focal loss, -log IoU (GIoU with `reg_max`) and centerness (eq. 2 and 3); see :meth:`DenseHead.loss`."""
        assert predictions.centerness is not None
        centerness = centerness_targets(priors, assignment)
        if isinstance(self.coder, DistanceCoder):
            distances = -aligned_iou(boxes, assignment.boxes).clamp(min=1e-6).log()
        else:
            distances = 1 - aligned_iou(boxes, assignment.boxes, generalized=True)
        logits, count = (predictions.logits, predictions.centerness), assignment.positive.sum()
        return losses_with_centerness(logits, distances, centerness, assignment, count, self.weights, floor=1e-6)


class FCOSForObjectDetection(DenseDetector):
    """FCOS with any timm backbone. Labels, outputs and boxes are as those of `DetrForObjectDetection`."""

    config: FCOSConfig
    config_class = FCOSConfig
    head_class = FCOSHead
