"""Faster R-CNN (NeurIPS 2015) on a feature pyramid (CVPR 2017), by MMDetection's definitions."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .assigners import Priors, Targets
from .boxes import image_sizes, to_relative
from .configuration import PyramidDetectorConfig
from .layers import FPNExtra
from .pyramid import DetectorOutput, PyramidDetector, valid_priors
from .roi_head import Linear, RoIHead, RoIPredictions, RoIs, class_logits
from .rpn import RPN, RPNPredictions

# In a padded row of `logits`: a score of exactly zero that is finite in every dtype.
NO_OBJECT = -1e4


class FasterRCNNConfig(PyramidDetectorConfig):
    """Configuration of :class:`FasterRCNNForObjectDetection`; see :class:`PyramidDetectorConfig` for the shared fields.

    The numbers are those of MMDetection's `faster-rcnn_r50_fpn.py`.

    Args:
        rpn_channels: Width of the RPN.
        anchor_scale: Side of the square anchor, in strides.
        aspect_ratios: Height / width of the anchors.
        rpn_positive_iou, rpn_negative_iou: Anchors between the two are ignored.
        rpn_forced_iou: The best anchors of a box are positive from this IoU on.
        rpn_samples: Anchors per image in the loss; `None` takes all, without chance.
        rpn_positive_fraction: Largest share of positives among them.
        train_proposals_per_level, train_proposals: Boxes per level before and per image after NMS, in training.
        test_proposals_per_level, test_proposals: The same for detection.
        proposal_nms: Of two boxes of one level with more IoU, one goes.
        min_proposal_size: Boxes must be wider and higher than this, in pixels.
        roi_size: Side of the pooled features.
        finest_scale: Boxes below twice this many pixels are pooled from the finest level.
        fc_channels, num_fcs: Fully connected layers of the RoI head.
        class_agnostic: One box per region for all classes.
        roi_positive_iou: Regions from this IoU on are objects, the others background.
        roi_samples: Regions per image in the loss, ground truth among them; `None` takes all, without chance.
        roi_positive_fraction: Largest share of positives among them.

    Raises:
        ValueError: A value out of range.
    """

    model_type = "crosskd_faster_rcnn"

    backbone_strides: list[int] | tuple[int, ...] = (4, 8, 16, 32)
    strides: list[int] | tuple[int, ...] = (4, 8, 16, 32, 64)
    fpn_extra: FPNExtra = "max_pool"
    rpn_channels: int = 256
    anchor_scale: float = 8.0
    aspect_ratios: list[float] | tuple[float, ...] = (0.5, 1.0, 2.0)
    rpn_positive_iou: float = 0.7
    rpn_negative_iou: float = 0.3
    rpn_forced_iou: float = 0.3
    rpn_samples: int | None = 256
    rpn_positive_fraction: float = 0.5
    train_proposals_per_level: int = 2000
    train_proposals: int = 1000
    test_proposals_per_level: int = 1000
    test_proposals: int = 1000
    proposal_nms: float = 0.7
    min_proposal_size: float = 0.0
    roi_size: int = 7
    finest_scale: int = 56
    fc_channels: int = 1024
    num_fcs: int = 2
    class_agnostic: bool = False
    roi_positive_iou: float = 0.5
    roi_samples: int | None = 512
    roi_positive_fraction: float = 0.25

    ranges = {
        **dict.fromkeys(("rpn_channels", "finest_scale"), (1, 8192)),
        **dict.fromkeys(("rpn_samples", "roi_samples"), (1, 1 << 20)),
        **dict.fromkeys(("train_proposals_per_level", "train_proposals"), (1, 1 << 20)),
        **dict.fromkeys(("test_proposals_per_level", "test_proposals"), (1, 1 << 20)),
        **dict.fromkeys(("rpn_positive_iou", "rpn_negative_iou", "rpn_forced_iou", "roi_positive_iou"), (0, 1)),
        **dict.fromkeys(("rpn_positive_fraction", "roi_positive_fraction", "proposal_nms"), (0, 1)),
        "anchor_scale": (0.01, 1024),
        "aspect_ratios": (1e-3, 1e3),
        "min_proposal_size": (0, 1 << 20),
        "roi_size": (1, 128),
        "fc_channels": (1, 1 << 16),
        "num_fcs": (1, 32),
    }
    default_loss_weights = {"loss_rpn_cls": 1.0, "loss_rpn_bbox": 1.0, "loss_cls": 1.0, "loss_bbox": 1.0}

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.rpn_negative_iou > self.rpn_positive_iou:
            raise ValueError(
                f"rpn_negative_iou={self.rpn_negative_iou} must not be above rpn_positive_iou={self.rpn_positive_iou}."
            )


@dataclass
class FasterRCNNOutput(DetectorOutput):
    """Output of Faster R-CNN; what isn't named here is as in the base class.

    Detections come from the proposals. In training, where they would cost a second pass, they come from the sampled
    regions, among which is the ground truth: evaluate in evaluation mode.

    Args:
        logits: (B, R, K) whose sigmoid is the (softmax) score of a class; images with fewer regions are filled up with
            regions of score zero.
        pred_boxes: (B, R, K, 4), a box per class, cxcywh relative to each unpadded image.
        rois, predictions: Sampled regions and the raw predictions for them, with the features, in passes with labels.
    """

    rois: RoIs | None = None
    predictions: RoIPredictions | None = None


class FasterRCNNForObjectDetection(PyramidDetector):
    """Faster R-CNN with any timm backbone. Labels are as those of `DetrForObjectDetection`."""

    config: FasterRCNNConfig
    config_class = FasterRCNNConfig

    def __init__(self, config: FasterRCNNConfig):
        super().__init__(config)
        self.rpn = RPN(config)
        self.roi_head = RoIHead(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        if isinstance(module, Linear):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        output_features: bool = False,
        output_loss: bool = True,
    ) -> FasterRCNNOutput:
        """Detect objects.

        Args:
            pixel_values: (B, 3, H, W) normalised pixels, padded on the right and at the bottom.
            pixel_mask: (B, H, W), 1 inside each image, 0 in its padding. Default: no padding.
            labels: Per image `class_labels` (n,) and `boxes` (n, 4), cxcywh relative to the unpadded image.
            output_features: Also return the pyramid and, with labels, the sampled regions and their predictions.
            output_loss: With labels, return `loss` and `loss_dict`; False leaves the division of `loss_parts` to the
                caller.
        """
        sizes = image_sizes(pixel_values, pixel_mask)
        features = self.pyramid(pixel_values)
        proposed, anchors = self.rpn(features), self.rpn.anchors(features)
        output = FasterRCNNOutput(features=features if output_features else None)
        if labels is not None:
            targets = Targets.from_labels(labels, sizes)
            rois = self.sample(proposed, anchors, sizes, targets)
            predictions = self.roi_head(features, rois.boxes)
            parts = self.rpn.loss(proposed, anchors, valid_priors(self.config, anchors, sizes), targets)
            output.set_loss(parts | self.roi_head.loss(predictions, rois), output_loss)
            if output_features:
                output["rois"], output["predictions"] = rois, predictions
        if labels is None or not self.training:
            regions = self.rpn.propose(
                proposed, anchors, sizes, self.config.test_proposals_per_level, self.config.test_proposals
            )
            boxes, mask, predictions = regions.boxes, regions.mask, self.roi_head(features, regions.boxes)
        else:
            boxes, mask = rois.boxes, rois.mask
        decoded = to_relative(self.roi_head.decode(predictions, boxes).flatten(1, 2), sizes)
        output["logits"] = class_logits(predictions.logits).masked_fill(~mask[..., None], NO_OBJECT)
        output["pred_boxes"] = decoded.unflatten(1, (-1, self.roi_head.num_labels)) * mask[..., None, None]
        return output

    def sample(self, proposed: RPNPredictions, anchors: Priors, sizes: Tensor, targets: Targets) -> RoIs:
        """The regions that the RoI head is trained on."""
        config = self.config
        limits = config.train_proposals_per_level, config.train_proposals
        return self.roi_head.sample(self.rpn.propose(proposed, anchors, sizes, *limits), targets)
