"""Detectors for the Hugging Face ecosystem: importing this package registers them with the Auto classes."""

from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

from .atss import ATSSConfig, ATSSForObjectDetection
from .dense import DenseDetector, DenseDetectorConfig, DenseDetectorOutput
from .fcos import FCOSConfig, FCOSForObjectDetection
from .gfl import GFLConfig, GFLForObjectDetection
from .image_processing import DetectionImageProcessor
from .retinanet import RetinaNetConfig, RetinaNetForObjectDetection

DETECTORS: dict[type[DenseDetectorConfig], type[DenseDetector]] = {
    ATSSConfig: ATSSForObjectDetection,
    FCOSConfig: FCOSForObjectDetection,
    GFLConfig: GFLForObjectDetection,
    RetinaNetConfig: RetinaNetForObjectDetection,
}

for _config, _model in DETECTORS.items():
    AutoConfig.register(_config.model_type, _config)
    AutoModelForObjectDetection.register(_config, _model)
    AutoImageProcessor.register(_config, image_processor_classes={"torchvision": DetectionImageProcessor})
    MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES[_config.model_type] = _model.__name__  # known to the pipeline's check
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
    "GFLConfig",
    "GFLForObjectDetection",
    "RetinaNetConfig",
    "RetinaNetForObjectDetection",
]
