"""Compare distillation methods with what original implementations printed: one line a file, exit status 1 if one fails.

    python -m tests.parity.methods tests/golden/methods/*.json

A file holds variants of one method on seeded inputs (`tests/golden/methods/README.md`). A runner draws the same inputs
and computes every figure through the classes that the trainer uses; figures that a runner doesn't compute are named and
count as wrong. Runs on the CPU; features take a second a file, GFL heads some ten.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests.parity import method_crosskd, method_features

Runner = Callable[[dict[str, Any]], dict[str, dict[str, Any]]]

# Of each method, what returns its figures by variant; the name of the only one is "".
RUNNERS: dict[str, Runner] = {
    "crosskd_strategies": method_crosskd.strategies,
    "crosskd_regions": method_crosskd.regions,
    "pkd_head": method_crosskd.pkd_head,
    "pkd": method_features.pkd,
    "fitnets": method_features.fitnets,
}
LOSSES = 1e-4  # relative
GRADIENTS = (1e-3, 1e-6)  # relative, absolute
ROUNDING = 1e-6  # absolute, of losses: those that should be zero
NOTHING = (None, "none", "zero")  # not reached by a gradient, or reached by one that is zero
SHOWN = 8


class Figure(NamedTuple):
    """One number of a file beside ours."""

    path: str
    expected: Any
    got: Any

    @property
    def error(self) -> float:
        """How far ours is off, in tolerances; infinite if it isn't computed."""
        if self.expected == "nan":  # what the original printed; ours has to be a number
            return 0.0 if isinstance(self.got, float) and self.got == self.got else float("inf")
        if self.expected in NOTHING or (self.expected == 0 and "gradients" in self.path):
            return 0.0 if self.got in (*NOTHING, 0.0) else float("inf")
        if isinstance(self.expected, str) or ("gradients" not in self.path and "losses" not in self.path):
            return 0.0 if self.got == self.expected else float("inf")
        if self.got is None or isinstance(self.got, str):
            return float("inf")
        relative, absolute = GRADIENTS if "gradients" in self.path else (LOSSES, ROUNDING)
        error = abs(self.got - self.expected) / (absolute + relative * abs(self.expected))
        return error if error == error else float("inf")


def figures(expected: Any, got: Any, path: str = "") -> Iterator[Figure]:
    """Every number of a file beside ours, by the path of its keys."""
    if isinstance(expected, Mapping):
        for key, value in expected.items():
            yield from figures(value, got.get(key) if isinstance(got, Mapping) else None, f"{path}.{key}")
    elif isinstance(expected, Sequence) and not isinstance(expected, str):
        known = isinstance(got, Sequence) and len(got) == len(expected)
        for index, value in enumerate(expected):
            yield from figures(value, got[index] if known else None, f"{path}[{index}]")
    else:
        yield Figure(path, expected, got)


def gradient_figures(loss: Tensor, levels: Sequence[Tensor], samples: int = 6) -> dict[str, Any] | str:
    """Gradient of a loss with respect to the tensors of all levels, summarised as the files have it."""
    if not loss.requires_grad:
        return "none"
    found = torch.autograd.grad(loss, list(levels), retain_graph=True, allow_unused=True)
    if all(gradient is None for gradient in found):
        return "none"
    norms = [None if g is None or not g.any() else float(g.double().norm()) for g in found]
    if not any(norms):
        return "zero"
    first = next(level for level, norm in enumerate(norms) if norm)
    values = found[first].detach().double().reshape(-1)
    index = np.linspace(0, len(values) - 1, min(samples, len(values))).round().astype(int)
    return {
        "norm": sum(norm**2 for norm in norms if norm) ** 0.5,
        "norm_per_level": norms,
        "first_level_with_gradient": {
            "level": first,
            "shape": list(found[first].shape),
            "norm": norms[first],
            "samples": values[index].tolist(),
        },
    }


def compare(document: dict[str, Any]) -> list[Figure]:
    """The figures of a file beside ours.

    Raises:
        KeyError: There is no runner for the file's method.
    """
    runner = RUNNERS.get(document["method"])
    if runner is None:
        raise KeyError(f"No runner for the method {document['method']!r}; there are {', '.join(RUNNERS)}.")
    got = runner(document)
    variants = document.get("variants") or {"": document}
    return [
        figure
        for name, variant in variants.items()
        for figure in figures(variant["expected"], got.get(name, {}), f"{name}: " if name else "")
    ]


def report(title: str, found: list[Figure]) -> bool:
    """Print a file's line, and the figures that are off. Returns whether all agree."""
    wrong = [figure for figure in found if not figure.error <= 1]
    worst = max((figure.error for figure in found), default=0.0)
    print(f"{'FAIL' if wrong else 'ok  '}  {title:32s} {len(found)} figures, the worst at {worst:.2g} of its tolerance")
    for figure in wrong[:SHOWN]:
        print(f"      {figure.path}: {figure.expected} in the file, {figure.got} here")
    if len(wrong) > SHOWN:
        print(f"      and {len(wrong) - SHOWN} more")
    return not wrong


def main() -> None:
    """Compare the files of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="json files of tests/golden/methods")
    files = parser.parse_args().files
    print(
        f"tolerances: losses {LOSSES} relative (and {ROUNDING}), gradients {GRADIENTS[0]} relative and {GRADIENTS[1]} "
        "absolute, everything else exact"
    )
    agree = [report(path.stem, compare(json.loads(path.read_text()))) for path in files]
    print("all files agree" if all(agree) else f"{agree.count(False)} of the files differ")
    sys.exit(0 if all(agree) else 1)


if __name__ == "__main__":
    main()
