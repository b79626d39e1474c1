"""Compare with the authors' figures: one line a case, exit status 1 if one fails.

    python -m tests.parity.steps tests/golden/*.json

Every figure of a case is compared, and those that differ or aren't computed are named. Runs on the CPU; about 5 seconds
a dense case on two cores, 20 to 60 seconds one of Faster R-CNN or Deformable DETR.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from tests.parity import golden, golden_faster_rcnn, parity_detr, wording
from tests.parity.figures import Figures, Pair, figure_error, side_by_side

# Largest error of a kind of figure; a kind that isn't listed may be off by OTHERWISE.
TOLERANCES = {"gradients": 5e-3, "trajectory": 1e-2}
OTHERWISE = 1e-3
SHOWN = 5  # differing figures

RUNS: dict[str, Callable[[dict[str, Any]], Figures]] = {
    "faster_rcnn": golden_faster_rcnn.run,
    "deformable_detr": parity_detr.run,
}


def compare(case: dict[str, Any]) -> tuple[dict[str, Pair], list[str]]:
    """A case's figures beside ours, and the groups of ours that the case doesn't have."""
    wording.check(case)
    identity = case.get("checks", {}).get("student_is_teacher")
    expected = case["expected"] | ({} if identity is None else {"student_is_teacher": identity})
    got = RUNS.get(case["student"]["architecture"], golden.run)(case | {"expected": expected})
    return side_by_side(expected, got), sorted(got.keys() - expected.keys())


def kind_of(name: str) -> str:
    """What a figure is about: the name of the column."""
    return "gradients" if "grad_norm" in name else name.split(".")[0]


def tolerance(name: str) -> float:
    """The largest error that a figure may have."""
    return TOLERANCES.get(kind_of(name), OTHERWISE)


def report(title: str, pairs: dict[str, Pair], absent: list[str]) -> bool:
    """Print a case's line, and those of figures that differ. Returns whether all agree."""
    errors = {name: figure_error(name, pair) for name, pair in pairs.items()}
    wrong = [name for name, error in errors.items() if not error <= tolerance(name)]
    largest: dict[str, float] = {}
    for name in sorted(errors, key=errors.__getitem__):
        largest[kind_of(name)] = errors[name]
    columns = "  ".join(f"{kind} {largest[kind]:.1e}" for kind in sorted(largest))
    print(f"{'FAIL' if wrong else 'ok  '}  {title:36s} {len(pairs)} figures: {columns}", flush=True)
    if absent:
        print(f"      not in the case: {', '.join(absent)}")
    for name in sorted(wrong)[:SHOWN]:
        expected, got, _ = pairs[name]
        ours = "not computed" if got is None else f"{_short(got)} here, off by {errors[name]:.1e}"
        print(f"      {name}: {_short(expected)} in the case, {ours}")
    if len(wrong) > SHOWN:
        print(f"      and {len(wrong) - SHOWN} more")
    return not wrong


def _short(figure: Any) -> str:
    text = f"a map of {tuple(figure.shape)}" if isinstance(figure, torch.Tensor) else str(figure)
    return text if len(text) <= 60 else f"{text[:57]}..."


def run(path: Path) -> bool:
    """Compare one case. Returns whether it agrees; one that can't be computed does not."""
    torch.manual_seed(0)
    try:
        pairs, absent = compare(json.loads(path.read_text()))
    except Exception as error:  # whatever is wrong with a case, the others are still compared
        print(f"FAIL  {path.stem:36s} {type(error).__name__}: {error}", flush=True)
        return False
    return report(path.stem, pairs, absent)


def main() -> int:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", type=Path, help="golden cases (json)")
    logging.disable_progress_bar()
    failed = [path for path in parser.parse_args().cases if not run(path)]
    print(f"{len(failed)} of the cases failed" if failed else "all cases agree")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
