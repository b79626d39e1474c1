"""Teachers and students from folders and the Hub: whole, or not at all."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping
from typing import Any

from transformers import AutoImageProcessor, AutoModelForObjectDetection, BaseImageProcessor, PreTrainedModel

logger = logging.getLogger(__name__)


def load_teacher(
    source: str | os.PathLike[str], revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, BaseImageProcessor | None]:
    """Load a teacher and, if one lies beside it, its image processor.

    Args:
        source: Folder or Hub id.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Whether code that lies beside the weights may run.

    Raises:
        ValueError: Weights are missing or have another shape: such a teacher would be random in part.
    """
    options = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    teacher, report = AutoModelForObjectDetection.from_pretrained(source, output_loading_info=True, **options)
    _demand_complete(report, f"The teacher {os.fspath(source)!r}", "a checkpoint of the whole detector")
    try:
        return teacher, AutoImageProcessor.from_pretrained(source, **options)
    except (OSError, ValueError):
        logger.warning("No image processor lies beside the teacher %s: it sees the student's pixels.", source)
        return teacher, None


def load_student(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Load a checkpoint's weights into `model` by way of `from_pretrained`, which alone knows how names are stored.

    Raises:
        ValueError: The checkpoint's weights are not those of this model.
    """
    fresh, report = type(model).from_pretrained(
        folder, config=copy.deepcopy(model.config), dtype=model.dtype, output_loading_info=True
    )
    _demand_complete(report, f"The checkpoint {os.fspath(folder)!r}", "a checkpoint of this student")
    model.load_state_dict(fresh.state_dict(), strict=True)


def _demand_complete(report: Mapping[str, Any], what: str, needed: str) -> None:
    for fault in ("missing_keys", "mismatched_keys"):
        names = sorted(str(name) for name in report[fault])
        if names:
            raise ValueError(
                f"{what} has {len(names)} {fault.replace('_', ' ')}, such as {names[:3]}: these weights "
                f"would be random. Give {needed}."
            )
