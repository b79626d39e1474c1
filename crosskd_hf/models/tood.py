"""Task-aligned one-stage object detector (TOOD, ICCV 2021): one row of convolutions for both tasks, and labels that say
how well a prediction serves both."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from .assigners import Assignment, Priors, Targets, assign_atss, highest_iou_wins, matched
from .box_coders import MAX_LOG_DISTANCE, DistanceCoder
from .boxes import aligned_iou, encode_distance, pairwise_iou, row_of, square_around_origin
from .centerness import centerness_targets
from .configuration import DenseDetectorConfig
from .dense import DenseDetector, DenseHead, Predictions, Taps
from .layers import Conv, ConvNormAct, Scale, maps_to_rows, prior_bias
from .losses import LossPart, focal_loss, logit_of, quality_focal


class TOODConfig(DenseDetectorConfig):
    """Configuration of :class:`TOODForObjectDetection`; see :class:`DenseDetectorConfig` for the shared fields.

    Args:
        num_convs: Convolutions that both tasks share; their outputs are read together.
        anchor_scale: Side of the square anchor of each location, in strides, for the assignment by ATSS.
        candidates: So many priors of an object with the highest alignment may become positive.
        score_exponent, iou_exponent: Alignment is score^score_exponent * IoU^iou_exponent (eq. 4).
        static_epochs: In the first epochs labels are assigned by ATSS. Who trains the model tells the epoch by
            `set_epoch`, as `CrossKDTrainer` does; without that the alignment assigns from the start.

    Raises:
        ValueError: A value out of range, or `stretch_cells`.
    """

    model_type = "crosskd_tood"

    num_convs: int = 6
    anchor_scale: float = 8.0
    candidates: int = 13
    score_exponent: float = 1.0
    iou_exponent: float = 6.0
    static_epochs: int = 4

    ranges = {
        "num_convs": (1, 64),
        "anchor_scale": (0.01, 1024),
        "candidates": (1, 1024),
        "score_exponent": (0, 64),
        "iou_exponent": (0, 64),
        "static_epochs": (0, 1 << 20),
    }
    default_loss_weights = {"loss_cls": 1.0, "loss_bbox": 2.0}

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.stretch_cells:
            raise ValueError("stretch_cells=True, but TOOD moves box sides by whole strides: leave it False.")


class TaskDecomposition(nn.Module):
    """Features of one task: a 1x1 convolution of all shared features, each layer weighted by attention (section 3.1).

    The attention reads the mean of the whole map, the padding of a batch included, as GroupNorm does too.

    Args:
        width: Channels of a layer and of the result.
        depth: Layers.
        norm_groups: Groups of the GroupNorm, `None` for no norm.
    """

    def __init__(self, width: int, depth: int, norm_groups: int | None):
        super().__init__()
        hidden = max(width * depth // 8, 1)
        self.squeeze = Conv(width * depth, hidden, 1, std=0.001)
        self.excite = Conv(hidden, depth, 1, std=0.001)
        self.reduce = Conv(width * depth, width, 1, bias=False)
        self.norm = nn.Identity() if norm_groups is None else nn.GroupNorm(norm_groups, width)

    def forward(self, stack: Tensor) -> Tensor:
        """Layers side by side (B, depth * width, H, W) to (B, width, H, W)."""
        attention = self.excite(F.relu(self.squeeze(stack.mean((2, 3), keepdim=True)))).sigmoid()  # (B, depth, 1, 1)
        kernel = self.reduce.weight[..., 0, 0].unflatten(1, (attention.shape[1], -1))  # (width, depth, width)
        kernel = (kernel * attention[:, None, :, 0]).flatten(2)  # (B, width, depth * width): cheaper than the stack
        reduced = torch.bmm(kernel, stack.flatten(2)).unflatten(2, stack.shape[2:])
        return F.relu(self.norm(reduced))


class TOODHead(DenseHead):
    """Scores that are joint ones of both tasks, and boxes whose sides are sampled where the head learns to look."""

    config: TOODConfig

    def __init__(self, config: TOODConfig):
        super().__init__(config)
        width, depth = config.head_channels, config.num_convs
        widths = [config.fpn_channels] + [width] * (depth - 1)
        self.convs = nn.ModuleList(ConvNormAct(channels, width, config.norm_groups) for channels in widths)
        self.cls_task = TaskDecomposition(width, depth, config.norm_groups)
        self.reg_task = TaskDecomposition(width, depth, config.norm_groups)
        bias = prior_bias(config.prior_probability)
        self.classifier = Conv(width, self.num_labels, 3, bias_value=bias)
        self.regressor = Conv(width, 4, 3)
        hidden = max(width // 4, 1)
        self.alignment = nn.Sequential(Conv(width * depth, hidden, 1), nn.ReLU(), Conv(hidden, 1, 3, bias_value=bias))
        self.offsets = nn.Sequential(
            Conv(width * depth, hidden, 1, std=0.001), nn.ReLU(), Conv(hidden, 8, 3, std=0.001)
        )
        self.scales = nn.ModuleList(Scale() for _ in config.strides)
        self.static = False

    @classmethod
    def box_coder(cls, config: Any) -> DistanceCoder:
        return DistanceCoder("stride")

    # ---- The path ----

    def tap(self, features: list[Tensor], cut: int, activated: bool = True) -> Taps:
        """See :meth:`DenseHead.tap`: the outputs of the first `cut` convolutions side by side, for both tasks."""
        self.check_cut(cut)
        maps = [self._stack(feature, 0, cut, activated) for feature in features]
        return Taps(maps, maps)

    def finish(self, taps: Taps, cut: int) -> Predictions:
        """See :meth:`DenseHead.finish`."""
        cls_stacks = [self._stack(tap, cut, self.num_convs) for tap in taps.cls]
        shared = taps.reg is taps.cls
        reg_stacks = cls_stacks if shared else [self._stack(tap, cut, self.num_convs) for tap in taps.reg]
        logits = [self._logits(stack) for stack in cls_stacks]
        sides = [self._distances(stack, scale) for stack, scale in zip(reg_stacks, self.scales, strict=True)]
        return Predictions(maps_to_rows(logits, self.num_labels), maps_to_rows(sides, 4))

    def _stack(self, tap: Tensor, start: int, stop: int, activated: bool = True) -> Tensor:
        """From the outputs of the convolutions before `start`, or the pyramid, to those before `stop`."""
        layers = list(tap.split(self.config.head_channels, 1)) if start else []
        feature = layers[-1] if start else tap
        for conv in list(self.convs)[start:stop]:
            linear = conv(feature, activated=False)
            feature = F.relu(linear)
            layers.append(feature if activated else linear)
        return torch.cat(layers, 1) if layers else tap

    def _logits(self, stack: Tensor) -> Tensor:
        """Logits of sqrt(class score * alignment), (B, K, H, W) (section 3.1)."""
        scores, alignment = self.classifier(self.cls_task(stack)), self.alignment(stack)
        return logit_of((F.logsigmoid(scores.float()) + F.logsigmoid(alignment.float())) / 2)

    def _distances(self, stack: Tensor, scale: nn.Module) -> Tensor:
        """Distances to the sides in strides, (B, 4, H, W); each side is that of a learnt location (section 3.1)."""
        raw = self.regressor(self.reg_task(stack)).float()
        distances = scale(raw.clamp(max=MAX_LOG_DISTANCE).exp())
        offsets = self.offsets(stack).float()  # (B, 8, H, W): down and right, for each side
        height, width = raw.shape[-2:]
        y = torch.arange(height, dtype=torch.float32, device=raw.device)[:, None].expand(height, width)
        x = torch.arange(width, dtype=torch.float32, device=raw.device).expand(height, width)
        here, sign = torch.stack([x, y, x, y]), row_of((-1, -1, 1, 1), raw)[:, None, None]
        boxes = here + sign * distances
        moved = deform_conv2d(boxes, offsets, boxes.new_ones(4, 1, 1, 1))  # bilinear, zero outside of the map
        solid = (moved[:, 2:] > moved[:, :2]).all(1, keepdim=True)
        return sign * (torch.where(solid, moved, boxes) - here)

    def tap_width(self, cut: int) -> int:
        """See :meth:`DenseHead.tap_width`."""
        return self.config.fpn_channels if cut == 0 else cut * self.config.head_channels

    def modules_before(self, cut: int) -> list[nn.Module]:
        """See :meth:`DenseHead.modules_before`."""
        return list(self.convs)[:cut]

    # ---- Training ----

    def set_epoch(self, epoch: float) -> None:
        """See :meth:`DenseHead.set_epoch`: ATSS assigns in the first `static_epochs`."""
        self.static = epoch < self.config.static_epochs

    def prior_boxes(self, stride: int) -> Tensor:
        """(1, 4) xyxy pixels: the square of `anchor_scale` strides around the corner of the cell (ATSS, CVPR 2020)."""
        return square_around_origin(self.config.anchor_scale * stride)

    @property
    def assignment_rule(self) -> tuple[object, ...]:
        return ("atss", self.grid, self.config.anchor_scale) if self.static else ("alignment", self)

    def assign(
        self, priors: Priors, valid: Tensor, targets: Targets, predictions: Predictions, boxes: Tensor, /
    ) -> Assignment:
        """By the alignment of the predictions, at first by ATSS (section 3.2); see :meth:`DenseHead.assign`."""
        if self.static:
            return assign_atss(priors, valid, targets)
        config = self.config
        exponents = config.score_exponent, config.iou_exponent
        scores = predictions.logits.sigmoid()
        return assign_by_alignment(priors, valid, targets, scores, boxes, config.candidates, *exponents)

    def normalizer(self, priors: Priors, assignment: Assignment) -> Tensor:
        """Sum of the scores that the positives have to reach, or their number where ATSS assigned them."""
        return (assignment.positive if assignment.scores is None else assignment.scores).sum()

    def loss(
        self, predictions: Predictions, boxes: Tensor, priors: Priors, assignment: Assignment
    ) -> dict[str, LossPart]:
        """Focal loss towards the alignment, and GIoU weighted by it (eq. 6 and 8); see :meth:`DenseHead.loss`.

        Where ATSS assigned: plain focal loss, and GIoU weighted by the centerness.
        """
        giou = 1 - aligned_iou(boxes, assignment.boxes, generalized=True)
        if assignment.scores is None:
            cls, importance = focal_loss(predictions.logits, assignment), centerness_targets(priors, assignment)
        else:
            importance = assignment.scores
            target = assignment.class_scores(importance, self.num_labels)
            cls = (quality_focal(predictions.logits, target, 2.0).sum(-1) * assignment.weight).sum()
        return {
            "loss_cls": LossPart(self.weights["loss_cls"] * cls, self.normalizer(priors, assignment)),
            "loss_bbox": LossPart(self.weights["loss_bbox"] * (giou * importance).sum(), importance.sum()),
        }


@torch.no_grad()
def assign_by_alignment(
    priors: Priors,
    valid: Tensor,
    targets: Targets,
    scores: Tensor,
    boxes: Tensor,
    candidates: int = 13,
    score_exponent: float = 1.0,
    iou_exponent: float = 6.0,
) -> Assignment:
    """Task-aligned assignment (section 3.2): priors whose predictions serve both tasks best are positive.

    Candidates of an object are the priors of the highest alignment, score^a * IoU^b; those whose centre lies in the
    object are positive. A prior that two objects claim goes to the higher IoU. The alignments of an object's positives,
    scaled so that the largest is the object's largest IoU, are the scores that they have to reach.

    Args:
        priors, valid, targets: See :meth:`DenseHead.assign`.
        scores: (B, N, K) predicted, in [0, 1].
        boxes: (B, N, 4) predicted, xyxy pixels.
        candidates: Of each object.
        score_exponent, iou_exponent: a and b.
    """
    iou = pairwise_iou(targets.boxes, torch.where(valid[..., None], boxes, 0))  # (B, G, N)
    score = scores.transpose(1, 2).gather(1, targets.labels[..., None].expand_as(iou))
    alignment = score.pow(score_exponent) * iou.pow(iou_exponent)
    best = alignment.topk(min(candidates, alignment.shape[-1]), dim=-1)
    sides = encode_distance(priors.centers[best.indices], targets.boxes[:, :, None])
    eligible = (best.values > 0) & (sides.amin(-1) > 0.01) & targets.mask[..., None]
    index = highest_iou_wins(best.indices, eligible, iou.gather(2, best.indices), valid)
    positive = index < iou.shape[1]
    index = torch.where(positive, index, 0)

    own, overlap = (torch.where(positive, of.gather(1, index[:, None])[:, 0], 0) for of in (alignment, iou))
    zeros = iou.new_zeros(iou.shape[:2])
    most, widest = (zeros.scatter_reduce(1, index, rows, "amax").gather(1, index) for rows in (own, overlap))
    reached = own / most.clamp(min=torch.finfo(own.dtype).tiny) * widest
    return matched(index, positive, valid, targets)._replace(scores=torch.where(positive, reached, 0))


class TOODForObjectDetection(DenseDetector):
    """TOOD with any timm backbone. Labels, outputs and boxes are as those of `DetrForObjectDetection`."""

    config: TOODConfig
    config_class = TOODConfig
    head_class = TOODHead
