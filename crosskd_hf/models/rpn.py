"""Region proposal network (Faster R-CNN, NeurIPS 2015) on a feature pyramid, by MMDetection's definitions."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .assigners import Priors, SizeCache, Targets, assign_max_iou
from .boxes import anchors_around_origin, decode_delta, encode_delta
from .layers import Conv, maps_to_rows
from .losses import LossPart
from .nms import nms_by_class
from .sampling import sample


class RPNPredictions(NamedTuple):
    """Raw output as rows, level after level, row by row, anchor by anchor.

    Args:
        logits: (B, N) objectness.
        deltas: (B, N, 4).
    """

    logits: Tensor
    deltas: Tensor


class Proposals(NamedTuple):
    """Boxes that may hold an object, the highest score first, padded to the image with most of them.

    Args:
        boxes: (B, P, 4) xyxy pixels inside the unpadded image; zeros in the padding.
        mask: (B, P) bool, False in the padding.
        scores: (B, P) in [0, 1]; zeros in the padding.
    """

    boxes: Tensor
    mask: Tensor
    scores: Tensor | None = None


class RPN(nn.Module):
    """One shared 3x3 convolution, objectness and box deltas of every anchor.

    Args:
        config: A `FasterRCNNConfig`.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self._known_anchors = SizeCache()
        anchors = len(config.aspect_ratios)
        self.conv = Conv(config.fpn_channels, config.rpn_channels, 3)
        self.classifier = Conv(config.rpn_channels, anchors, 1)
        self.regressor = Conv(config.rpn_channels, anchors * 4, 1)

    def forward(self, features: list[Tensor]) -> RPNPredictions:
        """Pyramid maps (B, C, H_l, W_l) to predictions, in float32."""
        hidden = [F.relu(self.conv(feature)) for feature in features]
        logits = maps_to_rows([self.classifier(feature) for feature in hidden], 1)[..., 0]
        return RPNPredictions(logits, maps_to_rows([self.regressor(feature) for feature in hidden], 4))

    def anchors(self, features: list[Tensor]) -> Priors:
        """Anchors of the pyramid's locations, in the order of the predictions. Centred on the corner of their cell."""
        shapes, device = [(f.shape[-2], f.shape[-1]) for f in features], features[0].device
        anchors: Priors = self._known_anchors.get((*shapes, device), lambda: self._make_anchors(shapes, device))
        return anchors

    def _make_anchors(self, shapes: list[tuple[int, int]], device: torch.device) -> Priors:
        config = self.config
        steps = [(stride, stride) for stride in config.strides]
        sizes = [torch.tensor([config.anchor_scale * stride]) for stride in config.strides]
        anchors = [anchors_around_origin(size, config.aspect_ratios).to(device) for size in sizes]
        return Priors.on_grid(shapes, config.strides, steps, anchors)

    @torch.no_grad()
    def propose(
        self, predictions: RPNPredictions, anchors: Priors, sizes: Tensor, per_level: int, per_image: int
    ) -> Proposals:
        """The best boxes of each image: the highest scores of every level, clipped, after NMS within the level.

        Args:
            sizes: (B, 2) height, width of the unpadded images in pixels.
            per_level, per_image: Limits before and after NMS.
        """
        boxes, scores, levels = self._best_of_levels(predictions, anchors, per_level)
        boxes = torch.minimum(boxes.clamp(min=0), sizes.flip(-1).repeat(1, 2)[:, None])
        solid = (boxes[..., 2:] - boxes[..., :2] > self.config.min_proposal_size).all(-1)
        kept, sure = [], []
        for image_boxes, image_scores, image_levels, rows in zip(boxes, scores, levels, solid, strict=True):
            candidates = image_boxes[rows]
            scored = candidates, image_scores[rows], image_levels[rows]
            best = nms_by_class(*scored, self.config.proposal_nms, per_image)
            kept.append(candidates[best])
            sure.append(scored[1][best])
        counts = torch.tensor([len(rows) for rows in kept], device=boxes.device)
        padded = pad_sequence(kept, batch_first=True)
        mask = torch.arange(padded.shape[1], device=boxes.device) < counts[:, None]
        return Proposals(padded, mask, pad_sequence(sure, batch_first=True))

    def _best_of_levels(
        self, predictions: RPNPredictions, anchors: Priors, per_level: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decoded boxes (B, n, 4) of the highest scores of each level, their scores (B, n) and levels (B, n)."""
        boxes, scores, levels = [], [], []
        end = 0
        for level, length in enumerate(anchors.level_lengths):
            start, end = end, end + length
            best = predictions.logits[:, start:end].sigmoid().topk(min(per_level, length), 1)
            rows = best.indices + start
            deltas = predictions.deltas.gather(1, rows[..., None].expand(-1, -1, 4))
            boxes.append(decode_delta(anchors.boxes[rows], deltas))
            scores.append(best.values)
            levels.append(torch.full_like(rows, level))
        return torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(levels, 1)

    def loss(
        self, predictions: RPNPredictions, anchors: Priors, valid: Tensor, targets: Targets
    ) -> dict[str, LossPart]:
        """Weighted parts `loss_rpn_cls` and `loss_rpn_bbox`, over a sample of anchors (Faster R-CNN, eq. 1).

        Args:
            valid: (B, N) bool, anchors that may take part.
        """
        config = self.config
        rows = self.loss_rows(predictions, anchors, valid, targets)
        return {
            "loss_rpn_cls": LossPart(config.loss_weights["loss_rpn_cls"] * rows.cls.sum(), rows.number),
            "loss_rpn_bbox": LossPart(config.loss_weights["loss_rpn_bbox"] * rows.bbox.sum(), rows.number),
        }

    def loss_rows(self, predictions: RPNPredictions, anchors: Priors, valid: Tensor, targets: Targets) -> "RPNLossRows":
        """What each anchor (B, N) adds to the loss before weight and division (Faster R-CNN, eq. 1)."""
        config = self.config
        assignment = assign_max_iou(
            anchors, valid, targets, config.rpn_positive_iou, config.rpn_negative_iou, config.rpn_forced_iou
        )
        positive, negative = assignment.positive, (assignment.weight > 0) & ~assignment.positive
        chosen = sample(positive, negative, config.rpn_samples, config.rpn_positive_fraction)
        positive, negative = positive & chosen, negative & chosen
        cls = F.binary_cross_entropy_with_logits(predictions.logits, positive.float(), reduction="none")
        bbox = F.l1_loss(predictions.deltas, encode_delta(anchors.boxes, assignment.boxes), reduction="none").sum(-1)
        return RPNLossRows(
            torch.where(chosen, cls, 0),
            torch.where(positive, bbox, 0),
            positive,
            negative,
            count_rows(positive, negative),
        )


class RPNLossRows(NamedTuple):
    """What each anchor adds to the loss.

    Args:
        cls, bbox: (B, N) binary cross entropy and L1 distance, 0 where they don't count.
        positive, negative: (B, N) bool, the sample.
        number: Scalar that the sums are divided by.
    """

    cls: Tensor
    bbox: Tensor
    positive: Tensor
    negative: Tensor
    number: Tensor


def count_rows(positive: Tensor, negative: Tensor) -> Tensor:
    """Sampled rows over all images, where an image without positives (or negatives) counts one too many.

    MMDetection's rule: the loss never divides by zero. (B, N) bool each, to a scalar.
    """
    return sum(rows.sum(1).clamp(min=1).sum() for rows in (positive, negative))  # type: ignore[return-value]
