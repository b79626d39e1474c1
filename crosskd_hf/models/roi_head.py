"""The second stage of Faster R-CNN: features of regions, two shared layers, classes and boxes of each class."""

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align
from transformers import initialization as init

from .assigners import Priors, Targets, assign_max_iou
from .boxes import area, decode_delta, encode_delta
from .losses import LossPart, logit_of
from .rpn import Proposals
from .sampling import sample

DELTA_STD = (0.1, 0.1, 0.2, 0.2)


class RoIs(NamedTuple):
    """Regions of interest and their ground truth, padded to one length.

    Args:
        boxes: (B, R, 4) xyxy pixels; zeros in the padding.
        mask: (B, R) bool, False in the padding.
        positive: (B, R) bool; a region that isn't positive is background.
        targets: (B, R, 4) xyxy pixels of the matched box; meaningless where not positive.
        labels: (B, R) class of the matched box; meaningless where not positive.
    """

    boxes: Tensor
    mask: Tensor
    positive: Tensor
    targets: Tensor
    labels: Tensor


class RoIPredictions(NamedTuple):
    """Raw output of the second stage.

    Args:
        logits: (B, R, K + 1), the background last.
        deltas: (B, R, K, 4), one box per class, or (B, R, 1, 4) if boxes are class-agnostic.
    """

    logits: Tensor
    deltas: Tensor


class Linear(nn.Linear):
    """A fully connected layer that knows its own initial values; `std=None` draws Xavier-uniform weights."""

    def __init__(self, in_features: int, out_features: int, std: float | None = None):
        self.std = std
        super().__init__(in_features, out_features)

    def reset_parameters(self) -> None:
        """Draw the initial values that the constructor was given."""
        if self.std is None:
            init.xavier_uniform_(self.weight)
        else:
            init.normal_(self.weight, std=self.std)
        init.zeros_(self.bias)


class RoIHead(nn.Module):
    """RoIAlign, fully connected layers shared by both tasks, one classifier and one regressor.

    It holds no state of the image: any pyramid of the right width and strides can be read with it, which is what
    cross-head distillation does.

    Args:
        config: A `FasterRCNNConfig`.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.num_labels: int = config.num_labels
        widths = [config.fpn_channels * config.roi_size**2] + [config.fc_channels] * config.num_fcs
        self.shared = nn.ModuleList(itertools.starmap(Linear, itertools.pairwise(widths)))
        self.num_boxes = 1 if config.class_agnostic else self.num_labels
        self.classifier = Linear(widths[-1], self.num_labels + 1, std=0.01)
        self.regressor = Linear(widths[-1], self.num_boxes * 4, std=0.001)

    def forward(self, features: list[Tensor], boxes: Tensor) -> RoIPredictions:
        """Predictions for `boxes` (B, R, 4), xyxy pixels, from pyramid maps (B, C, H_l, W_l). In float32."""
        hidden = self.pool(features, boxes).flatten(1)  # (B * R, C * S * S)
        for layer in self.shared:
            hidden = F.relu(layer(hidden))
        shape = boxes.shape[:2]
        logits, deltas = self.classifier(hidden).float(), self.regressor(hidden).float()
        return RoIPredictions(logits.unflatten(0, shape), deltas.unflatten(1, (-1, 4)).unflatten(0, shape))

    def pool(self, features: list[Tensor], boxes: Tensor) -> Tensor:
        """RoIAlign (ICCV 2017) of each box on the level of its size: (B, R, 4) to (B * R, C, S, S).

        Every level gets all boxes, those of other levels without size: of these RoIAlign takes no sample and makes 0.
        To choose the boxes of a level would be to wait for the device.
        """
        batch, regions = boxes.shape[:2]
        image = torch.arange(batch, device=boxes.device).repeat_interleave(regions)
        rows = torch.cat([image[:, None].to(boxes), boxes.flatten(0, 1)], 1)  # (B * R, 5)
        level_of_row = self.levels(boxes).flatten()
        size = self.config.roi_size
        pooled = rows.new_zeros(())
        for level, stride in enumerate(self.config.backbone_strides):
            here = torch.where((level_of_row == level)[:, None], rows, 0)
            feature = features[level].float()
            pooled = pooled + roi_align(feature, here, size, 1 / stride, sampling_ratio=0, aligned=True)
        return pooled.to(features[0].dtype)

    def levels(self, boxes: Tensor) -> Tensor:
        """Pyramid level of each box (Feature pyramid networks, CVPR 2017, eq. 1): (..., 4) to (...) int64.

        Boxes of less than twice `finest_scale` pixels go to the finest level. Levels beyond the backbone's are the
        RPN's alone.
        """
        level = torch.log2(area(boxes).clamp(min=0).sqrt() / self.config.finest_scale + 1e-6).floor()
        return level.clamp(0, len(self.config.backbone_strides) - 1).long()

    def decode(self, predictions: RoIPredictions, boxes: Tensor) -> Tensor:
        """Boxes of each class, (B, R, K, 4) xyxy pixels, from predictions for `boxes` (B, R, 4)."""
        decoded = decode_delta(boxes[:, :, None], predictions.deltas, DELTA_STD)
        return decoded.expand(-1, -1, self.num_labels, -1)

    @torch.no_grad()
    def sample(self, proposals: Proposals, targets: Targets) -> RoIs:
        """A random sample of the ground truth and the proposals, the ground truth in front."""
        config = self.config
        given = targets.mask & (area(targets.boxes) > 0)
        found = self.assign(proposals, targets)
        truth = RoIs(targets.boxes, given, given, targets.boxes, targets.labels)
        rows = RoIs(*(torch.cat(pair, 1) for pair in zip(truth, found, strict=True)))
        chosen = sample(rows.positive, rows.mask & ~rows.positive, config.roi_samples, config.roi_positive_fraction)
        order = chosen.int().argsort(dim=1, descending=True, stable=True)[:, : config.roi_samples]
        rows = rows._replace(mask=chosen, positive=rows.positive & chosen)
        labels = rows.labels.gather(1, order)
        mask, positive = rows.mask.gather(1, order), rows.positive.gather(1, order)
        boxes, matched = (b.gather(1, order[..., None].expand(-1, -1, 4)) for b in (rows.boxes, rows.targets))
        return RoIs(boxes * mask[..., None], mask, positive, matched, labels)

    @torch.no_grad()
    def assign(self, regions: Proposals, targets: Targets) -> RoIs:
        """Ground truth of each region (B, R): the box of highest IoU, from `roi_positive_iou` on (ICCV 2015)."""
        threshold = self.config.roi_positive_iou
        boxes = regions.boxes
        priors = Priors(boxes, boxes[..., :2], boxes[..., :2], boxes[..., 0], (boxes.shape[1],))
        found = assign_max_iou(priors, regions.mask, targets, threshold, threshold, forced_iou=None)
        return RoIs(boxes, regions.mask, found.positive, found.boxes, found.labels)

    def loss(self, predictions: RoIPredictions, rois: RoIs) -> dict[str, LossPart]:
        """Weighted parts `loss_cls` and `loss_bbox`; both are divided by the number of regions.

        Cross entropy, and L1 of the deltas of positives (Fast R-CNN, ICCV 2015, eq. 1, with L1 as in MMDetection).

        Args:
            predictions: For B x R regions.
            rois: The same regions (B, R), and what they have to predict.
        """
        weights, number = self.config.loss_weights, rois.mask.sum()
        labels = torch.where(rois.positive, rois.labels, self.num_labels)
        cls = F.cross_entropy(predictions.logits.flatten(0, 1), labels.flatten(), reduction="none")
        deltas = select_boxes(predictions.deltas, rois.labels)
        target = encode_delta(rois.boxes, rois.targets, DELTA_STD)
        target = torch.where(rois.positive[..., None], target, 0)  # padding has no size, and L1's gradient would be NaN
        bbox = F.l1_loss(deltas, target, reduction="none").sum(-1)
        return {
            "loss_cls": LossPart(weights["loss_cls"] * (cls * rois.mask.flatten()).sum(), number),
            "loss_bbox": LossPart(weights["loss_bbox"] * torch.where(rois.positive, bbox, 0).sum(), number),
        }


def select_boxes(deltas: Tensor, labels: Tensor) -> Tensor:
    """The box of one class per region: (B, R, K, 4) and (B, R) to (B, R, 4). A class-agnostic box is every class's."""
    if deltas.shape[2] == 1:
        return deltas[:, :, 0]
    return deltas.gather(2, labels[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]


def class_logits(logits: Tensor) -> Tensor:
    """Logits of softmax scores, so that sigmoid of the result is the score: (..., K + 1) to (..., K), no background."""
    return logit_of(logits.log_softmax(-1)[..., :-1])
