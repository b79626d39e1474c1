"""Detection data sets: read, checked, augmented, batched, and made."""

from .categories import CategoryMap
from .dataset import DetectionCollator, DetectionData, load_coco, load_objects
from .inspection import check_data
from .report import DataError, DataReport, Finding, Place
from .sampling import AspectRatioSampler
from .transforms import KeepSize, TrainTransform

__all__ = [
    "AspectRatioSampler",
    "CategoryMap",
    "DataError",
    "DataReport",
    "DetectionCollator",
    "DetectionData",
    "Finding",
    "KeepSize",
    "Place",
    "TrainTransform",
    "check_data",
    "load_coco",
    "load_objects",
]
