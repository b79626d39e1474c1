"""Cross-head knowledge distillation of object detectors for the Hugging Face ecosystem."""

import importlib
from typing import TYPE_CHECKING, Any

from . import models as models  # registers the detectors with the Auto classes

if TYPE_CHECKING:
    from .training.config import CrossKDConfig
    from .training.trainer import CrossKDTrainer

__all__ = ["CrossKDConfig", "CrossKDTrainer"]

_MODULES = {"CrossKDConfig": ".training.config", "CrossKDTrainer": ".training.trainer"}


def __getattr__(name: str) -> Any:
    """The trainer and the methods are imported when they are asked for: detection alone doesn't need them."""
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name], __name__), name)
    if name[:1].isupper():
        methods = vars(importlib.import_module(".distillation.methods", __name__))
        if name in methods:
            return methods[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
