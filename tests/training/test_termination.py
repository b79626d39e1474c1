"""SIGTERM: a checkpoint is saved, the run ends, and resuming repeats what would have come."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from crosskd_hf.training import checkpoints, termination
from crosskd_hf.training.termination import EXIT_STATUS
from crosskd_hf.training.trainer import CrossKDTrainer
from tests.tiny_run import losses, make_trainer

BASE: dict[str, Any] = {
    "max_steps": 5,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "train_sampling_strategy": "random",
    "augment": True,
    "ema_decay": 0.9,
    "save_strategy": "steps",
    "save_steps": 1000,
}


class At(TrainerCallback):
    """Does something once, at one moment of one update."""

    def __init__(self, moment: str, update: int, action: Callable[[], None]) -> None:
        self.update, self.action, self.done = update, action, False
        setattr(self, moment, self._act)

    def _act(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.update and not self.done:
            self.done = True
            self.action()


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def trainer_in(folder: Path, run: Path, *callbacks: TrainerCallback, **changes: Any) -> CrossKDTrainer:
    trainer = make_trainer(folder, output_dir=str(run), **(BASE | changes))
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


def terminated(trainer: CrossKDTrainer) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        trainer.train()
    assert stopped.value.code == EXIT_STATUS == 143
    assert signal.getsignal(signal.SIGTERM) is before


def weights(trainer: CrossKDTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def test_the_signal_saves_a_checkpoint_and_resuming_repeats_the_run(folder: Path, tmp_path: Path) -> None:
    whole = trainer_in(folder, tmp_path / "whole")
    whole.train()
    terminated(trainer_in(folder, tmp_path / "run", At("on_substep_end", 1, terminate)))
    assert [path.name for path in checkpoints.checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    resumed = trainer_in(folder, tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(resumed).items())


def test_it_comes_before_an_evaluation_that_is_due(folder: Path, tmp_path: Path) -> None:
    changes = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_steps": 2}
    evaluated = At("on_evaluate", 4, lambda: pytest.fail("there may be no time for it"))
    terminated(
        trainer_in(folder, tmp_path, At("on_step_begin", 3, terminate), evaluated, save_total_limit=1, **changes)
    )
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]


def test_during_an_evaluation(folder: Path, tmp_path: Path) -> None:
    changes = {"eval_strategy": "steps", "eval_steps": 2}
    whole = trainer_in(folder, tmp_path / "whole", **changes)
    whole.train()
    terminated(trainer_in(folder, tmp_path / "run", At("on_prediction_step", 2, terminate), **changes))
    assert [path.name for path in checkpoints.checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    resumed = trainer_in(folder, tmp_path / "run", **changes)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)


def test_behind_the_last_update_the_signal_has_its_usual_effect(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    trainer_in(folder, tmp_path, At("on_train_end", 5, terminate)).train()
    assert raised == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_without_checkpoints_nothing_changes(folder: Path, tmp_path: Path) -> None:
    seen: list[Any] = []
    note = At("on_step_begin", 0, lambda: seen.append(signal.getsignal(signal.SIGTERM)))
    trainer_in(folder, tmp_path, note, save_strategy="no", max_steps=1).train()
    assert seen == [signal.SIG_DFL]


def test_a_handler_of_the_user_stays(folder: Path, tmp_path: Path) -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        trainer = trainer_in(folder, tmp_path, At("on_step_begin", 1, terminate))
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]
    assert trainer.state.global_step == 5


def test_the_option_of_transformers_changes_nothing(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_in(folder, tmp_path, At("on_step_begin", 1, terminate), enable_jit_checkpoint=True)
    with pytest.raises(SystemExit):
        trainer.train()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-2"]


def test_in_another_thread_there_is_no_handler_and_training_goes_on(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_in(folder, tmp_path, max_steps=1)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 1


def test_nothing_stays_behind_a_failed_run(folder: Path, tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("no")

    trainer = trainer_in(folder, tmp_path, At("on_step_begin", 1, fail))
    callbacks = list(trainer.callback_handler.callbacks)
    with pytest.raises(RuntimeError, match="no"):
        trainer.train()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert trainer.callback_handler.callbacks == callbacks


class Slow(torch.utils.data.Dataset):
    """Its items take as long as it takes to send a signal or two."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        time.sleep(0.2)
        return index


SIGNAL_FROM_OUTSIDE = "import os, signal, sys; [os.kill(int(pid), signal.SIGTERM) for pid in sys.argv[1:]]"


@pytest.mark.timeout(120)
@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="only forked processes are spared")
def test_loaders_processes_heed_the_process_that_started_them_alone() -> None:
    loader = termination.spare_workers(DataLoader(Slow(), num_workers=2))
    batches = iter(loader)
    found = [int(next(batches)) for _ in range(2)]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    words = [sys.executable, "-c", SIGNAL_FROM_OUTSIDE, *(str(worker.pid) for worker in workers)]
    subprocess.run(words, check=True)
    found += [int(batch) for batch in batches]
    assert found == [0, 1, 2, 3]
    batches = iter(loader)
    next(batches)
    for worker in multiprocessing.active_children():
        worker.terminate()
        worker.join(20)
        assert worker.exitcode is not None


def test_a_loader_without_processes_stays_as_it_is() -> None:
    loader = DataLoader(Slow())
    assert termination.spare_workers(loader).multiprocessing_context is None
    assert termination.spare_workers([1]) == [1]


RUN = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from tests.training.test_termination import BASE, At
from tests.tiny_run import make_trainer
torch.set_num_threads(1)
folder, run, steps, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
trainer = make_trainer(folder, output_dir=str(run), **(BASE | {"max_steps": steps, "dataloader_num_workers": workers,
    "gradient_accumulation_steps": 1, "schedule": None, "lr_scheduler_type": "constant",
    "save_steps": int(sys.argv[5]), "save_total_limit": 1}))
trainer.add_callback(At("on_step_end", 4, (run / "_started").touch))
trainer.train(resume_from_checkpoint=any(run.glob("checkpoint-*")))
if trainer.args.process_index == 0:
    save_file({k: v.clone().contiguous() for k, v in trainer.model.state_dict().items()}, run / "final.safetensors")
"""


def start(
    folder: Path, run: Path, steps: int, processes: int = 1, workers: int = 0, save_steps: int = 1000
) -> subprocess.Popen[bytes]:
    script = folder / "run.py"
    script.write_text(RUN)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    words = [sys.executable, *(launcher if processes > 1 else []), str(script), str(folder), str(run), str(steps)]
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*words, str(workers), str(save_steps)], env=environment, cwd=root, start_new_session=True)


def children(pid: int) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in listed.stdout.split()]


def wait_for_updates(run: Path, process: subprocess.Popen[bytes]) -> None:
    while not (run / "_started").exists():
        assert process.poll() is None
        time.sleep(0.02)


CASES = {
    "a job with loaders": (1, 2, lambda pid: os.killpg(pid, signal.SIGTERM)),
    "the launcher": (2, 0, lambda pid: os.kill(pid, signal.SIGTERM)),
    "a job of two processes with loaders": (2, 1, lambda pid: os.killpg(pid, signal.SIGTERM)),
    "one of two processes": (2, 0, lambda pid: os.kill(children(pid)[-1], signal.SIGTERM)),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES)
def test_processes_agree_and_resuming_repeats_the_run(folder: Path, tmp_path: Path, case: str) -> None:
    processes, workers, terminate_it = CASES[case]
    run = tmp_path / "run"
    process = start(folder, run, 100_000, processes, workers)
    wait_for_updates(run, process)
    terminate_it(process.pid)
    assert process.wait(120) != 0
    (saved,) = checkpoints.checkpoints(run)
    assert checkpoints.fault(saved) is None
    update = json.loads((saved / "trainer_state.json").read_text())["global_step"]
    assert update >= 4
    for out in (run, tmp_path / "whole"):
        assert start(folder, out, update + 3, processes, workers).wait(300) == 0
    ours, theirs = (load_file(out / "final.safetensors") for out in (run, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [1, 2])
def test_killed_processes_lose_no_checkpoint(folder: Path, tmp_path: Path, number: int) -> None:
    """One or both of two processes are killed, with a checkpoint after every update and none but the last one kept."""
    run = tmp_path / "run"
    process = start(folder, run, 100_000, 2, save_steps=1)
    wait_for_updates(run, process)
    victims = children(process.pid)[-number:]
    assert len(victims) == number
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    assert process.wait(120) != 0
    last = checkpoints.last_checkpoint(run, contents=True)
    assert last is not None
    update = int(last.rpartition("-")[2])
    assert update >= 3
    for out in (run, tmp_path / "whole"):
        assert start(folder, out, update + 3, 2, save_steps=1).wait(300) == 0
    assert {path.name for path in run.glob("*checkpoint-*")} == {f"checkpoint-{update + 3}"}
    ours, theirs = (load_file(out / "final.safetensors") for out in (run, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
