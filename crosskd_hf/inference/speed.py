"""bfloat16 autocast and channels-last weights: how a model runs faster, and which of the two a device gains from."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from .precision import widened

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Speed:
    """How a model runs. Its weights stay float32, and what it returns is float32.

    Args:
        bf16: Convolutions and products of matrices are computed in bfloat16 (autocast).
        channels_last: Images, features and the weights of convolutions lie in memory channel by channel for each pixel.
            Nothing but speed depends on it.
        fast: Choose both as the device gains from them; one that is True stays.
    """

    bf16: bool = False
    channels_last: bool = False
    fast: bool = False

    def on(self, device: torch.device, fp16: bool = False) -> Speed:
        """With the choice that `fast` asks for; the log says what was chosen.

        Args:
            device: Where the model runs.
            fp16: Whether float16 autocast is chosen already, which keeps bfloat16 out.
        """
        if not self.fast:
            return self
        gains, reason = (False, "fp16 is given") if fp16 else bf16_gain(device)
        chosen = Speed(self.bf16 or gains, True, True)
        if os.environ.get("RANK", "0") == "0":
            autocast = "bf16 autocast" if chosen.bf16 else "no bf16 autocast"
            logger.warning("fast: channels_last, %s (%s)", autocast, reason)
        return chosen


FLOAT32 = Speed()


def bf16_gain(device: torch.device) -> tuple[bool, str]:
    """Whether a device computes in bfloat16 faster than in float32, and why, in a few words."""
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        name = torch.cuda.get_device_name(device)
        return supported, f"{name} {'computes' if supported else 'does not compute'} in bfloat16"
    if device.type != "cpu":
        return False, f"nobody has measured it on {device.type}"
    for known, name in (("_is_amx_tile_supported", "AMX"), ("_is_avx512_bf16_supported", "AVX-512 bf16")):
        if getattr(torch.cpu, known, bool)():  # a torch without the question: no
            return True, f"this CPU has {name}"
    return False, "this CPU has neither AMX nor AVX-512 bf16"


def to_channels_last(module: nn.Module, needed: bool = True) -> None:
    """Lay the weights of convolutions channels last, in place: the features follow them. Values stay the same.

    Parameters stay the same objects, so that optimisers keep them. Files that are saved from them are as ever.

    Args:
        module: A model.
        needed: Whether a model without convolutions is a fault.

    Raises:
        ValueError: It is, and the model has none.
    """
    kernels = [parameter for parameter in module.parameters() if parameter.ndim == 4]
    if needed and not kernels:
        raise ValueError(
            f"channels_last=True would have no effect: {type(module).__name__} has no convolutions. Leave it out; "
            "fast=True chooses by itself."
        )
    for kernel in kernels:
        kernel.data = kernel.data.contiguous(memory_format=torch.channels_last)


@contextmanager
def laid_out(model: nn.Module, speed: Speed) -> Iterator[None]:
    """Inside of it `model` is float32 and lies in memory as `speed` says; after it, bit by bit what it was.

    Args:
        model: On its device.
        speed: As of :meth:`Speed.on`.

    Raises:
        ValueError: Channels-last weights were asked for, but the model has no convolutions.
    """
    with widened(model):
        if speed.channels_last:
            to_channels_last(model, needed=not speed.fast)
        yield


@contextmanager
def running(model: nn.Module, speed: Speed) -> Iterator[None]:
    """As :func:`laid_out`, with autocast if `speed` says so."""
    device = next(model.parameters()).device.type
    autocast = torch.autocast(device, torch.bfloat16) if speed.bf16 else nullcontext()
    with laid_out(model, speed), autocast:
        yield
