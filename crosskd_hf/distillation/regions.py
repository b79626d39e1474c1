"""Regions of a feature map: where objects are, and which locations are trained to find them. Without gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models.assigners import Priors, Targets, mean_plus_std, nearest_priors
from ..models.boxes import aligned_iou, area, pairwise_iou, square_around_origin
from .passes import Batch, FeatureMap, Pass, rows_of_levels

PADDED_TO = 32  # px


def centers(feature: FeatureMap, own: Pass) -> Tensor:
    """(H * W, 2) xy pixels of a map's locations: where the detector's priors are centred, or the cells' middles."""
    height, width = feature.values.shape[-2:]
    if own.priors is not None:
        anchors = (own.rows[feature.stride].stop - own.rows[feature.stride].start) // (height * width)
        return own.priors.centers[own.rows[feature.stride]][::anchors]
    y, x = ((torch.arange(edge, device=feature.values.device) + 0.5) * feature.stride for edge in (height, width))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)


def inside_boxes(points: Tensor, targets: Targets) -> Tensor:
    """(B, N) bool: whether a point (N, 2) lies strictly inside any box of an image."""
    boxes = targets.boxes[:, :, None]  # (B, G, 1, 4)
    inside = ((points > boxes[..., :2]) & (points < boxes[..., 2:])).all(-1)
    return (inside & targets.mask[..., None]).any(1)


def positives(feature: FeatureMap, own: Pass) -> Tensor:
    """(B, H, W) bool: locations of a map with a prior that is assigned to an object."""
    assert own.assignment is not None
    rows = own.assignment.positive[:, own.rows[feature.stride]]
    return rows.unflatten(1, (*feature.values.shape[-2:], -1)).any(-1)


def anchors(own: Pass) -> tuple[Priors, dict[int, slice]]:
    """Anchors of a pass, and where in them those of a stride are.

    A detector's own anchors; instead of points, and on maps of a detector without priors, the squares of ATSS: one at
    each location, with a side of 8 strides.
    """
    if own.priors is not None:
        half = 4 * own.priors.strides[:, None]
        squares = torch.cat([own.priors.centers - half, own.priors.centers + half], -1)
        boxes = torch.where(area(own.priors.boxes)[:, None] > 0, own.priors.boxes, squares)
        return own.priors._replace(boxes=boxes), own.rows
    strides = [feature.stride for feature in own.features]
    shapes = [feature.values.shape[-2:] for feature in own.features]
    device = own.features[0].values.device
    around = [(square_around_origin(8.0 * stride) + stride / 2).to(device) for stride in strides]
    priors = Priors.on_grid(shapes, strides, [(stride, stride) for stride in strides], around)
    return priors, rows_of_levels(strides, priors)


def in_images(priors: Priors, batch: Batch) -> Tensor:
    """(B, N) bool: priors that do not lie in padding that other images bring.

    An image ends at its size rounded up to a multiple of 32 px, as in MMDetection, on which LD's code rests.
    """
    return priors.inside((batch.sizes / PADDED_TO).ceil() * PADDED_TO)


def by_locations(rows: Tensor, features: Sequence[FeatureMap], of_stride: dict[int, slice]) -> list[Tensor]:
    """Of rows (B, N) bool, whether any at a location holds: (B, H, W) float of each level."""
    return [
        rows[:, of_stride[stride]].unflatten(1, (*values.shape[-2:], -1)).any(-1).float() for stride, values in features
    ]


def levels_of_boxes(targets: Targets, levels: int) -> Tensor:
    """(B, G) the one level of each box by its size, from 0: one for each doubling above 56 pixels (FPN, eq. 1)."""
    edges = targets.boxes[..., 2:] - targets.boxes[..., :2] + 1
    return (edges.prod(-1).sqrt() / 56 + 1e-6).log2().floor().clamp(0, levels - 1)


def cells_of_boxes(feature: FeatureMap, targets: Targets, single: bool = False) -> tuple[Tensor, Tensor]:
    """The rows (B, G, H) and columns (B, G, W) of a map, bool, whose cells belong to each box: at least one of each.

    The cell in which a box ends isn't one of its own. With `single` a box that is thinner than a cell has one cell.
    """
    first, last = (targets.boxes / feature.stride).int().chunk(2, -1)  # (B, G, 2) x, y
    thin = last <= first
    if single:
        thin = thin.any(-1, keepdim=True)
    last = torch.where(thin, first, last - 1)
    found = []
    for axis, size in ((1, feature.values.shape[-2]), (0, feature.values.shape[-1])):
        cell = torch.arange(size, device=first.device)
        inside = (cell >= first[..., axis, None]) & (cell <= last[..., axis, None])
        found.append(inside & targets.mask[..., None])
    return found[0], found[1]


CANDIDATES = 9  # of a box on each level, whose IoU tells the threshold of ATSS
LEAST = 0.25  # share of that threshold from which a location is valuable


@torch.no_grad()
def valuable(priors: Priors, valid: Tensor, targets: Targets, union: bool = True) -> Tensor:
    """The valuable localization region (LD, CVPR 2022, algorithm 1).

    Args:
        priors, valid, targets: As of :meth:`DenseHead.assign`.
        union: Overlaps are intersection over union, as in the paper; or over the anchor's area.

    Returns:
        (B, N) largest IoU with those boxes from whose threshold (that of ATSS) the prior's overlap, less the squared
        distance of the centres in diagonals of the enclosing box, is at least a quarter but less than the whole.
    """
    candidates, known = nearest_priors(priors, valid, targets, CANDIDATES)
    threshold = mean_plus_std(aligned_iou(priors.boxes[candidates], targets.boxes[:, :, None]), known)  # (B, G, 1)
    iou = pairwise_iou(targets.boxes, priors.boxes)  # (B, G, N)
    overlap = iou
    if not union:  # inter = iou * (own + other) / (1 + iou)
        sizes = area(targets.boxes)[..., None], area(priors.boxes)
        overlap = iou * (sizes[0] + sizes[1]) / ((1 + iou) * sizes[1])
    overlap = overlap - _distance(targets.boxes, priors.boxes)
    counts = (overlap >= LEAST * threshold) & (overlap < threshold) & targets.mask[..., None] & valid[:, None]
    return torch.where(counts, iou, 0).amax(1)


def _distance(boxes: Tensor, others: Tensor) -> Tensor:
    """(B, G, N) squared distance of two centres over the squared diagonal of the enclosing box."""
    x1, y1, x2, y2 = boxes[..., None, :].unbind(-1)  # (B, G, 1)
    u1, v1, u2, v2 = others.unbind(-1)  # (N,)
    squared = ((x1 + x2 - u1 - u2) / 2).square() + ((y1 + y2 - v1 - v2) / 2).square()
    width = torch.maximum(x2, u2).sub_(torch.minimum(x1, u1))
    height = torch.maximum(y2, v2).sub_(torch.minimum(y1, v1))
    return squared.div_(width.square_().add_(height.square_()).clamp_(min=1e-6))
