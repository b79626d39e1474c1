"""Distillation: methods (what is distilled), views of detectors (who), and the distiller that brings them together."""

from .distiller import Distiller
from .method import METHODS, Method, MethodConfig, option
from .methods import KD, PKD, CrossKD, FitNets

__all__ = ["KD", "METHODS", "PKD", "CrossKD", "Distiller", "FitNets", "Method", "MethodConfig", "option"]
