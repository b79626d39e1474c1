"""The image processor of each architecture: one table for the converter, new models, examples and the command line."""

from typing import Any

from transformers import PreTrainedConfig

from .image_processing import DetectionImageProcessor

POST_PROCESSING: dict[str, dict[str, Any]] = {
    "atss": {"nms_threshold": 0.6},
    "deformable_detr": {
        "size_divisor": 1,
        "score_threshold": 0.0,
        "candidates_per_level": 100,
        "nms_threshold": 1.0,  # an IoU is never above 1: nothing is suppressed
        "max_detections": 100,
    },
    "faster_rcnn": {"nms_threshold": 0.5},
    "fcos": {"nms_threshold": 0.5},
    "gfl": {"nms_threshold": 0.6},
    "retinanet": {"nms_threshold": 0.5},
    "tood": {"nms_threshold": 0.6},
}
"""What differs from `DetectionImageProcessor`'s defaults, by architecture (MMDetection's `test_cfg` of each head)."""

CAFFE_PIXELS: dict[str, Any] = {
    "image_mean": [122.7717 / 255, 115.9465 / 255, 102.9801 / 255],
    "image_std": [1 / 255] * 3,
}
"""RGB pixels of Caffe's ResNets; the order BGR of their files is folded into the first convolution."""


def image_processor(
    detector: str | PreTrainedConfig | type[PreTrainedConfig], **settings: Any
) -> DetectionImageProcessor:
    """The image processor of an architecture.

    Args:
        detector: Its name, such as "retinanet", or its configuration.
        settings: Of `DetectionImageProcessor`; they win over the table.

    Raises:
        ValueError: The architecture is unknown.
    """
    name = (detector if isinstance(detector, str) else detector.model_type).removeprefix("crosskd_")
    if name not in POST_PROCESSING:
        raise ValueError(f"No image processor is known for {name!r}: choose one of {', '.join(POST_PROCESSING)}.")
    return DetectionImageProcessor(**POST_PROCESSING[name] | settings)
