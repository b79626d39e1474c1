"""Whether an image processor reads a detector's outputs as the detector means them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils import ModelOutput

from ..models import DETECTORS, DetectionImageProcessor
from ..models.bounds import check_pixels

_ALSO_SOFTMAX = {"yolos", "table-transformer"}  # of transformers; can be trained here, not distilled


class _Reading(NamedTuple):
    """How a processor reads outputs: whether the last one is "no object", and whether one of two equal boxes goes."""

    no_object: bool
    suppresses: bool


def has_no_object(model: PreTrainedModel) -> bool | None:
    """Whether a detector's classes compete by softmax with "no object" as the last one, rather than one sigmoid each.

    None if it is of no family that is known here.
    """
    if type(model.config) in DETECTORS:
        return False
    from ..distillation.detectors.detr_families import FAMILIES  # imports families that no other detector needs

    kind = model.config.model_type
    if kind in FAMILIES:
        return FAMILIES[kind].softmax
    return True if kind in _ALSO_SOFTMAX else None


def check_processor(model: PreTrainedModel, processor: BaseImageProcessor, no_object: bool | None = None) -> None:
    """Find a processor of another family, whose detections would be wrong without a word.

    Args:
        model: The detector.
        processor: Is tried on the outputs of three sure objects.
        no_object: As of `has_no_object`, where it is known from the outputs of a model of no known family.

    Raises:
        ValueError: It makes no detections; it takes the last class for "no object", or the other way round; or it
            leaves double boxes of a detector that relies on non-maximum suppression.
    """
    name, kind = type(processor).__name__, model.config.model_type
    if not hasattr(processor, "post_process_object_detection"):
        raise ValueError(
            f"{name} has no post_process_object_detection: it can't make detections of the model's outputs. "
            f"Give an image processor of '{kind}'."
        )
    check_pixels(processor.to_dict() if hasattr(processor, "to_dict") else {})
    expected, dense = has_no_object(model), type(model.config) in DETECTORS
    expected = no_object if expected is None else expected
    if expected is None or (dense and isinstance(processor, DetectionImageProcessor)):
        return
    reading = _reading(processor)
    if reading is None:
        return
    if reading.no_object and not expected:
        fault = "takes the last class for 'no object' (softmax): it would never be found"
    elif expected and not reading.no_object:
        fault = "takes 'no object', the last output of the model, for a class (sigmoid): it would be found everywhere"
    elif dense and not reading.suppresses:
        fault = "leaves all double boxes of an object: the model relies on non-maximum suppression"
    else:
        return
    needed = "DetectionImageProcessor" if dense else f"{'' if expected else 'Deformable'}DetrImageProcessor"
    raise ValueError(
        f"{name} is of another family than the model ('{kind}'). It {fault}. Give the processor that belongs to the "
        f"model: AutoImageProcessor.from_pretrained of its original checkpoint, or a {needed}."
    )


def check_image_size(model: PreTrainedModel, processor: BaseImageProcessor, what: str) -> None:
    """Find a model whose anchors were laid out for images of another size.

    Args:
        model: The student or the teacher; both see what the student's processor makes.
        processor: The student's.
        what: The model in words.

    Raises:
        ValueError: `anchor_image_size` of the model is not the size of the images.
    """
    fixed = model.config.to_dict().get("anchor_image_size")
    size = dict(processor.size or {})
    made = [size.get("height"), size.get("width")]
    if fixed is not None and None not in made and list(fixed) != made:
        raise ValueError(
            f"The {what} has anchors for images of {fixed[0]} x {fixed[1]} px (anchor_image_size), but the student's "
            f"image processor makes {made[0]} x {made[1]}. Load it by from_pretrained(..., anchor_image_size=None), "
            f"which lays them out anew for every size, or give both the same size."
        )


def _reading(processor: BaseImageProcessor) -> _Reading | None:
    """What a processor makes of a sure object of each of three classes, and of the first one twice.

    None if it needs other outputs than `logits` and `pred_boxes`.
    """
    classes = torch.tensor([0, 1, 2, 0])
    centers = torch.tensor([0.1, 0.5, 0.9, 0.1])[:, None]
    logits = torch.where(torch.nn.functional.one_hot(classes, 3) == 1, 10.0, -10.0)
    boxes = torch.cat([centers.expand(-1, 2), torch.full((4, 2), 0.1)], 1)
    outputs = ModelOutput(logits=logits[None], pred_boxes=boxes[None])
    try:
        (result,) = processor.post_process_object_detection(outputs, 0.5, torch.tensor([[100, 100]]))
        labels = result["labels"].tolist()
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, RuntimeError):
        return None
    return _Reading(2 not in labels, labels.count(0) < 2)
