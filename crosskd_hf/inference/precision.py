"""Half-precision weights are trained and run in float32 and saved in their own type; autocast does the rest.

An update of a bfloat16 weight that is smaller than 1/256 of it is lost, and most updates are. A module whose weights
are float16 or bfloat16 takes no float32 pixels either, unless autocast is on. Widening is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

HALF = frozenset((torch.float16, torch.bfloat16))
_CONVERTED = HALF | {torch.float64}  # which takes no float32 pixels either


def widen(module: nn.Module) -> dict[str, torch.dtype]:
    """Turn the half-precision weights and buffers of `module`, and those in float64, into float32, in place.

    Parameters stay the same objects, so that optimisers keep them.

    Returns:
        The type that each of them had, by name; empty if there was none.
    """
    types = {name: tensor.dtype for name, tensor in _tensors(module) if tensor.dtype in _CONVERTED}
    if types:
        _cast(module, dict.fromkeys(types, torch.float32))
    return types


@contextmanager
def widened(module: nn.Module) -> Iterator[None]:
    """Inside of it `module` is float32; after it, bit by bit what it was, whatever it was cast to inside."""
    with _put_back(module):
        widen(module)
        yield


@contextmanager
def as_stored(module: nn.Module, types: Mapping[str, torch.dtype]) -> Iterator[None]:
    """Inside of it the weights of `module` have the `types` that :func:`widen` found; after it, their own again."""
    with _put_back(module):
        _cast(module, types)
        yield


def in_type_of(module: nn.Module, pixel_values: Tensor) -> Tensor:
    """`pixel_values` in the type of the weights, for a module that is evaluated in half precision on purpose."""
    types = {parameter.dtype for parameter in module.parameters()}
    return pixel_values.to(types.pop()) if len(types) == 1 and types <= HALF else pixel_values


def widen_outputs(outputs: Any) -> Any:
    """The same outputs with their half-precision tensors as float32: box arithmetic and NMS need it."""
    for key, value in outputs.items():
        if isinstance(value, Tensor) and value.dtype in HALF:
            outputs[key] = value.float()
    return outputs


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers(remove_duplicate=False)


def _cast(module: nn.Module, types: Mapping[str, torch.dtype]) -> None:
    for prefix, owner in module.named_modules():
        for name, parameter in owner.named_parameters(prefix, recurse=False):
            if name in types:
                parameter.data = parameter.data.to(types[name])
        for name, buffer in owner.named_buffers(prefix, recurse=False):
            if name in types:
                setattr(owner, name.rpartition(".")[-1], buffer.to(types[name]))


@contextmanager
def _put_back(module: nn.Module) -> Iterator[None]:
    data = [(parameter, parameter.data) for parameter in module.parameters()]
    buffers = [
        (owner, name, buffer)
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False, remove_duplicate=False)
    ]
    try:
        yield
    finally:
        for parameter, own in data:
            parameter.data = own
        for owner, name, buffer in buffers:
            setattr(owner, name, buffer)
