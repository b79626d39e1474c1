"""Generalized Focal Loss detector (GFL, NeurIPS 2020)."""

from typing import Any, Literal

from torch import Tensor

from .assigners import Assignment, Priors
from .box_coders import DistributionCoder
from .boxes import both_ious, complete_iou
from .configuration import SquareAnchorConfig
from .dense import DenseDetector, Predictions
from .losses import LossPart, distribution_focal, quality_focal
from .two_towers import SquareAnchorHead


class GFLConfig(SquareAnchorConfig):
    """Configuration of :class:`GFLForObjectDetection`; see :class:`SquareAnchorConfig` for the shared fields.

    Args:
        reg_max: Largest bin of the distance distributions, in strides.
        quality_focal_beta: Exponent of the quality focal loss.
        box_loss: "giou" as published, or "ciou" (localization distillation on PASCAL VOC).
    """

    model_type = "crosskd_gfl"

    reg_max: int | None = 16
    quality_focal_beta: float = 2.0
    box_loss: Literal["giou", "ciou"] = "giou"

    ranges = {"quality_focal_beta": (0, 16)}
    default_loss_weights = {"loss_cls": 1.0, "loss_bbox": 2.0, "loss_dfl": 0.25}

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.reg_max is None:
            raise ValueError("GFL predicts distributions of distances: reg_max must be a number, 16 in the paper.")


class GFLHead(SquareAnchorHead):
    """Joint quality scores and distributions of the distances to the sides of a box."""

    config: GFLConfig
    coder: DistributionCoder

    def loss(
        self, predictions: Predictions, boxes: Tensor, priors: Priors, assignment: Assignment
    ) -> dict[str, LossPart]:
        """Quality focal, GIoU (or CIoU) and distribution focal loss (GFL, eq. 5 and 6); see :meth:`DenseHead.loss`."""
        weights, beta = self.weights, self.config.quality_focal_beta
        positive = assignment.positive.float()
        iou, giou = both_ious(boxes, assignment.boxes)
        quality = iou.detach() * positive
        target = assignment.class_scores(quality, self.num_labels)
        cls = (quality_focal(predictions.logits, target, beta).sum(-1) * assignment.weight).sum()

        # Each positive counts by how sure the classifier is of it (GFL's official code; not in the paper).
        confidence = predictions.logits.detach().sigmoid().amax(-1) * positive
        overlap = complete_iou(boxes, assignment.boxes) if self.config.box_loss == "ciou" else giou
        distance = (1 - overlap) * confidence
        distances = self.coder.encode(assignment.boxes, priors)
        dfl = distribution_focal(self.coder.sides(predictions.regression), distances).mean(-1) * confidence
        total = confidence.sum()
        return {
            "loss_cls": LossPart(weights["loss_cls"] * cls, assignment.count_positives()),
            "loss_bbox": LossPart(weights["loss_bbox"] * distance.sum(), total),
            "loss_dfl": LossPart(weights["loss_dfl"] * dfl.sum(), total),
        }


class GFLForObjectDetection(DenseDetector):
    """GFL with any timm backbone. Labels, outputs and boxes are as those of `DetrForObjectDetection`."""

    config: GFLConfig
    config_class = GFLConfig
    head_class = GFLHead
