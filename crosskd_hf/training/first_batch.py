"""A first batch of a collator that isn't of this package: judged before the first update, part by part."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import takes

logger = logging.getLogger(__name__)

MOST = 2.0  # of a relative box that reaches over the border; pixels are more
_FEW = 4  # boxes, of which corners and centres can't be told apart
_WAY_OUT = "as DetectionCollator makes it"


def check_batch(batch: Any, model: nn.Module, evaluated: bool) -> None:
    """Find out whether a collator makes what the model and, if `evaluated`, the evaluation need.

    Args:
        batch: What the collator made of some examples.
        model: The student.
        evaluated: Whether detections are looked for in such batches.

    Raises:
        ValueError: Something is missing or of another form, or something is there that the model doesn't take.
    """
    unknown = [key for key in batch if not takes(model, key)] if isinstance(batch, Mapping) else []
    if unknown:
        raise ValueError(
            f"The batches have {', '.join(unknown)}, which {type(model).__name__}.forward does not take: leave "
            "it out in the collator, or let the forward take it."
        )
    labels = check_form(batch, {"image_id", "orig_size"} if evaluated else set())
    tell_of_corners(labels)


def check_form(batch: Any, more: Set[str] = frozenset()) -> Sequence[dict[str, Any]]:
    """Find out whether a batch is of the form that losses and evaluation take.

    Args:
        batch: What a collator made.
        more: What the label of an image needs beside `boxes` and `class_labels`.

    Returns:
        The labels.

    Raises:
        ValueError: Something is missing or of another form; of a label with its image.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"The collator makes a {type(batch).__name__}; needed is a dict with pixel_values, pixel_mask and labels, "
            f"{_WAY_OUT}."
        )
    labels = batch.get("labels") or [{}]
    if isinstance(labels, Mapping) or not all(isinstance(label, Mapping) for label in labels):
        raise ValueError(f"labels of a batch must be a list with a dict for each image, {_WAY_OUT}.")
    needed = {"class_labels", "boxes", *more}
    label = next((label for label in labels if needed - set(label)), None)
    if label is not None:
        missing = sorted(needed - set(label))
        raise ValueError(
            f"The labels that the collator makes lack {', '.join(missing)}; they have {sorted(label)}. The "
            "image processor makes all of it from annotations={'image_id': ..., 'annotations': [...]}, as "
            "DetectionCollator calls it."
        )
    pixels = batch.get("pixel_values")
    faults = [
        *_of_pixels(pixels, len(labels)),
        *_of_mask(batch.get("pixel_mask"), pixels),
        *(fault for label in labels for fault in _of_label(label)),
    ]
    if faults:
        raise ValueError(f"The collator makes {faults[0]}, {_WAY_OUT}.")
    return labels  # type: ignore[no-any-return]


def _of_pixels(values: Any, count: int) -> Iterator[str]:
    if not isinstance(values, Tensor) or values.ndim != 4:
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        yield f"pixel_values of the form {shape}; needed is one tensor (B, 3, H, W)"
    elif values.shape[1] != 3 and values.shape[-1] == 3:
        yield f"pixel_values of the form {tuple(values.shape)}, channels last; needed is (B, 3, H, W)"
    elif values.dtype != torch.uint8 and not values.is_floating_point():
        yield f"pixel_values of {values.dtype}; needed is float32, or uint8 that is not normalised"
    elif len(values) != count:
        yield f"{len(values)} images and {count} labels; needed is a label for each image"


def _of_mask(mask: Any, values: Any) -> Iterator[str]:
    """The mask's meaning is that of transformers; in the code of DETR it is the other way round."""
    if mask is None or not isinstance(values, Tensor) or values.ndim != 4:
        return
    shape = (len(values), *values.shape[-2:])
    if not isinstance(mask, Tensor) or mask.shape != shape:
        yield f"a pixel_mask that is {_form(mask)}; needed is {shape}"
    elif not bool(mask[:, 0, 0].all()):
        yield "a pixel_mask of 0 in the top left, where images lie; needed is 1 for pixels of the image, 0 for padding"


def _of_label(label: Mapping[str, Any]) -> Iterator[str]:
    boxes, classes = label["boxes"], label["class_labels"]
    if not isinstance(boxes, Tensor) or not boxes.is_floating_point() or boxes.ndim != 2 or boxes.shape[1] != 4:
        yield f"boxes that are {_form(boxes)}; needed is a float tensor (n, 4)"
    elif not isinstance(classes, Tensor) or classes.is_floating_point() or classes.shape != boxes.shape[:1]:
        yield f"class_labels that are {_form(classes)} beside {len(boxes)} boxes; needed is an int64 tensor (n,)"
    elif not bool(boxes.isfinite().all()):
        yield f"boxes{_whose(label)} that are not finite numbers; needed are centre, width and height in [0, 1]"
    elif len(boxes) and boxes.abs().max() > MOST:
        yield (
            f"boxes{_whose(label)} of up to {boxes.abs().max():.4g}; needed are centre, width and height relative to "
            "the image, in [0, 1]"
        )
    elif len(boxes) and boxes[:, 2:].min() < 0:
        yield f"boxes{_whose(label)} with a width or height of {boxes[:, 2:].min():.4g}; needed is at least 0"


def _whose(label: Mapping[str, Any]) -> str:
    image_id = label.get("image_id")
    return f" of image_id {int(image_id)}" if isinstance(image_id, Tensor) and image_id.numel() == 1 else ""


def _form(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def tell_of_corners(labels: Sequence[Mapping[str, Any]]) -> None:
    """Warn of labels of a batch whose boxes may be corners."""
    boxes = torch.cat([label["boxes"].float().reshape(-1, 4) for label in labels])
    if len(boxes) < _FEW:
        return
    first, second = boxes[:, :2], boxes[:, 2:]
    reach_out = ((first - second / 2 < -0.05) | (first + second / 2 > 1.05)).any(1)
    if bool((second > first).all()) and 2 * int(reach_out.sum()) >= len(boxes):
        logger.warning(
            "%d of %d boxes of the first batch reach over the border, and all of them could be corners (x1, y1, x2, "
            "y2): boxes of labels are centre, width and height.",
            int(reach_out.sum()),
            len(boxes),
        )
