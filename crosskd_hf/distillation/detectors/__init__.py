"""What each family of detectors offers to methods: one view for each."""

from typing import Any

from transformers import PreTrainedModel

from ...models.dense import DenseDetector
from ...models.faster_rcnn import FasterRCNNForObjectDetection
from ..passes import DetectorView, Role
from ..pixels import PixelAdapter
from .dense import DenseView
from .detr import DetrView, detr_classes
from .faster_rcnn import FasterRCNNView

VIEWS: dict[type[PreTrainedModel], type[DetectorView]] = {
    DenseDetector: DenseView,
    FasterRCNNForObjectDetection: FasterRCNNView,
    **dict.fromkeys(detr_classes(), DetrView),
}
"""The view of a class of models and of its subclasses; open to users."""


def view(model: Any, role: Role, pixels: PixelAdapter | None = None) -> DetectorView:
    """The view of a model.

    Raises:
        ValueError: No class of the model is in :data:`VIEWS`.
    """
    for kind in type(model).__mro__:
        if kind in VIEWS:
            return VIEWS[kind](model, role, pixels)
    known = ", ".join(sorted({kind.__name__ for kind in VIEWS}))
    raise ValueError(
        f"The {role} is a {type(model).__name__} ('{model.config.model_type}'), which can't be distilled here. "
        f"Give one of {known} or a subclass, or add a view of your own to crosskd_hf.distillation.detectors.VIEWS."
    )
