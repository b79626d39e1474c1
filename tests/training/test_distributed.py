"""Two real processes (gloo) do what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from crosskd_hf.distillation.methods import METHODS as ALL_METHODS
from tests.ports import free_port
from tests.tiny_run import make_data, perform

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]  # of a busy machine; to tell a run that hangs

ACCELERATE = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
)
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")


def launch(launcher: tuple[str, ...], folder: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Perform `cases` one after the other in two processes; returns their results."""
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    port = () if launcher == TORCHRUN else ("--main_process_port", str(free_port()))
    command = [sys.executable, *launcher, *port, "-m", "tests.tiny_run", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=850, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(path.with_suffix(".results.json").read_text())


def weights(case: dict[str, Any], rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(f"{case['weights']}.{rank}.safetensors")


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert set(left) == set(right)
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


def scores(result: dict[str, Any]) -> dict[str, float]:
    """The n-th highest score of every image; an untrained detector's AP says little."""
    rows = {image: sorted(row[4] for row in rows) for image, rows in result["detections"].items()}
    assert len(rows) == 5
    assert all(len(row) > 10 for row in rows.values())
    return {f"{image} {number}": score for image, row in rows.items() for number, score in enumerate(row)}


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert len(ours["losses"]) == len(theirs["losses"]) > 0
    for left, right in zip(ours["losses"], theirs["losses"], strict=True):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-6)
    assert scores(ours) == pytest.approx(scores(theirs), abs=1e-5)
    assert ours["metrics"] == pytest.approx(theirs["metrics"], abs=1e-4, nan_ok=True)


def case(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    changes = {"output_dir": str(folder / f"{name}-run")} | changes
    return {"folder": str(folder), "changes": changes, "weights": str(folder / name)}


OTHER_FAMILIES = ("retinanet", "fcos", "atss", "faster_rcnn", "deformable_detr")
METHODS = {"deformable_detr": ["crosskd"]}
# All methods that the families' cases leave out, at once, and one of a user's own, which each process imports.
OTHERS = sorted({*ALL_METHODS} - {"crosskd", "pkd"})
EVERY: dict[str, Any] = {
    "methods": [
        *(f"{name}:start=0" if name == "fine_grained" else name for name in OTHERS),
        "tests.distillation.test_own_method:Means:alpha=0.5",
    ],
    "max_steps": 2,  # an epoch
}
RESUMED: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 5,
    "train_sampling_strategy": "random",
    "ema_decay": 0.9,
    "augment": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def launched(folder: Path) -> dict[str, Any]:
    make_data(folder / "uneven", num_train=7)
    case = family_case(folder / "uneven", "gfl", per_device_train_batch_size=2)
    return perform_in_two(folder, {"gfl": case})["gfl"]


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The slow cases, performed in one launch: starting processes costs more than what they do."""
    folder = tmp_path_factory.mktemp("more")
    make_data(folder / "uneven", num_train=7)
    make_data(folder / "lonely", num_train=5)
    cases = {family: family_case(folder / "uneven", family, per_device_train_batch_size=2) for family in OTHER_FAMILIES}
    cases["every"] = family_case(folder / "uneven", "gfl", "-every", per_device_train_batch_size=2, **EVERY)
    cases["lonely"] = case(folder / "lonely", "lonely", per_device_train_batch_size=2) | {"evaluate_first": True}
    cases["whole"] = case(folder / "uneven", "whole", **RESUMED)
    cases["resumed"] = case(folder / "uneven", "resumed", **RESUMED)
    cases["resumed"]["resume"] = str(folder / "uneven/whole-run/checkpoint-5")
    return perform_in_two(folder, cases)


def perform_in_two(folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    results = launch(ACCELERATE, folder, list(cases.values()))
    return {name: cases[name] | result for name, result in zip(cases, results, strict=True)}


def family_case(folder: Path, family: str, suffix: str = "", **changes: Any) -> dict[str, Any]:
    methods = METHODS.get(family, ["crosskd", "pkd"])
    return case(folder, f"{family}{suffix}", family=family, **({"methods": methods} | changes))


def assert_like_one_process(spread: dict[str, Any], family: str = "gfl", suffix: str = "", **changes: Any) -> None:
    """Two processes of two images and two micro-batches of two do what one process of four does."""
    folder = Path(spread["folder"])
    assert spread["processes"] == 2
    assert spread["wrapped"] == "DistributedDataParallel"
    assert largest_difference(weights(spread, 0), weights(spread, 1)) == 0
    whole = family_case(folder, family, f"{suffix}-one", **changes)
    small = changes | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    accumulated = family_case(folder, family, f"{suffix}-accumulated", **small)
    expected = perform(whole)
    assert_same(spread, expected)
    assert_same(perform(accumulated), expected)
    assert largest_difference(weights(spread), weights(whole)) < 1e-5
    assert largest_difference(weights(accumulated), weights(whole)) < 1e-5


def test_processes_and_accumulation_make_no_difference(launched: dict[str, Any]) -> None:
    """The second process has no object in its first batch and only one image in the last one of an epoch."""
    assert_like_one_process(launched)


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_the_same_for_every_family(more: dict[str, dict[str, Any]], family: str) -> None:
    assert_like_one_process(more[family], family)


@pytest.mark.slow
def test_the_same_for_every_method(more: dict[str, dict[str, Any]]) -> None:
    trained = {key.split("/")[0] for key in more["every"]["losses"][0] if "/" in key}
    assert trained == {*OTHERS, "means"}
    assert_like_one_process(more["every"], suffix="-every", **EVERY)


@pytest.mark.slow
def test_a_process_without_an_image_of_its_own(more: dict[str, dict[str, Any]]) -> None:
    """It has nothing but repeated images at the end of an epoch; and evaluating first doesn't disturb training."""
    assert_like_one_process(more["lonely"])


@pytest.mark.slow
def test_resume_in_two_processes(more: dict[str, dict[str, Any]]) -> None:
    """Inside of the second epoch, with adapters, averaged weights, shuffling and augmentation."""
    whole, resumed = more["whole"], more["resumed"]
    assert resumed["losses"] == whole["losses"]
    assert resumed["metrics"] == pytest.approx(whole["metrics"], nan_ok=True)
    for rank in (0, 1):
        assert largest_difference(weights(resumed, rank), weights(whole, rank)) == 0


@pytest.mark.slow
def test_torchrun(launched: dict[str, Any], tmp_path: Path) -> None:
    again = case(Path(launched["folder"]), "torchrun", per_device_train_batch_size=2)
    (result,) = launch(TORCHRUN, tmp_path, [again])
    assert result["losses"] == launched["losses"]
