"""The grid of methods and seeds (`benchmarks/accuracy.py`): what is skipped, and what its table says."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import accuracy
from benchmarks.accuracy import Grid, Results, Runner, difference, table
from crosskd_hf.experiments.comparison_options import DenseOptions, DetrOptions
from crosskd_hf.experiments.presets import preset

GRIDS = sorted((accuracy.ROOT / "benchmarks" / "grids").glob("*.yaml"))
COLUMNS = "date,commit,hardware,data,seed,run,model,teacher,methods,epochs,map,map_50,map_75,settings,teacher_sha256"


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """An empty file of results."""
    path = tmp_path / "results.csv"
    path.write_text(COLUMNS + "\n")
    return Results(path)


def grid(**changes: Any) -> Grid:
    """Two methods, two seeds."""
    given: dict[str, Any] = {"title": "t", "example": "e", "data": "d", "settings": {"a": 1}, "seeds": [0, 1]}
    given["runs"] = {"baseline": [], "crosskd": ["crosskd"], "both": ["crosskd", "pkd"]}
    return Grid(**given | changes)


class Fake(Runner):
    """Trains nothing: a run's AP is its methods and its seed."""

    def __init__(self, given: Grid, results: Results, teacher: str = "0") -> None:
        self.grid, self.results, self.teacher, self.trained = given, results, teacher, []

    def _teacher(self) -> Any:
        return (self.teacher, None)

    def _train(self, name: str, methods: list[str], seed: int, teacher: Any, keep: bool = False) -> dict[str, str]:
        self.trained.append((name, seed))
        return {"run": name, "seed": str(seed), "map": str(10.0 + 5 * len(methods) + seed * (1 + len(methods)))}


@pytest.fixture(autouse=True)
def _no_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "weight_hash", lambda model: f"hash {model}")


def test_a_run_with_a_row_is_skipped(results: Results) -> None:
    whole = Fake(grid(), results)
    whole.run()
    assert whole.trained == [(name, seed) for seed in (0, 1) for name in ("baseline", "crosskd", "both")]
    again = Fake(grid(runs={"baseline": [], "crosskd": ["crosskd"], "new": ["kd"]}), results)
    again.run()
    assert again.trained == [("new", 0), ("new", 1)]


def test_runs_of_several_processes_have_the_rows_of_one(results: Results, tmp_path: Path) -> None:
    settings = {"num_synthetic_images": 8, "shortest_edge": 64, "longest_edge": 64, "width": 32, "max_steps": 1}
    settings |= {"eval_strategy": "no", "save_strategy": "no", "dataloader_num_workers": 0, "disable_tqdm": True}
    small = grid(example="distill_coco", settings=settings, runs={"baseline": [], "crosskd": ["crosskd"]}, seeds=[0])
    Runner(small, results, tmp_path / "out").run(jobs=2)
    several = results.rows()
    results.path.write_text(COLUMNS + "\n")
    Runner(small, results, tmp_path / "out").run()
    one = results.rows()
    assert [row["run"] for row in several if row["run"] == "teacher"] == ["teacher"]
    order = lambda row: row["run"]  # noqa: E731
    assert sorted((row for row in several if row["run"] != "teacher"), key=order) == sorted(one, key=order)


def test_other_settings_or_another_teacher_are_other_runs(results: Results) -> None:
    Fake(grid(), results).run()
    other = Fake(grid(settings={"a": 2}), results)
    other.run()
    assert len(other.trained) == 6
    taught = Fake(grid(), results, teacher="another")
    taught.run()
    assert {name for name, _ in taught.trained} == {"crosskd", "both"}


def test_the_table_pairs_seeds(results: Results) -> None:
    Fake(grid(), results).run()
    lines = [*table(grid(), results)]
    assert lines[2] == "| baseline | 2 | 10.5 | 0.7 |  |  |"
    # Gains of 5 and 6: mean 5.5, deviation 0.707, t(1) = 12.706, half width 12.706 * 0.707 / sqrt(2) = 6.35.
    assert lines[3] == "| crosskd | 2 | 16.0 | 1.4 | +5.5 | -0.9 to +11.9 |"
    assert len(lines) == 5


def test_the_interval_is_that_of_students_t() -> None:
    # Three values of deviation 1: t(2) = 4.3027, over sqrt(3).
    assert difference([1.0, 2.0, 3.0]) == ("+2.0", "-0.5 to +4.5")
    assert difference([-1.25]) == ("-1.2", "")
    assert difference([]) == ("", "")


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_a_grid_is_read(path: Path) -> None:
    found = Grid.read(path)
    assert found.seeds == [0, 1, 2]
    assert len(found.runs) >= 2
    assert len({tuple(methods) for methods in found.runs.values()}) == len(found.runs)


def test_the_examples_of_the_grids_have_no_published_model_without_a_preset() -> None:
    assert DenseOptions().published_model is None
    assert DetrOptions().published_model is None
    options = DetrOptions(
        preset="crosskd-deformable-detr-r18-from-r50",
        train_images="a", train_annotations="b", val_images="c", val_annotations="d", teacher="t",
    )  # fmt: skip
    assert options.published_model == preset("crosskd-deformable-detr-r18-from-r50").model


def test_a_grid_needs_its_baseline(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text("{title: t, example: e, data: d, settings: {}, runs: {crosskd: [crosskd]}}")
    with pytest.raises(ValueError, match="needs a run 'baseline' with no methods"):
        Grid.read(path)
    path.write_text("{title: t, example: e, data: d, settings: {}, runs: {baseline: [], a: [nothing]}}")
    with pytest.raises(ValueError, match="'nothing' is not known"):
        Grid.read(path)


def test_a_row_with_unknown_columns_is_an_error(results: Results) -> None:
    with pytest.raises(ValueError, match="has no columns cost"):
        results.append({"run": "crosskd", "cost": "1"})
    assert results.rows() == []
