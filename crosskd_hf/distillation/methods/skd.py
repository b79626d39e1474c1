"""SKD: features imitate the structure of the teacher's, patch by patch (NeurIPS 2022)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.losses import LossPart
from ..adapters import adapter
from ..method import Method, MethodConfig, Paper, option
from ..passes import Batch, DetectorView, Pass, same_size

WINDOW, SIGMA = 11, 1.5  # pixels of a map (SSIM, IEEE TIP 2004)
C1, C2 = 0.01**2, 0.03**2
SOURCE = "not released; a summary by others"


class SKDMethod(Method):
    """See :class:`SKD`."""

    name = "skd"
    paper = Paper(
        "Structural Knowledge Distillation for Object Detection", "NeurIPS 2022", "https://arxiv.org/abs/2211.13133"
    )
    families = "all, also student and teacher of different families"

    def __init__(self, config: "SKD", student: DetectorView, teacher: DetectorView):
        super().__init__(config, student, teacher)
        pairs = zip(student.channels, teacher.channels, strict=True)
        self.adapters = nn.ModuleList(adapter(*pair) for pair in pairs)

    def forward(self, student: Pass, teacher: Pass, batch: Batch) -> dict[str, LossPart]:
        """The mean over each level's elements; one quotient for each level."""
        totals, counts = [], []
        for layer, own, target in zip(self.adapters, student.features, teacher.features, strict=True):
            goal = target.values.detach().float()
            adapted = layer(same_size(own.values, goal)).float()
            rows = dissimilarity(unit_range(adapted, self.config.detach_minmax), unit_range(goal))
            totals.append(rows.sum())
            counts.append(rows.new_full((), rows.numel()))
        return {"features": LossPart(torch.stack(totals), torch.stack(counts))}


def unit_range(values: Tensor, detach: bool = False) -> Tensor:
    """(B, C, H, W) with the smallest value of each map at 0 and the largest at 1; constant maps are 0.

    Args:
        detach: Smallest and largest value carry no gradient.
    """
    low, high = values.amin((2, 3), keepdim=True), values.amax((2, 3), keepdim=True)
    if detach:
        low, high = low.detach(), high.detach()
    return (values - low) / (high - low + 1e-6)


def window_size(height: int, width: int) -> int:
    """The largest odd window up to 11 that a map of this size can mirror at its borders; 1 if there is none above 1."""
    least = min(WINDOW, height, width)
    return least if least % 2 else max(least - 1, 1)


def dissimilarity(own: Tensor, target: Tensor) -> Tensor:
    """(B, C, H, W): half of one minus the structural similarity, in [0, 1], of maps with values in [0, 1].

    Local means, variances and covariances are those of a Gaussian window, mirrored at the borders. Maps too small for
    a window of 3 are compared by their squared distance.
    """
    size = window_size(own.shape[-2], own.shape[-1])
    if size < 3:
        return (own - target).square()
    places = torch.arange(size, dtype=torch.float32, device=own.device) - size // 2
    kernel = (-places.square() / (2 * SIGMA**2)).exp()
    kernel /= kernel.sum()
    products = torch.cat([own, target, own * own, target * target, own * target])
    mean, goal, own_square, goal_square, product = _smooth(products, kernel).chunk(5)
    squares, cross = mean.square() + goal.square(), mean * goal
    variances = own_square + goal_square - squares
    similarity = (2 * cross + C1) * (2 * (product - cross) + C2) / ((squares + C1) * (variances + C2) + 1e-12)
    return ((1 - similarity) / 2).clamp(0, 1)


def _smooth(values: Tensor, kernel: Tensor) -> Tensor:
    """(N, C, H, W) under a separable window."""
    margin, channels = len(kernel) // 2, values.shape[1]
    padded = F.pad(values, (margin, margin, margin, margin), mode="reflect")
    column = kernel[:, None].expand(channels, 1, -1, 1)
    return F.conv2d(F.conv2d(padded, column, groups=channels), column.mT, groups=channels)


@dataclass(frozen=True)
class SKD(MethodConfig):
    """Structural similarity (SSIM) between the maps of both models, each map and channel scaled to [0, 1].

    Args:
        weight: 4; a weight of 2 is reported too.
        detach_minmax: The smallest and the largest value by which a map is scaled carry no gradient.
    """

    method = SKDMethod

    weight: float | None = option(4.0, "Factor on the whole method.", SOURCE, least=0)
    detach_minmax: bool = option(False, "The range of a map carries no gradient.", "not published")
