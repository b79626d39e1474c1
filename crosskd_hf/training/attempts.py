"""`auto_find_batch_size` tries again with fewer images: from where the run began, not where it ran out of memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class StartingPoint:
    """Weights, buffers and random numbers as they are now, kept in main memory.

    Args:
        modules: Whose tensors are kept.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._tensors = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in _tensors(modules)]
        self._chance = torch.get_rng_state()
        self._chance_of_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    @torch.no_grad()
    def restore(self) -> None:
        """Bring all of it back."""
        for tensor, kept in self._tensors:
            tensor.copy_(kept)
        torch.set_rng_state(self._chance)
        if self._chance_of_devices:
            torch.cuda.set_rng_state_all(self._chance_of_devices)


def _tensors(modules: Sequence[nn.Module]) -> list[Tensor]:
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
