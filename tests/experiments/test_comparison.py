"""Several runs in one folder: an interrupted comparison goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from crosskd_hf.experiments.comparison import Comparison
from crosskd_hf.training.config import CrossKDConfig
from tests.tiny_run import load_data, make_data, make_detector, processor


def test_finished_runs_stay_and_others_begin(tmp_path: Path) -> None:
    make_data(tmp_path / "shapes")
    train, val = load_data(tmp_path / "shapes")

    def compare(resume: str | None) -> dict[str, dict[str, torch.Tensor]]:
        args = CrossKDConfig(
            str(tmp_path / "run"), max_steps=3, save_steps=2, per_device_train_batch_size=2, use_cpu=True,
            report_to="none", resume_from_checkpoint=resume,
        )  # fmt: skip
        comparison = Comparison(train, val, processor(), args)
        for name, seed in (("one", 1), ("two", 2)):
            comparison.run(name, make_detector(seed))
        assert set(comparison.results) == {"one", "two"}
        return {name: load_file(tmp_path / "run" / name / "model.safetensors") for name in ("one", "two")}

    whole = compare(None)
    shutil.rmtree(tmp_path / "run" / "one" / "checkpoint-3")  # an interruption before the last update of the first run
    shutil.rmtree(tmp_path / "run" / "two")  # and the second run had not begun
    resumed = compare("True")
    for name, weights in whole.items():
        assert all(torch.equal(resumed[name][key], value) for key, value in weights.items())
