"""Distillation methods: one file for each, and its configuration in :data:`METHODS`."""

from ..method import METHODS
from .fitnets import FitNets

METHODS.update({config.method.name: config for config in (FitNets,)})

__all__ = ["METHODS", "FitNets"]
