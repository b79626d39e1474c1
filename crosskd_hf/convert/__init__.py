"""Checkpoints of MMDetection and torchvision as models of this library and of transformers."""

from .checkpoint import Checkpoint, CheckpointError, Conversion, read_checkpoint
from .mmdet_checkpoint import convert_mmdet_checkpoint
from .torchvision import convert_torchvision, load_torchvision

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Conversion",
    "convert_mmdet_checkpoint",
    "convert_torchvision",
    "load_torchvision",
    "read_checkpoint",
]
