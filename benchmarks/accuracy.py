"""Does distillation pay? A grid of methods and seeds: one row a run in results.csv, then means and intervals.

    python benchmarks/accuracy.py benchmarks/grids/gfl_shapes.yaml            # trains what has no row yet
    python benchmarks/accuracy.py benchmarks/grids/gfl_shapes.yaml --table    # only prints
    python benchmarks/accuracy.py benchmarks/grids/gfl_bccd.yaml --data PATH  # folder of the data set
    python benchmarks/accuracy.py benchmarks/grids/gpu_bccd.yaml --jobs 6 --data PATH  # six runs at once

A grid is a YAML file: an example, the settings of all its runs, seeds, and the methods of each run. One teacher, of the
first seed, teaches all students of a data set; it is kept in `--out`, and its hash stands in the row of every student.
Of one seed all students start alike and see the same images in the same order, so that differences to the baseline
are paired. A run whose row is there is skipped. A run of the grids here takes half a minute of one core.
"""

import argparse
import concurrent.futures
import copy
import csv
import datetime
import importlib
import multiprocessing
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

from crosskd_hf.distillation import MethodConfig
from crosskd_hf.experiments.verdict import half_width
from crosskd_hf.inference.loading import load_detector
from crosskd_hf.training.provenance import weight_hash

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results.csv"
BASELINE = "baseline"
Row = dict[str, str]


@dataclass
class Grid:
    """What is run.

    Args:
        title: What the grid asks.
        example: Script in `examples/` that knows how to train.
        data: Name of the data set with the size of its images; grids of one name share the teacher.
        settings: Options of the example, the same for all runs.
        runs: Methods by the name of the run; none: the baseline.
        seeds: Of every run.
    """

    title: str
    example: str
    data: str
    settings: dict[str, Any]
    runs: dict[str, list[str]]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])

    @classmethod
    def read(cls, path: Path) -> "Grid":
        """A YAML file. Raises ValueError if there is no baseline, or a method is unknown."""
        grid = cls(**yaml.safe_load(path.read_text()))
        if grid.runs.get(BASELINE) != []:
            raise ValueError(f"{path} needs a run '{BASELINE}' with no methods: differences are taken to it.")
        for methods in grid.runs.values():
            MethodConfig.parse_all(methods)
        return grid

    @property
    def words(self) -> list[str]:
        """The settings as words of a command line."""
        return [str(word) for name, value in self.settings.items() for word in (f"--{name}", value)]

    def key(self, methods: Sequence[str]) -> Row:
        """Columns that tell a run from others, but seed and teacher."""
        settings = " ".join(f"{name}={value}" for name, value in sorted(self.settings.items()))
        return {"data": self.data, "methods": "+".join(methods), "settings": f"{self.example} {settings}"}


@dataclass
class Results:
    """A csv file with one row for each run, which is there as soon as the run is done."""

    path: Path = RESULTS

    def rows(self) -> list[Row]:
        """All of them."""
        with self.path.open(newline="", encoding="utf-8") as file:
            return [*csv.DictReader(file)]

    def of(self, wanted: Row) -> list[Row]:
        """The rows that hold what is wanted."""
        return [row for row in self.rows() if all(row.get(name) == value for name, value in wanted.items())]

    def append(self, row: Row) -> None:
        """Write a row under the columns of the file."""
        with self.path.open(newline="", encoding="utf-8") as file:
            columns = next(csv.reader(file))
        unknown = row.keys() - set(columns)
        if unknown:
            raise ValueError(f"{self.path} has no columns {', '.join(sorted(unknown))}.")
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, columns, lineterminator="\n").writerow(row)


@dataclass
class Runner:
    """Trains the runs of a grid.

    Args:
        grid, results: What is run, and where rows go.
        out: Where the teacher lies.
        words: Further words of the example's command line, such as the paths of the data.
    """

    grid: Grid
    results: Results
    out: Path
    words: Sequence[str] = ()

    def __post_init__(self) -> None:
        sys.path.insert(0, str(ROOT / "examples"))
        self.example = importlib.import_module(self.grid.example)
        folder = self.out / self.grid.data
        words = [*self.grid.words, *self.words, "--output_dir", str(folder), "--seed", str(self.grid.seeds[0])]
        self.arguments, self.config = self.example.parse(words)
        self.comparison = self.example.prepare(self.arguments, self.config)

    def run(self, jobs: int = 1) -> None:
        """Train what has no row yet, seed by seed; `jobs` runs at a time, each in a process of its own if several."""
        teacher = self._teacher()
        its_hash = weight_hash(teacher[0])
        missing: dict[tuple[str, int], Row] = {}
        for seed in self.grid.seeds:
            for name, methods in self.grid.runs.items():
                known = self.grid.key(methods) | {"seed": str(seed), "teacher_sha256": its_hash if methods else ""}
                if not self.results.of(known):
                    missing[name, seed] = known
        for run, row in self._rows(list(missing), teacher, jobs):
            self.results.append(row | missing[run])
            print(f"{self.grid.data}, seed {run[1]}, {run[0]}: AP {row['map']}", flush=True)

    def _rows(self, runs: list[tuple[str, int]], teacher: Any, jobs: int) -> Iterator[tuple[tuple[str, int], Row]]:
        """Runs with their rows, as they come."""
        if jobs == 1:
            for name, seed in runs:
                methods = self.grid.runs[name]
                yield (name, seed), self._train(name, methods, seed, teacher if methods else None)
            return
        context, given = multiprocessing.get_context("spawn"), (self.grid, self.results, self.out, self.words)
        with concurrent.futures.ProcessPoolExecutor(jobs, context, _begin, given) as pool:
            futures = {pool.submit(_row_of, *run): run for run in runs}
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()

    def _teacher(self) -> tuple[PreTrainedModel, Any]:
        """From its folder, or trained now."""
        folder = self.out / self.grid.data / "teacher"
        if not (folder / "model.safetensors").exists():
            row = self._train("teacher", [], self.grid.seeds[0], None, keep=True)
            its_hash = weight_hash(load_detector(folder)[0])
            self.results.append(row | self.grid.key([]) | {"methods": "", "teacher_sha256": its_hash})
        return load_detector(folder)

    def _train(self, name: str, methods: list[str], seed: int, teacher: Any, keep: bool = False) -> Row:
        """One run; its row."""
        step = "teacher" if keep else "distilled" if methods else "baseline"
        arguments, comparison = copy.copy(self.arguments), copy.copy(self.comparison)
        arguments.steps, comparison.results = [step], {}
        comparison.args = copy.copy(self.config)
        comparison.args.seed = seed
        if methods:
            comparison.args.methods = MethodConfig.parse_all(methods)
        with tempfile.TemporaryDirectory() as folder:
            if not keep:
                comparison.args.output_dir = folder
            self.example.run(arguments, comparison, {} if teacher is None else {"teacher": teacher})
        return self._row(name, seed, comparison.results[step])

    def _row(self, name: str, seed: int, metrics: dict[str, float]) -> Row:
        arguments, role = self.arguments, "teacher" if name == "teacher" else "student"
        kind = getattr(arguments, "detector", "deformable_detr")
        epochs = arguments.teacher_epochs if role == "teacher" else None
        return {
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "hardware": hardware(),
            "seed": str(seed),
            "run": name,
            "model": f"{kind}:{getattr(arguments, f'{role}_backbone')}",
            "teacher": "" if name in ("teacher", BASELINE) else f"{kind}:{arguments.teacher_backbone}",
            "epochs": str(epochs or self.config.num_train_epochs),
            **{key: f"{100 * metrics[key]:.2f}" for key in ("map", "map_50", "map_75")},
        }


_runner: Runner  # of a process that trains one run after the other


def _begin(grid: Grid, results: Results, out: Path, words: Sequence[str]) -> None:
    global _runner
    torch.set_num_threads(1)
    _runner = Runner(grid, results, out, words)


def _row_of(name: str, seed: int) -> Row:
    """Train a run in this process; the teacher lies in its folder."""
    return next(_runner._rows([(name, seed)], _runner._teacher(), 1))[1]


def commit() -> str:
    """The code that runs; marked if it differs from what is committed."""
    changed = git("status", "--porcelain", "--", "crosskd_hf", "examples", "benchmarks/accuracy.py")
    return git("rev-parse", "--short", "HEAD") + ("-changed" if changed else "")


def git(*words: str) -> str:
    """What git answers; nothing where there is no repository."""
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()


def hardware() -> str:
    """The device that the runs use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return f"{names[0] if names else platform.processor()} CPU, {torch.get_num_threads()} threads"


def table(grid: Grid, results: Results) -> Iterator[str]:
    """Of the rows of a grid, in Markdown: AP in percent, and differences to the baseline of the same seed."""
    yield "| run | seeds | AP | standard deviation | minus baseline | 95 % interval |"
    yield "|---|---|---|---|---|---|"
    baseline = by_seed(grid, results, [])
    for name, methods in grid.runs.items():
        values = by_seed(grid, results, methods)
        if not values:
            continue
        deviation = f"{statistics.stdev(values.values()):.1f}" if len(values) > 1 else ""
        cells = [name, len(values), f"{statistics.mean(values.values()):.1f}", deviation]
        gains = [value - baseline[seed] for seed, value in values.items() if seed in baseline] if methods else []
        yield f"| {' | '.join(map(str, [*cells, *difference(gains)]))} |"


def by_seed(grid: Grid, results: Results, methods: list[str]) -> dict[str, float]:
    """AP of a run's seeds; a row that was run again replaces the earlier one."""
    rows = [row for row in results.of(grid.key(methods)) if row["run"] != "teacher"]
    return {row["seed"]: float(row["map"]) for row in rows if int(row["seed"]) in grid.seeds}


def difference(gains: Sequence[float]) -> tuple[str, str]:
    """Mean, and the interval of Student's t that holds it with 95 %."""
    if not gains:
        return "", ""
    mean = statistics.mean(gains)
    if len(gains) == 1:
        return f"{mean:+.1f}", ""
    half = half_width(gains)
    return f"{mean:+.1f}", f"{mean - half:+.1f} to {mean + half:+.1f}"


def main() -> None:
    """Run the grids of the command line one after the other, and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grids", nargs="+", type=Path, help="YAML files")
    parser.add_argument("--out", type=Path, default=Path("outputs/grids"), help="where teachers are kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help="csv file of rows")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process of its own")
    given, words = parser.parse_known_args()
    results = Results(given.results)
    for grid in map(Grid.read, given.grids):
        if not given.table:
            torch.set_num_threads(1)  # tiny nets: more threads would wait for each other
            Runner(grid, results, given.out, words).run(given.jobs)
        print(f"\n{grid.title}\n", *table(grid, results), sep="\n", flush=True)


if __name__ == "__main__":
    main()
