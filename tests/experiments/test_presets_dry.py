"""The dry run of published experiments: which of them it runs, and some of them run."""

import importlib
from pathlib import Path
from typing import Any

import pytest

from crosskd_hf.experiments.presets import PRESETS


@pytest.fixture(scope="module")
def script() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        return importlib.import_module("presets_dry")


@pytest.fixture(scope="module")
def data(script: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return script.read(script.synthetic(tmp_path_factory.mktemp("coco")))


def test_every_pair_and_its_losses_once(script: Any) -> None:
    entries = script.distinct(list(PRESETS))
    chosen = {entry.name for entry in entries}
    assert len(chosen) == len(entries)
    assert {"gfl-r18", "crosskd-gfl-r18-from-r50", "kd-gfl-r18-from-r50"} <= chosen
    assert "gfl-r50-ld-baseline" not in chosen  # the same model as gfl-r50, alone too
    assert len(chosen) < len(PRESETS)


def test_synthetic_data_have_the_classes_of_coco(data: Any) -> None:
    train, val = data
    assert len(train.categories) == 80
    assert train.categories.raw_ids[-1] == 90
    assert 4 <= len(train.dataset) <= 6  # shapes leave some images empty, which are not chosen
    assert len(val.dataset) == 2
    for split in (train, val):
        assert all(row["bbox"] for row in split.dataset["objects"])
    used = {label for row in train.dataset["objects"] for label in row["category"]}
    assert used <= set(range(4))


@pytest.mark.parametrize(
    "name",
    [
        "gfl-r18",
        pytest.param("crosskd-gfl-r18-from-r50", marks=pytest.mark.slow),
        pytest.param("crosskd-fcos-r50-from-r101", marks=pytest.mark.slow),
        pytest.param("crosskd-faster-rcnn-r18-from-r50", marks=pytest.mark.slow),
        pytest.param("crosskd-deformable-detr-r18-from-r50", marks=pytest.mark.slow),
    ],
)
def test_two_updates_and_an_evaluation(script: Any, data: Any, name: str, tmp_path: Path) -> None:
    losses = script.dry_run(PRESETS[name], data, tmp_path)
    assert "loss=" in losses
    assert ("crosskd/" in losses) == name.startswith("crosskd")
