"""ATSS detector (CVPR 2020)."""

from typing import Any

from torch import Tensor

from .assigners import Assignment, Priors
from .box_coders import DeltaCoder
from .boxes import aligned_iou
from .centerness import centerness_targets, losses_with_centerness
from .configuration import SquareAnchorConfig
from .dense import DenseDetector, Predictions
from .losses import LossPart
from .two_towers import SquareAnchorHead


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

    @classmethod
    def number_coder(cls, config: Any) -> DeltaCoder:
        return DeltaCoder((0.1, 0.1, 0.2, 0.2))

    def loss(
        self, predictions: Predictions, boxes: Tensor, priors: Priors, assignment: Assignment
    ) -> dict[str, LossPart]:
        """Focal loss, GIoU and centerness, those of FCOS (ATSS, CVPR 2020); see :meth:`DenseHead.loss`."""
        assert predictions.centerness is not None
        centerness = centerness_targets(priors, assignment)
        distances = 1 - aligned_iou(boxes, assignment.boxes, generalized=True)
        logits, count = (predictions.logits, predictions.centerness), assignment.count_positives()
        return losses_with_centerness(logits, distances, centerness, assignment, count, self.weights)


class ATSSForObjectDetection(DenseDetector):
    """ATSS with any timm backbone. Labels, outputs and boxes are as those of `DetrForObjectDetection`."""

    config: ATSSConfig
    config_class = ATSSConfig
    head_class = ATSSHead
