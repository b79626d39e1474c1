"""The detectors' usual training schedules and the parameter groups of an optimiser.

Numbers: SGD with momentum 0.9, weight decay 1e-4, learning rate 0.01 for 16 images an update, linear warm-up from 0.001
over 500 updates, division by ten after epochs 8 and 11 of 12 or 16 and 22 of 24 (official CrossKD configs; methods of
mmdetection's `schedule_1x` and `schedule_2x`); AdamW for 50 epochs (Deformable DETR, ICLR 2021, appendix A.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

WARMUP_UPDATES = 500
WARMUP_STARTS = {"linear": 1e-3, "constant": 1 / 3, "none": 1.0}
"""The factor on the learning rate at the first update, by the kind of warm-up."""
OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {}),
}


@dataclass(frozen=True)
class Schedule:
    """An optimiser and its learning rates.

    Args:
        epochs: Length of the run.
        decay_epochs: After so many epochs the learning rate is divided by ten.
        optimizer: Of `OPTIMIZERS`.
        learning_rate: For `images_per_update` images an update.
        images_per_update: See `learning_rate`.
        weight_decay: Of all parameters.
        max_grad_norm: The gradient norm is clipped there.
        warmup_kind: "linear" rises from a thousandth, "constant" keeps a third, "none" starts with the whole rate.
    """

    epochs: int
    decay_epochs: tuple[int, ...]
    optimizer: str = "sgd"
    learning_rate: float = 0.01
    images_per_update: int = 16
    weight_decay: float = 1e-4
    max_grad_norm: float = 35.0  # the official FCOS config's; far above a healthy detector's gradient norm
    warmup_kind: str = "linear"

    def changed(self, **changes: Any) -> Schedule:
        """This schedule with those of the fields that are not None."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})


SCHEDULES = {
    "1x": Schedule(12, (8, 11)),
    "2x": Schedule(24, (16, 22)),
    "voc": Schedule(4, (3,)),
    "50e": Schedule(50, (40,), "adamw", 2e-4, 32, max_grad_norm=0.1, warmup_kind="none"),
}


def default_warmup(updates: int) -> int:
    """500 updates of warm-up, but at most a tenth of the whole run."""
    return min(WARMUP_UPDATES, math.ceil(updates / 10))


def decay_updates(schedule: Schedule, updates: int) -> list[int]:
    """The updates before which the learning rate falls, if the decay epochs are fractions of a run of any length."""
    return [round(updates * epoch / schedule.epochs) for epoch in schedule.decay_epochs]


def step_factor(decays: Sequence[int], warmup: int, kind: str = "linear") -> Callable[[int], float]:
    """The factor on the learning rate at update 0, 1, ...

    Args:
        decays: From these updates on it is divided by ten.
        warmup: The whole rate holds from the last of so many updates on, as in MMEngine; 0 for none.
        kind: Of the warm-up, see :class:`Schedule`.
    """
    start, last = WARMUP_STARTS[kind], warmup - 1

    def factor(update: int) -> float:
        decayed = 0.1 ** sum(update >= decay for decay in decays)
        if update >= last:
            return decayed
        return decayed * (start + (1 - start) * update / last if kind == "linear" else start)

    return factor


def step_schedule(optimizer: Optimizer, decays: Sequence[int], warmup: int, kind: str = "linear") -> LambdaLR:
    """A learning rate scheduler that follows :func:`step_factor`; every group keeps its own base learning rate."""
    return LambdaLR(optimizer, step_factor(decays, warmup, kind))


def parse_factors(given: Iterable[str]) -> dict[str, float]:
    """Factors by the name of a module, of words NAME=FACTOR.

    Raises:
        ValueError: A word of another form, a factor that isn't positive, or one name twice.
    """
    factors: dict[str, float] = {}
    for word in given:
        name, _, number = word.partition("=")
        try:
            factor = float(number)
        except ValueError:
            factor = 0.0
        if not name or name in factors or not 0 < factor < math.inf:
            raise ValueError(
                f"lr_factors has {word!r}: give NAME=FACTOR with the name of a module and a factor above 0, such as "
                "backbone=0.1, each name once."
            )
        factors[name] = factor
    return factors


@dataclass(frozen=True)
class GroupRule:
    """Which learning rate and weight decay a parameter gets.

    Args:
        learning_rate: Of all parameters that no other field speaks about.
        weight_decay: Likewise.
        backbone_learning_rate: Of parameters below a module named `backbone`; None: as the others.
        factors: On the learning rate of parameters below modules of these names; the longest name counts.
        bias_factor: On the learning rate of biases outside of normalisation layers.
        bias_weight_decay: Of all biases; None: as the others.
        undecayed: Full names of parameters without weight decay.
    """

    learning_rate: float
    weight_decay: float
    backbone_learning_rate: float | None = None
    factors: Mapping[str, float] = field(default_factory=dict)
    bias_factor: float = 1.0
    bias_weight_decay: float | None = None
    undecayed: Collection[str] = ()

    def __call__(self, name: str, is_plain_bias: bool) -> tuple[float, float]:
        """(learning rate, weight decay) of the parameter `name`; `is_plain_bias`: a bias outside of norms."""
        rate, decay, parts = self.learning_rate, self.weight_decay, name.split(".")
        if self.backbone_learning_rate is not None and "backbone" in parts:
            rate = self.backbone_learning_rate
        named = max((known for known in self.factors if known in parts), key=len, default=None)
        rate *= 1.0 if named is None else self.factors[named]
        if is_plain_bias:
            rate *= self.bias_factor
        if parts[-1] == "bias" and self.bias_weight_decay is not None:
            decay = self.bias_weight_decay
        return rate, 0.0 if name in self.undecayed else decay


def parameter_groups(model: nn.Module, rule: GroupRule) -> list[dict[str, Any]]:
    """Trainable parameters of `model` in groups of equal learning rate and weight decay.

    Raises:
        ValueError: A factor for a module that has no trainable parameter.
    """
    biases = set(_plain_biases(model))
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    unused = set(rule.factors)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            unused -= set(name.split("."))
            groups.setdefault(rule(name, name in biases), []).append(parameter)
    if unused:
        raise ValueError(
            f"lr_factors names {', '.join(sorted(unused))}, but no trainable parameter of {type(model).__name__} lies "
            "below a module of such a name: leave it out, or give a name of model.named_modules()."
        )
    return [{"params": ps, "lr": rate, "weight_decay": decay} for (rate, decay), ps in groups.items()]


def _plain_biases(model: nn.Module) -> Iterable[str]:
    normalisations = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
    for name, module in model.named_modules():
        if not isinstance(module, normalisations):
            for own, _ in module.named_parameters(recurse=False):
                if own == "bias":
                    yield f"{name}.bias" if name else "bias"
