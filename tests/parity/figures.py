"""A golden case's figures beside ours: every one is compared, and what this library doesn't compute is named.

Figures are nested dicts and lists of numbers or words. Ours have the same keys; where a case gives shape, mean,
standard deviation and samples of a map, ours is the map itself.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Figures = dict[str, Any]
MAP = {"shape", "mean", "std", "samples"}
PER_LEVEL = "_per_level"
SUM_OF_LEVELS = " (sum of its levels)"
SMALLEST = 1e-6  # numbers below count as this much when an error is made relative


class Pair(NamedTuple):
    """One figure.

    Args:
        expected: A number, a word, a flat list of them, a list of boxes (n, 4), or a dict with the keys of `MAP`.
        got: Ours; None if it isn't computed.
        smallest: Smaller numbers count as this much.
    """

    expected: Any
    got: Any
    smallest: float = SMALLEST


# Words about a case, and figures of something else than what this library computes.
LEFT_OUT = (
    "note",
    "backbone",
    "optimizer",
    "lr",
    "parameters_without_kd_grad",
    "invalid_positions_per_image",
    "smallest_gap_between_ranked_scores",
    "gap_at_the_cut",
    "kd_total_grad_norm_if_the_target_were_detached",
)


def on_device(value: Any) -> Any:
    """Seeded tensors, which NumPy draws on the CPU, on torch's default device."""
    if isinstance(value, dict):
        return {key: on_device(item) for key, item in value.items()}
    if isinstance(value, list):
        return [on_device(item) for item in value]
    return value.to(torch.get_default_device())


def side_by_side(expected: Mapping[str, Any], got: Mapping[str, Any]) -> dict[str, Pair]:
    """Every figure of a case beside ours, by the path of its keys, but the keys `LEFT_OUT`.

    Args:
        expected: The case's.
        got: Ours; more of them than the case has do no harm.
    """
    return dict(_walk(expected, got, "", SMALLEST))


def _walk(expected: Any, got: Any, name: str, smallest: float) -> Iterator[tuple[str, Pair]]:
    if got is not None and isinstance(expected, dict) and set(expected) != MAP:
        listed, got = (add_levels(expected, got), got) if isinstance(got, Mapping) else (expected, {})
        for key in listed.keys() - set(LEFT_OUT):
            value, ours = listed[key], got.get(key.removesuffix(SUM_OF_LEVELS))
            least = SMALLEST * max(value.values(), default=1.0) if key.endswith("grad_norms") else smallest
            yield from _walk(value, ours, f"{name}.{key}" if name else key, least)
    elif got is not None and _is_nested(expected) and not (name.endswith("boxes") and _is_flat(expected[0])):
        if len(got) != len(expected):
            got = [None] * len(expected)
        for index, (value, ours) in enumerate(zip(expected, got, strict=True)):
            yield from _walk(value, ours, f"{name}.{index}", smallest)
    else:
        yield name, Pair(expected, got, smallest)


def add_levels(expected: Mapping[str, Any], got: Mapping[str, Any]) -> Figures:
    """A case's figures, with a loss that the case lists by level added up.

    The levels are either a list (`loss_cls_per_level`) or have a key each (`loss_feat_kd_0`, `loss_feat_kd_1`, ...).
    Only what this library computes as one figure is added up; the sum gets the suffix `SUM_OF_LEVELS`.
    """
    figures: Figures = {}
    for key, value in expected.items():
        name, _, level = key.rpartition("_")
        listed = key.removesuffix(PER_LEVEL)
        if key in got or not (name in got or listed in got):
            figures[key] = value
        elif listed in got and isinstance(value, list):
            figures[listed + SUM_OF_LEVELS] = math.fsum(value)
        elif name in got and level.isdecimal() and isinstance(value, int | float):
            figures[name + SUM_OF_LEVELS] = figures.get(name + SUM_OF_LEVELS, 0.0) + value
        else:
            figures[key] = value
    return figures


def _is_nested(figure: Any) -> bool:
    return isinstance(figure, list) and bool(figure) and isinstance(figure[0], dict | list)


def _is_flat(figure: Any) -> bool:
    return isinstance(figure, list) and not _is_nested(figure)


def figure_error(name: str, pair: Pair) -> float:
    """How far ours is off, relative to the largest number of the figure.

    Boxes are judged by their longer side, maps by |mean| + deviation; whole numbers and words must be equal (else the
    error is infinite), and a figure whose name ends with "below" is a limit.
    """
    expected, got, smallest = pair
    if got is None:
        return math.inf
    with torch.device("cpu"):
        return _error(name, expected, got, smallest)


def _error(name: str, expected: Any, got: Any, smallest: float) -> float:
    if isinstance(expected, dict):
        return _map_error(got, expected)
    if name.endswith("below"):
        return 0.0 if got <= expected else math.inf
    ours, theirs = (list(value) if isinstance(value, list | tuple) else [value] for value in (got, expected))
    if len(ours) != len(theirs):
        return math.inf
    if not theirs or all(isinstance(value, int | str) for value in theirs):
        return 0.0 if ours == theirs else math.inf
    listed, found = (torch.tensor(value, dtype=torch.float64) for value in (theirs, ours))
    if _is_nested(expected):
        sides = (listed[:, 2:] - listed[:, :2]).amax(1, keepdim=True)
        return float(((found - listed).abs() / sides.clamp(min=1)).max())
    return float((found - listed).abs().max() / listed.abs().max().clamp(min=smallest))


def _map_error(got: Tensor, expected: Figures) -> float:
    if list(got.shape) != expected["shape"]:
        return math.inf
    flat = got.detach().cpu().flatten().float()
    places = torch.linspace(0, len(flat) - 1, len(expected["samples"])).long()
    values = torch.tensor([flat.mean(), flat.std() if len(flat) > 1 else math.nan, *flat[places]])
    listed = torch.tensor([expected["mean"], expected["std"], *expected["samples"]])
    defined = ~(values.isnan() & listed.isnan())  # one number has no deviation
    scale = abs(expected["mean"]) + (expected["std"] if len(flat) > 1 else 0.0)
    return float((values - listed)[defined].abs().max() / max(scale, SMALLEST))


def in_order(listed: Mapping[str, Any], found: Mapping[str, Tensor]) -> Figures:
    """Our detections or proposals of an image in the order of the listed ones, since equal scores have none.

    Args:
        listed: `boxes` (xyxy), `scores` and maybe `labels` of the first ones.
        found: The same of all of ours, (n, 4), (n,) and (n,).

    Returns:
        For each listed one the closest of ours of its label that isn't taken yet, and the number of ours, `num`.
    """
    found = {key: tensor.cpu() for key, tensor in found.items()}
    with torch.device("cpu"):
        return _in_order(listed, found)


def _in_order(listed: Mapping[str, Any], found: Mapping[str, Tensor]) -> Figures:
    free = torch.ones(len(found["scores"]), dtype=torch.bool)
    order: list[int] = []
    labels = listed.get("labels") or [None] * len(listed["boxes"])
    for box, score, label in zip(listed["boxes"], listed["scores"], labels, strict=True):
        allowed = free if label is None else free & (found["labels"] == label)
        if not allowed.any():
            return {"num": len(free)}
        distance = (found["boxes"] - torch.tensor(box)).abs().amax(1) + 100 * (found["scores"] - score).abs()
        order.append(int(distance.masked_fill(~allowed, torch.inf).argmin()))
        free[order[-1]] = False
    return {"num": len(free)} | {key: tensor[order].tolist() for key, tensor in found.items()}
