"""The metric that the best model is chosen by: whether evaluation gives it, and the data have what it is about."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..inference.coco_evaluator import metric_names
from ..inference.coco_truth import Truth
from .arguments import named
from .config import CrossKDConfig

_SIZES = {"map_small": (0, 32**2), "map_medium": (32**2, 96**2), "map_large": (96**2, np.inf)}  # of COCO, px


def adds_metrics(trainer: type, compute_metrics: object, callbacks: Sequence[Any] | None) -> bool:
    """Whether evaluation may give more than AP: a subclass's `evaluate`, `compute_metrics` or a user's callback."""
    moments: list[Callable[..., Any]] = [trainer.evaluate, *(given.on_evaluate for given in callbacks or ())]  # type: ignore[attr-defined]
    ours = ("crosskd_hf", "transformers")
    return compute_metrics is not None or any(moment.__module__.partition(".")[0] not in ours for moment in moments)


def check_best(args: CrossKDConfig, evaluation: Any, names: Sequence[str], others: bool) -> None:
    """As `check_metric`, for the metric of `args`; nothing without evaluation data or a metric.

    Raises:
        ValueError: `greater_is_better` would keep the lowest AP, too.
    """
    if evaluation is None or args.metric_for_best_model is None:
        return
    metric = args.metric_for_best_model
    if check_metric(metric, evaluation, names, others) and args.greater_is_better is False:
        raise ValueError(f"greater_is_better=False would keep the model of the lowest {metric}, an AP: leave it out.")


def check_metric(metric: str, evaluation: Any, names: Sequence[str], others: bool = False) -> bool:
    """Find out before the first update that no model will be the best one.

    Args:
        metric: `metric_for_best_model`.
        evaluation: A data set, or several by name, in the schema of `load_coco`.
        names: The student's classes.
        others: Whether there may be metrics beside AP, as of `adds_metrics`.

    Returns:
        Whether it is an AP.

    Raises:
        ValueError: Evaluation doesn't give the metric, or it would be NaN each time.
    """
    full = f"eval_{metric.removeprefix('eval_')}"
    given = {
        f"eval_{key}" if name is None else f"eval_{name}_{key}": (dataset, key)
        for name, dataset in named(evaluation).items()
        for key in metric_names(names)
    }
    if full not in given:
        if others and not re.match(r"eval_(map|loss)(_|$)", full):
            return False
        shown = ", ".join(list(given)[:16])
        raise ValueError(
            f"metric_for_best_model={metric!r} is no result of this evaluation, which gives {shown}"
            f"{', ...' if len(given) > 16 else ''}: choose one of these."
        )
    _demand_truth(full, *given[full], names)
    return True


def _demand_truth(full: str, dataset: Any, key: str, names: Sequence[str]) -> None:
    if dataset is None:
        return
    truth = Truth.of(dataset)
    counted, what = truth.crowds == 0, "but crowd regions"
    low, high = _SIZES.get(key, (0, np.inf))
    if key in _SIZES:
        counted &= (truth.areas >= low) & (truth.areas <= high)
        what = f"of an area from {low} to {high} px"
    label = metric_names(names).index(key) - len(metric_names(()))
    if label >= 0:
        counted, what = counted & (truth.labels == label), f"of the class {names[label]!r}"
    if not counted.any():
        raise ValueError(
            f"metric_for_best_model: {full} would be NaN each time, and no model the best one, for the evaluation data "
            f"has no object {what}. Choose another metric, such as {full.removesuffix(key)}map, or other data."
        )
