"""SIGTERM saves a checkpoint and ends the run: so SLURM, spot machines and containers announce that they will kill it.

The signal may reach the processes of a run at different moments, or one of them alone. So they tell each other at the
end of every update, in one small all-reduce whose result is read an update later, when it has long arrived.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import distributed
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

EXIT_STATUS = 128 + signal.SIGTERM

logger = logging.getLogger(__name__)


class _DuringEvaluation(Exception):
    """All processes know of the signal, and an evaluation is under way."""


@contextmanager
def watched(trainer: Trainer, save: Callable[[], None]) -> Iterator[None]:
    """Inside the context SIGTERM makes the training of `trainer` save a checkpoint and end.

    Where another handler is set already, or no checkpoints are wanted (`save_strategy="no"`), nothing changes.

    Args:
        trainer: Its `train` must run inside of the context. Every process must enter it.
        save: Writes the checkpoint of the present update.

    Raises:
        SystemExit: With status 143, when the checkpoint is written.
    """
    if trainer.args.save_strategy == "no":
        yield
        return
    callback = _Termination()
    trainer.add_callback(callback)  # behind the others, which say what is due
    previous = callback.install(trainer.args.enable_jit_checkpoint)
    try:
        yield
    except _DuringEvaluation:
        if trainer.state.global_step:
            save()
        _leave(trainer.state.global_step)
    finally:
        trainer.remove_callback(callback)
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)
    if callback.received and previous is not None:  # behind the last update
        signal.raise_signal(signal.SIGTERM)


class _Termination(TrainerCallback):
    """Asks for a last checkpoint, and ends the run when it is written."""

    def __init__(self) -> None:
        self.received = False
        self._decided = False
        self._told: _Told | None = None

    def install(self, replace: bool) -> Any:
        """Handle SIGTERM from now on. Returns what handled it before, or None if that stays.

        Args:
            replace: Whether to take the place of another handler, such as that of `enable_jit_checkpoint`.
        """
        previous = signal.getsignal(signal.SIGTERM)
        if threading.current_thread() is not threading.main_thread():
            return None
        if previous is not signal.SIG_DFL and not replace:
            logger.info("SIGTERM is handled by %s already; it saves no checkpoint.", previous)
            return None
        signal.signal(signal.SIGTERM, self._note)
        return signal.SIG_DFL if replace else previous

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._everybody_knows(args):
            self._decided = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # there are seconds left

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._everybody_knows(args):
            raise _DuringEvaluation

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._decided:
            _leave(state.global_step)

    def _everybody_knows(self, args: Any) -> bool:
        """Whether the signal has reached some process; the same answer in all of them."""
        if args.world_size == 1:
            return self.received
        earlier, self._told = self._told, _Told(self.received, args.device)
        return earlier is not None and earlier.read()


class _Told:
    """A flag, raised in one process and read in all, without waiting for the device where it is not read at once."""

    def __init__(self, raised: bool, device: torch.device) -> None:
        flag = torch.full((), float(raised), device=device)
        distributed.all_reduce(flag)
        self._flag = flag.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if device.type == "cuda" else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> bool:
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._flag)


def _leave(update: int) -> None:
    logger.warning(
        "SIGTERM: the checkpoint of update %d is saved, and the run ends. It goes on with resume_from_checkpoint=True.",
        update,
    )
    raise SystemExit(EXIT_STATUS)


def spare_workers(loader: Any) -> Any:
    """Let the loader's forked processes outlive a SIGTERM that goes to all processes of a job, and return the loader.

    A loader that loses one of them fails at once. That of the process that started them still ends them.
    """
    inner = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper keeps to itself what is set on it
    forks = _can_spare and multiprocessing.get_start_method() == "fork"
    if forks and isinstance(inner, DataLoader) and inner.num_workers and inner.multiprocessing_context is None:
        inner.multiprocessing_context = _Spared()
    return loader


_can_spare = hasattr(signal, "sigwaitinfo")  # Linux, where jobs get such signals
if _can_spare:
    from multiprocessing.context import ForkContext, ForkProcess

    class _Worker(ForkProcess):
        """From its start the signal is blocked, and read by a thread that knows where it comes from."""

        def run(self) -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=_heed_the_parent_alone, daemon=True).start()
            super().run()

    class _Spared(ForkContext):
        Process = _Worker


def _heed_the_parent_alone() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
