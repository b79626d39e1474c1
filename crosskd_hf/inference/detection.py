"""From a batch of pixels to detections: the one way that prediction, evaluation and training's evaluation take."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedModel

from ..models import DetectionImageProcessor
from ..models.pixels import to_rgb
from .precision import in_type_of, widen_outputs
from .speed import FLOAT32, Speed, running


@torch.no_grad()
def forward(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """What a model makes of a batch, in float32, even if its weights are in half precision."""
    pixels = in_type_of(model, inputs["pixel_values"])
    try:
        return widen_outputs(model(**{**inputs, "pixel_values": pixels}))
    except RuntimeError as error:
        explain_small_images(error, pixels)
        raise


def explain_small_images(error: RuntimeError, pixels: Tensor) -> None:
    """Say what it means if a detector chooses its queries among too few locations.

    Args:
        error: Of a pass of a model.
        pixels: Its batch, (B, C, H, W) or (B, H, W, C).

    Raises:
        ValueError: It is the error that torch has for that.
    """
    if "selected index k out of range" in str(error):
        shape = " x ".join(map(str, pixels.shape))
        raise ValueError(
            f"A batch of shape {shape} has fewer locations than a two-stage detector chooses its queries from: give "
            "larger images (the image processor's size, shortest_edges), or a model with fewer queries (num_queries)."
        ) from error


def parts_of_one_canvas(
    inputs: Mapping[str, Any], labels: Sequence[Mapping[str, Tensor]]
) -> Iterator[tuple[dict[str, Any], list[Mapping[str, Tensor]]]]:
    """A batch of :class:`EvaluationCollator` as smaller ones, in its order, of images that are padded to one size.

    Args:
        inputs: `pixel_values` (B, 3, H, W), and what else belongs to the B images.
        labels: Their labels; without `canvas`, as of a user's own collator, the batch stays whole.
    """
    canvases = [tuple(label["canvas"].tolist()) if "canvas" in label else None for label in labels]
    start = 0
    for canvas, run in itertools.groupby(canvases):
        rows = slice(start, start + len(list(run)))
        start = rows.stop
        part = {name: value[rows] for name, value in inputs.items()}
        for name in ("pixel_values", "pixel_mask"):
            if canvas is not None and name in part:
                part[name] = part[name][..., : canvas[0], : canvas[1]].contiguous()
        yield part, list(labels[rows])


def detections(
    processor: BaseImageProcessor, outputs: Any, sizes: Tensor, threshold: float
) -> list[dict[str, torch.Tensor]]:
    """Read a model's outputs; every box ends at the edge of its image.

    Processors of transformers leave boxes as the model predicts them, and DETR's reach over the edge of the image. The
    part outside belongs to no object, and would lower the IoU with the truth.

    Args:
        processor: The one that belongs to the model.
        outputs: Of :func:`forward`.
        sizes: (B, 2) heights and widths of the original images in pixels.
        threshold: Lowest score, in [0, 1].

    Returns:
        For each image `scores` (n,), `labels` (n,) and `boxes` (n, 4), xyxy pixels of the original image.
    """
    for name in ("logits", "pred_boxes"):  # processors view them, which a user's own model may not allow for
        outputs[name] = outputs[name].contiguous()
    results: list[dict[str, torch.Tensor]] = processor.post_process_object_detection(outputs, threshold, sizes)
    for result, size in zip(results, sizes, strict=True):
        result["boxes"] = result["boxes"].clamp(min=0).minimum(size.flip(0).repeat(2).to(result["boxes"]))
    return results


def handing_on(processor: BaseImageProcessor, most: int) -> BaseImageProcessor:
    """A copy of a processor that hands on so many detections of an image; DETR's can't be more than it has queries.

    Raises:
        ValueError: `most` is not positive.
    """
    if most < 1:
        raise ValueError(f"max_detections={most}: give a positive number.")
    limited = copy.copy(processor)
    if isinstance(limited, DetectionImageProcessor):
        limited.max_detections = most
        limited.candidates_per_level = max(most, limited.candidates_per_level)
    elif "top_k" in inspect.signature(processor.post_process_object_detection).parameters:
        limited.post_process_object_detection = functools.partial(processor.post_process_object_detection, top_k=most)
    return limited


def detect(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    images: Sequence[Image.Image],
    threshold: float,
    speed: Speed = FLOAT32,
) -> list[dict[str, torch.Tensor]]:
    """Detections of images, one after the other, as of :func:`detections`."""
    model.eval()
    results = []
    with running(model, speed):
        for image in images:
            pixels = to_rgb(image, getattr(processor, "pixel_range", None))
            inputs = processor(images=[pixels], return_tensors="pt").to(model.device)
            results += detections(
                processor, forward(model, inputs), torch.tensor([[image.height, image.width]]), threshold
            )
    return results


def to_device(model: PreTrainedModel, device: str | None = None) -> PreTrainedModel:
    """Move a model to a device; by default to the first accelerator, if there is one."""
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
