"""A distiller's trainable adapters between processes and on disk.

They are a few 1x1 convolutions, outside of the student that `DistributedDataParallel` wraps: one all-reduce of all
their gradients per update is simpler than a second wrapper, and indifferent to which of them a step used.
"""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate.utils import broadcast
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.nn.utils import parameters_to_vector

FILE = "distiller.safetensors"


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Parameters of `module` that get a gradient."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


@torch.no_grad()
def share_weights(module: nn.Module) -> None:
    """Give every process the first process's weights and buffers."""
    for tensor in module.state_dict().values():
        tensor.copy_(broadcast(tensor))


@torch.no_grad()
def average_gradients(module: nn.Module) -> None:
    """Average the gradients of `module` over all processes; a parameter without one counts as zero."""
    parameters = trainable(module)
    if not parameters or not (distributed.is_available() and distributed.is_initialized()):
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = parameters_to_vector(gradients)
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def save(module: nn.Module, folder: Path) -> None:
    """Write the weights of `module` into `folder`; nothing if it has none."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    if state:
        save_file(state, folder / FILE)


def load(module: nn.Module, folder: Path) -> None:
    """Read back what :func:`save` wrote.

    Raises:
        ValueError: The file is missing, or its names or shapes are others than those of `module`.
    """
    if not module.state_dict():
        return
    if not (folder / FILE).is_file():
        raise ValueError(
            f"{folder} has no {FILE}, but this distillation has trainable adapters. Resume with the methods of the run "
            "that wrote the checkpoint."
        )
    try:
        module.load_state_dict(load_file(folder / FILE), strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"the adapters in {folder / FILE} belong to another distillation: {error}. Resume with the methods of the "
            "run that wrote the checkpoint, or start a new run from its student."
        ) from error
