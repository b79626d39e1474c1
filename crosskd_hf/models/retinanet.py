"""RetinaNet (ICCV 2017)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .assigners import Assignment, Priors, Targets, assign_max_iou
from .box_coders import DeltaCoder
from .boxes import aligned_iou, anchors_around_origin
from .configuration import TwoTowerConfig
from .dense import DenseDetector, Predictions
from .layers import FPNExtra
from .losses import LossPart, focal_loss
from .two_towers import TwoTowerHead


class RetinaNetConfig(TwoTowerConfig):
    """Configuration of :class:`RetinaNetForObjectDetection`; see :class:`TwoTowerConfig` for the shared fields.

    Args:
        norm_groups: RetinaNet's towers have no norm.
        reg_max: With a number, sides are predicted as distributions (localization distillation, CVPR 2022).
        anchor_scale: Side of the smallest square anchor, in strides.
        scales_per_octave: Anchor sizes per level.
        aspect_ratios: Height / width of the anchors.
        round_anchors: Sizes and corners of the anchors are whole pixels, as in torchvision.
        positive_iou, negative_iou: Anchors between the two are ignored.
    """

    model_type = "crosskd_retinanet"

    norm_groups: int | None = None
    fpn_extra: FPNExtra = "on_input"
    anchor_scale: float = 4.0
    scales_per_octave: int = 3
    aspect_ratios: list[float] | tuple[float, ...] = (0.5, 1.0, 2.0)
    round_anchors: bool = False
    positive_iou: float = 0.5
    negative_iou: float = 0.4

    ranges = {
        "anchor_scale": (0.01, 1024),
        "scales_per_octave": (1, 64),
        "aspect_ratios": (1e-3, 1e3),
        "positive_iou": (0, 1),
        "negative_iou": (0, 1),
    }
    # With distributions the box loss is GIoU with weight 2 (localization distillation's configuration).
    default_loss_weights = {"loss_cls": 1.0, "loss_bbox": 1.0}

    def __post_init__(self, **kwargs: Any) -> None:
        given = self.loss_weights or {}
        super().__post_init__(**kwargs)
        if self.reg_max is not None and "loss_bbox" not in given:
            self.loss_weights = {**self.default_loss_weights, **given, "loss_bbox": 2.0}
        if self.negative_iou > self.positive_iou:
            raise ValueError(f"negative_iou={self.negative_iou} must not be above positive_iou={self.positive_iou}.")


class RetinaNetHead(TwoTowerHead):
    """Nine anchors per location, each with class scores and box deltas."""

    config: RetinaNetConfig
    has_scales = False

    @classmethod
    def number_coder(cls, config: Any) -> DeltaCoder:
        return DeltaCoder()

    @property
    def priors_per_location(self) -> int:
        return len(self.config.aspect_ratios) * self.config.scales_per_octave

    @property
    def assignment_rule(self) -> tuple[object, ...]:
        config = self.config
        anchors = config.anchor_scale, config.scales_per_octave, tuple(config.aspect_ratios), config.round_anchors
        return "max_iou", self.grid, anchors, config.positive_iou, config.negative_iou

    def prior_boxes(self, stride: int) -> Tensor:
        """(A, 4) xyxy pixels around the corner of the cell, ratio by ratio and octave by octave (section 4)."""
        octaves = torch.arange(self.config.scales_per_octave) / self.config.scales_per_octave
        sizes = self.config.anchor_scale * stride * 2**octaves
        if self.config.round_anchors:
            sizes = sizes.floor()
        boxes = anchors_around_origin(sizes, self.config.aspect_ratios)
        return boxes.round() if self.config.round_anchors else boxes

    def assign(self, priors: Priors, valid: Tensor, targets: Targets, *_: Any) -> Assignment:
        """By the largest IoU (section 4.1); see :meth:`DenseHead.assign`."""
        return assign_max_iou(priors, valid, targets, self.config.positive_iou, self.config.negative_iou)

    def loss(
        self, predictions: Predictions, boxes: Tensor, priors: Priors, assignment: Assignment
    ) -> dict[str, LossPart]:
        """Focal loss (eq. 5), and L1 between deltas, or GIoU with `reg_max`; see :meth:`DenseHead.loss`."""
        weights, count = self.weights, assignment.count_positives()
        cls = focal_loss(predictions.logits, assignment)
        if isinstance(self.coder, DeltaCoder):
            target = self.coder.encode(assignment.boxes, priors)
            rows = F.l1_loss(predictions.regression, target, reduction="none").sum(-1)
        else:
            rows = 1 - aligned_iou(boxes, assignment.boxes, generalized=True)
        bbox = torch.where(assignment.positive, rows, 0).sum()
        return {
            "loss_cls": LossPart(weights["loss_cls"] * cls, count),
            "loss_bbox": LossPart(weights["loss_bbox"] * bbox, count),
        }


class RetinaNetForObjectDetection(DenseDetector):
    """RetinaNet with any timm backbone. Labels, outputs and boxes are as those of `DetrForObjectDetection`."""

    config: RetinaNetConfig
    config_class = RetinaNetConfig
    head_class = RetinaNetHead
