"""One step of a student under a distiller, as the trainer makes it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from crosskd_hf.distillation import Distiller
from crosskd_hf.models.losses import LossPart, divide


def distilled_parts(distiller: Distiller, student: Any, batch: dict[str, Any]) -> dict[str, LossPart]:
    """The parts of the distillation's loss on a batch, with their graph."""
    return distiller(student(**batch, **distiller.student_request), batch)


def distilled_losses(distiller: Distiller, student: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """The same, divided."""
    return divide(distilled_parts(distiller, student, batch))
