"""The detectors' usual training schedules ("1x", "2x") and the parameter groups of an optimiser.

Numbers: SGD with momentum 0.9, weight decay 1e-4, learning rate 0.01 for 16 images an update, linear warm-up from 0.001
over 500 updates, division by ten at epochs 8 and 11 of 12 or 16 and 22 of 24 (official CrossKD configs; methods of
mmdetection's `schedule_1x` and `schedule_2x`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

IMAGES_PER_LEARNING_RATE = 16
WARMUP_UPDATES = 500
WARMUP_START = 1e-3


@dataclass(frozen=True)
class Schedule:
    """A step schedule: how many epochs, and after which ones the learning rate is divided by ten."""

    epochs: int
    decay_epochs: tuple[int, ...]


SCHEDULES = {"1x": Schedule(12, (8, 11)), "2x": Schedule(24, (16, 22))}


def scaled_learning_rate(learning_rate: float, images_per_update: int) -> float:
    """`learning_rate` holds for 16 images an update; scale it linearly to `images_per_update`."""
    return learning_rate * images_per_update / IMAGES_PER_LEARNING_RATE


def default_warmup(updates: int) -> int:
    """500 updates of warm-up, but at most a tenth of the whole run."""
    return min(WARMUP_UPDATES, math.ceil(updates / 10))


def step_factor(schedule: Schedule, updates: int, warmup: int) -> Callable[[int], float]:
    """The factor on the learning rate at update 0, 1, ...

    Args:
        schedule: Its decay epochs are read as fractions of the run, so that a run of another length decays alike.
        updates: Length of the whole run.
        warmup: Updates over which the factor rises linearly from 0.001 to 1; 0 for none.
    """
    decays = [round(updates * epoch / schedule.epochs) for epoch in schedule.decay_epochs]

    def factor(update: int) -> float:
        decayed = 0.1 ** sum(update >= decay for decay in decays)
        if update >= warmup:
            return decayed
        return decayed * (WARMUP_START + (1 - WARMUP_START) * update / warmup)

    return factor


def step_schedule(optimizer: Optimizer, schedule: Schedule, updates: int, warmup: int) -> LambdaLR:
    """A learning rate scheduler that follows :func:`step_factor`; every group keeps its own base learning rate."""
    return LambdaLR(optimizer, step_factor(schedule, updates, warmup))


@dataclass(frozen=True)
class GroupRule:
    """Which learning rate and weight decay a parameter gets.

    Args:
        learning_rate: Of all parameters that no other field speaks about.
        weight_decay: Likewise.
        backbone_learning_rate: Of parameters below a module named `backbone`; None: as the others.
        bias_factor: On the learning rate of biases outside of normalisation layers.
        bias_weight_decay: Of the same biases; None: as the others.
        undecayed: Full names of parameters without weight decay.
    """

    learning_rate: float
    weight_decay: float
    backbone_learning_rate: float | None = None
    bias_factor: float = 1.0
    bias_weight_decay: float | None = None
    undecayed: Collection[str] = ()

    def __call__(self, name: str, is_bias: bool) -> tuple[float, float]:
        """(learning rate, weight decay) of the parameter `name`."""
        rate, decay = self.learning_rate, self.weight_decay
        if self.backbone_learning_rate is not None and "backbone" in name.split("."):
            rate = self.backbone_learning_rate
        if is_bias:
            rate *= self.bias_factor
            decay = decay if self.bias_weight_decay is None else self.bias_weight_decay
        return rate, 0.0 if name in self.undecayed else decay


def parameter_groups(model: nn.Module, rule: GroupRule) -> list[dict[str, Any]]:
    """Trainable parameters of `model` in groups of equal learning rate and weight decay."""
    biases = set(_plain_biases(model))
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(rule(name, name in biases), []).append(parameter)
    return [{"params": ps, "lr": rate, "weight_decay": decay} for (rate, decay), ps in groups.items()]


def _plain_biases(model: nn.Module) -> Iterable[str]:
    normalisations = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
    for name, module in model.named_modules():
        if not isinstance(module, normalisations):
            for own, _ in module.named_parameters(recurse=False):
                if own == "bias":
                    yield f"{name}.bias" if name else "bias"
