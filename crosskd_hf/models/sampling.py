"""Random choice of training rows in two-stage detectors: so many in all, a share of them positive."""

import torch
from torch import Tensor


@torch.no_grad()
def sample(positive: Tensor, negative: Tensor, count: int | None, positive_fraction: float) -> Tensor:
    """Choose rows of each image by torch's generator (Faster R-CNN, NeurIPS 2015, section 3.1.3).

    Args:
        positive, negative: (B, N) bool, without overlap.
        count: Rows per image; negatives fill up what positives leave free. `None` chooses every row.
        positive_fraction: At most this share of `count` is positive.

    Returns:
        (B, N) bool, with at most `count` chosen rows per image.
    """
    if count is None:
        return positive | negative
    limit = positive.new_full((len(positive),), int(count * positive_fraction), dtype=torch.long)
    chosen = _random_subset(positive, limit, count)
    return chosen | _random_subset(negative, count - chosen.sum(1), count)


def _random_subset(mask: Tensor, counts: Tensor, largest: int) -> Tensor:
    """At most `counts` (B,) rows of `mask` (B, N) per image, where no count is above `largest`."""
    keys = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, -1)
    top = keys.topk(min(largest, mask.shape[1]), 1)
    kept = (top.values >= 0) & (torch.arange(top.values.shape[1], device=mask.device) < counts[:, None])
    return torch.zeros_like(mask).scatter(1, top.indices, kept)
