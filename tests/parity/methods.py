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

from tests.parity import (
    method_crosskd,
    method_detr,
    method_features,
    method_gid,
    method_ld,
    method_maps,
    method_regions,
)

Runner = Callable[[dict[str, Any]], dict[str, dict[str, Any]]]

# Of each method, what returns its figures by variant; the name of the only one is "".
RUNNERS: dict[str, Runner] = {
    "crosskd_strategies": method_crosskd.strategies,
    "crosskd_regions": method_crosskd.regions,
    "pkd_head": method_crosskd.pkd_head,
    "pkd": method_features.pkd,
    "fitnets": method_features.fitnets,
    "ld_imitation": method_regions.ld_imitation,
    "ld_gfl": method_ld.gfl,
    "ld_atss": method_ld.atss,
    "ld_fcos": method_ld.fcos,
    "ld_retinanet": method_ld.retinanet,
    "detrdistill": method_detr.detrdistill,
    "fgd": method_maps.fgd,
    "gid": method_gid.gid,
    "skd": method_maps.skd,
    "fine_grained": method_regions.fine_grained,
    "defeat": method_regions.defeat,
}
LOSSES = (1e-4, 1e-6)  # relative, absolute: of losses that should be zero
GRADIENTS = (1e-3, 1e-6)
TIED = (5e-3, 1e-6)  # of GID's response and relation: anchors of equal overlap come and go with rounding
VALUES = (1e-4, 1e-6)  # of what a region holds, which the files round
BOXES = (1e-4, 2e-3)  # of pixels, which the files round to a thousandth
# By words in the path of a figure, the first that fits; everything else is exact, such as the rows of a region.
TOLERANCES: dict[tuple[str, ...], tuple[float, float]] = {
    ("loss_distill_reg_deltas.total", "loss_distill_relation.total"): TIED,
    ("gradients",): GRADIENTS,
    ("losses",): LOSSES,
    (".boxes[", ".scores["): BOXES,
    (".values[", ".sum", "sum_mask", "_sum["): VALUES,
}
# Not reached by a gradient, or reached by one that is zero.
NOTHING = (None, "none", "zero", "no gradient (the loss is a constant here)")
SHOWN = 8


class Figure(NamedTuple):
    """One number of a file beside ours."""

    path: str
    expected: Any
    got: Any

    @property
    def tolerance(self) -> tuple[float, float] | None:
        """Relative and absolute; None: exact."""
        for words, tolerance in TOLERANCES.items():
            if any(word in self.path for word in words):
                return tolerance
        return None

    @property
    def error(self) -> float:
        """How far ours is off, in tolerances; infinite if it isn't computed."""
        if self.expected == "nan":  # what the original printed; ours has to be a number
            return 0.0 if isinstance(self.got, float) and self.got == self.got else float("inf")
        if self.expected in NOTHING or (self.expected == 0 and self.got in NOTHING and "gradients" in self.path):
            return 0.0 if self.got in (*NOTHING, 0.0) else float("inf")
        if isinstance(self.expected, str) or self.tolerance is None:
            return 0.0 if self.got == self.expected else float("inf")
        if self.got is None or isinstance(self.got, str):
            return float("inf")
        relative, absolute = self.tolerance
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
    found = []
    for name, variant in variants.items():
        ours, title = got.get(name, {}), f"{name}: " if name else ""
        found.extend(figures(variant["expected"], ours, title))
        for key, beside in variant.items():  # another method on the same inputs
            if key != "expected" and isinstance(beside, Mapping) and "expected" in beside:
                found.extend(figures(beside["expected"], ours.get(key, {}), f"{title}{key}: "))
    return found


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
        f"tolerances: losses {LOSSES[0]} relative (and {LOSSES[1]}), gradients {GRADIENTS[0]} relative and "
        f"{GRADIENTS[1]} absolute, values of regions {VALUES[0]} relative, GID's box response and relation {TIED[0]} "
        "relative, everything else exact; anchors of equal overlap fall as in the file"
    )
    agree = [report(path.stem, compare(json.loads(path.read_text()))) for path in files]
    print("all files agree" if all(agree) else f"{agree.count(False)} of the files differ")
    sys.exit(0 if all(agree) else 1)


if __name__ == "__main__":
    main()
