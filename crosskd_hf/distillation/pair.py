"""From two models to the distiller of their family."""

from transformers import BaseImageProcessor, PreTrainedModel

from crosskd_hf.models.dense import DenseDetector
from crosskd_hf.models.faster_rcnn import FasterRCNNForObjectDetection
from crosskd_hf.models.pyramid import PyramidDetector

from .base import Distiller
from .config import DistillationConfig
from .dense import DenseDistiller
from .detr import DetrDistiller
from .detr_families import FAMILIES
from .faster_rcnn import FasterRCNNDistiller
from .features import FeatureDistiller
from .pixels import PixelAdapter, PixelFormat


def make_distiller(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    config: DistillationConfig,
    student_processor: BaseImageProcessor | None = None,
    teacher_processor: BaseImageProcessor | None = None,
) -> Distiller:
    """Make the distiller for a pair of models.

    Args:
        student, teacher: Two models of one kind (dense, Faster R-CNN, DETR-type); PKD works between the kinds too.
        config: What is distilled.
        student_processor, teacher_processor: With both, the teacher sees pixels normalised its own way.

    Raises:
        ValueError: The pair cannot be distilled; the message says why and what would work.
    """
    pixels = None
    if student_processor is not None and teacher_processor is not None:
        pixels = PixelAdapter(PixelFormat.of(student_processor), PixelFormat.of(teacher_processor))
    if isinstance(student, DenseDetector) and isinstance(teacher, DenseDetector):
        return DenseDistiller(student, teacher, config, pixels)
    if isinstance(student, FasterRCNNForObjectDetection) and isinstance(teacher, FasterRCNNForObjectDetection):
        return FasterRCNNDistiller(student, teacher, config, pixels)
    for role, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, PyramidDetector) and model.config.model_type not in FAMILIES:
            raise ValueError(
                f"The {role} is a {type(model).__name__} ('{model.config.model_type}'), which can't be distilled here. "
                f"Give dense detectors (GFL, RetinaNet, FCOS, ATSS), Faster R-CNNs, or models of {', '.join(FAMILIES)}."
            )
    if student.config.model_type in FAMILIES and teacher.config.model_type in FAMILIES:
        return DetrDistiller(student, teacher, config, pixels)
    return FeatureDistiller(student, teacher, config, pixels)
