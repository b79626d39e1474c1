"""Label assignment: which prior answers for which ground-truth box. Vectorised over images, levels and boxes.

Every assigner takes priors shared by the batch, `valid` (B, N) which leaves out priors in the padding of an image, and
:class:`Targets`, and returns an :class:`Assignment`. No gradient, no loop over images, no wait for the device.
"""

import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .boxes import aligned_iou, area, encode_distance, pairwise_iou, to_absolute


class Priors(NamedTuple):
    """Anchors or points of all levels, level after level, row by row, `A` per location.

    Args:
        boxes: (N, 4) xyxy pixels; for points, boxes of no size.
        centers: (N, 2) xy pixels, where distances are measured from.
        cells: (N, 2) xy pixels of the top left corner of the feature cell.
        strides: (N,) pixels per cell.
        level_lengths: Number of priors of each level,
        lengths: and the same on the device, (L,), where the priors lie on a grid.
    """

    boxes: Tensor
    centers: Tensor
    cells: Tensor
    strides: Tensor
    level_lengths: tuple[int, ...]
    lengths: Tensor | None = None

    @classmethod
    def on_grid(
        cls,
        shapes: Sequence[Sequence[int]],
        strides: Sequence[int],
        steps: Sequence[tuple[int, int]],
        anchors: Sequence[Tensor],
    ) -> "Priors":
        """The same anchors in every cell of a level's map.

        Args:
            shapes: Height and width of the map of each level.
            strides: What to call the pixels per cell,
            steps: and the cell's real height and width in pixels.
            anchors: (A, 4) xyxy pixels, float32: those of the cell at the origin.
        """
        boxes, cells, pixels = [], [], []
        for (height, width), stride, step, around in zip(shapes, strides, steps, anchors, strict=True):
            y = torch.arange(height, device=around.device, dtype=torch.float32) * step[0]
            x = torch.arange(width, device=around.device, dtype=torch.float32) * step[1]
            cell = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 1, 2)  # (H * W, 1, 2)
            boxes.append((cell.repeat(1, 1, 2) + around).reshape(-1, 4))  # (H * W * A, 4)
            cells.append(cell.expand(-1, len(around), 2).reshape(-1, 2))
            pixels.append(x.new_full((len(boxes[-1]),), stride))
        rows = torch.cat(boxes)
        centers = (rows[:, :2] + rows[:, 2:]) / 2
        level_lengths = tuple(len(level) for level in boxes)
        lengths = torch.tensor(level_lengths, device=rows.device)
        return cls(rows, centers, torch.cat(cells), torch.cat(pixels), level_lengths, lengths)

    def inside(self, sizes: Tensor) -> Tensor:
        """Priors whose cell begins inside an image, (B, N) bool, for its `sizes` (B, 2) height, width."""
        return (self.cells < sizes.flip(-1)[:, None]).all(-1)


class SizeCache:
    """What depends on the sizes of the maps alone, of those that came last: most batches have a size seen before.

    Nothing of it is state: copies and files of a model start without.

    Args:
        limit: How many sizes are kept.
    """

    def __init__(self, limit: int = 32):
        self.limit = limit
        self._known: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make()` returned for `key` (sizes and device); made anew in a graph that is being traced.

        Args:
            key: All that the result depends on.
            make: Returns tensors that nobody writes to.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return make()
        if key not in self._known:
            while len(self._known) >= self.limit:
                self._known.pop(next(iter(self._known)), None)
            with torch.inference_mode(False), torch.no_grad():  # a training step may be next
                self._known[key] = make()
        return self._known[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.limit,)


class Targets(NamedTuple):
    """Ground truth of a batch, padded to the image with most boxes (at least one row, so that G is never 0).

    Args:
        boxes: (B, G, 4) xyxy pixels; rows without a box hold zeros.
        labels: (B, G) class indices.
        mask: (B, G) bool, True where there is a box.
    """

    boxes: Tensor
    labels: Tensor
    mask: Tensor

    @classmethod
    def from_labels(cls, labels: list[dict[str, Tensor]], sizes: Tensor) -> "Targets":
        """From labels as of `DetrForObjectDetection`: per image `class_labels` (n,), relative cxcywh `boxes` (n, 4)."""
        classes = [label["class_labels"] for label in labels]
        boxes = [label["boxes"].float() for label in labels]
        no_class, no_box = sizes.new_zeros(1, dtype=torch.int64), sizes.new_zeros(1, 4, dtype=torch.float32)
        padded = pad_sequence([*classes, no_class], batch_first=True, padding_value=-1)[:-1]  # with G of at least 1
        relative = pad_sequence([*boxes, no_box], batch_first=True)[:-1]
        mask = padded >= 0
        return cls(to_absolute(relative, sizes), padded.clamp(min=0), mask)


class Assignment(NamedTuple):
    """What each prior has to predict.

    Args:
        positive: (B, N) bool.
        weight: (B, N) float, 1 where the prior takes part in classification, 0 in padding and in an ignore band.
        boxes: (B, N, 4) xyxy pixels of the matched box; meaningless where not positive.
        labels: (B, N) class of the matched box; meaningless where not positive.
        scores: (B, N) in [0, 1], the class score that each prior has to reach, of assigners that say so; 0 where not
            positive.
    """

    positive: Tensor
    weight: Tensor
    boxes: Tensor
    labels: Tensor
    scores: Tensor | None = None

    def count_positives(self) -> Tensor:
        """Number of positives, where an image without any counts as one."""
        return self.positive.sum(1).clamp(min=1).sum()

    def class_scores(self, scores: Tensor, num_labels: int) -> Tensor:
        """Scores (B, N) for the matched classes as a target for all, (B, N, K); the other classes get zero."""
        target = scores.new_zeros(*scores.shape, num_labels)
        return target.scatter_(2, self.labels[..., None], scores[..., None])


def matched(index: Tensor, positive: Tensor, weight: Tensor, targets: Targets) -> Assignment:
    """The assignment of each prior to ground truth number `index`, (B, N) in [0, G)."""
    boxes = targets.boxes.gather(1, index[..., None].expand(-1, -1, 4))
    return Assignment(positive, weight.float(), boxes, targets.labels.gather(1, index))


@torch.no_grad()
def assign_max_iou(
    priors: Priors,
    valid: Tensor,
    targets: Targets,
    positive_iou: float = 0.5,
    negative_iou: float = 0.4,
    forced_iou: float | None = 0.0,
) -> Assignment:
    """Positive from `positive_iou`, ignored between the two, and each box's best priors are positive in any case.

    RetinaNet (ICCV 2017, section 4.1) with the forced matches of Faster R-CNN. Where several boxes force one prior the
    last one gets it; a box that overlaps no prior, or none by `forced_iou`, forces none. With `None` no box does.
    The boxes of `priors` may be (B, N, 4), every image having its own.
    """
    # No area, no overlap, no match: so the mask costs no pass over (B, G, N).
    boxes = torch.where(valid[..., None], priors.boxes, 0)
    iou = pairwise_iou(targets.boxes, boxes)  # (B, G, N)
    best, index = iou.max(1)  # (B, N)
    positive = best >= positive_iou
    ignored = (best >= negative_iou) & ~positive

    if forced_iou is None:
        return matched(index, positive, valid & ~ignored, targets)
    best_of_box = iou.amax(2)  # (B, G)
    forces = targets.mask & (best_of_box > 0) & (best_of_box >= forced_iou)
    reachable = torch.where(forces, best_of_box, torch.inf)
    order = torch.arange(1, iou.shape[1] + 1, dtype=torch.int16, device=iou.device)
    forced = torch.where(iou == reachable[..., None], order[:, None], 0).amax(1).long()  # (B, N): 1 + the last box
    index = torch.where(forced > 0, forced - 1, index)
    return matched(index, positive | (forced > 0), valid & ~(ignored & (forced == 0)), targets)


@torch.no_grad()
def assign_atss(priors: Priors, valid: Tensor, targets: Targets, candidates_per_level: int = 9) -> Assignment:
    """Adaptive training sample selection (ATSS, CVPR 2020, algorithm 1), one prior per location.

    Candidates of a box are the priors closest to its centre on each level; positive are those whose IoU reaches mean +
    standard deviation over the candidates and whose centre lies in the box. A prior claimed twice goes to the higher
    IoU.
    """
    candidates, eligible = nearest_priors(priors, valid, targets, candidates_per_level)
    iou = aligned_iou(priors.boxes[candidates], targets.boxes[:, :, None])
    threshold = mean_plus_std(iou, eligible)
    sides = encode_distance(priors.centers[candidates], targets.boxes[:, :, None])
    eligible &= (iou >= threshold) & (sides.amin(-1) > 0.01)
    owner = highest_iou_wins(candidates, eligible, iou, valid)
    positive = owner < targets.boxes.shape[1]
    return matched(torch.where(positive, owner, 0), positive, valid, targets)


def nearest_priors(priors: Priors, valid: Tensor, targets: Targets, per_level: int) -> tuple[Tensor, Tensor]:
    """The priors of each level that are closest to the centre of each box.

    Returns:
        Their rows (B, G, c) in order of the levels, and (B, G, c) bool, False for rows that are no valid priors.
    """
    centers = (targets.boxes[..., :2] + targets.boxes[..., 2:]) / 2  # (B, G, 2)
    across, down = (centers[..., axis, None] - priors.centers[:, axis] for axis in (0, 1))  # (B, G, N)
    squared = across.square_().add_(down.square_()).masked_fill_(~valid[:, None], torch.inf)
    lengths = priors.level_lengths
    levels = zip(squared.split(lengths, -1), lengths, strict=True)
    nearest = [level.topk(min(per_level, length), dim=-1, largest=False) for level, length in levels]
    starts = itertools.accumulate(lengths, initial=0)
    candidates = torch.cat([level.indices + start for level, start in zip(nearest, starts, strict=False)], -1)
    return candidates, torch.cat([level.values for level in nearest], -1).isfinite() & targets.mask[..., None]


def mean_plus_std(values: Tensor, mask: Tensor) -> Tensor:
    """Mean plus unbiased deviation over the last axis where the mask holds, (..., c) to (..., 1)."""
    count = mask.sum(-1, keepdim=True)
    mean = (values * mask).sum(-1, keepdim=True) / count.clamp(min=1)
    variance = ((values - mean).square() * mask).sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    return mean + variance.sqrt()


def highest_iou_wins(candidates: Tensor, eligible: Tensor, iou: Tensor, valid: Tensor) -> Tensor:
    """Give every prior to one of the boxes that claim it.

    Args:
        candidates: (B, G, c) priors that each box claims,
        eligible: (B, G, c) bool, if this is True,
        iou: (B, G, c) in [0, 1], and the overlap of the two.
        valid: (B, N), of which only the shape is read.

    Returns:
        (B, N) the box of the highest overlap, the first of equals; G where no box claims the prior.
    """
    boxes, per_box = candidates.shape[1:]
    flat = candidates.flatten(1)  # (B, G * c)
    claim = torch.where(eligible, iou, -1.0).flatten(1)
    best = claim.new_full(valid.shape, -1.0).scatter_reduce(1, flat, claim, "amax")  # (B, N)
    owner = torch.arange(boxes, device=flat.device).repeat_interleave(per_box).expand_as(flat)
    owner = torch.where(eligible.flatten(1) & (claim == best.gather(1, flat)), owner, boxes)
    return flat.new_full(valid.shape, boxes).scatter_reduce(1, flat, owner, "amin")


@torch.no_grad()
def assign_points(
    priors: Priors, valid: Tensor, targets: Targets, ranges: Tensor, center_radius: float | None = None
) -> Assignment:
    """FCOS (ICCV 2019, section 3.2): points inside a box whose longest side distance is in the level's range.

    Args:
        ranges: (N, 2) pixels, smallest and largest longest distance that each point may regress.
        center_radius: With center sampling, points must also be this many strides from the centre of the box at most.

    A point inside several boxes takes the smallest.
    """
    points, boxes = priors.centers, targets.boxes[:, :, None]  # (N, 2), (B, G, 1, 4)
    sides = encode_distance(points.expand(*boxes.shape[:2], -1, -1), boxes)  # (B, G, N, 4)
    inside = sides.amin(-1) > 0
    if center_radius is not None:
        reach = priors.strides[:, None] * center_radius
        center = (boxes[..., :2] + boxes[..., 2:]) / 2
        shrunk = torch.cat(
            [torch.maximum(center - reach, boxes[..., :2]), torch.minimum(center + reach, boxes[..., 2:])], -1
        )
        inside = encode_distance(points.expand(*boxes.shape[:2], -1, -1), shrunk).amin(-1) > 0
    longest = sides.amax(-1)
    eligible = inside & (longest >= ranges[:, 0]) & (longest <= ranges[:, 1])
    eligible &= targets.mask[..., None] & valid[:, None]
    smallest, index = torch.where(eligible, area(boxes), torch.inf).min(1)  # (B, N)
    return matched(index, smallest.isfinite(), valid, targets)
