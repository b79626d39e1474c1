"""`CrossKDTrainer`: Hugging Face's `Trainer` for object detectors, with or without a teacher."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import broadcast_object_list, extract_model_from_parallel, gather_object
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from . import adapters, checkpoints, provenance, saving, supervision
from .accumulation import UpdateSums, add_up, rehearsal, weighted
from .categories import CategoryMap
from .data import DetectionCollator
from .distillation import Distiller, make_distiller
from .ema import WeightAverage
from .evaluation import CocoEvaluator
from .guard import NonFiniteGuard, NonFiniteLossError
from .loading import load_student, load_teacher
from .model_card import CardContent, model_card
from .models.losses import LossPart, divide
from .optim import GroupRule, parameter_groups, scaled_learning_rate, step_schedule
from .reproducible import RandomOrder, ReproducibleCollator
from .sampling import AspectRatioSampler
from .saving import TRAINING_WEIGHTS
from .training_args import CrossKDConfig
from .transforms import Record

logger = logging.getLogger(__name__)

_COLUMNS = {"image_id", "width", "height", "objects"}


class CrossKDTrainer(Trainer):
    """Trains a detector on its labels and, with a teacher, on what the teacher makes of its features.

    What it saves is a plain student: `from_pretrained` loads any checkpoint and the final folder. Beside the weights
    lie `distillation.json` (teacher, its weight hash, cut, losses, class map), `distiller.safetensors` (trainable
    adapters, if there are any) and `training_args.json`; no pickle is written that would execute code when read.

    Args:
        model: The student.
        args: Options of training and distillation.
        train_dataset: In the schema of `load_coco`, or any data set that `data_collator` understands.
        eval_dataset: `datasets.Dataset` in the schema of `load_coco`: its boxes are the truth of `evaluate`.
        processing_class: The student's image processor.
        teacher_model: A model, or a folder or Hub id to load one from; None trains the student alone.
        teacher_processing_class: The teacher's image processor, if it normalises pixels differently. Read from where
            the teacher is loaded, if it is loaded.
        train_transform: Augmentation of training examples, such as `TrainTransform()`.
        data_collator: Instead of `DetectionCollator(processing_class, train_transform)`; then it serves evaluation too.
        callbacks, optimizers: As of `Trainer`.

    Raises:
        ValueError: The pair can't be distilled, the teacher's weights are incomplete, or something needed is missing.
        NotImplementedError: DeepSpeed or FSDP: detectors fit on one device; use plain processes (DDP).
    """

    args: CrossKDConfig
    data_collator: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: PreTrainedModel,
        args: CrossKDConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: BaseImageProcessor | None = None,
        teacher_model: PreTrainedModel | str | os.PathLike[str] | None = None,
        teacher_processing_class: BaseImageProcessor | None = None,
        train_transform: Callable[[Record], Record] | None = None,
        data_collator: Callable[[Sequence[Any]], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = CrossKDConfig() if args is None else args
        if processing_class is None and data_collator is None:
            raise ValueError(
                "processing_class is missing: give the student's image processor, such as "
                "AutoImageProcessor.from_pretrained(...)."
            )
        supervision.prepare(model)
        collators = _collators(processing_class, train_transform, data_collator, args.seed)
        super().__init__(
            model=model,
            args=args,
            data_collator=collators[0],
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[*(callbacks or []), _UpdateHooks(self)],
            optimizers=optimizers,
        )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise NotImplementedError(
                "DeepSpeed and FSDP are not supported: a detector and its teacher fit on one device. "
                "Launch plain processes: accelerate launch --multi_gpu ..."
            )
        self.loss_is_scaled_for_ga = False
        self._eval_collator = collators[1]
        self.ema: WeightAverage | None = None
        self.distiller: Distiller | None = None
        self._teacher_hash: str | None = None
        if teacher_model is not None:
            self._set_teacher(teacher_model, teacher_processing_class)
        self._guard = NonFiniteGuard(Path(args.output_dir) / "_nonfinite", args.process_index)
        self._evaluators: dict[int, tuple[Any, CocoEvaluator]] = {}
        self._detections: CocoEvaluator | None = None
        self._train_sampler: Any = None
        self._own_images = True
        self._update_sums: UpdateSums | None = None
        self._averaged = 1
        self._first_update = False
        self._log_sums: dict[str, Tensor] = {}
        self._log_updates = 0

    # ---- Teacher ----

    def _set_teacher(
        self, teacher: PreTrainedModel | str | os.PathLike[str], processor: BaseImageProcessor | None
    ) -> None:
        if not isinstance(teacher, PreTrainedModel):
            teacher, found = load_teacher(teacher, self.args.teacher_revision, self.args.teacher_trust_remote_code)
            processor = processor or found
        config = self.args.distillation_config()
        distiller = make_distiller(self.model, teacher, config, self.processing_class, processor)
        teacher.requires_grad_(False).eval().to(self.args.device)
        if self.args.torch_compile:
            teacher.compile(backend=self.args.torch_compile_backend, mode=self.args.torch_compile_mode)
        self.distiller = distiller.to(self.args.device)
        self._teacher_hash = provenance.weight_hash(teacher)

    def _provenance(self) -> dict[str, Any] | None:
        if self.distiller is None or self._teacher_hash is None:
            return None
        return provenance.describe(self.distiller.teacher, self._teacher_hash, self.distiller.describe())

    def _check_teacher(self) -> None:
        assert self.distiller is not None
        teacher = self.distiller.teacher
        if any(parameter.grad is not None for parameter in teacher.parameters()):
            raise RuntimeError("The teacher got a gradient in the first update; its parameters must stay frozen.")
        if provenance.weight_hash(teacher) != self._teacher_hash:
            raise RuntimeError(
                "The teacher's weights or statistics changed in the first update; was it put into train "
                "mode, or does the student share modules with it?"
            )

    # ---- Data ----

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        training_collator = self.data_collator
        if not is_training:
            self.data_collator = self._eval_collator
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.data_collator = training_collator

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
        """Tell sampler and augmentation; accelerate's loaders don't reach the sampler of a resumed epoch."""
        for part in (self._train_sampler, self.data_collator):
            if isinstance(part, RandomOrder | AspectRatioSampler | ReproducibleCollator):
                part.set_epoch(epoch)

    def _images_per_update(self) -> int:
        return int(self.get_total_train_batch_size(self.args))

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """0: six operations per parameter and pixel, as the base class counts, mean nothing for a detector."""
        return 0

    # ---- One update ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], None]:
        """The micro-batches of one update, without repeated images; learns their normalizers if there are several."""
        batches = []
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            batches.append(self._without_repeats(batch))
        self._guard.clear()
        self._update_sums, self._averaged = None, self.args.world_size
        if len(batches) > 1 and self.args.exact_accumulation:
            self._update_sums, self._averaged = self._rehearse(batches), self.args.world_size * len(batches)
        return batches, None

    def _without_repeats(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Cut off what a sampler took from the start of the epoch to fill up the last batches of all processes.

        A process without an image of its own keeps one, and `_own_images` says that it must not count.
        """
        self._own_images = True
        rest = self._images_in_last_round()
        if rest == 0 or not self.accelerator.gradient_state.end_of_dataloader:
            return batch
        size = self._train_batch_size
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
        return len(dataset) % (self._train_batch_size * args.world_size)

    def _rehearse(self, batches: list[dict[str, Any]]) -> UpdateSums:
        self.model.train()
        parts = []
        with rehearsal(self.model):
            for number, batch in enumerate(batches, start=1):
                _, own, kd = self._forward(self.model, self._prepare_inputs(batch))
                parts.append(weighted(own | kd, self._weight(number == len(batches))))
        return add_up(parts)

    def _weight(self, is_last: bool) -> float:
        return 0.0 if is_last and not self._own_images else 1.0

    def _forward(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Any, dict[str, LossPart], dict[str, LossPart]]:
        """Outputs of the student, the parts of its own loss, and those of the distillation."""
        if self.distiller is None:
            outputs = model(**inputs)
            return outputs, supervision.supervised_parts(self.model, outputs, inputs), {}
        outputs = model(**inputs, **self.distiller.student_request)
        own = supervision.supervised_parts(self.model, outputs, inputs)
        with self.accelerator.autocast():
            return outputs, own, self.distiller(outputs, inputs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The sum of all loss parts, each divided by its normalizer over micro-batches and processes."""
        outputs, own, kd = self._forward(model, inputs)
        parts = weighted(own | kd, self._weight(self.accelerator.sync_gradients))
        sums = add_up([parts]) if self._update_sums is None else self._update_sums
        losses = divide(parts, sums.normalizers, self._averaged)
        self._guard.watch(losses, inputs, sums.bad)
        self._note(losses | supervision.own_log(outputs, losses))
        if self._first_update and kd and self._own_images:
            self._check_distillation(torch.stack([losses[name] for name in kd]).sum())
        loss = torch.stack(list(losses.values())).sum()
        return (loss, outputs) if return_outputs else loss

    def _check_distillation(self, kd_loss: Tensor) -> None:
        assert self.distiller is not None
        self.distiller.check_gradients(self.model, kd_loss)
        if kd_loss.item() == 0:
            logger.warning(
                "The distillation loss of the first update is exactly 0. That is right only if the student "
                "equals the teacher; otherwise look at methods and loss_weights."
            )

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward pass of one micro-batch; the adapters' gradients are averaged with the last one."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.distiller is not None and self.accelerator.sync_gradients:
            adapters.average_gradients(self.distiller)
        return torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0)

    def _adapters(self) -> list[nn.Parameter]:
        return [] if self.distiller is None else adapters.trainable(self.distiller)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        parameters = [*model.parameters(), *self._adapters()]
        return self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm; the last place before the optimiser moves, so bad updates end here."""
        if grad_norm is None:
            grad_norm = self.accelerator.clip_grad_norm_([*model.parameters(), *self._adapters()], float("inf"))
        judged = None if self.accelerator.scaler is not None else grad_norm
        if not self._guard.triggered(judged):
            return grad_norm
        message = self._guard.report(self.state.global_step + 1, judged)
        if self.args.nonfinite == "stop":
            raise NonFiniteLossError(
                f"{message} Nothing of it reached the weights. Look at the data and the learning "
                "rate, or set nonfinite='skip' to go on without such updates."
            )
        self._guard.skipped += 1
        logger.warning("%s It is skipped (%d so far).", message, self._guard.skipped)
        for parameter in [*model.parameters(), *self._adapters()]:
            parameter.grad = None
        return torch.zeros_like(torch.as_tensor(grad_norm))

    # ---- Optimiser ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """SGD of the schedule, or Hugging Face's optimiser; adapters in a group of their own."""
        if self.optimizer is None:
            self._new_optimizer(self.model if model is None else model)
        known = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        new = [parameter for parameter in self._adapters() if id(parameter) not in known]
        if new:
            rate, decay = self._learning_rate(self.args.learning_rate), self.args.weight_decay
            self.optimizer.add_param_group({"params": new, "lr": rate, "weight_decay": decay})
        return self.optimizer

    def _new_optimizer(self, model: nn.Module) -> None:
        args = self.args
        if args.schedule is None and args.backbone_lr is None:
            super().create_optimizer(model)
            return
        rule = GroupRule(
            self._learning_rate(args.learning_rate),
            args.weight_decay,
            None if args.backbone_lr is None else self._learning_rate(args.backbone_lr),
            args.bias_lr_factor,
            args.bias_weight_decay,
            () if args.schedule else _undecayed(model, self.get_decay_parameter_names(model)),
        )
        groups = parameter_groups(model, rule)
        if args.schedule is None:
            kind, settings = self.get_optimizer_cls_and_kwargs(args, model)
            self.optimizer = kind(groups, **settings)
        else:
            self.optimizer = torch.optim.SGD(groups, lr=rule.learning_rate, momentum=0.9)
            logger.info("%d images an update: learning rate %g", self._images_per_update(), rule.learning_rate)

    def _learning_rate(self, given: float) -> float:
        if self.args.schedule is None or not self.args.scale_learning_rate:
            return given
        return scaled_learning_rate(given, self._images_per_update())

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The step schedule, or `lr_scheduler_type`."""
        schedule = self.args.schedule_settings()
        if schedule is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)
        self.lr_scheduler = step_schedule(optimizer or self.optimizer, schedule, num_training_steps, warmup)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    # ---- Log ----

    def _note(self, losses: Mapping[str, Tensor]) -> None:
        for name, loss in losses.items():
            value = torch.nan_to_num(loss.detach().float(), nan=0.0, posinf=0.0, neginf=0.0)
            value = value / self.current_gradient_accumulation_steps
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
            self._forget_log()
        super().log(logs, start_time)

    def _forget_log(self) -> None:
        self._log_sums, self._log_updates = {}, 0

    # ---- Run ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As of `Trainer`; incomplete checkpoints are passed over, and those of another teacher refused.

        Args:
            resume_from_checkpoint: Folder of a checkpoint, or True for the newest complete one in `output_dir`.
            trial, ignore_keys_for_eval: As of `Trainer`.

        Raises:
            ValueError: There is no such checkpoint, or it was distilled from another teacher.
            NonFiniteLossError: A loss part became NaN or infinite.
        """
        run = Path(self.args.output_dir)
        if self.args.should_save and run.is_dir():
            checkpoints.recover(run)
        self.accelerator.wait_for_everyone()
        folder = saving.checkpoint_to_resume(run, resume_from_checkpoint)
        if folder is not None:
            provenance.check_same_teacher(folder, self._teacher_hash)
            provenance.warn_of_changes(folder, self._provenance())
            saving.check_average(folder, self.args.ema_decay)
        self._forget_preparation()
        self._first_update = self.args.check_first_step
        self._forget_log()
        return super().train(None if folder is None else str(folder), trial, ignore_keys_for_eval)

    def _forget_preparation(self) -> None:
        """Let a model that `evaluate` prepared be wrapped for training; accelerate would leave it as it is."""
        if self.model_wrapped is self.model and "_is_accelerate_prepared" in vars(self.model):
            extract_model_from_parallel(self.model, keep_fp32_wrapper=False)
            self.model._is_accelerate_prepared = False

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        if self.args.ddp_find_unused_parameters is None and supervision.returns_loss_parts(self.model):
            self.args.ddp_find_unused_parameters = False
        return super()._build_accelerator_args(**kwargs)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if self.distiller is not None:
            self.distiller.train()
            adapters.share_weights(self.distiller)
        if self.args.ema_decay is not None:
            self.ema = WeightAverage(self.model, self.args.ema_decay, self.state.global_step)
            if resume_from_checkpoint is not None:
                load_model(self.model, Path(resume_from_checkpoint) / TRAINING_WEIGHTS, strict=True)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _finalize_training(self, *args: Any) -> TrainOutput:
        if self.ema is not None:
            self.ema.copy_to(self.model)
            self.ema = None
        return super()._finalize_training(*args)

    def _as_student(self) -> AbstractContextManager[None]:
        """Inside of it the model holds the weights that count: the averaged ones, if there is an average."""
        return nullcontext() if self.ema is None else self.ema.swapped(self.model)

    # ---- Evaluation ----

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """COCO AP: `<prefix>_map`, `_map_50`, `_map_75`, `_map_small`, `_map_medium`, `_map_large`, `_map_<class>`."""
        evaluator = self._detections = self._evaluator(dataloader.dataset)
        evaluator.reset()
        with self._as_student():
            output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        for rows in gather_object([evaluator.rows]):
            evaluator.merge(rows)
        metrics = [evaluator.compute() if self.args.process_index == 0 else None]
        broadcast_object_list(metrics)
        rows, self._detections = evaluator.rows, None
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in (metrics[0] or {}).items()})
        return output._replace(predictions=rows)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, None, None]:
        """Detections of one batch go straight to the evaluator; nothing else is kept."""
        assert self._detections is not None
        if self.processing_class is None:
            raise ValueError("Evaluation needs processing_class: the image processor turns outputs into detections.")
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad():
            outputs = model(**inputs)
        sizes = torch.stack([label["orig_size"] for label in labels])
        results = self.processing_class.post_process_object_detection(outputs, self.args.eval_threshold, sizes)
        self._detections.update([int(label["image_id"]) for label in labels], results)
        return None, None, None

    def _evaluator(self, dataset: Any) -> CocoEvaluator:
        """The evaluator of a data set; its truth is read once."""
        known = self._evaluators.get(id(dataset))
        if known is not None and known[0] is dataset:
            return known[1]
        if not isinstance(dataset, datasets.Dataset) or not set(dataset.column_names) >= _COLUMNS:
            raise ValueError(
                f"The evaluation data must be a datasets.Dataset with the columns {sorted(_COLUMNS)}, as "
                f"load_coco and load_objects make it; got {type(dataset).__name__}."
            )
        evaluator = CocoEvaluator(dataset, CategoryMap.from_config(self.model.config))
        self._evaluators[id(dataset)] = (dataset, evaluator)
        return evaluator

    # ---- Saving and loading ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the student and what lies beside it. Only the process that saves does anything."""
        if not self.args.should_save:
            return
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder, state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        (folder / "training_args.json").write_text(self.args.to_json_string() + "\n", encoding="utf-8")
        content = self._provenance()
        if content is not None and self.distiller is not None:
            provenance.write(folder, content)
            adapters.save(self.distiller, folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student with its model card. Files appear whole: each one replaces its predecessor in one move."""
        if self.args.should_save:
            folder = Path(self.args.output_dir if output_dir is None else output_dir)
            with checkpoints.replaced(folder) as staging, self._as_student():
                self._save(str(staging))
                (staging / "README.md").write_text(str(self._card()), encoding="utf-8")
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write `checkpoint-N` under another name, rename it when it is complete, then drop the oldest ones."""
        self.store_flos()
        run = Path(self._get_output_dir(trial))
        folder = run / f"checkpoint-{self.state.global_step}"
        staging = run / f"{checkpoints.SAVING}{folder.name}"
        steps: tuple[Callable[[], None], ...] = (
            lambda: self._begin_checkpoint(staging, folder),
            lambda: self._write_checkpoint(staging),
            lambda: self._end_checkpoint(staging, folder),
        )
        for step in steps:
            saving.together(step, self.state.global_step, staging if self.args.should_save else None)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _begin_checkpoint(self, staging: Path, folder: Path) -> None:
        best = self.state.best_global_step
        best_folder = folder.with_name(f"checkpoint-{best}")
        if best and (best_folder == folder or best_folder.is_dir()):
            self.state.best_model_checkpoint = str(best_folder)
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)

    def _write_checkpoint(self, staging: Path) -> None:
        with self._as_student():
            self._save(str(staging))
        if self.args.save_only_model:
            return
        if self.ema is not None and self.args.should_save:
            save_model(self.model, str(staging / TRAINING_WEIGHTS))
        self._save_optimizer_and_scheduler(str(staging))
        self._save_scaler(str(staging))
        self._save_rng_state(str(staging))

    def _end_checkpoint(self, staging: Path, folder: Path) -> None:
        if not self.args.should_save:
            return
        saving.note_callback_states(self.state, [*self.callback_handler.callbacks, self.control])
        self.state.save_to_json(str(staging / "trainer_state.json"))
        checkpoints.write_manifest(staging)
        checkpoints.publish(staging, folder)
        checkpoints.rotate(folder.parent, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_student(self.model, resume_from_checkpoint)
        if self.distiller is not None:
            adapters.load(self.distiller, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        logger.info("Best model: %s (%s)", self.state.best_model_checkpoint, self.state.best_metric)
        load_student(self.model, self.state.best_model_checkpoint)

    # ---- Hub ----

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write `README.md` into `output_dir`; `license`, `tags`, `model_name` and `dataset` go into it."""
        if self.is_world_process_zero():
            tags = [tags] if isinstance(tags, str) else (tags or [])
            name = dataset if isinstance(dataset, str) or dataset is None else ", ".join(dataset)
            card = self._card(license=license, tags=tags, model_name=model_name, dataset=name)
            Path(self.args.output_dir, "README.md").write_text(str(card), encoding="utf-8")

    def _card(
        self,
        license: str | None = None,
        tags: Sequence[str] = (),
        model_name: str | None = None,
        dataset: str | None = None,
    ) -> Any:
        return model_card(
            CardContent(
                name=model_name or Path(self.args.output_dir).absolute().name,
                architecture=type(self.model).__name__,
                metrics=self._metrics_of_these_weights(),
                dataset=dataset or self.args.dataset_name or "evaluation data",
                model_id=self.hub_model_id or Path(self.args.output_dir).name,
                license=license or self.args.license,
                teacher=None if self.distiller is None else provenance.hub_id(self.distiller.teacher),
                provenance=self._provenance(),
                tags=tags,
            )
        )

    def _metrics_of_these_weights(self) -> dict[str, float]:
        """The evaluation of the best checkpoint, if that is what was loaded, or else the last one."""
        evaluations = [entry for entry in self.state.log_history if "eval_map" in entry]
        if self.args.load_best_model_at_end and self.state.best_global_step:
            best = [entry for entry in evaluations if entry["step"] == self.state.best_global_step]
            evaluations = best or evaluations
        return evaluations[-1] if evaluations else {}

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a checkpoint by `hub_strategy`. Waits: the folder may be rotated away."""
        if self.is_world_process_zero():
            saving.upload(Path(checkpoint_folder), str(self.hub_model_id), self.args)


class _UpdateHooks(TrainerCallback):
    """What happens around an optimiser step beside the student."""

    def __init__(self, trainer: CrossKDTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: CrossKDConfig, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._set_epoch(int(state.epoch or 0))

    def on_optimizer_step(self, args: CrossKDConfig, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter in self.trainer._adapters():
            parameter.grad = None
        if self.trainer.ema is not None:
            self.trainer.ema.update(self.trainer.model)

    def on_step_end(self, args: CrossKDConfig, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._first_update and self.trainer.distiller is not None:
            self.trainer._check_teacher()
        self.trainer._first_update = False


def _collators(
    processor: BaseImageProcessor | None,
    transform: Callable[[Record], Record] | None,
    given: Callable[[Sequence[Any]], dict[str, Any]] | None,
    seed: int,
) -> tuple[Any, Any]:
    """Collators of training and of evaluation."""
    if given is not None:
        return given, given
    evaluation = DetectionCollator(processor)
    return (evaluation if transform is None else ReproducibleCollator(processor, transform, seed)), evaluation


def _undecayed(model: nn.Module, decayed: Sequence[str]) -> set[str]:
    return {name for name, _ in model.named_parameters()} - set(decayed)
