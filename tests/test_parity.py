"""The authors' figures of whole pairs: losses, gradients, outputs and detections (`benchmarks/parity.py`)."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
QUICK = {"gfl_r18_from_r50_pkd", "retinanet_r18_from_r50"}
CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))


@pytest.fixture(scope="module")
def parity() -> ModuleType:
    """`benchmarks/parity.py`, which is a script and no module of the package."""
    spec = importlib.util.spec_from_file_location("parity", ROOT / "benchmarks" / "parity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cases_of_every_family() -> None:
    assert set(CASES) >= QUICK
    assert {case.split("_")[0] for case in CASES} >= {"atss", "deformable", "fcos", "gfl", "retinanet"}


@pytest.mark.parametrize(
    "name", [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
@pytest.mark.timeout(900)
def test_the_authors_figures(parity: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["parity.py", str(GOLDEN / f"{name}.json")])
    assert parity.main() == 0
