"""The parts of transformers and accelerate that aren't promised to stay: all that are used here, listed and checked.

`Trainer` calls the methods that a subclass overrides by their names, and callbacks likewise. A release that renames one
goes on without the override, and without an error: checkpoints without a manifest, updates that nobody judged, averaged
weights that were never averaged. So everything that the trainers override or use stands in a table of this module, with
its parameters, and :func:`check` compares the tables with the installed release whenever a trainer is built.
`tests/training/test_upstream.py` holds the tables against the classes and against the source of the package.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from accelerate import Accelerator
from transformers import PreTrainedConfig, Trainer, TrainerCallback, TrainingArguments
from transformers import __version__ as installed

TRIED = ("5.18", "5.24")  # first and last minor release of transformers with which these tables were compared


class UpstreamError(RuntimeError):
    """The installed transformers or accelerate lacks something that this package relies on."""


class Hook(NamedTuple):
    """A method of `Trainer` by its name.

    Args:
        name: As upstream defines it.
        parameters: Their names in upstream's order, separated by spaces, without `self`; "..." stands for any others.
        purpose: What would silently be lost without it.
    """

    name: str
    parameters: str
    purpose: str


# What the trainers override. Upstream must call each of them by this name with these parameters.
OVERRIDDEN = (
    Hook("_get_train_sampler", "train_dataset", "an order that depends on seed and epoch alone"),
    Hook("_get_eval_sampler", "eval_dataset", "evaluation in batches of one padded size"),
    Hook("_clip_grad_norm", "model", "clipping of the adapters' gradients"),
    Hook("_save_checkpoint", "model trial", "checkpoints that are whole or not there"),
    Hook("_load_from_checkpoint", "resume_from_checkpoint model", "resuming with every weight"),
    Hook("_load_best_model", "", "the best checkpoint with every weight"),
    Hook("create_accelerator_and_postprocess", "", "processes that don't search for unused parameters"),
    Hook("get_train_dataloader", "", "the check that labels are classes of the student"),
    Hook("get_eval_dataloader", "eval_dataset", "evaluation without augmentation"),
    Hook("get_test_dataloader", "test_dataset", "prediction without augmentation"),
    Hook("create_optimizer", "model", "learning rates of schedule, backbone and adapters"),
    Hook("create_scheduler", "num_training_steps optimizer", "the step schedule"),
    Hook("train", "resume_from_checkpoint trial ignore_keys_for_eval", "the choice of a whole checkpoint"),
    Hook("get_batch_samples", "epoch_iterator num_batches device", "normalizers over micro-batches"),
    Hook("_prepare_inputs", "inputs", "pixels as the model wants them"),
    Hook("training_step", "model inputs num_items_in_batch", "gradients of adapters over processes"),
    Hook("compute_loss", "model inputs return_outputs num_items_in_batch", "the losses"),
    Hook("floating_point_ops", "inputs", "a count of operations that means nothing here"),
    Hook("log", "logs start_time", "loss parts in the log"),
    Hook(
        "evaluation_loop",
        "dataloader description prediction_loss_only ignore_keys metric_key_prefix",
        "COCO AP, and evaluation of the averaged weights",
    ),
    Hook("prediction_step", "model inputs prediction_loss_only ignore_keys", "detections"),
    Hook("save_state", "", "a state without folders of this machine"),
    Hook(
        "hyperparameter_search",
        "hp_space compute_objective n_trials direction backend hp_name kwargs",
        "a search for the highest AP",
    ),
    Hook(
        "push_to_hub", "commit_message blocking token revision ...", "settings and pictures of the data that stay here"
    ),
    Hook("init_hf_repo", "token ...", "one sentence for a Hub that doesn't answer"),
    Hook("save_model", "output_dir _internal_call", "the model card, and averaged weights"),
    Hook(
        "create_model_card",
        "language license tags model_name finetuned_from tasks dataset_tags dataset dataset_args",
        "the model card",
    ),
)

CALLED_BY_USERS = ("train", "hyperparameter_search", "save_state")

# Moments at which upstream must call every callback. `_Moments` of coco_trainer.py and `_Termination` of termination.py
# have methods for them.
MOMENTS = {
    "on_train_begin": "averaged weights, and adapters that are equal in all processes",
    "on_epoch_begin": "another order and augmentation in every epoch",
    "on_pre_optimizer_step": "the stop before an update that is not finite",
    "on_optimizer_step": "averaged weights",
    "on_step_end": "the checks of the first update",
    "on_prediction_step": "a checkpoint on SIGTERM during an evaluation",
    "on_save": "the end after a checkpoint on SIGTERM",
    "on_train_end": "the averaged weights as the result",
}

# Methods of `Trainer` that the functions below call.
CALLED = (
    Hook("_get_output_dir", "trial", "the folder of a trial"),
    Hook("_save_optimizer_and_scheduler", "output_dir", "the optimiser's state"),
    Hook("_save_scaler", "output_dir", "the gradient scaler's state"),
    Hook("_save_rng_state", "output_dir", "random numbers"),
)

# Attributes that the functions below read or set, by the class whose code must know them.
ATTRIBUTES: tuple[tuple[type, str], ...] = (
    (Trainer, "_train_batch_size"),
    (Accelerator, "_is_accelerate_prepared"),
    (TrainingArguments, "_n_gpu"),
    (PreTrainedConfig, "_commit_hash"),
)

# The detection losses of transformers by their names, and the criterion that each makes. Its `get_loss` computes one
# kind of term, divided by a number of boxes; `DetrLoss` overrides it.
LOSSES = {
    "ForObjectDetectionLoss": "ImageLoss",
    "DeformableDetrForObjectDetectionLoss": "DeformableDetrImageLoss",
    "RTDetrForObjectDetectionLoss": "RTDetrLoss",
    "DFineForObjectDetectionLoss": "DFineLoss",
    "Deimv2ForObjectDetectionLoss": "Deimv2Loss",
    "LwDetrForObjectDetectionLoss": "LwDetrImageLoss",
}
_GET_LOSS = "loss outputs targets indices num_boxes"

# What the package imports from modules of transformers that its documentation doesn't name, module by module. Such an
# import fails loudly, but not by itself with the releases that were tried.
IMPORTED = {
    "transformers.backbone_utils": "BackboneMixin",
    "transformers.models.auto.modeling_auto": "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "transformers.models.d_fine.modeling_d_fine": "distance2bbox weighting_function",
    "transformers.models.deformable_detr.image_processing_deformable_detr": (
        "DeformableDetrImageProcessor DeformableDetrImageProcessorKwargs"
    ),
    "transformers.models.lw_detr.modeling_lw_detr": "refine_bboxes",
    "transformers.trainer_pt_utils": "nested_detach nested_numpify",
}


# ---- Check ----


@functools.cache
def check(trainer: type = Trainer, callback: type = TrainerCallback) -> None:
    """Compare the tables with the installed releases.

    Args:
        trainer, callback: transformers' own classes.

    Raises:
        UpstreamError: Something is missing, is called otherwise or by nobody; the message names all of it.
    """
    faults = [*_method_faults(trainer), *_moment_faults(trainer, callback), *_attribute_faults(trainer)]
    if faults:
        raise _error(faults)


def _error(faults: Iterable[str]) -> UpstreamError:
    first, last = TRIED
    following = f"{last.split('.')[0]}.{int(last.split('.')[1]) + 1}"
    return UpstreamError(
        f"transformers {installed} doesn't fit: {'; '.join(faults)}. Going on would lose this in silence. "
        f"crosskd_hf was tried with transformers {first} to {last}: "
        f"pip install 'transformers>={first},<{following}', or take a newer crosskd_hf."
    )


def _method_faults(trainer: type) -> Iterator[str]:
    for hook in (*OVERRIDDEN, *CALLED):
        method = inspect.getattr_static(trainer, hook.name, None)
        if method is None:
            yield f"Trainer has no {hook.name} ({hook.purpose})"
            continue
        found = " ".join(list(inspect.signature(method).parameters)[1:])
        expected, more, _ = hook.parameters.partition(" ...")
        if not (f"{found} ".startswith(f"{expected} ") if more else found == expected):
            yield f"Trainer.{hook.name} takes ({found}), not ({hook.parameters}) ({hook.purpose})"
        if hook.name not in CALLED_BY_USERS and not _is_known(trainer, hook.name):
            yield f"Trainer doesn't call {hook.name} any more ({hook.purpose})"


def _moment_faults(trainer: type, callback: type) -> Iterator[str]:
    for moment, purpose in MOMENTS.items():
        if not hasattr(callback, moment) or not _is_known(trainer, moment):
            yield f"Trainer doesn't call {moment} of its callbacks ({purpose})"


def _attribute_faults(trainer: type) -> Iterator[str]:
    for owner, name in ATTRIBUTES:
        if not _is_known(trainer if owner is Trainer else owner, name):
            yield f"{owner.__name__} doesn't know {name}"


def _is_known(owner: type, name: str) -> bool:
    """Whether some function of a class, other than the one of that name, mentions `name`."""
    return any(name in names for function, names in _mentioned(owner) if function != name)


@functools.cache
def _mentioned(owner: type) -> list[tuple[str, set[str]]]:
    """The functions of a class and its bases, and what the code of each mentions."""
    members = [member for base in owner.__mro__ for member in vars(base).items()]
    functions = [(name, getattr(value, "__func__", getattr(value, "fget", value))) for name, value in members]
    codes = [(name, getattr(inspect.unwrap(f), "__code__", None)) for name, f in functions if callable(f)]
    return [(name, set(_names(code))) for name, code in codes if code is not None]


def _names(code: CodeType) -> Iterable[str]:
    """Attributes, globals and strings of a function's code, inner functions included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif isinstance(constant, str):
            yield constant


# ---- Use ----


def detection_loss(model: Any, needed: bool) -> Any:
    """The loss function of a DETR-type model, if it is one of transformers' that are listed here.

    Args:
        model: A model of transformers.
        needed: Whether another loss function of transformers is a fault; one of the user's own never is.

    Raises:
        UpstreamError: It is.
    """
    function = None if getattr(model, "loss_type", None) is None else model.loss_function
    name, module = (getattr(function, key, "") for key in ("__name__", "__module__"))
    if name in LOSSES:
        return function
    if needed and (function is None or module.startswith("transformers.")):
        raise _error([f"the loss of '{model.config.model_type}' is {name or 'not known'}"])
    return None


@functools.cache
def criterion_of(function: Any) -> type:
    """The class that computes the terms of a loss function of the table.

    Raises:
        UpstreamError: The function doesn't make it any more, or it computes its terms another way.
    """
    name = LOSSES[function.__name__]
    criterion = function.__globals__.get(name)
    if criterion is None or name not in _names(function.__code__):
        raise _error([f"{function.__name__} doesn't make a {name} any more"])
    found = " ".join(list(inspect.signature(criterion.get_loss).parameters)[1:])
    if found != _GET_LOSS or not _is_known(criterion, "get_loss"):
        raise _error([f"{name}.get_loss takes ({found}), not ({_GET_LOSS}), or nobody calls it"])
    return criterion


def with_criterion(function: Any, criterion: Any) -> Any:
    """A copy of a loss function of the table that makes `criterion` instead of its own; the original is not touched."""
    names = {**function.__globals__, LOSSES[function.__name__]: criterion}
    copied = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def micro_batch_size(trainer: Trainer) -> int:
    """Images of one process's micro-batch; `auto_find_batch_size` may have made it smaller than the arguments say."""
    return int(trainer._train_batch_size)


def trial_folder(trainer: Trainer, trial: Any) -> str:
    """Where checkpoints go: `output_dir`, or the folder of a hyperparameter search's trial."""
    return str(trainer._get_output_dir(trial))


def save_training_state(trainer: Trainer, folder: str) -> None:
    """Write optimiser, scheduler, gradient scaler and random numbers into `folder`. Every process must call it."""
    trainer._save_optimizer_and_scheduler(folder)
    trainer._save_scaler(folder)
    trainer._save_rng_state(folder)


def is_prepared(model: Any) -> bool:
    """Whether accelerate takes `model` as prepared and would hand it back as it is."""
    return "_is_accelerate_prepared" in vars(model)


def forget_preparation(model: Any) -> None:
    """Let accelerate prepare `model` once more."""
    model._is_accelerate_prepared = False


def use_one_device(args: TrainingArguments) -> None:
    """Keep `Trainer` from `nn.DataParallel`."""
    args._n_gpu = 1


def commit_of(config: PreTrainedConfig) -> str | None:
    """The commit of the Hub that a configuration was loaded from; None for one of local origin."""
    return vars(config).get("_commit_hash")
