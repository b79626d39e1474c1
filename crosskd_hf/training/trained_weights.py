"""What an optimiser moves: judged before the first update, for what it doesn't hold stays as it is in silence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from torch import nn


def demand_trainable(student: nn.Module) -> None:
    """Raise `ValueError` for a student that is frozen as a whole."""
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError(
            "No parameter of the student is to be trained, all are frozen: model.requires_grad_(True), or leave out "
            "what froze them."
        )


def demand_optimized(student: nn.Module, adapters: Sequence[nn.Parameter], optimizer: Any, scheduler: Any) -> None:
    """Judge an optimiser that a user or a subclass made.

    Args:
        student: Of which a part may be left out on purpose.
        adapters: The trainable parameters of the distillation.
        optimizer, scheduler: As the trainer has them.

    Raises:
        ValueError: It holds nothing of the student, or lacks adapters, or the schedule is that of another optimiser.
    """
    scheduled = getattr(getattr(scheduler, "scheduler", scheduler), "optimizer", optimizer)
    if _plain(scheduled) is not _plain(optimizer):
        raise ValueError(
            "The learning rate schedule in optimizers was made for another optimiser, so the rates of this one would "
            "stay as they are: give both, optimizers=(optimizer, schedule), or lr_scheduler_type."
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in student.parameters() if parameter.requires_grad):
        raise ValueError(
            "The optimiser holds no parameter of the student, so nothing would be learned: it was made for another "
            "model, or for parameters that were replaced since. Make it from the parameters() of the model that the "
            "trainer gets."
        )
    missing = sum(id(parameter) not in held for parameter in adapters)
    if missing:
        raise ValueError(
            f"The optimiser lacks {missing} parameters of the adapters between student and teacher, which would stay "
            "random: a create_optimizer of your own has to add them, optimizer.add_param_group({'params': [p for p in "
            "self.distiller.parameters() if p.requires_grad]}), or let CrossKDTrainer.create_optimizer do it."
        )


def _plain(optimizer: Any) -> Any:
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
