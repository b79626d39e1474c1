"""`CocoTrainer`: detection data, their order and augmentation, and the optimisers and schedules of detectors."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel, TrainerCallback

from ..data.class_names import class_names
from ..data.collators import DetectionCollator, EvaluationCollator
from ..data.sampling import AspectRatioSampler
from ..data.transforms import Record
from ..inference.speed import to_channels_last
from ..models.dense import DenseDetector
from . import arguments, ineffective, upstream
from .arguments import WithoutMask
from .best_metric import adds_metrics, check_best
from .classes import CheckedLabels, check_classes
from .config import CrossKDConfig
from .evaluating_trainer import EvaluatingTrainer
from .first_batch import check_batch
from .loading import bare_model
from .packing import Packing
from .raw_data import in_schema
from .reproducible import RandomOrder, ReproducibleCollator
from .schedules import OPTIMIZERS, GroupRule, decay_updates, parameter_groups, parse_factors, step_schedule
from .termination import spare_workers
from .trained_backbone import demand_trained_backbone

logger = logging.getLogger(__name__)


class CocoTrainer(EvaluatingTrainer):
    """Examples of `load_coco` in, detectors' schedules; sampling and augmentation depend on seed and epoch alone.

    Args:
        model, args, train_dataset, eval_dataset, processing_class, train_transform, data_collator, callbacks,
            optimizers, model_init, compute_metrics, optimizer_cls_and_kwargs, preprocess_logits_for_metrics: As of
            `CrossKDTrainer`.

    Raises:
        ValueError: Neither an image processor nor a collator is given, or the student's classes are not those of the
            data.
        NotImplementedError: DeepSpeed or FSDP.
        UpstreamError: transformers is of a release that the trainer doesn't fit.
    """

    data_collator: Any
    optimizer: Any
    lr_scheduler: Any
    _train_sampler: Any = None
    _step_scheduler: Any = None
    _optimizer_for: int | None = None  # images an update, of an optimiser that was made here

    def __init__(
        self,
        model: PreTrainedModel,
        args: CrossKDConfig,
        train_dataset: Any,
        eval_dataset: Any,
        processing_class: BaseImageProcessor | None,
        train_transform: Callable[[Record], Record] | None,
        data_collator: Callable[[Sequence[Any]], dict[str, Any]] | None,
        callbacks: list[TrainerCallback] | None,
        optimizers: tuple[Any, Any],
        model_init: Callable[..., PreTrainedModel] | None,
        compute_metrics: Callable[..., dict[str, float]] | None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None,
    ) -> None:
        arguments.check_processing(processing_class, data_collator, eval_dataset)
        upstream.check()
        if data_collator is None:
            train_dataset = in_schema(train_dataset, bare_model(model).config, "training data")
        eval_dataset = in_schema(eval_dataset, bare_model(model).config, "evaluation data")
        arguments.check_data(train_dataset, eval_dataset, args)
        arguments.check_metrics(args, compute_metrics, preprocess_logits_for_metrics)
        arguments.check_optimizer(optimizer_cls_and_kwargs, optimizers, model_init)
        ineffective.refuse_beside_given(args, optimizers, optimizer_cls_and_kwargs)
        student = _laid_out(bare_model(model), args)
        check_classes(student, train_dataset, eval_dataset, data_collator is None)
        if train_dataset is not None:
            demand_trained_backbone(student)
        names = class_names(student.config)
        check_best(args, eval_dataset, names, adds_metrics(type(self), compute_metrics, callbacks))
        collators = _collators(processing_class, train_transform, data_collator, args.seed, len(names))
        super().__init__(
            model=model,
            args=args,
            data_collator=collators[0],
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.callback_handler.callbacks.insert(0, _Moments(self))  # other callbacks see the averaged weights
        self._refuse_sharding()
        self._eval_collator, self._own_collator = collators[1], data_collator is not None
        self._train_transform = train_transform
        self.model_init = model_init  # its first model is known already
        if data_collator is not None or not arguments.takes(bare_model(self.model), "pixel_mask"):
            self._check_batches()

    def _refuse_sharding(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise NotImplementedError(
                "DeepSpeed and FSDP are not supported: a detector and its teacher fit on one device. "
                "Launch plain processes: accelerate launch --multi_gpu ..."
            )

    def _adopt_model(self) -> None:
        """Make ready what depends on the student; `model_init` makes a new one for every run."""
        check_classes(bare_model(self.model), self.train_dataset, self.eval_dataset, not self._own_collator)
        demand_trained_backbone(bare_model(self.model))
        _laid_out(self.model, self.args)

    # ---- Data ----

    def _check_batches(self) -> None:
        """Judge a first batch of all data, where collator or model are not of this package."""
        evaluation = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else {"": self.eval_dataset}
        pairs: list[tuple[Any, Any, bool]] = [(data, self._eval_collator, True) for data in evaluation.values()]
        for dataset, collator, evaluated in [(self.train_dataset, self.data_collator, False), *pairs]:
            count = min(2, len(dataset)) if isinstance(dataset, Sized) else 0
            if count > 0:
                with arguments.same_chance():
                    batch = self._fitting(collator)([dataset[number] for number in range(count)])
                check_batch(batch, bare_model(self.model), evaluated)

    def get_train_dataloader(self) -> Any:
        """As of `Trainer`, uint8 pixels; labels that are none of the student's classes stop it at their batch."""
        collator = self.data_collator
        if isinstance(collator, DetectionCollator) and not self._own_collator:
            collator = collator.compacted()
        if not isinstance(collator, DetectionCollator) or collator.num_classes is None:
            seen = isinstance(self.train_dataset, Sized)
            collator = CheckedLabels(collator, len(class_names(self.model.config)), seen)
        with self._collating(collator):
            return spare_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As of `Trainer`, without augmentation and of every image."""
        with self._evaluating():
            return spare_workers(super().get_eval_dataloader(self._known(eval_dataset, "evaluation data")))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As of `Trainer`, without augmentation and of every image."""
        with self._evaluating():
            return spare_workers(super().get_test_dataloader(self._known(test_dataset, "test data")))

    def _known(self, dataset: Any, what: str) -> Any:
        """A data set given to a method, as the constructor would take it; the name of one among several stays."""
        if isinstance(dataset, str) and isinstance(self.eval_dataset, Mapping) and dataset in self.eval_dataset:
            return dataset
        return in_schema(dataset, bare_model(self.model).config, what)

    def _fitting(self, collator: Any) -> Any:
        """The collator without a mask, for a model that takes none."""
        model = bare_model(self.model)
        return collator if arguments.takes(model, "pixel_mask") else WithoutMask(collator, type(model).__name__)

    @contextmanager
    def _collating(self, collator: Any) -> Iterator[None]:
        training_collator, self.data_collator = self.data_collator, Packing(self._fitting(collator))
        try:
            yield
        finally:
            self.data_collator = training_collator

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Inside of it `Trainer` makes loaders of evaluation; it would leave out their last batch with `drop_last`."""
        given, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            with self._collating(self._eval_collator):
                yield
        finally:
            self.args.dataloader_drop_last = given

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if self.args.group_by_aspect_ratio:
            sampler: Any = AspectRatioSampler(dataset["width"], dataset["height"], self._images_per_update(), seed)
        elif self.args.train_sampling_strategy == "random" and isinstance(dataset, Sized):
            sampler = RandomOrder(len(dataset), seed)
        else:
            return super()._get_train_sampler(train_dataset)
        self._train_sampler = sampler
        return sampler

    def _set_epoch(self, epoch: int) -> None:
        """Tell sampler, augmentation and model; accelerate's loaders don't reach the sampler of a resumed epoch."""
        for part in (self._train_sampler, self.data_collator):
            if isinstance(part, RandomOrder | AspectRatioSampler | ReproducibleCollator):
                part.set_epoch(epoch)
        # A stream has no epochs: `state.epoch` is then the share of the run that is done.
        model = bare_model(self.model)
        if isinstance(model, DenseDetector) and isinstance(self.train_dataset, Sized):
            model.set_epoch(epoch)

    # ---- Moments of a run ----

    def _begin_training(self) -> None:
        """Model, optimiser and schedule are ready, those of a checkpoint loaded."""
        self._tell_images_per_update()
        self._tell_of_rates_out_of_reach()

    def _before_optimizer_step(self) -> None:
        """The gradients are complete and clipped."""

    def _after_optimizer_step(self) -> None:
        """The weights have moved; the gradients are still there."""

    def _after_update(self) -> None:
        """The update is complete."""

    def _end_training(self) -> None:
        """The run is over, the best checkpoint loaded if it was asked for."""

    def _images_per_update(self) -> int:
        return int(self.get_total_train_batch_size(self.args))

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """0: six operations per parameter and pixel, as the base class counts, mean nothing for a detector."""
        return 0

    def _tell_images_per_update(self) -> None:
        """What an update is made of, before the first one: a launcher may have started less than it was asked for."""
        if not self.is_world_process_zero():
            return
        args, alone = self.args, self.args.world_size == 1 and "WORLD_SIZE" not in os.environ
        asked_for_more = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
        logger.warning(
            "%d x %d x %d = %d images an update (processes x batch x accumulation)%s%s",
            args.world_size,
            upstream.micro_batch_size(self),
            args.gradient_accumulation_steps,
            self._images_per_update(),
            "" if args.schedule is None else f", learning rate {self._base_learning_rate():g}",
            "; for several processes on CPUs: torchrun --nproc_per_node N" if alone and asked_for_more else "",
        )

    def _tell_of_rates_out_of_reach(self) -> None:
        """A warm-up that is longer than the run, and decays behind its end."""
        updates, args = self.state.max_steps, self.args
        if not self.is_world_process_zero():
            return
        warmup = args.get_warmup_steps(updates)
        if warmup > updates:
            logger.warning(
                "The warm-up takes %d updates, the run has %d: it ends before the learning rate is reached "
                "(warmup_steps).", warmup, updates,
            )  # fmt: skip
        late = [epoch for epoch in args.decay_epochs or () if round(epoch * self._updates_per_epoch()) >= updates]
        if late:
            logger.warning(
                "The learning rate doesn't fall at decay_epochs %s: the run ends after epoch %.4g.",
                late, updates / self._updates_per_epoch(),
            )  # fmt: skip

    # ---- Optimiser ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """SGD of the schedule, or Hugging Face's optimiser; a new one if updates have got another number of images."""
        if self._optimizer_for not in (None, self._images_per_update()):
            self.optimizer = None
        if self.optimizer is None:
            self._optimizer_for = self._images_per_update()
            self._new_optimizer(self.model if model is None else model)
        return self.optimizer

    def _new_optimizer(self, model: nn.Module) -> None:
        args = self.args
        factors = parse_factors(args.lr_factors)
        if args.schedule is None and args.backbone_lr is None and not factors:
            super().create_optimizer(model)
            return
        rule = GroupRule(
            self._base_learning_rate(),
            args.weight_decay,
            None if args.backbone_lr is None else self._learning_rate(args.backbone_lr),
            factors,
            args.bias_lr_factor,
            args.bias_weight_decay,
            () if args.schedule else _undecayed(model, self.get_decay_parameter_names(model)),
        )
        kind, settings = self._optimizer_kind(model)
        self.optimizer = kind(parameter_groups(model, rule), **settings)

    def _optimizer_kind(self, model: nn.Module) -> tuple[Any, dict[str, Any]]:
        if self.optimizer_cls_and_kwargs is not None:
            return self.optimizer_cls_and_kwargs
        schedule = self.args.schedule_settings()
        if schedule is None:
            return self.get_optimizer_cls_and_kwargs(self.args, model)
        kind, settings = OPTIMIZERS[schedule.optimizer]
        return kind, {"lr": self._base_learning_rate(), **settings}

    def _base_learning_rate(self) -> float:
        """Of parameters without a rule of their own; that of `optimizer_cls_and_kwargs` is used as it is."""
        given = None if self.optimizer_cls_and_kwargs is None else self.optimizer_cls_and_kwargs[1].get("lr")
        return self._learning_rate(self.args.learning_rate) if given is None else given

    def _learning_rate(self, given: float) -> float:
        schedule = self.args.schedule_settings()
        if schedule is None or not self.args.scale_learning_rate:
            return given
        return given * self._images_per_update() / schedule.images_per_update

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The step schedule, or `lr_scheduler_type`."""
        schedule = self.args.schedule_settings()
        is_given = self.lr_scheduler is not None and self.lr_scheduler is not self._step_scheduler
        if schedule is None or is_given:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)
        decays = decay_updates(schedule, num_training_steps)
        if self.args.decay_epochs is not None:
            decays = [round(epoch * self._updates_per_epoch()) for epoch in self.args.decay_epochs]
        self.lr_scheduler = step_schedule(optimizer or self.optimizer, decays, warmup, schedule.warmup_kind)
        self._step_scheduler = self.lr_scheduler  # another call to train() gets a new one
        return self.lr_scheduler

    def _updates_per_epoch(self) -> int:
        if not isinstance(self.train_dataset, Sized):
            raise ValueError(
                "decay_epochs needs training data of a known length: leave it out, then the schedule's decays are "
                "fractions of max_steps."
            )
        args = self.args
        images = upstream.micro_batch_size(self) * args.world_size
        count = len(self.train_dataset)
        batches = count // images if args.dataloader_drop_last else math.ceil(count / images)
        return max(math.ceil(batches / args.gradient_accumulation_steps), 1)


def _laid_out(model: PreTrainedModel, args: CrossKDConfig) -> PreTrainedModel:
    """The model, its weights in the layout that was asked for, each in memory of its own.

    transformers loads some weights as parts of one tensor (RF-DETR's queries, keys and values); safetensors saves no
    part of a tensor.
    """
    for parameter in model.parameters():
        if parameter.untyped_storage().nbytes() > parameter.nbytes:
            parameter.data = parameter.data.clone()
    if args.channels_last:
        to_channels_last(model, needed=not args.fast)
    return model


class _Moments(TrainerCallback):
    """Calls the trainer at the moments for which `Trainer` has callbacks, but no methods."""

    def __init__(self, trainer: CocoTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: CrossKDConfig, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._begin_training()

    def on_epoch_begin(self, args: CrossKDConfig, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args: CrossKDConfig, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._before_optimizer_step()

    def on_optimizer_step(self, args: CrossKDConfig, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._after_optimizer_step()

    def on_step_end(self, args: CrossKDConfig, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._after_update()

    def on_train_end(self, args: CrossKDConfig, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._end_training()


def _collators(
    processor: BaseImageProcessor | None,
    transform: Callable[[Record], Record] | None,
    given: Callable[[Sequence[Any]], dict[str, Any]] | None,
    seed: int,
    num_classes: int,
) -> tuple[Any, Any]:
    """Collators of training and of evaluation."""
    if given is not None:
        return given, given
    evaluation = EvaluationCollator(processor, compact=True)
    if transform is None:
        return DetectionCollator(processor, num_classes=num_classes), evaluation
    return ReproducibleCollator(processor, transform, seed, num_classes), evaluation


def _undecayed(model: nn.Module, decayed: Sequence[str]) -> set[str]:
    return {name for name, _ in model.named_parameters()} - set(decayed)
