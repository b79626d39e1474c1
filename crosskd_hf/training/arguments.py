"""What the trainer's constructor was given: judged before anything is loaded, and said in one sentence."""

from __future__ import annotations

import inspect
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any, TypeAlias

import datasets
import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset
from transformers import PreTrainedModel, TrainingArguments

from .config import CrossKDConfig
from .loading import bare_model

logger = logging.getLogger(__name__)

NEEDS_PROCESSOR = "Evaluation needs processing_class: the image processor turns outputs into detections."
TRUTH_COLUMNS = {"image_id", "width", "height", "objects"}

Teacher: TypeAlias = PreTrainedModel | str | os.PathLike[str]


def check_settings(args: object) -> CrossKDConfig:
    """The settings, or those of a run without any.

    Raises:
        TypeError: `args` is no `CrossKDConfig`.
    """
    if args is None or isinstance(args, CrossKDConfig):
        return CrossKDConfig() if args is None else args
    options = "all of its options and" if type(args) is TrainingArguments else "those of TrainingArguments and"
    raise TypeError(
        f"args is a {type(args).__name__}; CrossKDTrainer needs a CrossKDConfig, which has {options} those of "
        f"distillation: args=CrossKDConfig('folder', ...)."
    )


def check_student(model: Any) -> Any:
    """The student as it was given.

    Raises:
        TypeError: It is no detector of transformers, nor one in a wrapper of peft.
    """
    bare = bare_model(model)
    if not isinstance(bare, PreTrainedModel):
        raise TypeError(f"model is {_kind(model)}; a PreTrainedModel is needed{_way_out(model, 'model')}.")
    _demand_weights(bare, "model")
    if bare.config.return_dict is False:
        raise TypeError("model returns tuples, where no loss is found by name: set model.config.return_dict=True.")
    return model


def _demand_weights(model: nn.Module, name: str) -> None:
    empty = [key for key, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if empty:
        raise ValueError(
            f"{name} has no weights yet: {len(empty)} of its tensors are on the device 'meta', such as {empty[0]}. "
            "Load them, from_pretrained(...), or build it on a device."
        )


def check_own_loss(compute_loss: Callable[..., Any]) -> None:
    """Raise `TypeError` for a subclass's `compute_loss` that can't be called as `Trainer` calls it."""
    parameters = inspect.signature(compute_loss).parameters
    if "num_items_in_batch" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    raise TypeError(
        f"{compute_loss.__qualname__}({', '.join(parameters)}) takes no num_items_in_batch, which Trainer gives: write "
        "def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None)."
    )


def check_teacher(teacher: object) -> Teacher:
    """The teacher's model, out of its wrapper of peft, or where to load the teacher from.

    Raises:
        TypeError: Neither of the two.
        ValueError: It has layers that no gradient passes.
    """
    found = bare_model(teacher)
    if isinstance(found, PreTrainedModel):
        _demand_weights(found, "teacher_model")
        _check_gradients_pass(found)
    if isinstance(found, PreTrainedModel | str | os.PathLike):
        return found
    raise TypeError(
        f"teacher_model is {_kind(teacher)}; a PreTrainedModel, or a folder or Hub id to load one from, is "
        f"needed{_way_out(teacher, 'teacher_model')}."
    )


def check_without_teacher(teacher: Teacher | None, processor: object, args: CrossKDConfig, training: object) -> None:
    """Tell of what has no effect without a teacher; nothing if there is one.

    Raises:
        ValueError: `teacher_processing_class` was given.
    """
    if teacher is not None:
        return
    if processor is not None:
        raise ValueError("teacher_processing_class would have no effect without teacher_model: is that missing?")
    methods = [str(method) for method in args.methods]
    if training is not None and (methods != ["crosskd"] or args.teacher_eval):
        logger.warning("There is no teacher_model, so the student learns from labels alone: methods=%s rest.", methods)


def check_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Raise `ValueError` if freezing the teacher would freeze parameters that the student trains."""
    of_teacher = {id(parameter) for parameter in teacher.parameters()}
    shared = [name for name, p in student.named_parameters() if p.requires_grad and id(p) in of_teacher]
    if shared:
        raise ValueError(
            f"Student and teacher share {len(shared)} parameters that are to be trained, such as {shared[0]}; the "
            "teacher's are frozen. Give the teacher its own: teacher_model=copy.deepcopy(...), or load it once more."
        )


def move_teacher(teacher: PreTrainedModel, device: torch.device) -> None:
    """Bring the teacher to `device`; one that is there already is left alone, for quantised models refuse `to`.

    Raises:
        ValueError: It is elsewhere and can't be moved.
    """
    tensors = [*teacher.parameters(), *teacher.buffers()]
    if all(tensor.device == torch.empty(0, device=device).device for tensor in tensors):
        return
    try:
        teacher.to(device)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"The teacher lies on {tensors[0].device} and can't be moved to {device} ({error}). Load it there: "
            f"from_pretrained(..., device_map={{'': {str(device)!r}}})."
        ) from error


def check_processing(processor: object, collator: object, evaluation: object) -> None:
    """Raise `ValueError` where an image processor is needed, but not given."""
    if processor is None and collator is None:
        raise ValueError(
            "processing_class is missing: give the student's image processor, such as "
            "AutoImageProcessor.from_pretrained(...)."
        )
    if processor is None and evaluation is not None:
        raise ValueError(NEEDS_PROCESSOR)


def check_data(training: Any, evaluation: Any, args: CrossKDConfig) -> None:
    """Find out before training whether the data can be sampled and evaluated.

    Args:
        training: A data set, or None.
        evaluation: A data set, several by name, or None.

    Raises:
        ValueError: A data set has no truth that COCO's AP could be computed from, or the training data tell no sizes to
            group images by.
    """
    columns = getattr(training, "column_names", None) or ()
    sized = isinstance(training, datasets.Dataset) and {"width", "height"} <= set(columns)
    if args.group_by_aspect_ratio and training is not None and not sized:
        raise ValueError(
            "group_by_aspect_ratio=True needs all images' sizes before the first: a datasets.Dataset with the "
            f"columns width and height, such as load_coco makes it; got {type(training).__name__}."
        )
    _demand_batches(training, args)
    if isinstance(evaluation, Mapping) and not evaluation:
        raise ValueError("eval_dataset is an empty dict: give data sets by name, or leave it out.")
    for name, dataset in named(evaluation).items():
        if dataset is not None:
            check_truth(dataset, name)


def _demand_batches(training: Any, args: CrossKDConfig) -> None:
    if not isinstance(training, Sized):
        return
    images = args.train_batch_size * args.world_size
    if len(training) == 0:
        raise ValueError("The training data has no images: nothing would be learned. Did a filter leave out all?")
    if args.dataloader_drop_last and len(training) < images:
        raise ValueError(
            f"The training data has {len(training)} images, fewer than the {images} of a batch of all processes, and "
            "dataloader_drop_last=True leaves such a batch out: nothing would be learned. Set it to False, or "
            "per_device_train_batch_size lower."
        )


def named(evaluation: Any) -> Mapping[Any, Any]:
    """Evaluation sets by name; that of one alone is None."""
    return evaluation if isinstance(evaluation, Mapping) else {None: evaluation}


def check_truth(dataset: Any, name: object = None) -> None:
    """Raise `ValueError` unless `dataset` (called `name` among several) is in the schema of `load_coco`."""
    called = "" if name is None else f" {name!r}"
    if isinstance(dataset, datasets.Dataset) and set(dataset.column_names) >= TRUTH_COLUMNS:
        if len(dataset) == 0:
            raise ValueError(f"The evaluation data{called} has no images: AP would be NaN. Did a filter leave out all?")
        return
    way_out = ""
    if isinstance(dataset, datasets.IterableDataset | torch.utils.data.IterableDataset):
        way_out = " AP needs the truth of all images at once: load this data without streaming."
    elif isinstance(dataset, Subset):
        way_out = " Of a datasets.Dataset take a part with dataset.select(indices)."
    elif isinstance(dataset, list | tuple):
        way_out = " Several data sets go by name: {'near': ..., 'far': ...}."
    elif isinstance(dataset, datasets.Dataset):
        way_out = f" Its columns are {dataset.column_names}. Images without boxes: crosskd_hf.inference.predict."
    raise ValueError(
        f"The evaluation data{called} must be a datasets.Dataset with the columns "
        f"{sorted(TRUTH_COLUMNS)}, as load_coco and load_objects make it; got {type(dataset).__name__}.{way_out}"
    )


def takes(model: nn.Module, name: str) -> bool:
    """Whether the forward of `model` has an argument of this name, or takes any."""
    parameters = inspect.signature(model.forward).parameters.values()
    return any(parameter.name == name or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


class WithoutMask:
    """A collator for a model whose forward knows no `pixel_mask`: leaves out the mask of batches without padding.

    Args:
        collator: Makes batches.
        model: What the model is called, for the message.
    """

    def __init__(self, collator: Callable[[Sequence[Any]], dict[str, Any]], model: str) -> None:
        self.collator = collator
        self.model = model

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        """The collator's batch.

        Raises:
            ValueError: An image of it is padded, which the model would take for a part of the image.
        """
        batch = dict(self.collator(examples))
        mask = batch.pop("pixel_mask", None)
        if mask is not None and not bool(torch.as_tensor(mask).all()):
            raise ValueError(
                f"The images of a batch are padded to one size, but {self.model}.forward takes no pixel_mask that says "
                "where: let it take one, or use an image processor that makes all images one size, "
                "size={'height': ..., 'width': ...}."
            )
        return batch


@contextmanager
def same_chance() -> Iterator[None]:
    """After the context, random numbers go on as if nothing had happened inside."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


def check_optimizer(optimizer: Any, optimizers: tuple[Any, Any], model_init: object) -> None:
    """Find optimisers that would be given up in silence.

    Args:
        optimizer: `optimizer_cls_and_kwargs`.
        optimizers, model_init: As the trainer got them.

    Raises:
        ValueError: A weight decay that `Trainer` overrides, or the optimiser of a model that will be replaced.
    """
    if model_init is not None and any(given is not None for given in optimizers):
        raise ValueError(
            "optimizers belong to one model, but model_init makes a new one for every run: give "
            "optimizer_cls_and_kwargs instead."
        )
    if optimizer is not None and "weight_decay" in optimizer[1]:
        raise ValueError(
            "weight_decay in optimizer_cls_and_kwargs has no effect, since every group of parameters has its own: "
            "set it in CrossKDConfig(weight_decay=...)."
        )


def check_metrics(args: CrossKDConfig, compute_metrics: object, preprocess: object) -> None:
    """Raise `ValueError` for options of `compute_metrics` that would have no effect."""
    if preprocess is not None and compute_metrics is None:
        raise ValueError("preprocess_logits_for_metrics needs compute_metrics: AP alone keeps no logits.")
    if args.include_for_metrics:
        raise ValueError(
            f"include_for_metrics={args.include_for_metrics}: compute_metrics gets predictions and labels alone; "
            "leave it empty."
        )


def check_checkpointing(args: CrossKDConfig, distils: bool) -> None:
    """Raise `ValueError` for a checkpointing that the gradients of a distillation can't be taken through.

    `TrainingArguments` keeps the older names of the options equal to the newer ones, `activation_checkpointing`.
    """
    kwargs: Mapping[str, Any] = args.gradient_checkpointing_kwargs or {}
    if args.gradient_checkpointing and kwargs.get("use_reentrant") and distils and args.check_first_step:
        raise ValueError(
            "Reentrant checkpointing can't be differentiated twice, as the check of the first update does: leave "
            "gradient_checkpointing_kwargs={'use_reentrant': False}, or set check_first_step=False."
        )
    if kwargs and not args.gradient_checkpointing:
        raise ValueError(
            f"gradient_checkpointing_kwargs={kwargs} would have no effect without gradient_checkpointing=True: leave "
            "it out, or set that."
        )


def _check_gradients_pass(teacher: nn.Module) -> None:
    quantised = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
    names = [name for name, module in teacher.named_modules() if type(module).__module__.startswith(quantised)]
    if names:
        raise ValueError(
            f"The teacher's layers are quantised by torch.ao (such as {names[0]}), which lets no gradient through to "
            "the student's features. Give the teacher as it was, or one whose weights alone are quantised "
            "(bitsandbytes, torchao)."
        )


def _kind(given: object) -> str:
    if given is None:
        return "missing"
    if isinstance(given, str):
        return f"the text {given!r}"
    package = type(given).__module__.partition(".")[0]
    return f"a {'' if package == 'builtins' else package + ' '}{type(given).__name__}"


def _way_out(given: object, name: str) -> str:
    """What to give instead, to be appended to what is needed."""
    if isinstance(given, str):
        return f": {name}=AutoModelForObjectDetection.from_pretrained({given!r})"
    if given is None:
        return ", such as AutoModelForObjectDetection.from_pretrained(...), or model_init, a function that makes one"
    if type(given).__name__ == "OptimizedModule":
        return ": give the one that torch.compile got, and torch_compile=True, which compiles student and teacher"
    if isinstance(given, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return f": give {name}.module, the trainer wraps it itself"
    if type(given).__module__.startswith("torchvision."):
        return ": `crosskd-hf convert` makes a model folder from a torchvision detector's weights"
    if isinstance(given, Mapping):
        return ": load these weights into one with load_state_dict, or give the folder that they lie in"
    if callable(given) and not isinstance(given, nn.Module):
        return ": a function that makes models goes by model_init"
    return ", such as AutoModelForObjectDetection.from_pretrained(...) makes it"
