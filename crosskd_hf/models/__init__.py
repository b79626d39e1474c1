"""Detectors for the Hugging Face ecosystem: importing this package registers them with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    AutoVideoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

from .atss import ATSSConfig, ATSSForObjectDetection
from .configuration import DenseDetectorConfig
from .dense import DenseDetector, DenseDetectorOutput
from .faster_rcnn import FasterRCNNConfig, FasterRCNNForObjectDetection, FasterRCNNOutput
from .fcos import FCOSConfig, FCOSForObjectDetection
from .gfl import GFLConfig, GFLForObjectDetection
from .image_processing import DetectionImageProcessor
from .processors import image_processor
from .retinanet import RetinaNetConfig, RetinaNetForObjectDetection
from .tood import TOODConfig, TOODForObjectDetection

DETECTORS: dict[type[PreTrainedConfig], type[PreTrainedModel]] = {
    ATSSConfig: ATSSForObjectDetection,
    FasterRCNNConfig: FasterRCNNForObjectDetection,
    FCOSConfig: FCOSForObjectDetection,
    GFLConfig: GFLForObjectDetection,
    RetinaNetConfig: RetinaNetForObjectDetection,
    TOODConfig: TOODForObjectDetection,
}

for _config, _model in DETECTORS.items():
    AutoConfig.register(_config.model_type, _config)
    AutoModelForObjectDetection.register(_config, _model)
    AutoImageProcessor.register(_config, image_processor_classes={"torchvision": DetectionImageProcessor})
    # A pipeline looks for a video processor too, and would ask to run code that it guesses to lie beside the weights.
    AutoVideoProcessor.register(_config, DetectionImageProcessor)
    # The code travels with the weights, so that trust_remote_code=True works where this package is not installed.
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModelForObjectDetection")
DetectionImageProcessor.register_for_auto_class("AutoImageProcessor")

__all__ = [
    "DETECTORS",
    "ATSSConfig",
    "ATSSForObjectDetection",
    "DenseDetector",
    "DenseDetectorConfig",
    "DenseDetectorOutput",
    "DetectionImageProcessor",
    "FCOSConfig",
    "FCOSForObjectDetection",
    "FasterRCNNConfig",
    "FasterRCNNForObjectDetection",
    "FasterRCNNOutput",
    "GFLConfig",
    "GFLForObjectDetection",
    "RetinaNetConfig",
    "RetinaNetForObjectDetection",
    "TOODConfig",
    "TOODForObjectDetection",
    "image_processor",
]
