"""Options of `TrainingArguments` that can have no effect on a detector, or none beside a schedule: they are refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Any

from transformers import TrainingArguments

DEFAULTS: dict[str, Any] = {
    field.name: field.default if field.default_factory is MISSING else field.default_factory()
    for field in fields(TrainingArguments)
}

_TOKENS = "images have no tokens"
_STREAMED = "detections go to the COCO evaluator image by image"
_LANGUAGE = "it is for language models"
_LENGTH = "images have no length; group_by_aspect_ratio=True groups them"

REASONS: dict[str, str] = {
    "label_smoothing_factor": "the losses of detectors don't smooth labels",
    "average_tokens_across_devices": "losses are divided by the objects of all devices, see exact_accumulation",
    "include_num_input_tokens_seen": _TOKENS,
    "use_liger_kernel": _LANGUAGE,
    "liger_kernel_config": _LANGUAGE,
    "use_cache": _LANGUAGE,
    "neftune_noise_alpha": _LANGUAGE,
    "logging_nan_inf_filter": "nonfinite='stop' or 'skip' says what becomes of such losses",
    "prediction_loss_only": "evaluation is COCO AP and computes no loss",
    "eval_use_gather_object": _STREAMED,
    "eval_accumulation_steps": _STREAMED,
    "length_column_name": _LENGTH,
    "parallelism_config": "a detector and its teacher fit on one device; launch plain processes",
}
"""Why an option has no effect, by its name."""

OF_OTHER_OPTIMISERS = (
    "optim",
    "optim_args",
    "optim_target_modules",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
)
"""What a schedule, which has an optimiser and steps of its own, doesn't read."""

_FALSE = {"include_num_input_tokens_seen": ("no", False)}
_BY_LENGTH = ("group_by_length", "batch_rebalance")


def refuse(args: TrainingArguments, schedule: str | None, given: Iterable[str]) -> None:
    """Raise `ValueError` for the first option with a value that nothing here would read.

    Args:
        args: Before their defaults are filled in.
        schedule: Name of the schedule, or None.
        given: Options that were given although their value may be the default.
    """
    for name, reason in REASONS.items():
        value, default = getattr(args, name), DEFAULTS[name] if name != "logging_nan_inf_filter" else False
        if value not in _FALSE.get(name, (default,)):
            raise ValueError(f"{name}={value!r} would have no effect: {reason}. Leave it at {default!r}.")
    if args.train_sampling_strategy in _BY_LENGTH:
        raise ValueError(f"train_sampling_strategy={args.train_sampling_strategy!r} has nothing to sort by: {_LENGTH}.")
    if schedule is None:
        return
    changed = {name for name in OF_OTHER_OPTIMISERS if getattr(args, name) not in (None, DEFAULTS[name])}
    unread = [name for name in OF_OTHER_OPTIMISERS if name in changed | set(given)]
    if unread:
        raise ValueError(
            f"{', '.join(unread)} would have no effect beside schedule={schedule!r}, which has an optimiser and steps "
            "of its own: leave it out, or set schedule=None."
        )


def refuse_beside_given(args: Any, optimizers: tuple[Any, Any]) -> None:
    """Raise `ValueError` for options that a given optimiser or learning rate schedule would leave unread.

    Args:
        args: A `CrossKDConfig`.
        optimizers: Optimiser and schedule that the trainer was given; None for those that it makes itself.
    """
    optimizer, scheduler = optimizers
    if scheduler is not None and args.schedule is not None:
        raise ValueError(
            f"schedule={args.schedule!r} would have no effect beside the schedule in optimizers: leave out one of both."
        )
    defaults: dict[str, Any] = {"backbone_lr": None, "lr_factors": [], "bias_lr_factor": 1.0, "bias_weight_decay": None}
    unread = [name for name, default in defaults.items() if getattr(args, name) != default]
    if optimizer is not None and unread:
        raise ValueError(
            f"{', '.join(unread)} would have no effect beside the optimiser in optimizers, which has its own groups of "
            "parameters: leave it out, or let the trainer make the optimiser."
        )
