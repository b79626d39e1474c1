"""The authors' figures of whole pairs: losses, gradients, outputs and detections (`benchmarks/parity.py`)."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
QUICK = {"gfl_r18_from_r50_pkd", "retinanet_r18_from_r50"}
CASES = sorted(p.stem for p in GOLDEN.glob("*.json") if p.stem.split("_")[0] in ("atss", "fcos", "gfl", "retinanet"))


@pytest.fixture(scope="module")
def parity() -> ModuleType:
    """`benchmarks/parity.py`, which is a script and no module of the package."""
    spec = importlib.util.spec_from_file_location("parity", ROOT / "benchmarks" / "parity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["parity"] = module
    spec.loader.exec_module(module)
    return module


def test_quick_cases_exist() -> None:
    assert set(CASES) >= QUICK
    assert len(CASES) >= 7


@pytest.mark.parametrize(
    "name", [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_the_authors_figures(parity: ModuleType, name: str) -> None:
    figures = parity.Case(json.loads((GOLDEN / f"{name}.json").read_text())).run()._asdict()
    wrong = {key: value for key, value in figures.items() if value is not None and not value <= parity.TOLERANCES[key]}
    assert not wrong
