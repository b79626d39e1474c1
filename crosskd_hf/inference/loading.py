"""Trained detectors from folders and the Hub: whole, or not at all."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from transformers import AutoImageProcessor, AutoModelForObjectDetection, BaseImageProcessor, PreTrainedModel

from ..sources import check_source
from .downloads import check_download
from .processors import check_processor

logger = logging.getLogger(__name__)


def load_detector(
    source: str | os.PathLike[str], revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A saved detector and its image processor, from a folder or the Hub; arguments as of :func:`load_teacher`.

    Raises:
        OSError: There is no model at `source`, or the Hub doesn't answer.
        ValueError: Weights or the image processor are missing, or the processor belongs to another family of models.
    """
    model, processor = load_teacher(source, revision, trust_remote_code)
    if processor is None:
        raise ValueError(f"No image processor lies beside the model in {source}: save one there with save_pretrained.")
    check_processor(model, processor)
    return model, processor


def load_teacher(
    source: str | os.PathLike[str], revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, BaseImageProcessor | None]:
    """Load a teacher and, if one lies beside it, its image processor.

    Args:
        source: Folder or Hub id.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Whether code that lies beside the weights may run.

    Raises:
        OSError: There is no model at `source`, or the Hub doesn't answer.
        ValueError: Weights are missing or have another shape, so that such a teacher would be random in part; or a
            configuration asks for what it may not, see `check_download`; or the image processor can't be made.
    """
    check_source(source, revision)
    if not trust_remote_code:
        check_download(source, revision or "main")
    options = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    teacher, report = AutoModelForObjectDetection.from_pretrained(source, output_loading_info=True, **options)
    demand_complete(report, f"The teacher {os.fspath(source)!r}", "a checkpoint of the whole detector")
    try:
        BaseImageProcessor.get_image_processor_dict(source, revision=options["revision"])
    except OSError:
        logger.warning("No image processor lies beside the teacher %s: it sees the student's pixels.", source)
        return teacher, None
    return teacher, AutoImageProcessor.from_pretrained(source, **options)


def demand_complete(report: Mapping[str, Any], what: str, needed: str) -> None:
    """Refuse weights that were loaded in part.

    Args:
        report: The loading info of `from_pretrained`.
        what: The checkpoint in words.
        needed: What to give instead.

    Raises:
        ValueError: Weights are missing or have another shape.
    """
    for fault in ("missing_keys", "mismatched_keys"):
        names = sorted(str(name) for name in report[fault])
        if names:
            raise ValueError(
                f"{what} has {len(names)} {fault.replace('_', ' ')}, such as {names[:3]}: these weights "
                f"would be random. Give {needed}."
            )
