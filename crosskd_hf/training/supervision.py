"""A student's own loss as parts, whether the model hands them out or is one of transformers' with a finished loss."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import numpy as np
from torch import Tensor, distributed
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils import ModelOutput

from ..data.transforms import is_multi_scale
from ..distillation.detr_families import FAMILIES
from ..distillation.detr_loss import fix_num_boxes_reduction, proposal_loss_parts
from ..models.boxes import image_sizes
from ..models.losses import LossPart

WHOLE = "loss_task"
_OF_LAST_LAYER = re.compile(r"loss_[a-z]+")


def returns_loss_parts(model: PreTrainedModel) -> bool:
    """Whether the annotated result of the model's forward has a field `loss_parts`."""
    result = get_type_hints(type(model).forward).get("return")
    return is_dataclass(result) and "loss_parts" in {field.name for field in fields(result)}


def prepare(model: PreTrainedModel, processor: BaseImageProcessor | None, transform: Any = None) -> None:
    """Make the losses of transformers independent of the number of processes, if `model` uses them.

    Raises:
        ValueError: Processor or transform make images that have to be padded, and the model doesn't know of padding.
    """
    if returns_loss_parts(model):
        return
    fix_num_boxes_reduction()
    if processor is not None:
        _check_padding(model, processor, transform)


def supervised_parts(model: PreTrainedModel, outputs: ModelOutput, inputs: Mapping[str, Any]) -> dict[str, LossPart]:
    """The terms of the student's loss on its labels.

    Models of transformers divide their loss by the mean number of boxes over processes, at least one: that number is
    multiplied back, so that their loss adds up over processes and micro-batches like every other one. (Exact where
    every term is divided so; the class term of DETR itself is a weighted mean over the local queries.)

    Args:
        model: The bare student.
        outputs: Of its forward pass with labels.
        inputs: The batch.

    Raises:
        TypeError: There is no loss in the outputs.
    """
    if not isinstance(outputs, Mapping) or "loss" not in outputs:
        raise TypeError(
            f"{type(model).__name__} returned {'no loss' if isinstance(outputs, Mapping) else 'a tuple'}: its forward "
            "must return a ModelOutput with loss, logits and pred_boxes when it is given labels."
        )
    parts = outputs.get("loss_parts")
    if parts is not None:
        return dict(parts)
    labels, loss = inputs["labels"], outputs["loss"]
    count = loss.new_tensor(float(sum(len(label["class_labels"]) for label in labels)))
    mean = count.clone()
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(mean)
        mean /= distributed.get_world_size()
    whole = {WHOLE: LossPart(loss * mean.clamp(min=1), count)}
    sizes = image_sizes(inputs["pixel_values"], inputs.get("pixel_mask"))
    return whole | proposal_loss_parts(model, outputs, labels, sizes)


def _check_padding(model: PreTrainedModel, processor: BaseImageProcessor, transform: Any) -> None:
    family = FAMILIES.get(model.config.model_type)
    if family is None or family.reads_mask:
        return
    landscape, portrait = (np.zeros(shape, np.uint8) for shape in ((48, 64, 3), (64, 48, 3)))
    shapes = {processor(images=image, return_tensors="pt")["pixel_values"].shape for image in (landscape, portrait)}
    resized = is_multi_scale(transform)  # then the processor doesn't
    if resized or len(shapes) > 1:
        culprit = "a TrainTransform with shortest_edges" if resized else type(processor).__name__
        raise ValueError(
            f"'{model.config.model_type}' doesn't read pixel_mask: its boxes are relative to the padded image, labels "
            f"to the image alone. But {culprit} makes images of different sizes, which are padded in a "
            "batch. Leave shortest_edges (multi_scale) empty, and use a processor that makes all images one size, such "
            "as RTDetrImageProcessor, or give it size={'height': ..., 'width': ...}."
        )


def own_log(outputs: ModelOutput, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Terms to log of a model that hands out no parts: its `loss_dict`, unweighted, without those of inner layers.

    Args:
        outputs: Of the forward pass.
        losses: The divided parts; how `loss_task` was scaled, its terms are scaled too.
    """
    if WHOLE not in losses:
        return {}
    scale = losses[WHOLE].detach() / outputs["loss"].detach()
    terms = (outputs.get("loss_dict") or {}).items()
    return {name: value.detach() * scale for name, value in terms if _OF_LAST_LAYER.fullmatch(name)}
