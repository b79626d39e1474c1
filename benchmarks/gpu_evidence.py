"""The part "evidence" of `on_gpu.py`: whether distillation helps a student that starts from scratch, over seeds."""

from __future__ import annotations

import concurrent.futures
import itertools
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.accuracy import BASELINE, ROOT, Grid, Results, Runner
from crosskd_hf.data.shapes import make_shapes

GRIDS = ("gpu_bccd", "gpu_bccd_float32")  # fast=True and float32; one teacher
# For a rehearsal on the CPU.
SMALL = {
    "student_backbone": "test_resnet", "teacher_backbone": "test_resnet", "width": 32, "shortest_edge": 64,
    "longest_edge": 64, "max_steps": 2, "use_cpu": True,
}  # fmt: skip


def evidence(report: Any, device: str, data: str | None) -> None:
    """Every run of the grids at once, each in a process of its own; `report` writes each grid down.

    Args:
        report: As of `on_gpu.py`. Rows of single runs stand in a csv file beside its own.
        device: "cuda", or "cpu" for a rehearsal.
        data: Folder of a data set in COCO's format, such as BCCD; None: synthetic shapes.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if data is None:
            make_shapes(folder / "shapes", *((8, 4, 64) if device == "cpu" else (240, 80, 320)))
        words = ["--data", data or str(folder / "shapes"), "--data_format", "coco"]
        results = Results(report.path.with_suffix(".csv"))
        results.path.write_text((ROOT / "benchmarks" / "results.csv").read_text().splitlines()[0] + "\n")
        grids = [_grid(name, device == "cpu", data is None) for name in GRIDS]
        runners = [Runner(grid, results, folder, words) for grid in grids]
        report.run("teacher", lambda: _figures(runners[0], "teacher"))
        with concurrent.futures.ThreadPoolExecutor(len(runners)) as threads:
            jobs = [len(runner.grid.runs) * len(runner.grid.seeds) for runner in runners if not report.over]
            runs = [threads.submit(runner.run, number) for runner, number in zip(runners, jobs, strict=False)]
            for runner, run in itertools.zip_longest(runners, runs):
                report.run(runner.grid.title, lambda runner=runner, run=run: run.result() or _figures(runner))


def _grid(name: str, small: bool, synthetic: bool) -> Grid:
    grid = Grid.read(ROOT / "benchmarks" / "grids" / f"{name}.yaml")
    if small:
        grid.settings, grid.seeds = grid.settings | SMALL, grid.seeds[:1]
    if synthetic:
        grid.data, grid.title = "shapes-320", grid.title.replace("blood cells (BCCD)", "synthetic shapes")
    return grid


def _figures(runner: Runner, only: str | None = None) -> dict[str, Any]:
    """AP in percent of a grid's runs, seed by seed, and gains over the baseline; the teacher is trained first."""
    runner._teacher()
    rows = runner.results.of(runner.grid.key([]) | {"run": "teacher", "methods": ""})
    if only:
        return {"ok": True, only: [float(row["map"]) for row in rows]}
    by_seed = {
        name: {row["seed"]: float(row["map"]) for row in runner.results.of(runner.grid.key(methods) | {"run": name})}
        for name, methods in runner.grid.runs.items()
    }
    baseline = by_seed[BASELINE]
    gains = {
        f"{name} minus {BASELINE}": round(statistics.fmean(found[seed] - baseline[seed] for seed in found), 2)
        for name, found in by_seed.items()
        if name != BASELINE
    }
    return {
        "ok": True,
        **{name: [found[str(seed)] for seed in runner.grid.seeds] for name, found in by_seed.items()},
        **gains,
    }
