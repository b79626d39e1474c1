"""The line of an epoch."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import TrainerState

from crosskd_hf.training.config import CrossKDConfig
from crosskd_hf.training.progress import EpochLines


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    told: list[str] = []
    monkeypatch.setattr("crosskd_hf.training.progress.tqdm.write", told.append)
    return told


@pytest.mark.parametrize(("before", "word"), [([], "best so far"), ([0.4, 0.3], "best 40.0")])
def test_ap_beside_the_best_one(lines: list[str], tmp_path: Path, before: list[float], word: str) -> None:
    """Of this run, and of a resumed one before its interruption."""
    args = CrossKDConfig(str(tmp_path), num_train_epochs=4, report_to="none")
    history = [{"eval_map": value, "step": step} for step, value in enumerate(before)]
    state = TrainerState(log_history=history, global_step=2, max_steps=8, epoch=1.0)
    callback = EpochLines()
    callback.on_train_begin(args, state, None)
    state.global_step = 4
    callback.on_log(args, state, None, logs={"loss": 1.0, "crosskd/cls": 0.25, "learning_rate": 0.002})
    callback.on_evaluate(args, state, None, metrics={"eval_map": 0.35, "eval_map_50": 0.6})
    (line,) = lines
    assert line.startswith(f"epoch 1/4  AP 35.0  AP50 60.0  {word}  loss 1 (labels 0.75, crosskd 0.25)  lr 0.002  ")
