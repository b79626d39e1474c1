"""Detection data sets: read, checked, augmented and batched; and synthetic ones."""

from typing import TYPE_CHECKING

from ..lazy import from_modules

if TYPE_CHECKING:
    from .albumentations_adapter import Albumentations
    from .categories import CategoryMap
    from .collators import DetectionCollator
    from .dataset import DetectionData, load_coco, load_objects
    from .inspection import check_data
    from .loading import check_detection_dataset, load_detection_dataset
    from .report import DataError, DataReport, Finding, Place
    from .sampling import AspectRatioSampler
    from .splits import DetectionSplits
    from .transforms import KeepSize, TrainTransform

__all__ = [
    "Albumentations",
    "AspectRatioSampler",
    "CategoryMap",
    "DataError",
    "DataReport",
    "DetectionCollator",
    "DetectionData",
    "DetectionSplits",
    "Finding",
    "KeepSize",
    "Place",
    "TrainTransform",
    "check_data",
    "check_detection_dataset",
    "load_coco",
    "load_detection_dataset",
    "load_objects",
]

# Prediction reads images and class names, and needn't wait for the data set library.
__getattr__ = from_modules(
    __name__,
    {
        "Albumentations": ".albumentations_adapter",
        "AspectRatioSampler": ".sampling",
        "CategoryMap": ".categories",
        "DataError": ".report",
        "DataReport": ".report",
        "DetectionCollator": ".collators",
        "DetectionData": ".dataset",
        "DetectionSplits": ".splits",
        "Finding": ".report",
        "KeepSize": ".transforms",
        "Place": ".report",
        "TrainTransform": ".transforms",
        "check_data": ".inspection",
        "check_detection_dataset": ".loading",
        "load_coco": ".dataset",
        "load_detection_dataset": ".loading",
        "load_objects": ".dataset",
    },
)
