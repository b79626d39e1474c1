"""ATSS detector (CVPR 2020)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .assigners import Assignment, Priors, Targets, assign_atss
from .boxes import aligned_iou, encode_distance
from .dense import DenseDetector, DenseDetectorConfig, DenseHead, Predictions
from .losses import LossPart
from .retinanet import focal_loss


class SquareAnchorConfig(DenseDetectorConfig):
    """Configuration of :class:`SquareAnchorHead`; see :class:`DenseDetectorConfig` for the shared fields.

    Args:
        anchor_scale: Side of the square anchor of each location, in strides.
    """

    anchor_scale: float = 8.0

    ranges = {"anchor_scale": (0.01, 1024)}


class SquareAnchorHead(DenseHead):
    """One square anchor per location, assigned by ATSS."""

    config: SquareAnchorConfig

    @property
    def assignment_rule(self) -> tuple[object, ...]:
        return "atss", self.grid, self.config.anchor_scale

    def prior_boxes(self, stride: int) -> Tensor:
        half = self.config.anchor_scale * stride / 2
        return torch.tensor([[-half, -half, half, half]])

    def assign(self, priors: Priors, valid: Tensor, targets: Targets) -> Assignment:
        return assign_atss(priors, valid, targets)


class ATSSConfig(SquareAnchorConfig):
    """Configuration of :class:`ATSSForObjectDetection`; see :class:`SquareAnchorConfig` for the shared fields.

    Args:
        reg_max: With a number, sides are predicted as distributions (localization distillation, CVPR 2022).
    """

    model_type = "crosskd_atss"

    default_loss_weights = {"loss_cls": 1.0, "loss_bbox": 2.0, "loss_centerness": 1.0}


class ATSSHead(SquareAnchorHead):
    """Class scores, box deltas and centerness."""

    config: ATSSConfig
    has_centerness = True
    delta_std = (0.1, 0.1, 0.2, 0.2)

    def loss(
        self, predictions: Predictions, boxes: Tensor, priors: Priors, assignment: Assignment
    ) -> dict[str, LossPart]:
        weights, count = self.weights, assignment.count_positives()
        centerness = centerness_targets(priors, assignment)
        giou = (1 - aligned_iou(boxes, assignment.boxes, generalized=True)) * centerness
        return {
            "loss_cls": LossPart(weights["loss_cls"] * focal_loss(predictions.logits, assignment), count),
            "loss_bbox": LossPart(weights["loss_bbox"] * giou.sum(), centerness.sum()),
            "loss_centerness": LossPart(
                weights["loss_centerness"] * centerness_loss(predictions, centerness, assignment), count
            ),
        }


def centerness_targets(priors: Priors, assignment: Assignment) -> Tensor:
    """sqrt of (nearer / farther side) over both axes (FCOS, eq. 3), (B, N) in [0, 1]; 0 where not positive."""
    left, top, right, bottom = encode_distance(priors.centers, assignment.boxes).clamp(min=0).unbind(-1)
    horizontal = torch.minimum(left, right) / torch.maximum(left, right).clamp(min=1e-6)
    vertical = torch.minimum(top, bottom) / torch.maximum(top, bottom).clamp(min=1e-6)
    return (horizontal * vertical).sqrt() * assignment.positive


def centerness_loss(predictions: Predictions, centerness: Tensor, assignment: Assignment) -> Tensor:
    """Binary cross entropy of the centerness over the positives, summed."""
    assert predictions.centerness is not None
    rows = F.binary_cross_entropy_with_logits(predictions.centerness, centerness, reduction="none")
    return (rows * assignment.positive).sum()


class ATSSForObjectDetection(DenseDetector):
    """ATSS with any timm backbone. Labels, outputs and boxes are as those of `DetrForObjectDetection`."""

    config: ATSSConfig
    config_class = ATSSConfig
    head_class = ATSSHead
