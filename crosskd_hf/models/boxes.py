"""Boxes: relative and absolute formats, overlaps, and the coders of regression targets.

Inside the models boxes are `xyxy` in pixels of the padded input; `sizes` are the (height, width) of each image
without its padding. At the boundary boxes are `cxcywh` relative to that unpadded size.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_convert

# Boxes of the delta coder cannot grow by more than this factor per step (the usual 16 / 1000 clip of R-CNN code).
MAX_LOG_RATIO = math.log(1000 / 16)


def image_sizes(pixel_values: Tensor, pixel_mask: Tensor | None) -> Tensor:
    """(B, 2) height and width of each image without its padding, float32, without waiting for the device."""
    if pixel_mask is None:
        height, width = pixel_values.shape[-2:]
        return row_of((height, width), pixel_values.new_empty((), dtype=torch.float32)).expand(len(pixel_values), -1)
    edges = pixel_mask[:, :, 0], pixel_mask[:, 0, :]  # every image begins in the corner
    return torch.stack([edge.sum(1, dtype=torch.float32) for edge in edges], -1)


def row_of(numbers: Sequence[float], like: Tensor) -> Tensor:
    """The numbers as a tensor (n,) of the dtype and device of `like`, filled there: a copy from the host would wait."""
    return torch.stack([like.new_full((), number) for number in numbers])


def to_relative(boxes: Tensor, sizes: Tensor) -> Tensor:
    """(B, N, 4) xyxy pixels to cxcywh relative to `sizes` (B, 2)."""
    return box_convert(boxes, "xyxy", "cxcywh") / _scale(sizes)


def to_absolute(boxes: Tensor, sizes: Tensor) -> Tensor:
    """(B, N, 4) cxcywh relative to `sizes` (B, 2) to xyxy pixels."""
    return box_convert(boxes * _scale(sizes), "cxcywh", "xyxy")


def _scale(sizes: Tensor) -> Tensor:
    return sizes.flip(-1).repeat(1, 2)[:, None]  # (B, 1, 4): width, height, width, height


def area(boxes: Tensor) -> Tensor:
    """Area of xyxy boxes, (..., 4) to (...)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def aligned_iou(boxes: Tensor, targets: Tensor, generalized: bool = False, eps: float = 1e-6) -> Tensor:
    """IoU of each box with its own target, or the generalized IoU (CVPR 2019, eq. 1).

    Args:
        boxes, targets: (..., 4) xyxy of one shape. Differentiable, without indexing, so the device is not waited for.
        eps: Smallest union and enclosing area, in square units of the boxes.

    Returns:
        (...) in [0, 1], or in [-1, 1] if `generalized`.
    """
    iou, union = _iou_and_union(boxes, targets, eps)
    return _generalized(iou, union, boxes, targets, eps) if generalized else iou


def both_ious(boxes: Tensor, targets: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """IoU and generalized IoU of each box with its own target, as of :func:`aligned_iou`, for little more than one."""
    iou, union = _iou_and_union(boxes, targets, eps)
    return iou, _generalized(iou, union, boxes, targets, eps)


def _iou_and_union(boxes: Tensor, targets: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    overlap = area_of_intersection(boxes, targets)
    union = (area(boxes) + area(targets) - overlap).clamp(min=eps)
    return overlap / union, union


def _generalized(iou: Tensor, union: Tensor, boxes: Tensor, targets: Tensor, eps: float) -> Tensor:
    corner = torch.minimum(boxes[..., :2], targets[..., :2])
    extent = (torch.maximum(boxes[..., 2:], targets[..., 2:]) - corner).clamp(min=0)
    enclosing = (extent[..., 0] * extent[..., 1]).clamp(min=eps)
    return iou - (enclosing - union) / enclosing


def complete_iou(boxes: Tensor, targets: Tensor, eps: float = 1e-6) -> Tensor:
    """IoU less the distance of the centres and the difference of the aspect ratios (CIoU, AAAI 2020, eq. 10).

    The weight of the aspect ratios is a constant to the gradient, as in the paper.

    Args:
        boxes, targets: (..., 4) xyxy of one shape; any may be without area, as rows that don't count are.
        eps: Smallest union, squared diagonal and height, in units of the boxes.

    Returns:
        (...) in [-2, 1].
    """
    iou = aligned_iou(boxes, targets, eps=eps)
    low, high = torch.minimum(boxes, targets)[..., :2], torch.maximum(boxes, targets)[..., 2:]
    diagonal = (high - low).square().sum(-1).clamp(min=eps)
    centers = ((boxes - targets)[..., :2] + (boxes - targets)[..., 2:]).square().sum(-1) / 4
    extents = [corners[..., 2:] - corners[..., :2] for corners in (boxes, targets)]
    angles = [(extent[..., 0] / extent[..., 1].clamp(min=eps)).atan() for extent in extents]
    aspect = 4 / math.pi**2 * (angles[0] - angles[1]).square()
    weight = (aspect / (1 - iou + aspect).clamp(min=eps)).detach()
    return iou - centers / diagonal - weight * aspect


def area_of_intersection(boxes: Tensor, targets: Tensor) -> Tensor:
    """Overlapping area of each box with its own target, (..., 4) to (...)."""
    corner = torch.maximum(boxes[..., :2], targets[..., :2])
    extent = (torch.minimum(boxes[..., 2:], targets[..., 2:]) - corner).clamp(min=0)
    return extent[..., 0] * extent[..., 1]


def pairwise_iou(boxes: Tensor, others: Tensor, eps: float = 1e-6) -> Tensor:
    """IoU of every box with every other, batched: (B, G, 4) and (B, N, 4) to (B, G, N), without gradient.

    Works one axis at a time and in place, without the (B, G, N, 2) corners of `torchvision.ops.box_iou`, which has no
    batch axis either. A box without area overlaps nothing.
    """
    x1, y1, x2, y2 = boxes.detach().float()[..., None, :].unbind(-1)  # (B, G, 1)
    u1, v1, u2, v2 = others.detach().float()[..., None, :, :].unbind(-1)  # (B, 1, N)
    overlap = (torch.minimum(x2, u2).sub_(torch.maximum(x1, u1))).clamp_(min=0)
    overlap *= (torch.minimum(y2, v2).sub_(torch.maximum(y1, v1))).clamp_(min=0)
    union = ((x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1)).sub_(overlap).clamp_(min=eps)
    return overlap.div_(union)


def anchors_around_origin(sizes: Tensor, aspect_ratios: Sequence[float]) -> Tensor:
    """Boxes of area size^2 for `sizes` (S,) in pixels and each height / width: (ratios * S, 4), ratio by ratio."""
    roots = torch.tensor(aspect_ratios).sqrt()[:, None]
    half_widths, half_heights = (1 / roots * sizes).reshape(-1) / 2, (roots * sizes).reshape(-1) / 2
    return torch.stack([-half_widths, -half_heights, half_widths, half_heights], -1)


def square_around_origin(side: float) -> Tensor:
    """The square of this side in pixels, (1, 4) xyxy."""
    return torch.tensor([[-side / 2, -side / 2, side / 2, side / 2]])


def encode_delta(priors: Tensor, boxes: Tensor, std: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Boxes as (dx, dy, dw, dh) from their priors (R-CNN, appendix C), divided by `std`. (..., 4) xyxy, broadcast."""
    prior = box_convert(priors, "xyxy", "cxcywh")
    box = box_convert(boxes, "xyxy", "cxcywh")
    centers = (box[..., :2] - prior[..., :2]) / prior[..., 2:]
    log_ratio = (box[..., 2:].clamp(min=1e-6) / prior[..., 2:]).log()
    return torch.cat([centers, log_ratio], -1) / row_of(std, priors)


def decode_delta(priors: Tensor, deltas: Tensor, std: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Inverse of :func:`encode_delta`; the change of size is clipped to a factor of 62.5."""
    prior = box_convert(priors, "xyxy", "cxcywh")
    deltas = deltas.float() * row_of(std, priors)
    centers = prior[..., :2] + deltas[..., :2] * prior[..., 2:]
    half = prior[..., 2:] * deltas[..., 2:].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() / 2
    return torch.cat([centers - half, centers + half], -1)


def encode_distance(points: Tensor, boxes: Tensor) -> Tensor:
    """Distances (left, top, right, bottom) from points (..., 2) to the sides of boxes (..., 4)."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], -1)


def decode_distance(points: Tensor, distances: Tensor) -> Tensor:
    """Boxes (..., 4), xyxy, from points (..., 2) and distances (..., 4): the inverse of :func:`encode_distance`."""
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], -1)
