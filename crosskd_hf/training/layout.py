"""The state of an optimiser follows its parameters' layout in memory, and is contiguous in files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def keep_contiguous_in_files(optimizer: torch.optim.Optimizer) -> None:
    """Let `state_dict` hand out contiguous tensors, and what is loaded get the layout of its parameter.

    A run goes on from a checkpoint with another layout then, and computes as if it had not stopped.
    """
    if not getattr(optimizer, "_files_are_contiguous", False):
        optimizer.register_state_dict_post_hook(_contiguous)
        optimizer.register_load_state_dict_post_hook(_as_parameters)
        optimizer._files_are_contiguous = True  # type: ignore[attr-defined]


def _contiguous(_: torch.optim.Optimizer, content: dict[str, Any]) -> dict[str, Any]:
    states = {
        key: {name: value.contiguous() if isinstance(value, Tensor) else value for name, value in state.items()}
        for key, state in content["state"].items()
    }
    return {**content, "state": states}


def _as_parameters(optimizer: torch.optim.Optimizer) -> None:
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim == 4:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
