"""Numbers and switches among the options: judged before anything else, for a wrong one fails late, or never."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from numbers import Real
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """Numbers that an option takes.

    Args:
        words: They in words.
        fits: Whether a finite number is one of them.
    """

    words: str
    fits: Callable[[Any], bool]


_COUNT = Kind("a whole number of at least 1", lambda value: value >= 1 and value == int(value))
_INDEX = Kind("a whole number of at least 0", lambda value: value >= 0 and value == int(value))
_SEED = Kind("a whole number from 0 to 4294967295", lambda value: 0 <= value < 1 << 32 and value == int(value))
_AT_LEAST_0 = Kind("a number of at least 0 that is finite", lambda value: value >= 0)
_ABOVE_0 = Kind("a number above 0 that is finite", lambda value: value > 0)
_NUMBER = Kind("a number", lambda value: True)
_UPDATES = Kind("a whole number of at least 1, or -1 for num_train_epochs", lambda v: (v >= 1 or v < 0) and v == int(v))

KINDS: Mapping[str, Kind] = {
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "max_steps": _UPDATES,
    "num_train_epochs": _ABOVE_0,
    "learning_rate": _AT_LEAST_0,
    "backbone_lr": _AT_LEAST_0,
    "weight_decay": _AT_LEAST_0,
    "max_grad_norm": _AT_LEAST_0,
    "warmup_steps": _AT_LEAST_0,
    "logging_steps": _ABOVE_0,
    "eval_steps": _ABOVE_0,
    "save_steps": _ABOVE_0,
    "eval_delay": _AT_LEAST_0,
    "save_total_limit": _INDEX,
    "dataloader_num_workers": _INDEX,
    "bias_lr_factor": _AT_LEAST_0,
    "bias_weight_decay": _AT_LEAST_0,
    "ema_decay": _NUMBER,  # the range of these is told by `CrossKDConfig`
    "eval_threshold": _NUMBER,
    "patience": _NUMBER,
    "seed": _SEED,
    "data_seed": _SEED,
}
"""The numbers of every option that is one; None stays what it is."""

_WITH_STEPS = {"logging_steps": "logging_strategy", "eval_steps": "eval_strategy", "save_steps": "save_strategy"}


def check_numbers(args: Any) -> None:
    """Raise `ValueError` for the first option of :data:`KINDS` that has another value.

    Args:
        args: A `CrossKDConfig`, before `TrainingArguments` reads it. What nothing reads may be anything.
    """
    for name, kind in KINDS.items():
        value = getattr(args, name)
        if value is None or _is_unread(args, name):
            continue
        if isinstance(value, bool) or not isinstance(value, Real):
            hint = " A YAML file takes 1e-4 for a text: write 1.0e-4." if isinstance(value, str) else ""
            raise ValueError(f"{name}={value!r} is no number: give {kind.words}.{hint}")
        if not math.isfinite(value) or not kind.fits(value):
            raise ValueError(f"{name}={value!r} is out of range: give {kind.words}.")


def check_switches(args: Any) -> None:
    """Raise `ValueError` for the first option that is on or off and has another value: the word "false" counts as on.

    Args:
        args: A `CrossKDConfig`.
    """
    for field in fields(args):
        value = getattr(args, field.name)
        if isinstance(field.default, bool) and value not in (None, True, False):
            raise ValueError(f"{field.name}={value!r} is neither True nor False, which it takes alone.")


def _is_unread(args: Any, name: str) -> bool:
    if name in _WITH_STEPS:
        strategy = getattr(args, _WITH_STEPS[name])
        return str(getattr(strategy, "value", strategy)) != "steps"
    return name == "num_train_epochs" and isinstance(args.max_steps, int) and args.max_steps > 0
