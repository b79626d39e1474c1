"""The teacher on the evaluation data, before a student learns from it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import datasets
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from ..data.categories import CategoryMap
from ..distillation import Distiller
from ..distillation.pixels import PixelAdapter, PixelFormat
from ..inference.evaluation import detect_dataset

logger = logging.getLogger(__name__)


def teacher_metrics(
    distiller: Distiller,
    student: PreTrainedModel,
    processor: Any,
    teacher_processor: Any,
    evaluation: Any,
    batch_size: int,
    is_main: bool,
) -> dict[str, float]:
    """COCO AP of the teacher, seeing what it sees in training; in [0, 1], for the classes of the data.

    Args:
        distiller: Holds the teacher.
        student: Its classes are those of the data.
        processor, teacher_processor: Of the student, and of the teacher if it is known.
        evaluation: The evaluation data, or several in a dict, of which the first is taken.
        batch_size: Images at once.
        is_main: Whether this process evaluates; the others are told.

    Raises:
        ValueError: The teacher finds nothing: AP is 0.
    """
    dataset = next(iter(evaluation.values())) if isinstance(evaluation, Mapping) else evaluation
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError("teacher_eval=True needs eval_dataset: give evaluation data, or set teacher_eval=False.")
    found: list[Any] = [None]
    if is_main:
        adapt = None
        if teacher_processor is not None:
            adapt = PixelAdapter(PixelFormat.of(processor), PixelFormat.of(teacher_processor))
        categories = CategoryMap.from_config(student.config)
        found = [
            detect_dataset(
                distiller.teacher,
                processor,
                dataset,
                categories,
                batch_size=batch_size,
                reader=teacher_processor,
                adapt=adapt,
            ).compute()
        ]
    broadcast_object_list(found)
    metrics: dict[str, float] = found[0]
    if not metrics["map"] > 0:
        raise ValueError(
            "The teacher finds nothing on the evaluation data (AP 0): a student would learn that from it. Are its "
            "classes those of the data, by name? Is it trained, and are its images of this size? `crosskd-hf evaluate` "
            "shows its AP by class; a detector of other classes is trained on yours first: crosskd-hf train --student "
            "TEACHER. teacher_eval=False goes on nevertheless."
        )
    logger.warning("The teacher's AP on the evaluation data is %.1f %%.", 100 * metrics["map"])
    return metrics
