"""Two real processes (gloo) do what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_run import make_data, perform

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.distributed

ACCELERATE = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone")


def launch(launcher: tuple[str, ...], folder: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Perform `cases` one after the other in two processes; returns their results."""
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    command = [sys.executable, *launcher, "-m", "tests.tiny_run", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(path.with_suffix(".results.json").read_text())


def weights(case: dict[str, Any], rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(f"{case['weights']}.{rank}.safetensors")


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert set(left) == set(right)
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert len(ours["losses"]) == len(theirs["losses"]) > 0
    for left, right in zip(ours["losses"], theirs["losses"], strict=True):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-6)
    assert ours["metrics"] == pytest.approx(theirs["metrics"], abs=1e-4, nan_ok=True)


def case(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    changes = {"output_dir": str(folder / f"{name}-run")} | changes
    return {"folder": str(folder), "changes": changes, "weights": str(folder / name)}


def test_processes_and_accumulation_make_no_difference(tmp_path: Path) -> None:
    """With images without objects, a process whose last batch is smaller, and one whose last batch has no own image."""
    uneven, lonely = tmp_path / "uneven", tmp_path / "lonely"
    make_data(uneven, num_train=7)
    make_data(lonely, num_train=5)
    two = [
        case(folder, "two", per_device_train_batch_size=2) | {"evaluate_first": True} for folder in (uneven, lonely)
    ]
    results = launch(ACCELERATE, tmp_path, two)
    for folder, spread, result in zip((uneven, lonely), two, results, strict=True):
        assert result["processes"] == 2
        assert result["wrapped"] == "DistributedDataParallel"
        assert largest_difference(weights(spread, 0), weights(spread, 1)) == 0
        whole = case(folder, "one")
        accumulated = case(folder, "accumulated", per_device_train_batch_size=2, gradient_accumulation_steps=2)
        expected = perform(whole)
        assert_same(result, expected)
        assert_same(perform(accumulated), expected)
        assert largest_difference(weights(spread), weights(whole)) < 1e-5
        assert largest_difference(weights(accumulated), weights(whole)) < 1e-5


def test_resume_in_two_processes(tmp_path: Path) -> None:
    """From a checkpoint inside of the second epoch, with adapters, averaged weights, shuffling and augmentation."""
    make_data(tmp_path, num_train=10)
    changes: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 5,
        "train_sampling_strategy": "random",
        "ema_decay": 0.9,
    }
    whole = case(tmp_path, "whole", **changes) | {"augment": True}
    resumed = case(tmp_path, "resumed", **changes) | {"augment": True, "resume": str(tmp_path / "whole-run/checkpoint-5")}
    expected, result = launch(TORCHRUN, tmp_path, [whole, resumed])
    assert result["losses"] == expected["losses"]
    assert result["metrics"] == pytest.approx(expected["metrics"], nan_ok=True)
    for rank in (0, 1):
        assert largest_difference(weights(resumed, rank), weights(whole, rank)) == 0
