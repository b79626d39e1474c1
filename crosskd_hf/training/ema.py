"""An exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..inference.precision import HALF


class WeightAverage:
    """Running average of the parameters and floating-point buffers of `model`; other buffers are copied.

    The average is float32 at least: in half precision most of its small steps would be lost.

    Args:
        model: Its present weights are where the average starts.
        decay: In (0, 1). The first updates use the smaller (1 + n) / (10 + n), n updates so far, so that a short run
            doesn't remember its random start.
        updates: How many updates the average has seen already (a resumed run).

    Raises:
        ValueError: `decay` outside (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float, updates: int = 0) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema_decay is {decay}; it must lie between 0 and 1, such as 0.999.")
        self.decay = decay
        self.updates = updates
        self._average = {name: _wide(tensor.detach().clone()) for name, tensor in _tensors(model)}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the present weights of `model`."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, tensor in _tensors(model):
            if tensor.is_floating_point():
                self._average[name].lerp_(_wide(tensor), 1 - decay)
            else:
                self._average[name].copy_(tensor)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Give `model` the averaged weights."""
        for name, tensor in _tensors(model):
            tensor.copy_(self._average[name])

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Inside the context `model` has the averaged weights; after it, its own ones again, bit by bit."""
        own = {name: tensor.detach().clone() for name, tensor in _tensors(model)}
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in _tensors(model):
                    tensor.copy_(own[name])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALF else tensor


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
