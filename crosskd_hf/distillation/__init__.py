"""Distillation: methods (what is distilled), views of detectors (who), and the distiller that brings them together."""

from ..models.losses import LossPart as LossPart
from .distiller import Distiller as Distiller
from .method import Method as Method
from .method import MethodConfig as MethodConfig
from .method import Paper as Paper
from .method import option as option
from .methods import *  # noqa: F403  # every configuration, and METHODS
from .passes import Batch as Batch
from .passes import DetectorView as DetectorView
from .passes import Pass as Pass
