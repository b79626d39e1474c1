"""The authors' figures of whole pairs: losses, gradients, outputs and detections (`tests/parity/steps.py`)."""

import sys
from pathlib import Path

import pytest

from tests.parity import steps

GOLDEN = Path(__file__).parents[1] / "golden"
QUICK = {"gfl_r18_from_r50_pkd", "retinanet_r18_from_r50"}
CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))


def test_cases_of_every_family() -> None:
    assert set(CASES) >= QUICK
    assert {case.split("_")[0] for case in CASES} >= {"atss", "deformable", "fcos", "gfl", "retinanet"}


@pytest.mark.parametrize(
    "name", [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
@pytest.mark.timeout(900)
def test_the_authors_figures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["steps", str(GOLDEN / f"{name}.json")])
    assert steps.main() == 0
