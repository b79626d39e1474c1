"""The contract that every family of distilled detectors meets."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from crosskd_hf.models.losses import LossPart


class Distiller(nn.Module):
    """Everything between a student's forward pass and the distillation losses of one student-teacher pair.

    Trainable adapters are sub-modules of the distiller; it may have none. The teacher is frozen, in evaluation mode,
    and held outside the module tree: it is neither saved nor trained nor wrapped with the distiller.
    """

    def __init__(self, teacher: PreTrainedModel):
        super().__init__()
        self._teacher = [teacher.requires_grad_(False).eval()]  # a list hides it from nn.Module's registration
        self.student_request: dict[str, Any] = {}

    @property
    def teacher(self) -> PreTrainedModel:
        """The frozen teacher."""
        return self._teacher[0]

    def forward(self, outputs: Any, inputs: Mapping[str, Any]) -> dict[str, LossPart]:
        """Distillation losses.

        Args:
            outputs: What the student's `forward(**inputs, **student_request)` returned, with its graph.
            inputs: The batch. The teacher's own pass over it is done here, without gradient.
        """
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Cut, losses and weights, adapters and class map, fit for JSON."""
        raise NotImplementedError

    def silent_parameters(self, student: PreTrainedModel) -> list[nn.Parameter]:
        """Student parameters that these distillation losses must not reach: its layers behind the cut."""
        return []

    def check_gradients(self, student: PreTrainedModel, kd_loss: Tensor) -> None:
        """Assert that this is the distillation it claims to be; keeps the graph for the real backward pass.

        Args:
            student: The bare student.
            kd_loss: Sum of the distillation losses of one batch, with its graph.

        Raises:
            RuntimeError: The loss is not finite, its gradient does not reach the student's trunk, or it reaches layers
                behind the cut.
        """
        if not torch.isfinite(kd_loss):
            raise RuntimeError(f"The distillation loss of the first step is {kd_loss.item()}: check teacher and data.")
        silent = {id(parameter) for parameter in self.silent_parameters(student)}
        trained = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
        gradients: tuple[Tensor | None, ...] = (None,) * len(trained)
        if kd_loss.requires_grad:
            gradients = torch.autograd.grad(kd_loss, [p for _, p in trained], retain_graph=True, allow_unused=True)
        reached = [(name, id(p)) for (name, p), g in zip(trained, gradients, strict=True) if g is not None and g.any()]
        leaked = [name for name, key in reached if key in silent]
        if leaked:
            raise RuntimeError(f"The distillation loss reaches student layers behind the cut, such as {leaked[:3]}.")
        if kd_loss.item() != 0 and not reached:
            raise RuntimeError(
                "The distillation loss does not depend on any trained parameter of the student: is its trunk frozen?"
            )
