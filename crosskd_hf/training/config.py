"""`CrossKDConfig`: Hugging Face's `TrainingArguments` with the options of distillation and of detectors' schedules."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames

from ..distillation import MethodConfig
from ..files import without_folders
from ..inference.speed import Speed
from . import ineffective, upstream
from .moved import tell_of_moved_options
from .ranges import check_numbers, check_switches
from .schedules import SCHEDULES, WARMUP_STARTS, Schedule, default_warmup, parse_factors

logger = logging.getLogger(__name__)


EXTRAS = frozenset(("tensorboard", "wandb"))  # of setup.cfg

OURS = "this project"
AUTHORS = "authors' configurations (jbwang1997/CrossKD)"


class Help(str):
    """The help of an option that also knows where its default comes from: a field's metadata go to argparse as a whole.

    Args:
        text: What the option is.
        source: Of its default.
    """

    def __new__(cls, text: str, source: str) -> Help:
        return super().__new__(cls, text)

    def __init__(self, text: str, source: str) -> None:
        self.source = source


def option(default: Any, text: str, source: str = OURS, aliases: Sequence[str] = ()) -> Any:
    """A field of a dataclass of options, for a command line and for docs/options.md.

    Args:
        default: A list is copied for every instance; `MISSING` makes the option a required one.
        text: What the option is.
        source: Where the default comes from.
        aliases: Older names on a command line, such as "--old_name".
    """
    metadata = {"help": Help(text, source)} | ({"aliases": list(aliases)} if aliases else {})
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


@tell_of_moved_options
@dataclass
class CrossKDConfig(TrainingArguments):
    """Arguments of `CrossKDTrainer`. Everything of `TrainingArguments` holds, with these differences:

    - `learning_rate`, `weight_decay`, `max_grad_norm`, `num_train_epochs` and `warmup_steps` are None unless given:
      then the `schedule` sets them, or without a schedule Hugging Face's defaults do. `optim` and `lr_scheduler_type`
      stay None with a schedule.
    - Options that could have no effect are refused: see `crosskd_hf.training.ineffective`.
    - `restore_callback_states_from_checkpoint=True`: a resumed run remembers the patience of early stopping.
    - `remove_unused_columns=False` (the collator needs the raw columns), `label_names=["labels"]`,
      `logging_nan_inf_filter=False` (the guard does better), `accelerator_config.dispatch_batches=False`
      (dispatching merges the label lists of different images), `eval_do_concat_batches=False` (concatenation loses
      images whose labels differ in length), `dataloader_pin_memory` is off on a CPU.
    - Wherever the best evaluation counts (`load_best_model_at_end`, `save_strategy="best"`, a learning rate that falls
      on a plateau), `metric_for_best_model` is `eval_map`.
    - Several visible devices without a launcher are not used by `nn.DataParallel`, which can't carry detection labels:
      one device is used, and the `accelerate launch` line for all of them is logged.

    Args:
        methods: What is distilled: configurations such as `CrossKD(cut=2)`, or strings that mean the same, such as
            "crosskd:cut=2" or "my_package.my_module:MyConfig". Here they are configurations; `to_dict` has the strings.
        schedule: "1x" (12 epochs, learning rate divided by ten after 8 and 11), "2x" (24; 16 and 22) or "voc" (4; 3):
            SGD with momentum 0.9, weight decay 1e-4, gradient norm clipped at 35, learning rate 0.01 for 16 images an
            update and scaled linearly with the real number (micro-batch x accumulation x processes), linear warm-up
            from a thousandth over 500 updates, but at most a tenth of the run. "50e", for Deformable DETR: AdamW, 50
            epochs, step after 40, learning rate 2e-4 for 32 images, clipped at 0.1, no warm-up. With another
            `num_train_epochs` or with `max_steps` the decays keep their place as fractions of the run. None: `optim`
            and `lr_scheduler_type`.
        decay_epochs: Instead of the schedule's, after these epochs, whatever the length of the run.
        warmup_kind: Instead of the schedule's: "linear" rises from a thousandth, "constant" keeps a third of the rate
            (FCOS), "none".
        scale_learning_rate: Whether a schedule reads `learning_rate` as for its number of images an update, 16 or 32.
            False: as it is.
        backbone_lr: Learning rate of parameters below a module named `backbone`, such as 1e-5 for DETR; scaled as
            `learning_rate` is.
        lr_factors: Factors on the learning rate by names of modules, NAME=FACTOR each, such as backbone=0.1
            sampling_offsets=0.1 (Deformable DETR).
        bias_lr_factor: Factor on the learning rate of biases outside of norms (FCOS: 2). Needs a `schedule`.
        bias_weight_decay: Weight decay of all biases (FCOS: 0). Needs a `schedule`.
        exact_accumulation: Make `gradient_accumulation_steps` micro-batches count exactly as one big batch. Costs one
            more forward pass of the student per micro-batch, and the memory of the teacher's features and predictions
            for all micro-batches of an update. False: every micro-batch is divided by its own normalizers. Without
            accumulation it changes and costs nothing.
        nonfinite: What to do when a loss part or the gradient is NaN or infinite: "stop" with a message, or "skip" the
            update and count it (`skipped_updates` in the logs). The batch is saved in `output_dir/_nonfinite`.
        ema_decay: Decay in (0, 1) of an exponential moving average of the student's weights, such as 0.9998. The
            averaged student is what is evaluated, compared and saved, and what the trainer holds after `train()`.
        check_first_step: Assert at the first update of every run that the distillation is finite, reaches the student's
            trunk and not its layers behind the cut, and leaves the teacher unchanged. Costs one backward pass.
        eval_threshold: Detections with a lower score are not evaluated, in [0, 1]; AP is defined with 0. Beside it the
            image processor's own `score_threshold` holds.
        group_by_aspect_ratio: Whether a batch is all landscape or all portrait.
        patience: Stop after so many evaluations without a better `metric_for_best_model`; None goes on to the end.
            Needs `load_best_model_at_end`.
        teacher_eval: Evaluate the teacher on the evaluation data before the first update; one that finds nothing (AP 0)
            stops the run, because the student would learn to find nothing.
        fast: Recommended for speed: `channels_last`, batch norms of the teacher as a part of its convolutions, and
            `bf16` where the device computes in bfloat16 (a CPU with AMX or AVX-512 bf16, a GPU that says so), unless
            `fp16` is given. The log says what was chosen.
        channels_last: Lay the weights of the convolutions of student and teacher channels last in memory, and thereby
            the features. The values are the same, and files hold them as ever.
        dataset_name: Name of the evaluation data on the model card.
        license: Licence on the model card, in the Hub's spelling.
        teacher_revision: Branch, tag or commit of a teacher that is given by its Hub id.
        teacher_trust_remote_code: Whether a teacher given by its Hub id or folder may run code that lies beside it.

    Raises:
        ValueError: A value out of range or without effect, or several processes that don't form one run.
    """

    # None is filled in by `__post_init__`
    learning_rate: float = option(None, "Learning rate; with a schedule, for 16 images an update (0.01).", AUTHORS)
    weight_decay: float = option(None, "Weight decay. Default: the schedule's 1e-4, or 0.", AUTHORS)
    max_grad_norm: float = option(None, "Clip the gradient norm. Default: the schedule's 35 (50e: 0.1), or 1.", AUTHORS)
    num_train_epochs: float = option(None, "Epochs. Default: the schedule's, or 3.", AUTHORS)
    warmup_steps: float | None = option(
        None, "Updates of warm-up, or their share. Default: the schedule's 500, or 0.", AUTHORS
    )
    optim: OptimizerNames | str = option(None, "Optimiser. Default: the schedule's SGD, or AdamW.", AUTHORS)
    lr_scheduler_type: SchedulerType | str = option(
        None, "Learning rate schedule. Default: the schedule's steps, or linear.", AUTHORS
    )
    restore_callback_states_from_checkpoint: bool = option(True, "Resume callbacks too, such as early stopping.")
    remove_unused_columns: bool = option(False, "Must be False: the collator needs the raw columns.")
    logging_nan_inf_filter: bool = option(False, "Must be False: nonfinite does better.")
    eval_do_concat_batches: bool = option(False, "Must be False: labels of images differ in length.")
    dataloader_pin_memory: bool | None = option(None, "Pin batches in memory. Default: if training is not on a CPU.")

    schedule: str | None = option(None, f"{', '.join(SCHEDULES)}: a published schedule and its optimiser.", AUTHORS)
    decay_epochs: list[float] | None = option(
        None, "Divide the learning rate by ten after these epochs. Default: the schedule's.", AUTHORS
    )
    warmup_kind: str | None = option(None, f"{', '.join(WARMUP_STARTS)}. Default: the schedule's.", AUTHORS)
    scale_learning_rate: bool = option(
        True,
        "A schedule reads learning_rate as for 16 images an update (50e: 32).",
        "linear scaling (arXiv:1706.02677)",
    )
    backbone_lr: float | None = option(None, "Learning rate of the backbone.", "DETR (ECCV 2020): 1e-5")
    lr_factors: list[str] = option([], "NAME=FACTOR on the learning rate of parameters below a module NAME.")
    bias_lr_factor: float = option(1.0, "Factor on the learning rate of biases outside of norms (FCOS: 2).", AUTHORS)
    bias_weight_decay: float | None = option(None, "Weight decay of biases (FCOS: 0).", AUTHORS)
    exact_accumulation: bool = option(True, "Accumulated micro-batches count exactly as one batch.")
    nonfinite: str = option("stop", "'stop' or 'skip' on a NaN or infinite loss part or gradient.")
    ema_decay: float | None = option(None, "Decay of the weight average that becomes the student, such as 0.9998.")
    check_first_step: bool = option(True, "Assert at the first update that distillation works.")
    eval_threshold: float = option(0.0, "Lowest score that is evaluated.", "COCO evaluation")
    group_by_aspect_ratio: bool = option(
        False, "Batches of landscape or of portrait images, which need less padding.", "MMDetection groups so"
    )
    patience: int | None = option(None, "Stop after so many evaluations without a better AP.")
    teacher_eval: bool = option(False, "Evaluate the teacher before the first update; AP 0 stops the run.")
    dataset_name: str | None = option(None, "Name of the evaluation data on the model card.")
    fast: bool = option(False, "Run as the device gains: bf16 autocast where it computes in bfloat16, channels_last.")
    channels_last: bool = option(False, "Weights of convolutions lie channels last in memory; files are as ever.")
    license: str | None = option(None, "Licence on the model card, in the Hub's spelling, such as apache-2.0.")
    teacher_revision: str | None = option(None, "Branch, tag or commit of the teacher on the Hub.")
    teacher_trust_remote_code: bool = option(False, "The teacher may run code that lies beside its weights.")

    methods: list[str] = option(
        ["crosskd"], "What is distilled: NAME or NAME:OPTION=VALUE,... each, see `crosskd-hf methods`."
    )

    label_names: list[str] | None = option(["labels"], "Keys of the labels.")
    metric_for_best_model: str | None = option(None, "Default with load_best_model_at_end: eval_map.")

    def __post_init__(self) -> None:
        self.methods = MethodConfig.parse_all(self.methods)  # type: ignore[assignment]
        self._fill_in()
        self._check()
        of_schedule = {name: None for name in ("optim", "lr_scheduler_type", "warmup_steps") if self._is_none(name)}
        for name in of_schedule:
            setattr(self, name, ineffective.DEFAULTS[name])
        if self.metric_for_best_model is None and self._needs_best():
            self.metric_for_best_model = "eval_map"
        if self.fast:
            self._choose_speed()
        super().__post_init__()
        for name in of_schedule if self.schedule else ():
            setattr(self, name, None)
        ineffective.refuse_spreading(self.accelerator_config)
        self.accelerator_config.dispatch_batches = False
        if self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):  # they'd take a rising AP for a bad sign
            mode = "max" if self.greater_is_better else "min"
            given: dict[str, Any] = self.lr_scheduler_kwargs or {}  # type: ignore[has-type]
            self.lr_scheduler_kwargs = {"mode": mode} | given
        if self.dataloader_pin_memory is None:
            self.dataloader_pin_memory = self.device.type != "cpu"
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16=True would have no effect on a CPU: leave it out, or take bf16=True.")
        self._check_processes()

    def to_dict(self) -> dict[str, Any]:
        """As of `TrainingArguments`; methods are strings."""
        return super().to_dict() | {"methods": [str(method) for method in self.methods]}

    def to_json_string(self) -> str:
        """As of `TrainingArguments`, without the folders of this machine: it is saved beside the weights and pushed."""
        return json.dumps(without_folders(self.to_dict() | self._named_after_the_folder()), indent=2)

    def _named_after_the_folder(self) -> dict[str, str]:
        folder = Path(self.output_dir).absolute().name
        return {"output_dir": folder} | ({"run_name": folder} if self.run_name == self.output_dir else {})

    def schedule_settings(self) -> Schedule | None:
        """The chosen schedule with the changes of the other options, or None."""
        return SCHEDULES[self.schedule].changed(warmup_kind=self.warmup_kind) if self.schedule else None

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Updates of warm-up in a run of `num_training_steps` updates."""
        schedule = self.schedule_settings()
        if schedule is not None and schedule.warmup_kind == "none":
            return 0
        if self.warmup_steps is None:
            return default_warmup(num_training_steps)
        return int(super().get_warmup_steps(num_training_steps))

    def _choose_speed(self) -> None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        given: TrainingArguments = self
        chosen = Speed(given.bf16, fast=True).on(torch.device("cpu" if given.use_cpu else device), given.fp16)
        self.bf16, self.channels_last = chosen.bf16, chosen.channels_last
        self.use_cpu = given.use_cpu or device == "cpu"  # without it `TrainingArguments` refuses bf16 where no GPU is

    def _is_none(self, name: str) -> bool:
        return getattr(self, name) is None

    def _needs_best(self) -> bool:
        plateau = self.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
        return self.load_best_model_at_end or self.save_strategy == "best" or plateau

    def _fill_in(self) -> None:
        if self.schedule is not None and self.schedule.lower() == "none":  # how a command line says None
            self.schedule = None
        chosen = SCHEDULES.get(self.schedule or "")
        defaults = {
            "learning_rate": chosen.learning_rate if chosen else 5e-5,
            "weight_decay": chosen.weight_decay if chosen else 0.0,
            "max_grad_norm": chosen.max_grad_norm if chosen else 1.0,
            "num_train_epochs": float(chosen.epochs) if chosen else 3.0,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def _check(self) -> None:
        check_numbers(self)
        check_switches(self)
        if self.schedule is not None and self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule={self.schedule!r}: choose one of {', '.join(SCHEDULES)}, or None for optim and "
                "lr_scheduler_type."
            )
        self._check_rates()
        if self.nonfinite not in ("stop", "skip"):
            raise ValueError(f"nonfinite={self.nonfinite!r}: choose 'stop' or 'skip'.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must lie between 0 and 1, such as 0.9998, or be None.")
        if not 0 <= self.eval_threshold <= 1:
            raise ValueError(f"eval_threshold={self.eval_threshold} must lie in [0, 1].")
        self._check_callbacks()
        if self.group_by_aspect_ratio and self.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} would have no effect beside "
                "group_by_aspect_ratio=True, which draws batches at random: leave out one of the two."
            )
        ineffective.refuse(
            self, self.schedule, [name for name in ("optim", "lr_scheduler_type") if not self._is_none(name)]
        )
        if self.eval_do_concat_batches:
            raise ValueError("eval_do_concat_batches=True loses images whose labels differ in length; leave it False.")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would drop the image and its boxes; leave it False.")

    def _check_rates(self) -> None:
        """What changes a schedule needs one; what changes the rate of the same parameters can't be given twice."""
        defaults = {"bias_lr_factor": 1.0, "bias_weight_decay": None, "decay_epochs": None, "warmup_kind": None}
        changed = [name for name, default in defaults.items() if getattr(self, name) != default]
        if self.schedule is None and changed:
            raise ValueError(f"{', '.join(changed)} belong to a schedule: set schedule='1x' or another one.")
        if self.warmup_kind is not None and self.warmup_kind not in WARMUP_STARTS:
            raise ValueError(f"warmup_kind={self.warmup_kind!r}: choose one of {', '.join(WARMUP_STARTS)}.")
        settings = self.schedule_settings()
        if settings is not None and settings.warmup_kind == "none" and self.warmup_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} would have no effect with warmup_kind='none' of schedule="
                f"{self.schedule!r}: leave it out, or set warmup_kind='linear'."
            )
        if any(not isinstance(epoch, int | float) or not epoch > 0 for epoch in self.decay_epochs or ()):
            raise ValueError(f"decay_epochs={self.decay_epochs}: give numbers of epochs above 0.")
        if "backbone" in parse_factors(self.lr_factors) and self.backbone_lr is not None:
            raise ValueError("backbone_lr and lr_factors both set the learning rate of the backbone: leave out one.")

    def _check_callbacks(self) -> None:
        for name in EXTRAS.intersection([self.report_to] if isinstance(self.report_to, str) else self.report_to or ()):
            if importlib.util.find_spec(name) is None:
                raise ValueError(
                    f"report_to={name!r}, but {name} is not installed: pip install 'crosskd_hf[{name}]', from a clone "
                    f"pip install '.[{name}]', or report_to='none'."
                )
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience={self.patience}: needed is a number of evaluations of at least 1.")

    def _check_processes(self) -> None:
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched > 1 and self.world_size == 1:
            raise ValueError(
                f"The launcher started {launched} processes, but each of them would train alone: without "
                "CUDA devices set use_cpu=True (--use_cpu)."
            )
        devices = self.n_gpu
        if devices > 1:
            upstream.use_one_device(self)
            command = shlex.join(sys.argv)
            logger.warning(
                "%d devices are visible, but this is one process: only one of them is used. For all: "
                "accelerate launch --multi_gpu --num_processes %d %s",
                devices,
                devices,
                command,
            )
