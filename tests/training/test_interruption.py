"""Runs that are killed or run out of disk (`pytest -m slow tests/training/test_interruption.py`)."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForObjectDetection

from crosskd_hf.training import checkpoints
from crosskd_hf.training.saving import TRAINING_WEIGHTS
from tests.tiny_run import losses, make_data, make_trainer

logger = logging.getLogger(__name__)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KILLS = 24
STEPS = 200
CHANGES: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "eval_strategy": "steps",
    "eval_steps": 10,
    "metric_for_best_model": "eval_map",
    "train_sampling_strategy": "random",
    "ema_decay": 0.9,
    "augment": True,
}


@pytest.fixture
def quick_disk() -> None:
    """Every file is forced to the disk here, as in real runs."""


def train(folder: Path, output: Path) -> None:
    """Train to the end from wherever `output` stands."""
    torch.set_num_threads(1)
    trainer = make_trainer(folder, output_dir=str(output), **CHANGES)
    trainer.train(resume_from_checkpoint=checkpoints.last_checkpoint(output) is not None if output.is_dir() else None)


def kill(output: Path, process: Any, rng: random.Random, while_saving: bool) -> None:
    """Let some checkpoints be written, then kill: at any time, or when the next save or deletion is under way."""
    newest = checkpoints.last_checkpoint(output) if output.is_dir() else None
    for _ in range(rng.randint(1, 3)):
        while process.is_alive() and (checkpoints.last_checkpoint(output) if output.is_dir() else None) == newest:
            time.sleep(0.005)
        newest = checkpoints.last_checkpoint(output)
    if while_saving:
        while process.is_alive() and not any(output.glob("_*")):
            pass
    time.sleep(rng.uniform(0, 0.03 if while_saving else 0.5))
    os.kill(process.pid, signal.SIGKILL)


def assert_every_checkpoint_is_whole_or_known_not_to_be(output: Path) -> None:
    for folder in output.glob("checkpoint-*"):
        if checkpoints.is_complete(folder):
            AutoModelForObjectDetection.from_pretrained(folder)
            torch.load(folder / "optimizer.pt", weights_only=True)
            load_file(folder / TRAINING_WEIGHTS)


def test_kill_at_any_moment(tmp_path: Path) -> None:
    make_data(tmp_path)
    context, rng = multiprocessing.get_context("fork"), random.Random(7)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(tmp_path, whole)
    reached, during_save, newest = [], 0, 0
    for number in range(KILLS):
        process = context.Process(target=train, args=(tmp_path, killed))
        process.start()
        kill(killed, process, rng, while_saving=number % 2 == 1)
        process.join()
        during_save += any(killed.glob("_*"))
        assert_every_checkpoint_is_whole_or_known_not_to_be(killed)
        last = checkpoints.last_checkpoint(killed) if killed.is_dir() else None
        step = int(last.rsplit("-", 1)[1]) if last else 0
        assert step >= newest, "a kill lost a checkpoint"
        newest = step
        reached.append(step)
    logger.warning("killed %d times, %d during a save; last good checkpoints %s", KILLS, during_save, reached)
    process = context.Process(target=train, args=(tmp_path, killed))
    process.start()
    process.join()
    ours, theirs = (checkpoints.last_checkpoint(output) for output in (killed, whole))
    assert ours is not None
    assert theirs is not None
    assert Path(ours).name == Path(theirs).name == f"checkpoint-{STEPS}"
    for name in ("model.safetensors", TRAINING_WEIGHTS, "distiller.safetensors"):
        left, right = load_file(Path(ours) / name), load_file(Path(theirs) / name)
        assert all(torch.equal(left[key], right[key]) for key in right), name
    assert logs(Path(ours)) == logs(Path(theirs))
    left, right = (torch.load(Path(f) / "optimizer.pt", weights_only=True) for f in (ours, theirs))
    assert all(
        torch.equal(left["state"][k]["momentum_buffer"], v["momentum_buffer"]) for k, v in right["state"].items()
    )
    assert during_save >= KILLS // 4


def logs(folder: Path) -> list[dict[str, float]]:
    state = json.loads((folder / "trainer_state.json").read_text())
    timed = ("runtime", "per_second", "preparation")
    return [{k: str(v) for k, v in e.items() if not any(word in k for word in timed)} for e in state["log_history"]] + [
        {"best_metric": state["best_metric"]}
    ]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for three and a half checkpoints."""
    make_data(tmp_path)
    make_trainer(tmp_path, output_dir=str(tmp_path / "one"), **(CHANGES | {"max_steps": 2})).train()
    kilobytes = sum(path.stat().st_size for path in (tmp_path / "one").rglob("*") if path.is_file()) // 1024
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes * 7 // 2}k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_loses_no_checkpoint(tmp_path: Path, small_disk: Path) -> None:
    changes = CHANGES | {"eval_strategy": "no", "metric_for_best_model": None, "save_total_limit": 5, "max_steps": 20}
    trainer = make_trainer(tmp_path, output_dir=str(small_disk), **changes)
    with pytest.raises(RuntimeError, match="could not be written"):
        trainer.train()
    whole = checkpoints.checkpoints(small_disk)
    assert len(whole) >= 2
    assert [int(path.name.rsplit("-", 1)[1]) for path in whole] == list(range(2, trainer.state.global_step, 2))
    assert_every_checkpoint_is_whole_or_known_not_to_be(small_disk)
    assert not list(small_disk.glob("_*"))
    resumed = make_trainer(tmp_path, output_dir=str(small_disk), **(changes | {"save_strategy": "no"}))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 20
    assert losses(resumed)[: trainer.state.global_step] == losses(trainer)
