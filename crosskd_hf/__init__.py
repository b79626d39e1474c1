"""Cross-head knowledge distillation of object detectors for the Hugging Face ecosystem."""

from . import models as models  # registers the detectors with the Auto classes
from .trainer import CrossKDTrainer
from .training_args import CrossKDConfig

__all__ = ["CrossKDConfig", "CrossKDTrainer"]
