"""Distillation methods: one file for each, and its configuration in :data:`METHODS`."""

from ..method import METHODS
from .crosskd import CrossKD
from .fitnets import FitNets
from .kd import KD
from .pkd import PKD

METHODS.update({config.method.name: config for config in (CrossKD, KD, PKD, FitNets)})

__all__ = ["KD", "METHODS", "PKD", "CrossKD", "FitNets"]
