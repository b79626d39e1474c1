"""Whether a detector's classes by name are those of its outputs."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ..data.class_names import class_names, listing
from ..models import FasterRCNNForObjectDetection
from ..models.dense import DenseDetector
from .processors import has_no_object


def check_width(model: PreTrainedModel, what: str = "student") -> None:
    """Raise `ValueError` if a head that is known here is not as wide as the `id2label` of `model`, the `what`."""
    demand_width(model, _head_width(model), what)


def _head_width(model: PreTrainedModel) -> int | None:
    """How many logits a model makes of a box; None if it is of no family that is known here."""
    from ..distillation.detectors.detr_families import FAMILIES  # imports families that no other detector needs

    family = FAMILIES.get(model.config.model_type)
    if family is not None:
        layer = family.classifier(model)
        return layer.out_features if isinstance(layer, nn.Linear) else None
    if isinstance(model, FasterRCNNForObjectDetection):
        return model.roi_head.num_labels
    return model.head.num_labels if isinstance(model, DenseDetector) else None


def demand_width(model: PreTrainedModel, width: int | None, what: str = "student") -> None:
    """As `check_width`, of a head of `width` outputs, or of a head of which nothing is known (None)."""
    names, no_object = class_names(model.config), has_no_object(model)
    possible = (False, True) if no_object is None else (no_object,)
    if width is None or width in {len(names) + extra for extra in possible}:
        return
    left_out = sorted(set(range(len(names))) - set(map(int, model.config.id2label)))
    way_out = (
        f"Changing id2label changes no head: load the {what} by from_pretrained(..., id2label=..., label2id=..., "
        "ignore_mismatched_sizes=True)."
    )
    if left_out:
        way_out = f"It leaves out {left_out[0]}: its keys are numbers of outputs, 0 to {width - 1 - bool(no_object)}."
    raise ValueError(
        f"The {what}'s head has {width} outputs{', the last for no object' if no_object else ''}, but its id2label "
        f"names {listing(names)}. {way_out}"
    )
