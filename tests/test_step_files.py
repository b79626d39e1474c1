"""What one CrossKD step opens (`benchmarks/step_files.py`)."""

import json

import pytest

from benchmarks import step_files


def test_the_distillation_of_a_step_is_a_few_files(capsys: pytest.CaptureFixture[str]) -> None:
    step_files.main()
    figures = json.loads(capsys.readouterr().out)
    own, called = figures["distillation"]["own"], figures["distillation"]["called"]
    assert own["files"] <= 8
    assert own["lines"] <= 1900
    assert figures["files"] == len(figures["opened"])
    assert figures["lines"] == sum(figures["opened"].values()) > own["lines"] + called["lines"]
    assert "crosskd_hf/distillation/methods/crosskd.py" in list(figures["opened"])[: own["files"]]
    assert not any("faster_rcnn" in name or "detectors/detr" in name for name in figures["opened"])
