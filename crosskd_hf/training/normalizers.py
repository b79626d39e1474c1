"""One update's normalizers, added up over its micro-batches and over all processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models.losses import LossPart, sum_normalizers


class UpdateSums(NamedTuple):
    """What every process knows about an update.

    Args:
        normalizers: One row of all elements of all parts, to be given to `divide`.
        bad: Scalar, above 0 (or NaN) if a part on any process is not finite.
    """

    normalizers: Tensor
    bad: Tensor


@torch.no_grad()
def add_up(micro_batches: Sequence[dict[str, LossPart]]) -> UpdateSums:
    """Add the normalizers of micro-batches and processes, in one all-reduce that carries a flag for bad values along.

    Args:
        micro_batches: The parts of each, with equal keys everywhere.
    """
    parts = {
        name: LossPart(part.total, torch.stack([other[name].normalizer.float() for other in micro_batches]).sum(0))
        for name, part in micro_batches[0].items()
    }
    values = [tensor.float().reshape(-1) for batch in micro_batches for part in batch.values() for tensor in part[:2]]
    bad = (~torch.isfinite(torch.cat(values))).sum()
    sums = sum_normalizers(parts | {"not finite": LossPart(bad, bad)})
    return UpdateSums(sums[:-1], sums[-1])


def weighted(parts: dict[str, LossPart], weight: float) -> dict[str, LossPart]:
    """`parts` with totals and normalizers times `weight`."""
    if weight == 1:
        return parts
    return {name: LossPart(part.total * weight, part.normalizer * weight, part.floor) for name, part in parts.items()}


@contextmanager
def normalizer_pass(model: nn.Module) -> Iterator[None]:
    """A pass without gradient that leaves no trace: random numbers and the buffers of `model` are put back."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {buffer.device.index for buffer in model.parameters() if buffer.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(index or 0 for index in devices)), torch.no_grad():
        yield
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
