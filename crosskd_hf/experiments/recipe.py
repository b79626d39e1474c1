"""Settings that let a detector learn from as many images as there are: the defaults of `train` and `distill`.

`docs/defaults.md` has the reasons. `CrossKDConfig()` by itself keeps the defaults of `TrainingArguments`, whose
learning rate and three epochs are meant for language models.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..create import is_new
from ..distillation.detectors.detr_families import FAMILIES
from ..training.config import CrossKDConfig


class Start(enum.Enum):
    """What the weights of a model know before training."""

    RANDOM = "random weights"
    BACKBONE = "a pretrained backbone"
    DETECTOR = "a trained detector"


@dataclass(frozen=True)
class _Numbers:
    """Of one kind of detector and start: learning rate for 8 images an update, its factor for the backbone, updates."""

    learning_rate: float
    backbone_factor: float
    updates: int
    epochs: tuple[int, int]


# Fewest and most epochs hold the number of updates to what small and large data sets need.
_CONVOLUTIONAL = {
    Start.RANDOM: _Numbers(2e-3, 1.0, 600, (12, 60)),
    Start.BACKBONE: _Numbers(5e-4, 0.2, 600, (12, 50)),
    Start.DETECTOR: _Numbers(2e-4, 0.2, 400, (6, 30)),
}
_TRANSFORMER = {
    Start.RANDOM: _Numbers(1e-3, 1.0, 2000, (50, 150)),
    Start.BACKBONE: _Numbers(2e-4, 0.1, 1500, (36, 100)),
    Start.DETECTOR: _Numbers(1e-4, 0.1, 600, (12, 50)),
}

CHOSEN = (
    "per_device_train_batch_size", "num_train_epochs", "learning_rate", "backbone_lr", "lr_scheduler_type",
    "warmup_steps", "weight_decay", "max_grad_norm", "ema_decay", "logging_steps", "save_strategy", "save_total_limit",
    "report_to", "eval_strategy", "load_best_model_at_end",
)  # fmt: skip
"""Settings that the recipe may choose."""
OF_THE_OPTIMISER = (
    "learning_rate", "backbone_lr", "optim", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Defaults for one model on one data set.

    Args:
        images: Of the training data.
        start: What the model knows.
        config: Of the model.
        processes: Of the run.
    """

    images: int
    start: Start
    config: PreTrainedConfig
    processes: int = 1

    def settings(self, given: Collection[str] = (), evaluated: bool = True, **values: Any) -> dict[str, Any]:
        """Settings of `CrossKDConfig`.

        Args:
            given: Names of what the user has set. It stays out, with what would contradict it: a `schedule` brings its
                own optimiser, `max_steps` its own number of epochs, another `eval_strategy` no best model.
            evaluated: Whether there is validation data.
            values: What the user has set for `per_device_train_batch_size`, `gradient_accumulation_steps` and
                `num_train_epochs`, for the numbers that depend on them.
        """
        numbers = (_TRANSFORMER if self.config.model_type in FAMILIES else _CONVOLUTIONAL)[self.start]
        batch = int(values.get("per_device_train_batch_size") or self.batch())
        an_update = batch * int(values.get("gradient_accumulation_steps") or 1) * self.processes
        per_epoch = max(1, math.ceil(self.images / an_update))
        fewest, most = numbers.epochs
        epochs = float(values.get("num_train_epochs") or min(max(math.ceil(numbers.updates / per_epoch), fewest), most))
        rate = numbers.learning_rate * math.sqrt(an_update / 8)
        found: dict[str, Any] = {
            "per_device_train_batch_size": batch,
            "num_train_epochs": epochs,
            "learning_rate": float(f"{rate:.2g}"),
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.05,
            "weight_decay": 1e-4,
            "max_grad_norm": 0.1 if self.config.model_type in FAMILIES else 10.0,
            "ema_decay": self._decay(per_epoch * epochs),
            "logging_steps": max(1, min(50, per_epoch // 4)),
            "save_strategy": "epoch",
            "save_total_limit": 1,
            "report_to": "none",
        }
        if numbers.backbone_factor != 1:
            found["backbone_lr"] = float(f"{rate * numbers.backbone_factor:.2g}")
        if evaluated:
            found |= {"eval_strategy": "epoch", "load_best_model_at_end": True}
        return _without_contradictions(found, set(given))

    def batch(self) -> int:
        """Images of a process in an update: 8, fewer if an epoch would have less than ten updates."""
        return max(1, min(8, self.images // (10 * self.processes)))

    def _decay(self, updates: float) -> float:
        """Weights are averaged over the last twentieth of the run, but over no more than 5,000 updates."""
        return round(1 - 1 / min(max(updates / 20, 10.0), 5000.0), 5)


def _without_contradictions(found: dict[str, Any], given: set[str]) -> dict[str, Any]:
    out = set(given)
    if "schedule" in given:
        out |= {*OF_THE_OPTIMISER, "num_train_epochs"}
    if "max_steps" in given:
        out |= {"num_train_epochs"}
    if "learning_rate" in given:
        out |= {"backbone_lr"}
    if given & {"eval_strategy", "save_strategy", "eval_steps", "save_steps", "load_best_model_at_end"}:
        out |= {"load_best_model_at_end"}
    if "eval_steps" in given:
        found["eval_strategy"] = "steps"
    if "save_steps" in given:
        found["save_strategy"] = "steps"
    if given & {"eval_steps", "save_steps"} and found.get("eval_strategy") != found["save_strategy"]:
        out |= {"load_best_model_at_end"}
    return {name: value for name, value in found.items() if name not in out}


def start_of(source: str, model: PreTrainedModel) -> Start:
    """What the weights of a model that was made from a word know."""
    if not is_new(source):
        return Start.DETECTOR
    config = model.config.to_dict()
    frozen = any(not parameter.requires_grad for parameter in model.parameters())
    return Start.BACKBONE if frozen or config.get("frozen_stages") else Start.RANDOM


def in_words(args: CrossKDConfig, images: int, size: Any, start: Start | None = None) -> str:
    """The run in one line, before its first update."""
    an_update = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    updates = args.max_steps if args.max_steps > 0 else math.ceil(images / an_update) * math.ceil(args.num_train_epochs)
    rate = "of schedule " + args.schedule if args.schedule else f"{args.learning_rate:g}"
    parts = [
        f"{images} images",
        f"batch {an_update}",
        f"{updates} updates" if args.max_steps > 0 else f"{updates} updates ({args.num_train_epochs:g} epochs)",
        f"lr {rate}",
        *([f"backbone lr {args.backbone_lr:g}"] if args.backbone_lr is not None else []),
        *([f"weight average {args.ema_decay:g}"] if args.ema_decay is not None else []),
        f"images of {_size(size)}",
        *([f"from {start.value}"] if start is not None else []),
    ]
    return ", ".join(parts)


def _size(size: Any) -> str:
    given = dict(size or {})
    if given.get("height"):
        return f"{given['height']} x {given['width']} px"
    return f"{given.get('shortest_edge')} px, at most {given.get('longest_edge')}"
