"""Regions of a feature map: where objects are, and which locations are trained to find them. Without gradient."""

import torch
from torch import Tensor

from ..models.assigners import Targets
from .passes import FeatureMap, Pass


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
