"""`crosskd-hf analyse` and `predict --nms`, on saved models and a data set in a folder."""

from pathlib import Path

import pytest

from tests.analysis.test_probe import detector, rows_of
from tests.cli.running import run
from tests.tiny_run import make_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, two teachers and data."""
    root = tmp_path_factory.mktemp("figures")
    make_data(root / "data")
    for name, kind, seed in (("student", "gfl", 0), ("teacher", "gfl", 1), ("other", "atss", 2)):
        model, processor = detector(kind, seed)
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return root


@pytest.mark.parametrize(
    ("figure", "teachers", "more"),
    [
        ("conflict", ["teacher", "other"], ["--split", "train"]),
        ("targets", ["teacher"], ["--plain-kd", "other", "--number", "2"]),
        ("gradients", ["teacher"], ["--methods", "pkd", "fgd", "crosskd:cut=2", "--number", "2"]),
    ],
)
def test_a_figure(
    figure: str, teachers: list[str], more: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert run("analyse", figure, "student", *teachers, "--data", "data", *more, "--out", "out") == 0
    assert (folder / "out" / f"{figure}.png").stat().st_size > 5000
    rows = rows_of(folder / "out" / f"{figure}.csv")
    if figure == "conflict":
        assert {row["teacher"] for row in rows} == {"teacher", "other"}
    if figure == "gradients":
        assert [row["method"] for row in rows] == ["pkd", "fgd", "crosskd"] * 2


def test_curves_train_each_method(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    new = ["gfl:test_efficientnet_gn", "teacher", "--width", "16", "--longest-edge", "64", "--epochs", "1"]
    assert run("analyse", "curves", *new, "--methods", "baseline", "crosskd", "--data", "data", "--out", "out") == 0
    assert (folder / "out" / "curves.png").stat().st_size > 5000
    rows = rows_of(folder / "out" / "curves.csv")
    assert [row["run"] for row in rows] == ["baseline", "crosskd"]
    assert all(float(row["l1_to_teacher"]) > 0 and float(row["l1_to_labels"]) > 0 for row in rows)
    assert all((folder / "out" / name / "model.safetensors").is_file() for name in ("baseline", "crosskd"))


def test_nms_side_by_side(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert run("predict", "teacher", "data/val", "--nms", "0.3", "0.9", "--threshold", "0.2", "--out", "found") == 0
    assert {float(row["nms"]) for row in rows_of(folder / "found" / "nms.csv")} == {0.3, 0.9}


def test_what_has_no_effect_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert run("predict", "teacher", "data/val", "--nms", "0.3", "--format", "csv", "--out", "found") == 1
    assert "--format has no effect beside --nms" in capsys.readouterr().err
    assert run("analyse", "conflict", "student", "teacher", "--data", "data", "--number", "0") == 1
    assert "--number 0 must be at least 1" in capsys.readouterr().err
