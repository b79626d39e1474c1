"""Compare with the authors' figures: one line a case, exit status 1 if one fails.

    python benchmarks/parity.py tests/golden/*.json

Runs on the CPU; about 5 seconds a dense case on two cores, 20 to 40 seconds one of Faster R-CNN or Deformable DETR.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import golden
import golden_faster_rcnn
import parity_detr

# Largest error of a kind of figure; a kind that isn't listed may be off by OTHERWISE.
TOLERANCES = {
    "gradients": 5e-3,
    "iou_gap": 1e-2,
    "trajectory": 1e-2,
    "identity": 1e-6,
}
OTHERWISE = 1e-3


def run_dense(case: dict[str, Any]) -> dict[str, float]:
    """A dense detector: every head of `crosskd_hf.models` but those below."""
    figures = golden.Case(case).run()._asdict()
    return {name: value for name, value in figures.items() if value is not None}


def run_detr(case: dict[str, Any]) -> dict[str, float]:
    """Deformable DETR: figures by the part of the model that they are about."""
    errors: dict[str, float] = {}
    for name, (expected, got) in parity_detr.run(case).items():
        kind = "gradients" if "grad_norm" in name else name.split(".")[0]
        errors[kind] = max(errors.get(kind, 0.0), list_error(got, expected))
    return errors


def list_error(got: Any, expected: Any) -> float:
    """Largest difference of two numbers, lists of numbers or words, against the largest expected number."""
    rows = [list(value) if isinstance(value, list | tuple) else [value] for value in (got, expected)]
    if len(rows[0]) != len(rows[1]):
        return float("inf")
    if any(isinstance(value, str) for value in rows[1]):
        return 0.0 if rows[0] == rows[1] else float("inf")
    scale = max([abs(value) for value in rows[1]], default=0.0)
    differences = [abs(a - b) for a, b in zip(*rows, strict=True)]
    return max(differences, default=0.0) / max(scale, 1e-6)


RUNS: dict[str, Callable[[dict[str, Any]], dict[str, float]]] = {
    "faster_rcnn": golden_faster_rcnn.run,
    "deformable_detr": run_detr,
}


def main() -> int:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", type=Path, help="golden cases (json)")
    failed = 0
    for path in parser.parse_args().cases:
        torch.manual_seed(0)
        case = json.loads(path.read_text())
        errors = RUNS.get(case["student"]["architecture"], run_dense)(case)
        wrong = [name for name, value in errors.items() if not value <= TOLERANCES.get(name, OTHERWISE)]
        failed += bool(wrong)
        columns = "  ".join(f"{name} {value:.1e}" for name, value in errors.items())
        print(f"{'FAIL' if wrong else 'ok  '}  {path.stem:36s} {columns}", flush=True)
    print(f"{failed} of the cases failed" if failed else "all cases agree")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
