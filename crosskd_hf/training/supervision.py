"""A student's own loss as parts, whether the model hands them out or is one of transformers' with a finished loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import numpy as np
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils import ModelOutput

from ..data.transforms import is_multi_scale
from ..distillation.detectors.detr_families import FAMILIES
from ..models.losses import LossPart
from . import detr_loss

WHOLE = "loss_task"


def returns_loss_parts(model: PreTrainedModel) -> bool:
    """Whether the annotated result of the model's forward has a field `loss_parts`."""
    result = get_type_hints(type(model).forward).get("return")
    return is_dataclass(result) and "loss_parts" in {field.name for field in fields(result)}


def prepare(model: PreTrainedModel, processor: BaseImageProcessor | None, transform: Any = None) -> None:
    """Let `model` hand out the terms of its loss, if it is a DETR of transformers.

    Raises:
        ValueError: Processor or transform make images that have to be padded, and the model doesn't know of padding.
        UpstreamError: The loss of transformers is not what it was in the releases that were tried.
    """
    if returns_loss_parts(model):
        return
    detr_loss.take_over(model)
    if processor is not None:
        _check_padding(model, processor, transform)


def supervised_parts(model: PreTrainedModel, outputs: ModelOutput, inputs: Mapping[str, Any]) -> dict[str, LossPart]:
    """The terms of the student's loss on its labels.

    A loss that comes as one number counts as a mean over the images of the micro-batch, as it does for `Trainer`.

    Args:
        model: The student, prepared.
        outputs: Of its forward pass with labels.
        inputs: The batch.

    Raises:
        TypeError: There is no loss in the outputs.
    """
    parts = outputs.get("loss_parts") if isinstance(outputs, Mapping) else None
    if parts is not None:
        return dict(parts)
    if not isinstance(outputs, Mapping) or "loss" not in outputs:
        raise TypeError(
            f"{type(model).__name__} returned {'no loss' if isinstance(outputs, Mapping) else 'a tuple'}: its forward "
            "must return a ModelOutput with loss, logits and pred_boxes when it is given labels."
        )
    if detr_loss.is_taken_over(model):
        return outputs["loss_dict"] | detr_loss.proposal_parts(model, outputs, inputs["labels"])
    loss = outputs["loss"]
    images = loss.detach().new_full((), len(inputs["pixel_values"]))
    return {WHOLE: LossPart(loss * images, images)}


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
