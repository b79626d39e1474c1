"""A run of 2,000 updates grows nowhere (`pytest -m slow tests/training/test_long_run.py`)."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.tiny_run import make_trainer

logger = logging.getLogger(__name__)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

STEPS, EVERY, SETTLED = 2000, 100, 600
PROC = Path("/proc")


class Usage(TrainerCallback):
    """Memory and open files of this process and of its data loader's workers, every hundred updates."""

    def __init__(self) -> None:
        self.megabytes: list[tuple[float, ...]] = []
        self.handles: list[tuple[int, ...]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % EVERY == 0:
            processes = [PROC / str(os.getpid()), *map(PROC.joinpath, children())]
            self.megabytes.append(tuple(resident(process) for process in processes))
            self.handles.append(tuple(len(list((process / "fd").iterdir())) for process in processes))


def children() -> list[str]:
    return (PROC / f"self/task/{os.getpid()}/children").read_text().split()


def resident(process: Path) -> float:
    """Megabytes of memory that the process holds."""
    return int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.skipif(not (PROC / "self/statm").exists(), reason="reads /proc")
def test_memory_files_and_log_stay_as_they_are(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "max_steps": STEPS,
        "logging_steps": EVERY,
        "eval_strategy": "steps",
        "eval_steps": 500,
        "save_strategy": "steps",
        "save_steps": 500,
        "save_total_limit": 2,
        "train_sampling_strategy": "random",
        "ema_decay": 0.99,
        "augment": True,
        "learning_rate": 0.01,
        "dataloader_num_workers": 1,
        "dataloader_persistent_workers": True,
    }
    trainer, usage = make_trainer(tmp_path, **changes), Usage()
    trainer.add_callback(usage)
    trainer.train()
    logger.warning("megabytes %s", [tuple(round(value) for value in row) for row in usage.megabytes])
    logger.warning("open files %s", usage.handles)
    assert trainer.state.global_step == STEPS
    before, after = usage.megabytes[SETTLED // EVERY - 1], usage.megabytes[-1]
    assert len(after) >= 2, "the loader's worker is missing"
    assert after[0] - before[0] < 15
    assert after[1] - before[1] < 15
    for number in (0, 1):  # each batch on its way from the worker holds some
        opened = [row[number] for row in usage.handles]
        assert min(opened[-7:]) <= min(opened[SETTLED // EVERY - 1 :][:7]) + 8
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == STEPS // EVERY
    assert len(json.dumps(logs[-1])) < 1.5 * len(json.dumps(logs[0]))
