"""What a run tells while it goes on: a bar, and one line per evaluation."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_callback import PrinterCallback


class QuietBar(ProgressCallback):
    """The progress bars of `Trainer` without the dictionaries that it prints between them."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Nothing: `EpochLines` says it."""


class EpochLines(TrainerCallback):
    """One readable line per evaluation, or per epoch where nothing is evaluated.

    Such as `epoch 3/30  AP 12.3  AP50 30.1  loss 2.31 (labels 1.80, crosskd 0.51)  lr 0.002  4 min left`: AP in
    percent, losses as means since the last line, by the labels' own and each method's.
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._count = 0
        self._start = 0.0
        self._first_step = 0
        self._best = -1.0
        self._rate = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock; a resumed run knows its best AP."""
        self._start, self._first_step = time.monotonic(), state.global_step
        self._best = max((entry["eval_map"] for entry in state.log_history if "eval_map" in entry), default=-1.0)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Collect losses."""
        if not logs or "loss" not in logs:
            return
        self._count += 1
        self._rate = logs.get("learning_rate", self._rate)
        for name, value in logs.items():
            if name == "loss" or "/" in name:
                self._sums[name.split("/")[0]] += float(value)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A line without AP."""
        if str(args.eval_strategy.value) == "no":
            self._tell(args, state, {})

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """A line with AP."""
        if state.global_step and self._count:
            self._tell(args, state, metrics or {})

    def _tell(self, args: Any, state: Any, metrics: dict[str, float]) -> None:
        if state.is_world_process_zero:
            tqdm.write(self._line(args, state, metrics))
        self._sums.clear()
        self._count = 0

    def _line(self, args: Any, state: Any, metrics: dict[str, float]) -> str:
        parts = [f"epoch {state.epoch or 0:.3g}/{args.num_train_epochs:.3g}"]
        if args.max_steps > 0:
            parts = [f"update {state.global_step}/{state.max_steps}"]
        average = metrics.get("eval_map")
        if average is not None:
            better = average > self._best
            self._best = max(self._best, average)
            parts += [f"AP {100 * average:4.1f}", f"AP50 {100 * metrics.get('eval_map_50', float('nan')):4.1f}"]
            parts += ["best so far"] if better else [f"best {100 * self._best:.1f}"]
        parts += [self._losses(), f"lr {self._rate:.2g}", _left(self._seconds_left(state))]
        return "  ".join(part for part in parts if part)

    def _losses(self) -> str:
        if not self._count:
            return ""
        means = {name: value / self._count for name, value in self._sums.items()}
        whole = means.pop("loss", 0.0)
        if not means:
            return f"loss {whole:.3g}"
        groups = {"labels": whole - sum(means.values())} | means
        return f"loss {whole:.3g} ({', '.join(f'{name} {value:.3g}' for name, value in groups.items())})"

    def _seconds_left(self, state: Any) -> float:
        done = state.global_step - self._first_step
        return (time.monotonic() - self._start) / max(done, 1) * (state.max_steps - state.global_step)


def _left(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s left"
    return f"{seconds / 60:.0f} min left" if seconds < 5400 else f"{seconds / 3600:.1f} h left"


def tell_readably(trainer: Any) -> None:
    """Replace the dictionaries that a `Trainer` prints by one line per evaluation; its bars stay."""
    had_bar = any(type(callback) is ProgressCallback for callback in trainer.callback_handler.callbacks)
    for kind in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(kind)
    if had_bar:
        trainer.add_callback(QuietBar())
    trainer.add_callback(EpochLines())
