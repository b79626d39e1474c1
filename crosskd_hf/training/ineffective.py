"""Options of `TrainingArguments` that can have no effect on a detector, or none beside a schedule: they are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    "label_names": "batches of detectors have their labels in 'labels'",
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

_OURS: dict[str, Any] = {"logging_nan_inf_filter": False, "label_names": ["labels"]}  # defaults of `CrossKDConfig`
_ALSO: dict[str, tuple[Any, ...]] = {
    "include_num_input_tokens_seen": (False,),
    "label_names": (None,),
}  # as good as them
_PLAIN_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused")
_READ_BY: dict[tuple[str, ...], Callable[[str], bool]] = {
    ("adam_beta1", "adam_beta2", "adam_epsilon"): lambda optim: optim not in ("adafactor", "sgd", "adagrad", "rmsprop"),
    ("optim_args",): lambda optim: optim not in ("adafactor", *_PLAIN_ADAMW),
    ("optim_target_modules",): lambda optim: optim.startswith(("galore", "apollo")),
}
"""Whether transformers reads these options for an `optim`."""

_BY_LENGTH = ("group_by_length", "batch_rebalance")


def refuse(args: TrainingArguments, schedule: str | None, given: Iterable[str]) -> None:
    """Raise `ValueError` for the first option with a value that nothing here would read.

    Args:
        args: Before their defaults are filled in.
        schedule: Name of the schedule, or None.
        given: Options that were given although their value may be the default.
    """
    for name, reason in REASONS.items():
        value, default = getattr(args, name), _OURS.get(name, DEFAULTS[name])
        if value not in (default, *_ALSO.get(name, ())):
            raise ValueError(f"{name}={value!r} would have no effect: {reason}. Leave it at {default!r}.")
    if args.train_sampling_strategy in _BY_LENGTH:
        raise ValueError(f"train_sampling_strategy={args.train_sampling_strategy!r} has nothing to sort by: {_LENGTH}.")
    if not args.dataloader_in_order:
        raise ValueError(
            "dataloader_in_order=False would leave the order of batches to chance: a run that goes on from a "
            "checkpoint would repeat some images and leave out others. Leave it True."
        )
    if schedule is None:
        _refuse_beside_optim(args)
        return
    unread = [name for name in OF_OTHER_OPTIMISERS if name in {*_changed(args), *given}]
    if unread:
        raise ValueError(
            f"{', '.join(unread)} would have no effect beside schedule={schedule!r}, which has an optimiser and steps "
            "of its own: leave it out, or set schedule=None."
        )


def _changed(args: TrainingArguments) -> list[str]:
    return [name for name in OF_OTHER_OPTIMISERS if getattr(args, name) not in (None, DEFAULTS[name])]


def _refuse_beside_optim(args: TrainingArguments) -> None:
    """Raise `ValueError` for settings that the chosen `optim` doesn't read, and for one that fits no update of ours."""
    chosen = str(getattr(args.optim, "value", args.optim) or DEFAULTS["optim"])
    if "layerwise" in chosen or "lomo" in chosen:
        raise ValueError(
            f"optim={chosen!r} moves each weight within the backward pass, before the gradients of an update are added "
            "up over micro-batches, clipped and judged: choose another optim."
        )
    for names, are_read in _READ_BY.items():
        unread = [name for name in _changed(args) if name in names and not are_read(chosen)]
        if unread:
            raise ValueError(
                f"{', '.join(unread)} would have no effect beside optim={chosen!r}, which doesn't read it: leave it "
                "out, or choose another optim."
            )


def refuse_spreading(accelerator: Any) -> None:
    """Raise `ValueError` for ways to spread batches over processes by which images would be lost or mixed up.

    Args:
        accelerator: `accelerator_config` of the settings.
    """
    reasons = {
        "dispatch_batches": (True, "would merge the labels of different images"),
        "split_batches": (True, "would make an update of fewer images than the learning rate is scaled for"),
        "even_batches": (False, "would let a process with fewer images wait for ever"),
    }
    for name, (refused, reason) in reasons.items():
        if getattr(accelerator, name) is refused:
            raise ValueError(f"accelerator_config: {name}={refused} {reason}. Leave it out.")


def refuse_beside_given(args: Any, optimizers: tuple[Any, Any], kind: Any = None) -> None:
    """Raise `ValueError` for options that a given optimiser or learning rate schedule would leave unread.

    Args:
        args: A `CrossKDConfig`.
        optimizers: Optimiser and schedule that the trainer was given; None for those that it makes itself.
        kind: `optimizer_cls_and_kwargs`.
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
    if args.schedule is not None:
        return
    for given, what, of_it in (
        (optimizer if kind is None else kind, "optimiser", ("optim", "adam_")),
        (scheduler, "schedule", ("lr_scheduler",)),
    ):
        unread = [name for name in _changed(args) if name.startswith(of_it)]
        if given is not None and unread:
            raise ValueError(
                f"{', '.join(unread)} would have no effect beside the {what} that the trainer was given: leave out one "
                "of both."
            )
