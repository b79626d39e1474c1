"""From a batch of pixels to detections: the one way that prediction, evaluation and training's evaluation take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedModel

from ..models.pixels import to_rgb
from .precision import in_type_of, widen_outputs, widened


@torch.no_grad()
def forward(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """What a model makes of a batch, in float32, even if its weights are in half precision."""
    pixels = in_type_of(model, inputs["pixel_values"])
    return widen_outputs(model(**{**inputs, "pixel_values": pixels}))


def detections(
    processor: BaseImageProcessor, outputs: Any, sizes: Tensor, threshold: float
) -> list[dict[str, torch.Tensor]]:
    """Read a model's outputs.

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
    return results


def detect(
    model: PreTrainedModel, processor: BaseImageProcessor, images: Sequence[Image.Image], threshold: float
) -> list[dict[str, torch.Tensor]]:
    """Detections of images, one after the other, as of :func:`detections`."""
    model.eval()
    results = []
    with widened(model):
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
