"""Non-maximum suppression within classes, exact for any number of classes and any size of image.

torchvision's `batched_nms` moves the boxes of each class apart in float32: of a class far up the list, or in a large
image, only a coarse position is left, and the overlaps are others.
"""

import torch
from torch import Tensor
from torchvision.ops import nms

# So many boxes are compared at once; of more it is quicker to take each class by itself. On a GPU it never is.
FEW = 1000


def nms_by_class(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, most: int) -> Tensor:
    """Of two boxes of one class whose IoU is above `threshold`, the one with the lower score goes.

    Args:
        boxes: (M, 4) xyxy, finite.
        scores: (M,); of equal ones the first counts as the higher.
        labels: (M,) int64, of any values.
        threshold: In [0, 1].
        most: So many rows are wanted.

    Returns:
        Rows that stay, the highest score first, (at most `most`,) int64.
    """
    if len(boxes) > FEW and 2 * most <= FEW:  # a box's fate depends on higher scores alone: often a part is enough
        first = scores.argsort(descending=True, stable=True)[:FEW]
        kept = _side_by_side(boxes[first], scores[first], labels[first], threshold)
        if len(kept) >= most:
            return first[kept[:most]]
    if boxes.is_cuda or len(boxes) <= FEW:
        return _side_by_side(boxes, scores, labels, threshold)[:most]
    return _one_by_one(boxes, scores, labels, threshold)[:most]


def _one_by_one(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    order = labels.argsort(stable=True)
    counts = torch.unique_consecutive(labels[order], return_counts=True)[1].tolist()
    kept = torch.ones_like(labels, dtype=torch.bool)
    for rows in order.split(counts):
        if len(rows) > 1:
            kept[rows] = False
            kept[rows[nms(boxes[rows], scores[rows], threshold)]] = True
    stay = kept.nonzero().squeeze(1)
    return stay[scores[stay].argsort(descending=True, stable=True)]


def _side_by_side(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """All classes at once, moved apart in float64: a billionth of a pixel is left of a class ten thousand apart."""
    if not len(boxes):
        return labels
    boxes, rank = boxes.double(), labels.unique(return_inverse=True)[1]
    apart = rank * (boxes.max() - boxes.min() + 1)
    return nms(boxes + apart[:, None], scores.double(), _in_float32(threshold))


def _in_float32(threshold: float) -> float:
    """Overlaps in float64 are above the result if they are above `threshold` once rounded to float32."""
    single = torch.tensor(threshold)
    below = single if single.double() <= threshold else single.nextafter(torch.tensor(-1.0))
    return float((below.double() + below.nextafter(torch.tensor(2.0)).double()) / 2)
