"""Distillation methods: what passes between a student and its frozen teacher."""

from .base import Distiller
from .config import DistillationConfig
from .dense import DenseDistiller
from .faster_rcnn import FasterRCNNDistiller
from .pair import make_distiller

__all__ = ["DenseDistiller", "DistillationConfig", "Distiller", "FasterRCNNDistiller", "make_distiller"]
