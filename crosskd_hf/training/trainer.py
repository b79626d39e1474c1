"""`CrossKDTrainer`: Hugging Face's `Trainer` for object detectors, with or without a teacher."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor, EarlyStoppingCallback, PreTrainedModel, TrainerCallback, set_seed

from ..data.transforms import Record, TrainTransform
from ..distillation import Distiller
from ..inference.head_width import check_width
from ..inference.loading import load_teacher
from ..inference.precision import widen
from ..inference.processors import check_image_size, check_processor
from ..inference.speed import to_channels_last
from . import adapters, arguments, provenance, run_folder, supervision
from .config import CrossKDConfig
from .loading import bare_model
from .teacher_check import teacher_metrics
from .update_trainer import UpdateTrainer

logger = logging.getLogger(__name__)


class CrossKDTrainer(UpdateTrainer):
    """Trains a detector on its labels and, with a teacher, on what the teacher makes of its features.

    What it saves is a plain student: `from_pretrained` loads any checkpoint and the final folder. Beside the weights
    lie `distillation.json` (teacher, its weight hash, cut, losses, class map), `distiller.safetensors` (trainable
    adapters, if there are any) and `training_args.json`; no pickle is written that would execute code when read.

    Args:
        model: The student, maybe inside a `PeftModel`; None with `model_init`.
        args: Options of training and distillation.
        train_dataset: In the schema of `load_coco`; raw data or a stream with `image` and `objects`, brought to
            that schema; or any data set that `data_collator` understands.
        eval_dataset: `datasets.Dataset` in the schema of `load_coco`: its boxes are the truth of `evaluate`.
        processing_class: The student's image processor.
        teacher_model: A model, or a folder or Hub id to load one from; None trains the student alone.
        teacher_processing_class: The teacher's image processor, if it normalises pixels differently. Read from where
            the teacher is loaded, if it is loaded.
        train_transform: Augmentation of training examples. "default": `TrainTransform()`, a flip of every second image,
            unless there is a `data_collator`; None: no augmentation.
        data_collator: Instead of `DetectionCollator(processing_class, train_transform)`; then it serves evaluation too.
        callbacks, optimizers, model_init: As of `Trainer`. A model of `model_init` gets a distiller of its own.
        compute_loss_func: Replaces the student's loss on its labels, `loss(outputs, labels, num_items_in_batch=None)`,
            by a mean over the images of a micro-batch; what the teacher teaches is added.
        compute_metrics: Metrics beside COCO AP, from `EvalPrediction(predictions, label_ids)`: both are lists with an
            entry per batch, the outputs as a tuple of arrays and the labels of each image (`eval_do_concat_batches`
            is False). All outputs are kept in memory until the evaluation ends.
        preprocess_logits_for_metrics: Shrinks the outputs of a batch before they are kept, from (outputs, labels).
        optimizer_cls_and_kwargs: Instead of the schedule's SGD or of `optim`; its `lr` is used as it is.

    Raises:
        TypeError: Settings, student or teacher are of a kind that can't be used; the message says what can.
        ValueError: The pair can't be distilled, the teacher's weights are incomplete, something needed is missing, the
            student's classes are not those of the data, or `processing_class` belongs to another family of models.
        DataError: Labels of a data set are none of the student's classes.
        NotImplementedError: DeepSpeed or FSDP: detectors fit on one device; use plain processes (DDP).
    """

    _teacher: tuple[PreTrainedModel, BaseImageProcessor | None] | None = None
    _teacher_hash: str | None = None
    _prepared: Distiller | None = None  # whose methods have prepared the student

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: CrossKDConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: BaseImageProcessor | None = None,
        teacher_model: PreTrainedModel | str | os.PathLike[str] | None = None,
        teacher_processing_class: BaseImageProcessor | None = None,
        train_transform: Callable[[Record], Record] | str | None = "default",
        data_collator: Callable[[Sequence[Any]], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        args = arguments.check_settings(args)
        arguments.check_own_loss(type(self).compute_loss)
        student = arguments.check_student(self._first_model(model, model_init, args.seed))
        teacher = None if teacher_model is None else arguments.check_teacher(teacher_model)
        arguments.check_checkpointing(args, teacher is not None)
        arguments.check_without_teacher(teacher, teacher_processing_class, args, train_dataset)
        if args.should_save:
            run_folder.make(Path(args.output_dir))
        self._loss_func = compute_loss_func  # `Trainer` would take what it returns for the loss of a whole update
        transform = _transform(train_transform, data_collator)
        supervision.prepare(bare_model(student), processing_class, transform)
        super().__init__(
            model=student,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            train_transform=transform,
            data_collator=data_collator,
            callbacks=_with_patience(callbacks, args),
            optimizers=optimizers,
            model_init=model_init,
            compute_metrics=compute_metrics,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self._prepare_updates()
        self._note_student()
        if teacher is not None:
            self._set_teacher(teacher, teacher_processing_class)
            self._make_distiller()
        self._check_processor()

    def _check_processor(self) -> None:
        """After the pair: that a model can't be distilled at all is the better message."""
        if self.processing_class is None:
            return
        check_processor(self.student, self.processing_class)
        check_image_size(self.student, self.processing_class, "student")
        if self.distiller is not None:
            check_image_size(self.distiller.teacher, self.processing_class, "teacher")

    def _first_model(self, model: Any, model_init: Callable[..., PreTrainedModel] | None, seed: int) -> Any:
        """The model that was given, or the one that `model_init` starts with."""
        if model_init is None:
            return model
        if model is not None:
            raise ValueError("Both model and model_init are given, but only one of them can be trained: leave one out.")
        set_seed(seed)
        self.model_init = model_init
        return self.call_model_init()

    def _adopt_model(self) -> None:
        """As of `CocoTrainer`, with a distiller for the new student; nothing if the student is known."""
        if self.student is self._adopted:
            return
        super()._adopt_model()
        supervision.prepare(self.student, self.processing_class, self._train_transform)
        if self._teacher is not None:
            self._make_distiller()
        self._check_processor()
        self._note_student()

    def _note_student(self) -> None:
        """What depends on the student alone, and needn't be found out in every step."""
        student = self._adopted = self.student
        self._head_checked = False
        hands_out = self._loss_func is None and supervision.returns_loss_parts(student)
        divides_here = hands_out and arguments.takes(student, "output_loss")
        self._student_request = {"output_loss": False} if divides_here else {}

    def _make_distiller(self) -> None:
        assert self._teacher is not None
        teacher, processor = self._teacher
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        processors = self.processing_class, processor
        distiller = Distiller(self.student, teacher, self.args.methods, *processors, self.args.fast, dtype)
        self.distiller = distiller.to(self.args.device)
        if self.args.torch_compile:
            taught_by = distiller.pair.teacher.model
            taught_by.compile(backend=self.args.torch_compile_backend, mode=self.args.torch_compile_mode)

    # ---- Teacher ----

    def _set_teacher(self, teacher: arguments.Teacher, processor: BaseImageProcessor | None) -> None:
        if not isinstance(teacher, PreTrainedModel):
            options = self.args.teacher_revision, self.args.teacher_trust_remote_code
            teacher, found = load_teacher(teacher, *options, with_processor=processor is None)
            processor = processor or found
        arguments.check_apart(self.model, teacher)
        check_width(teacher, "teacher")
        widen(teacher)  # its head sees the student's float32 features, with or without autocast
        teacher.requires_grad_(False).eval()
        arguments.move_teacher(teacher, self.args.device)
        if self.args.channels_last:
            to_channels_last(teacher, needed=False)
        self._teacher = teacher, processor
        self._teacher_hash = provenance.weight_hash(teacher)

    def _provenance(self) -> dict[str, Any] | None:
        if self.distiller is None or self._teacher_hash is None:
            return None
        return provenance.describe(self.distiller.teacher, self._teacher_hash, self.distiller.describe())

    def _save_beside(self, folder: Path) -> None:
        content = self._provenance()
        if content is not None and self.distiller is not None:
            provenance.write(folder, content)
            adapters.save(self.distiller, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._adopt_model()
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.distiller is not None:
            adapters.load(self.distiller, Path(resume_from_checkpoint))

    def _check_resume(self, folder: Path) -> None:
        provenance.check_same_teacher(folder, self._teacher_hash)
        provenance.warn_of_changes(folder, self._provenance())
        super()._check_resume(folder)

    def _evaluate_teacher(self, distiller: Distiller) -> None:
        """Metrics `teacher_map` and the like in the log, before the first update."""
        processor = None if self._teacher is None else self._teacher[1]
        size = self.args.per_device_eval_batch_size
        main = self.is_world_process_zero()
        found = teacher_metrics(
            distiller, self.student, self.processing_class, processor, self.eval_dataset, size, main
        )
        self.log({f"teacher_{name}": value for name, value in found.items() if not math.isnan(value)})

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

    # ---- Run ----

    def create_accelerator_and_postprocess(self) -> None:
        """As of `Trainer`; models that hand out parts use all their parameters, so DDP needn't look for unused ones."""
        given = self.args.ddp_find_unused_parameters
        uses_all = self.model is not None and supervision.returns_loss_parts(self.student)
        if given is None and uses_all and self._loss_func is None:
            self.args.ddp_find_unused_parameters = False
        super().create_accelerator_and_postprocess()
        self.args.ddp_find_unused_parameters = given

    def _begin_training(self) -> None:
        self._adopt_model()  # already, but for a subclass's own create_optimizer
        if self.distiller is not None:
            self.distiller.check_length(self.state.max_steps)
        if self.distiller is not None and self.args.teacher_eval and self._resumed is None:
            self._evaluate_teacher(self.distiller)
        if self.distiller is not None and self._resumed is None and self._prepared is not self.distiller:
            self.distiller.prepare_student()
        self._prepared = self.distiller
        super()._begin_training()
        self._first_update = self.args.check_first_step
        self._forget_log()
        if self.distiller is not None:
            self.distiller.train()
            adapters.share_weights(self.distiller)

    def _trained_modules(self) -> list[nn.Module]:
        return [*super()._trained_modules(), *([] if self.distiller is None else [self.distiller])]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As of `CocoTrainer`; adapters come in a group of their own."""
        self._adopt_model()
        optimizer = super().create_optimizer(model)
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        new = [parameter for parameter in self._adapters() if id(parameter) not in known]
        if new:
            group = {"params": new, "lr": self._base_learning_rate(), "weight_decay": self.args.weight_decay}
            optimizer.add_param_group(group)
        return optimizer

    def _after_update(self) -> None:
        if self._first_update and self.distiller is not None:
            self._check_teacher()
        self._first_update = False


def _transform(
    given: Callable[[Record], Record] | str | None, collator: Callable[..., Any] | None
) -> Callable[[Record], Record] | None:
    if given is not None and collator is not None and given != "default":
        raise ValueError(
            "train_transform would have no effect beside a data_collator, which makes the batches: give it to the "
            "collator, DetectionCollator(image_processor, transform), or leave out one of both."
        )
    if not isinstance(given, str):
        return given
    if given != "default":
        raise ValueError(f"train_transform={given!r}: give a transform, None, or 'default'.")
    return TrainTransform() if collator is None else None


def _with_patience(callbacks: list[TrainerCallback] | None, args: CrossKDConfig) -> list[TrainerCallback] | None:
    if args.patience is None:
        return callbacks
    if not args.load_best_model_at_end:  # known only now: the command line sets it when the data is read
        raise ValueError(
            f"patience={args.patience} needs load_best_model_at_end=True, so that the best model is kept; `train` and "
            "`distill` set it if there is validation data."
        )
    return [*(callbacks or []), EarlyStoppingCallback(args.patience)]
