"""Trained detectors from folders and the Hub: whole, or not at all."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import huggingface_hub
import torch
from huggingface_hub import _CACHED_NO_EXIST
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModelForObjectDetection, BaseImageProcessor, PreTrainedModel

from ..models import DETECTORS
from ..sources import check_source, first_line
from .downloads import check_download
from .head_width import check_width
from .processors import check_processor

logger = logging.getLogger(__name__)

_PROCESSOR = "preprocessor_config.json"
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
    source: str | os.PathLike[str],
    revision: str | None = None,
    trust_remote_code: bool = False,
    with_processor: bool = True,
) -> tuple[PreTrainedModel, BaseImageProcessor | None]:
    """Load a teacher and, if one lies beside it, its image processor.

    Args:
        source: Folder or Hub id.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Whether code that lies beside the weights may run.
        with_processor: Whether to look for the image processor.

    Raises:
        OSError: There is no model at `source`, its weights or its image processor can't be read, or the Hub doesn't
            answer.
        ValueError: Weights are missing or have another shape, so that such a teacher would be random in part, or aren't
            finite; `id2label` has other classes than the outputs; a configuration asks for what it may not, see
            `check_download`; or the image processor can't be made.
    """
    check_source(source, revision)
    if not trust_remote_code:
        check_download(source, revision or "main")
    options: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    teacher = _load_whole(os.fspath(source), options)
    check_width(teacher, "model")
    if not with_processor:
        return teacher, None
    try:
        BaseImageProcessor.get_image_processor_dict(source, revision=options["revision"])
    except OSError as error:
        if not _has_no_processor(os.fspath(source), options["revision"]):
            raise OSError(
                f"The image processor of {os.fspath(source)!r} can't be read ({first_line(error)}): without it the "
                f"detector may see other pixels than it was trained on. Repair or fetch its {_PROCESSOR}, or give the "
                "image processor itself (teacher_processing_class)."
            ) from error
        logger.warning("No image processor lies beside the teacher %s: it sees the student's pixels.", source)
        return teacher, None
    return teacher, AutoImageProcessor.from_pretrained(source, **options)


def _has_no_processor(source: str, revision: str) -> bool:
    """Whether it is known that no image processor lies there; one that isn't in the cache may be on the Hub."""
    if os.path.isdir(source):
        return not os.path.lexists(os.path.join(source, _PROCESSOR))
    return huggingface_hub.try_to_load_from_cache(source, _PROCESSOR, revision=revision) is _CACHED_NO_EXIST


def _load_whole(source: str, options: dict[str, Any]) -> PreTrainedModel:
    loading = {"output_loading_info": True, "ignore_mismatched_sizes": True, **options}  # refused below, with names
    try:
        model, report = AutoModelForObjectDetection.from_pretrained(source, **loading)
    except SafetensorError as error:
        raise OSError(
            f"The weights in {source} can't be read ({error}): the file is cut short or damaged. Copy it once more."
        ) from error
    except OSError as error:
        if os.path.isdir(source):
            raise
        raise OSError(
            f"The model {source!r} can't be fetched from the Hub ({first_line(error)}). Fetch it where there is a "
            f"network, hf download {source}, or give a folder."
        ) from error
    demand_complete(report, f"The model {source!r}", "a checkpoint of the whole detector")
    _demand_no_more(model, report, source)
    floats = {name: value for name, value in model.state_dict().items() if value.dtype in _FLOATS}
    wrong = [name for name, value in floats.items() if not bool(value.isfinite().all())]
    if wrong:
        raise ValueError(
            f"{len(wrong)} weights of the model {source!r} have NaN or infinity in them, such as {wrong[:3]}: it would "
            "find nothing. Take an earlier checkpoint."
        )
    return model  # type: ignore[no-any-return]


def _demand_no_more(model: PreTrainedModel, report: Mapping[str, Any], source: str) -> None:
    """Refuse weights of one of our own detectors that its configuration builds no layer for."""
    more = sorted(str(name) for name in report["unexpected_keys"])
    if more and type(model.config) in DETECTORS:
        raise ValueError(
            f"The model {source!r} has {len(more)} weights that its config.json builds no layer for, such as "
            f"{more[:3]}: it would be another detector than was trained. Take the config.json that was saved with them."
        )


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
