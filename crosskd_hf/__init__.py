"""Cross-head knowledge distillation of object detectors for the Hugging Face ecosystem."""

import importlib
from typing import TYPE_CHECKING, Any

from .lazy import from_modules, import_after

if TYPE_CHECKING:
    from . import models as models
    from .create import create_detector
    from .data.loading import load_detection_dataset
    from .experiments.distill import distill
    from .training.config import CrossKDConfig
    from .training.trainer import CrossKDTrainer

__all__ = ["CrossKDConfig", "CrossKDTrainer", "create_detector", "distill", "load_detection_dataset"]

# The detectors are in the Auto classes whenever transformers is there, whichever of the two is imported first.
import_after("transformers", f"{__name__}.models")

_public = from_modules(
    __name__,
    {
        "CrossKDConfig": ".training.config",
        "CrossKDTrainer": ".training.trainer",
        "load_detection_dataset": ".data.loading",
        "create_detector": ".create",
        "distill": ".experiments.distill",
    },
)


def __getattr__(name: str) -> Any:
    """The trainer and the methods are imported when they are asked for: detection alone doesn't need them."""
    if name == "models":
        return importlib.import_module(".models", __name__)
    if name[:1].isupper() and name not in __all__:
        methods = vars(importlib.import_module(".distillation.methods", __name__))
        if name in methods:
            return methods[name]
    return _public(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
