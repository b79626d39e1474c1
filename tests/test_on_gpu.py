"""What is measured on a GPU, rehearsed on the CPU, and the page that is made of it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_evidence import evidence
from benchmarks.gpu_page import known, page
from benchmarks.gpu_speed import Setting, measure_step, settings, speed
from benchmarks.on_gpu import PARTS, Report

ROOT = Path(__file__).parents[1]


def report(device: str, **checks: dict[str, Any]) -> dict[str, Any]:
    return {"part": "speed", "device": device, "date": "2026-11-26", "commit": "abc", "torch": "2", "checks": checks}


def test_the_page_is_made_of_the_files() -> None:
    assert (ROOT / "docs" / "gpu.md").read_text() == page(known())


def test_without_a_gpu_the_page_says_so() -> None:
    for reports in ([], [report("CPU, x86_64", step={"ok": True, "median_seconds": 1.0})]):
        text = page(reports)
        assert [f"{part}: not run on a GPU." in text for part in PARTS] == [True] * len(PARTS)
        assert "median_seconds" not in text


def test_with_a_gpu_the_page_has_its_figures() -> None:
    failed, missing = {"ok": False, "error": "a|b\nc"}, {"ok": None, "reason": "time"}
    text = page([report("NVIDIA H100", step={"ok": True, "median_seconds": 0.12345}, one=failed, two=missing)])
    assert "NVIDIA H100, 2026-11-26, commit abc, torch 2." in text
    assert "| step | median_seconds 0.1235 |" in text
    assert "| one | **failed** error a/b c |" in text
    assert "| two | not measured reason time |" in text
    nested = page([report("NVIDIA H100", step={"ok": True, "errors": {"losses": 1.234e-7, "n": 2}, "wrong": []})])
    assert "| step | errors (losses 1.2e-07, n 2) |" in nested
    assert "speed: not run on a GPU." not in text


def test_settings_begin_with_the_most_telling() -> None:
    found = list(settings(small=False))
    assert len({str(setting) for setting in found}) == len(found)
    assert [setting.kind for setting in found[:3]] == ["float32", "bf16", "fast"]
    assert {setting.batch for setting in found} == {2, 16}
    assert {setting.student.split(":")[0] for setting in found} == {"gfl", "faster_rcnn", "deformable_detr"}


@pytest.mark.parametrize(("family", "kind"), [("gfl", "float32"), ("gfl", "fast"), ("deformable_detr", "fast")])
def test_a_step_is_measured(family: str, kind: str) -> None:
    nets = (f"{family}:test_resnet",) * 2
    figures = measure_step(Setting(*nets, 1, kind), "cpu", (64, 64), 1, 1e12)
    assert figures["ok"]
    assert 0 < figures["least_seconds"] <= figures["median_seconds"]
    assert figures["share_of_peak"] >= 0
    assert figures["images_per_second"] > 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_evidence_is_rehearsed(tmp_path: Path) -> None:
    written = Report(tmp_path / "out.json", "evidence", 1000.0, "cpu")
    evidence(written, "cpu", None)
    teacher, *grids = written.content["checks"].values()
    assert not written.failed
    assert len(teacher["teacher"]) == 1
    assert [len(grid["baseline"]) == len(grid["crosskd"]) == 1 for grid in grids] == [True, True]
    assert all(grid["crosskd minus baseline"] == grid["crosskd"][0] - grid["baseline"][0] for grid in grids)
    with (tmp_path / "out.csv").open() as rows:
        assert [row["run"] for row in csv.DictReader(rows)].count("crosskd") == 2


@pytest.mark.parametrize("part", [speed, evidence])
def test_a_part_whose_time_is_over_ends_with_a_file(part: Any, tmp_path: Path) -> None:
    written = Report(tmp_path / "out.json", "speed", -1.0, "cpu")
    part(written, "cpu", None)
    checks = json.loads((tmp_path / "out.json").read_text())["checks"]
    assert checks
    assert {figures["reason"] for figures in checks.values()} == {"the time given by --seconds was over"}
