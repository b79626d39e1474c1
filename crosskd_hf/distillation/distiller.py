"""Where a student, its teacher and the methods meet: one pass of the teacher, any methods, named parts of the loss."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedModel

from ..models.losses import LossPart
from .detectors import view
from .frozen import FrozenCopy
from .method import Method, MethodConfig
from .passes import Batch, Needs, Pair, Pass
from .pixels import PixelAdapter, PixelFormat


class Distiller(nn.Module):
    """Everything between a student's forward pass and the distillation losses of one student-teacher pair.

    Trainable adapters are sub-modules; there may be none. The teacher is frozen, in evaluation mode, and held outside
    the module tree: it is neither saved nor trained nor wrapped with the distiller.

    Args:
        student, teacher: Two detectors that :data:`~.detectors.VIEWS` knows.
        methods: Configurations, or their strings.
        student_processor, teacher_processor: With both, the teacher sees pixels normalised its own way.
        fast_teacher: Teach by a :class:`FrozenCopy`, whose outputs differ by rounding.
        dtype: With it, the type of autocast if every pass is made under autocast.

    Attributes:
        student_request: Further arguments of the student's forward pass.
        update: Optimiser updates before the present one; whoever trains sets it.

    Raises:
        ValueError: The pair can't be distilled so; the message says why and what would work.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        methods: Sequence[MethodConfig | str],
        student_processor: BaseImageProcessor | None = None,
        teacher_processor: BaseImageProcessor | None = None,
        fast_teacher: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        pixels = None
        if student_processor is not None and teacher_processor is not None:
            pixels = PixelAdapter(PixelFormat.of(student_processor), PixelFormat.of(teacher_processor))
        teacher.requires_grad_(False).eval()
        self._frozen = FrozenCopy(teacher, dtype) if fast_teacher else None
        self._kept: deque[Pass] = deque()
        self._keeping = False
        taught_by = teacher if self._frozen is None else self._frozen.model
        self.pair = Pair(view(student, "student"), view(taught_by, "teacher", pixels))
        configs = MethodConfig.parse_all(methods)
        _check_names([config.name for config in configs])
        _share_strides(self.pair, configs)
        self.methods = nn.ModuleDict({config.name: self._build(config) for config in configs})
        self.student_request = self.pair.student.request(self._needs("student_needs"))
        self.pair.teacher.request(self._needs("teacher_needs"))
        self.update = 0

    def _build(self, config: MethodConfig) -> Method:
        return config.method(config.published(self.pair), *self.pair)

    def _needs(self, whose: str) -> Needs:
        return frozenset().union(*(getattr(method, whose) for method in self.named_methods.values()))

    @property
    def named_methods(self) -> dict[str, Method]:
        """The methods by their names."""
        return cast("dict[str, Method]", dict(self.methods.items()))

    @property
    def teacher(self) -> PreTrainedModel:
        """The frozen teacher, as it was given."""
        return self.pair.teacher.model if self._frozen is None else self._frozen.teacher  # type: ignore[no-any-return]

    def forward(self, outputs: Any, inputs: Mapping[str, Any]) -> dict[str, LossPart]:
        """Distillation losses, keyed `<method>/<term>`.

        Args:
            outputs: What the student's `forward(**inputs, **student_request)` returned, with its graph.
            inputs: The batch. The teacher's own pass over it is done here, without gradient.
        """
        batch = Batch(inputs["pixel_values"], inputs.get("pixel_mask"), inputs.get("labels") or [], self.update)
        student = self.pair.student.read(outputs, batch)
        teacher = self._teacher_pass(batch)
        parts: dict[str, LossPart] = {}
        for name, method in self.named_methods.items():
            weights = {term: method.config.weight * weight for term, weight in method.config.terms.items()}
            for term, part in method(student, teacher, batch).items():
                if term not in method.terms:
                    raise ValueError(f"{name} returned the term {term!r}, but it names {method.terms} as its terms.")
                if term in weights:
                    parts[f"{name}/{term}"] = part._replace(total=weights[term] * part.total)
        return parts

    def _teacher_pass(self, batch: Batch) -> Pass:
        if self._kept and not self._keeping:
            return self.pair.teacher.again(self._kept.popleft())
        if self._frozen is not None:
            self._frozen.refresh()
        found = self.pair.teacher.teacher_pass(batch)
        if self._keeping:
            self._kept.append(found)
        return found

    @contextmanager
    def keeping_passes(self) -> Iterator[None]:
        """The teacher's passes of calls inside of it are kept; as many calls after it take them, in this order.

        These calls must be made on the same batches.
        """
        self.forget_passes()
        self._keeping = True
        try:
            yield
        finally:
            self._keeping = False

    def forget_passes(self) -> None:
        """Drop what :meth:`keeping_passes` has kept."""
        self._kept.clear()

    def check_length(self, updates: int) -> None:
        """Raises ValueError if a method can have no effect in a run of so many updates."""
        for method in self.named_methods.values():
            method.check_length(updates)

    def prepare_student(self) -> None:
        """What methods change in the student before its training begins."""
        teaching, self.pair.teacher.model = self.pair.teacher.model, self.teacher  # weights as they were given
        try:
            for method in self.named_methods.values():
                method.prepare_student(*self.pair)
        finally:
            self.pair.teacher.model = teaching

    def describe(self) -> dict[str, Any]:
        """What is distilled, fit for JSON.

        Returns:
            `methods` with all their numbers, their `papers`, the shapes of `adapters`, and `classes`, the indices of
            those that are compared by either model and the names of the `unknown` ones; None if none are compared.
        """
        shared = next((m.classes for m in self.named_methods.values() if m.classes is not None), None)
        return {
            "methods": {name: method.config.describe() for name, method in self.named_methods.items()},
            "papers": {name: str(m.paper) for name, m in self.named_methods.items() if m.paper is not None},
            "adapters": {
                name.removeprefix("methods."): list(parameter.shape) for name, parameter in self.named_parameters()
            },
            "classes": None if shared is None else shared._asdict(),
        }

    def close(self) -> None:
        """Take the views' hooks off both models; this also happens when the distiller is garbage-collected."""
        for each in self.pair:
            each.close()

    def __enter__(self) -> Distiller:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- What the first update proves ----

    def check_gradients(self, losses: Mapping[str, Tensor]) -> None:
        """Assert that every method is the distillation it claims to be; keeps the graph for the real backward pass.

        Args:
            losses: The divided parts of one batch with their graph, by key.

        Raises:
            RuntimeError: A loss is not finite, its gradient does not reach the student, or it reaches layers that the
                method must not reach.
        """
        trained = [(name, p) for name, p in self.pair.student.model.named_parameters() if p.requires_grad]
        for name, method in self.named_methods.items():
            own = [loss for key, loss in losses.items() if key.startswith(f"{name}/")]
            if own:
                spared = {id(parameter) for parameter in method.unreached(self.pair.student)}
                _check_gradient(name, torch.stack(own).sum(), trained, spared)


def _check_gradient(name: str, loss: Tensor, trained: list[tuple[str, nn.Parameter]], spared: set[int]) -> None:
    if not torch.isfinite(loss):
        raise RuntimeError(f"The {name} loss of the first step is {loss.item()}: check teacher and data.")
    gradients: tuple[Tensor | None, ...] = (None,) * len(trained)
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, [p for _, p in trained], retain_graph=True, allow_unused=True)
    reached = [(key, id(p)) for (key, p), g in zip(trained, gradients, strict=True) if g is not None and g.any()]
    leaked = [key for key, parameter in reached if parameter in spared]
    if leaked:
        raise RuntimeError(f"The {name} loss reaches student layers that it must not reach, such as {leaked[:3]}.")
    if loss.item() != 0 and not reached:
        raise RuntimeError(
            f"The {name} loss does not depend on any trained parameter of the student: is its trunk frozen?"
        )


def _check_names(names: list[str]) -> None:
    if not names:
        raise ValueError("methods is empty: name at least one, such as 'crosskd', or train without a teacher.")
    if len({*names}) < len(names):
        raise ValueError(f"methods names {', '.join(names)}: give each method once.")


def _share_strides(pair: Pair, configs: Sequence[MethodConfig]) -> None:
    shared = tuple(stride for stride in pair.student.strides if stride in pair.teacher.strides)
    reading = [config.name for config in configs if "features" in config.method.needs]
    if not shared and reading:
        raise ValueError(
            f"{', '.join(reading)} compares features of equal strides, but the student has features of strides "
            f"{pair.student.strides}, the teacher of {pair.teacher.strides}. Choose feature levels that both have."
        )
    for each in pair:
        each.keep(shared)
