"""One update's loss parts: normalizers over its micro-batches and all processes, what depends on them, and the log."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models.losses import LossPart, sum_normalizers

INNER_LAYER = re.compile(r"d\d+\.(dn_)?")
"""What the names of the terms of an inner decoder layer begin with."""
MATCHED, UNMATCHED = "loss_ddf_matched", "loss_ddf_unmatched"


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


def balanced(losses: Mapping[str, Tensor], parts: Mapping[str, LossPart], normalizers: Tensor) -> dict[str, Tensor]:
    """Weigh the means over matched and unmatched queries in the localisation distillation of D-FINE and DEIMv2.

    Both count by the square root of how many they are, which only all micro-batches and processes together know.

    Args:
        losses: Of all terms, divided.
        parts: The terms before their division, in the same order.
        normalizers: What they were divided by, added up over micro-batches and processes: as many as the elements of
            all normalizers of `parts`.

    Source: D-FINE (ICLR 2025), equation 6, as in transformers.
    """
    result = dict(losses)
    matched = [name for name in losses if name.endswith(MATCHED)]
    if not matched:
        return result
    rows = normalizers.split([part.normalizer.numel() for part in parts.values()])
    roots = {name: row.sum().sqrt() for name, row in zip(parts, rows, strict=True)}
    for name in matched:
        other = name.removesuffix(MATCHED) + UNMATCHED
        share = roots[name] / (roots[name] + roots[other]).clamp(min=1)
        result[name], result[other] = losses[name] * share, losses[other] * (1 - share)
    return result


def folded(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For the log: `aux_loss_*` and `dn_loss_*` are sums over the layers of the decoder."""
    sums: dict[str, Tensor] = {}
    for name, loss in losses.items():
        match = INNER_LAYER.match(name)
        short = name if match is None else f"{match[1] or 'aux_'}{name[match.end() :]}"
        short = short.removesuffix("_unmatched").removesuffix("_matched")
        sums[short] = sums[short] + loss if short in sums else loss
    return sums


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
