"""`UpdateTrainer`: one update of a student, from its micro-batches to gradients that are finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..distillation import Distiller
from ..inference.detection import explain_small_images
from ..models.losses import LossPart, divide
from . import adapters, supervision, upstream
from .checkpointing_trainer import CheckpointingTrainer
from .classes import check_head
from .guard import NonFiniteGuard, NonFiniteLossError
from .loading import bare_model
from .loss_parts import UpdateSums, add_up, balanced, folded, normalizer_pass, weighted
from .trained_weights import demand_optimized

logger = logging.getLogger(__name__)

Losses = tuple[Any, dict[str, LossPart], dict[str, LossPart]]  # outputs of the student, its own parts, the teacher's


class UpdateTrainer(CheckpointingTrainer):
    """Adds up the loss parts of labels and teacher, divides them once for all processes and micro-batches, and judges.

    A subclass makes the pair: it sets `distiller`, `_loss_func`, `_student_request` and `_head_checked`, and calls
    :meth:`_prepare_updates`.
    """

    distiller: Distiller | None = None
    _loss_func: Callable[..., Tensor] | None = None  # instead of the student's own loss
    _student_request: Mapping[str, Any] = MappingProxyType({})  # further arguments of the student's forward
    _head_checked = False
    # Of the present update.
    _gradient_norm: Tensor | None = None
    _own_images = True
    _update_sums: UpdateSums | None = None
    _micro_batches = 1
    _first_update = False
    _told_of_own_loss = False

    @property
    def student(self) -> PreTrainedModel:
        """The student without a wrapper of peft."""
        return bare_model(self.model)

    def _prepare_updates(self) -> None:
        self._guard = NonFiniteGuard(Path(self.args.output_dir) / "_nonfinite", self.args.process_index)
        self._averaged = self.args.world_size
        self._forget_log()

    def _begin_training(self) -> None:
        super()._begin_training()
        demand_optimized(self.student, self._adapters(), self.optimizer, self.lr_scheduler)

    # ---- Micro-batches ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], None]:
        """The micro-batches of one update, without repeated images; learns their normalizers if there are several.

        None for a run that was at its end when it was resumed: `Trainer` would look for the end behind one update more.
        """
        if 0 < self.state.max_steps <= self.state.global_step:
            return [], None
        batches = []
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            batches.append(self._without_repeats(batch))
        if not batches and self.state.global_step == 0:
            raise ValueError(
                "The training data gave no batch: nothing would be learned. Is the stream empty, or read to its end "
                "already, as an iterator is after its first pass?"
            )
        self._guard.clear()
        self._gradient_norm = None
        if self.distiller is not None:
            self.distiller.forget_passes()
        self._update_sums, self._averaged = None, self.args.world_size
        self._micro_batches = max(len(batches), 1)
        if len(batches) > 1 and self.args.exact_accumulation:
            self._update_sums, self._averaged = self._normalizer_pass(batches), self.args.world_size * len(batches)
        return batches, None

    def _without_repeats(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Cut off what a sampler took from the start of the epoch to fill up the last batches of all processes.

        A process without an image of its own keeps one, and `_own_images` says that it must not count.
        """
        self._own_images = True
        rest = self._images_in_last_round()
        if rest == 0 or not self.accelerator.gradient_state.end_of_dataloader:
            return batch
        size = upstream.micro_batch_size(self)
        own = min(max(rest - self.args.process_index * size, 0), size)
        self._own_images = own > 0
        return {key: value[: max(own, 1)] for key, value in batch.items()}

    def _images_in_last_round(self) -> int:
        """How many images an epoch's last micro-batches hold together; 0 if they are full, or not filled up."""
        args, dataset = self.args, self.train_dataset
        if args.world_size == 1 or args.dataloader_drop_last or args.accelerator_config.split_batches:
            return 0
        if args.train_sampling_strategy == "batch_rebalance" or not isinstance(dataset, Sized):
            return 0
        return len(dataset) % (upstream.micro_batch_size(self) * args.world_size)

    def _normalizer_pass(self, batches: list[dict[str, Any]]) -> UpdateSums:
        self.model.train()
        parts = []
        keeping = nullcontext() if self.distiller is None else self.distiller.keeping_passes()
        with normalizer_pass(self.model), keeping:
            for number, batch in enumerate(batches, start=1):
                _, own, kd = self._forward(self.model, self._prepare_inputs(batch))
                parts.append(weighted(own | kd, self._weight(number == len(batches))))
        return add_up(parts)

    def _weight(self, is_last: bool) -> float:
        return 0.0 if is_last and not self._own_images else 1.0

    # ---- Loss ----

    def _forward(self, model: nn.Module, inputs: dict[str, Any]) -> Losses:
        """Outputs of the student, the parts of its own loss, and those of the distillation."""
        try:
            return self._forward_both(model, inputs)
        except RuntimeError as error:
            explain_small_images(error, inputs["pixel_values"])
            raise

    def _forward_both(self, model: nn.Module, inputs: dict[str, Any]) -> Losses:
        request = {} if self.distiller is None else self.distiller.student_request
        outputs = model(**inputs, **request, **self._student_request)  # `compute_loss` divides the parts, once
        if not self._head_checked:
            check_head(self.student, outputs, self.processing_class)
            self._head_checked = True
        own = self._own_parts(outputs, inputs)
        if self.distiller is None:
            return outputs, own, {}
        self.distiller.update = self.state.global_step
        with self.accelerator.autocast():
            return outputs, own, self.distiller(outputs, inputs)

    def _own_parts(self, outputs: Any, inputs: dict[str, Any]) -> dict[str, LossPart]:
        """The parts of the student's loss on its labels; `compute_loss_func` returns a mean over its images."""
        if self._loss_func is None:
            return supervision.supervised_parts(self.student, outputs, inputs)
        loss = self._loss_func(outputs, inputs["labels"], num_items_in_batch=None)
        images = loss.new_full((), len(inputs["labels"]))
        return {supervision.WHOLE: LossPart(loss * images, images)}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The sum of all loss parts, each divided by its normalizer over micro-batches and processes."""
        inputs = self._normalize(inputs)
        outputs, own, kd = self._forward(model, inputs)
        parts = weighted(own | kd, self._weight(self.accelerator.sync_gradients))
        sums = add_up([parts]) if self._update_sums is None else self._update_sums
        losses = balanced(divide(parts, sums.normalizers, self._averaged), parts, sums.normalizers)
        self._guard.watch(losses, inputs, sums.bad)
        self._note(folded({name: losses[name] for name in own}) | {name: losses[name] for name in kd})
        if self._first_update and kd and self._own_images:
            self._check_distillation({name: losses[name] for name in kd})
        loss = torch.stack(list(losses.values())).sum()
        return (loss, outputs) if return_outputs else loss

    def _check_distillation(self, losses: Mapping[str, Tensor]) -> None:
        assert self.distiller is not None
        self.distiller.check_gradients(losses)
        if torch.stack(list(losses.values())).eq(0).all():
            logger.warning(
                "The distillation loss of the first update is exactly 0. That is right only if the student "
                "equals the teacher, or if the methods begin later."
            )

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward pass of one micro-batch; the adapters' gradients are averaged with the last one."""
        told = len(self._guard)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if len(self._guard) == told:  # a subclass's own `compute_loss`
            self._watch_own_loss(loss, inputs)
        if self.distiller is not None and self.accelerator.sync_gradients:
            adapters.average_gradients(self.distiller)
        return torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0)

    def _watch_own_loss(self, loss: Tensor, inputs: dict[str, Any]) -> None:
        bad = self.accelerator.reduce((~loss.detach().isfinite()).float(), "sum")
        self._guard.watch({"loss": loss}, inputs, bad)
        if self._first_update and self.distiller is not None and not self._told_of_own_loss:
            name = type(self).__name__
            logger.warning(
                "%s.compute_loss doesn't call CrossKDTrainer.compute_loss, so the teacher teaches nothing, unless %s "
                "calls self.distiller(outputs, inputs) itself.",
                name,
                name,
            )
            self._told_of_own_loss = True

    # ---- Gradients ----

    def _adapters(self) -> list[nn.Parameter]:
        return [] if self.distiller is None else adapters.trainable(self.distiller)

    def _clip_grad_norm(self, model: nn.Module, bound: float | None = None) -> Tensor:
        """Clip the gradients of student and adapters together; returns their norm before that."""
        parameters = [*model.parameters(), *self._adapters()]
        norm: Tensor = self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm if bound is None else bound)
        self._gradient_norm = norm
        return norm

    def _before_optimizer_step(self) -> None:
        """The last moment before the weights move, so bad updates end here."""
        super()._before_optimizer_step()
        norm = self._clip_grad_norm(self.model, math.inf) if self._gradient_norm is None else self._gradient_norm
        judged = None if self.accelerator.scaler is not None else norm
        if not self._guard.triggered(judged):
            return
        message = self._guard.report(self.state.global_step + 1, judged)
        if self.args.nonfinite == "stop":
            raise NonFiniteLossError(
                f"{message} Nothing of it reached the weights. Look at the data and the learning "
                "rate, or set nonfinite='skip' to go on without such updates."
            )
        self._guard.skipped += 1
        logger.warning("%s It is skipped (%d so far).", message, self._guard.skipped)
        for parameter in [*self.model.parameters(), *self._adapters()]:
            parameter.grad = None

    def _after_optimizer_step(self) -> None:
        super()._after_optimizer_step()
        for parameter in self._adapters():
            parameter.grad = None

    # ---- Log ----

    def _note(self, losses: Mapping[str, Tensor]) -> None:
        for name, loss in losses.items():
            value = torch.nan_to_num(loss.detach().float(), nan=0.0, posinf=0.0, neginf=0.0)
            value = value / self._micro_batches
            self._log_sums[name] = self._log_sums.get(name, 0.0) + value
        self._log_updates += int(self.accelerator.sync_gradients)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds every loss part, averaged over processes and the updates since the last log, to the training logs."""
        if "loss" in logs and self._log_sums:
            names = sorted(self._log_sums)
            means = torch.stack([self._log_sums[name] for name in names]) / max(self._log_updates, 1)
            means = self.accelerator.reduce(means, "mean")
            logs = {**logs, **dict(zip(names, means.tolist(), strict=True))}
            if self._guard.skipped:
                logs["skipped_updates"] = self._guard.skipped
            if self._gradient_norm is not None:
                norm = float(self._gradient_norm)  # with the adapters' share
                logs["grad_norm"] = norm if math.isfinite(norm) else 0.0  # an update that was skipped
            self._forget_log()
        super().log(logs, start_time)

    def _forget_log(self) -> None:
        self._log_sums: dict[str, Tensor] = {}
        self._log_updates = 0
