"""What came out of `distill`: the results of its runs, and whether distillation helped, beside the noise of a seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import t as student_t

from ..inference.evaluation import HEAD, ap_row

ONE_SEED = 2.0
"""Standard deviation, in AP points, of the difference of two runs that differ in their seed alone: the median over the
three-seed rows of docs/results.md is 1.4 for one run, and a difference of two has the square root of two times that."""

BASELINE, DISTILLED, TEACHER = "baseline", "distilled", "teacher"


@dataclass(frozen=True)
class Distillation:
    """What came out.

    Args:
        results: Name of a run ("teacher", "baseline", "distilled", or with "-SEED" for several seeds) -> COCO metrics.
        verdict: In one sentence.
        gains: AP points of each seed that the distilled student has above the baseline.
        folder: Where models and tables lie.
    """

    results: dict[str, dict[str, float]]
    verdict: str
    gains: tuple[float, ...]
    folder: Path

    @property
    def students(self) -> list[Path]:
        """Folders of the distilled students; `from_pretrained` loads them."""
        return [self.folder / name for name in self.results if name.startswith(DISTILLED)]

    def __str__(self) -> str:
        lines = [f"{name:14s}{ap_row(metrics)}" for name, metrics in self.results.items()]
        return "\n".join([f"{'':14s}{HEAD}", *lines, "", self.verdict, *self.advice])

    @property
    def advice(self) -> list[str]:
        """What the figures ask for, in sentences; empty if nothing."""
        teacher = self.results.get(TEACHER)
        alone = [metrics["map"] for name, metrics in self.results.items() if name.startswith(BASELINE)]
        if teacher is None or teacher["map"] > max(alone):
            return []
        return [
            f"The teacher's AP {100 * teacher['map']:.1f} is not above the baseline's {100 * max(alone):.1f}: a "
            "student learns little from it. Train it longer (teacher_settings, --teacher_settings "
            "num_train_epochs=...), or take a better one."
        ]


def verdict(gains: Sequence[float]) -> str:
    """Whether distillation helped, in one sentence, with the noise beside it.

    Args:
        gains: AP points of each pair of runs.
    """
    mean = statistics.fmean(gains)
    if len(gains) == 1:
        noise = 2 * ONE_SEED
        if abs(mean) <= noise:
            return (
                f"Undecided: the distilled student is {mean:+.1f} AP from the baseline, and two runs that differ in "
                f"their seed alone differ by up to {noise:.0f} AP; three seeds tell more (seeds=3, --seeds 3)."
            )
        word = "helped" if mean > 0 else "harmed"
        return (
            f"Distillation {word}: {mean:+.1f} AP with one seed, more than the {noise:.0f} AP by which two runs that "
            "differ in their seed alone may differ."
        )
    half = half_width(gains)
    interval = f"{mean:+.1f} AP, 95 % interval {mean - half:+.1f} to {mean + half:+.1f} over {len(gains)} seeds"
    if abs(mean) <= half:
        return f"Undecided: {interval}, which holds 0."
    word = "helped" if mean > 0 else "harmed"
    return f"Distillation {word}: {interval}."


def half_width(values: Sequence[float]) -> float:
    """Half of the interval that holds the mean of all seeds with 95 %, by Student's t.

    Args:
        values: Of two seeds or more.
    """
    return float(student_t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
