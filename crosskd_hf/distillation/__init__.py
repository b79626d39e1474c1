"""Distillation: methods (what is distilled), views of detectors (who), and the distiller that brings them together."""

from .distiller import Distiller as Distiller
from .method import Method as Method
from .method import MethodConfig as MethodConfig
from .method import option as option
from .methods import *  # noqa: F403  # every configuration, and METHODS
