"""Names of classes: which are the same in a model and in a data set, or in two of either.

One matcher for all: names that are spelt alike belong together; then those that differ in case and spaces alone. Where
that fits several, nothing is matched and the caller says so.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

from transformers import PreTrainedConfig


class NameMatches(NamedTuple):
    """For each of some names, which of the known ones it is.

    Args:
        indices: Of each name the index in the known ones; -1 if it is none of them, or may be several.
        ambiguous: Name -> the known names that it may be, where exactly one had to be found.
    """

    indices: list[int]
    ambiguous: dict[str, list[str]]


def normal_name(name: str) -> str:
    """What the spellings of one class name have in common: not case, spaces or the way that accents are encoded."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def is_background(name: str) -> bool:
    """Whether a class is none, but what lies around all objects: `background`, or LabelMe's `__ignore__`."""
    return normal_name(name).strip("_") in ("background", "ignore")


def match_names(names: Sequence[str], known: Sequence[str]) -> NameMatches:
    """Find each of `names` in `known`, exactly spelt first, then by `normal_name` if that leaves no choice.

    Each of the known names is given to one name only. Neither list holds a name twice.
    """
    exact = {name: index for index, name in enumerate(known)}
    indices = [exact.get(name, -1) for name in names]
    taken = set(indices)
    alike, rivals = _rows_of(known, normal_name), _rows_of(names, normal_name)
    ambiguous: dict[str, list[str]] = {}
    for row, name in enumerate(names):
        if indices[row] >= 0:
            continue
        spelling = normal_name(name)
        candidates = [index for index in alike.get(spelling, ()) if index not in taken]
        if len(candidates) == len(alike.get(spelling, ())) == len(rivals[spelling]) == 1:
            indices[row] = candidates[0]
        elif candidates:
            ambiguous[name] = [known[index] for index in candidates]
    return NameMatches(indices, ambiguous)


def are_same(data: Sequence[str], model: Sequence[str]) -> bool:
    """Whether a data set and a model have the same classes in one order; numbers as names are only counted."""
    if are_placeholders(data):
        return len(data) <= len(model)
    if are_placeholders(model):
        return len(data) == len(model)
    return match_names(data, model).indices == list(range(len(model)))


def are_reordered(data: Sequence[str], model: Sequence[str]) -> bool:
    """Whether a data set and a model have the same classes in different orders; a model may have a background, too."""
    found = set(match_names(data, model).indices)
    others = [name for index, name in enumerate(model) if index not in found]
    return not are_same(data, model) and -1 not in found and all(map(is_background, others))


def demand_same(data: Sequence[str], model: Sequence[str], what: str) -> None:
    """Check that a student has the classes of its data, in the same order.

    Args:
        data, model: Names of the classes of either.
        what: The data in words.

    Raises:
        ValueError: It has others; the message holds both lists and the way out.
    """
    if are_same(data, model):
        return
    if are_reordered(data, model):
        way_out = (
            "These are the same classes in another order: bring the data to the student's order by "
            "data.for_model(student.config). If the student was made for the order of the data, correct its id2label "
            "and label2id."
        )
    else:
        way_out = (
            "Give the student a head for the classes of the data: from_pretrained(..., id2label=..., label2id=..., "
            "ignore_mismatched_sizes=True), or build_detector(spec, data.categories) for a new student. Read every "
            "split with the same map: load_coco(..., train.categories)."
        )
    raise ValueError(
        f"The student has other classes than the {what}. Student (id2label): {listing(model)}. "
        f"Data: {listing(data)}. {way_out}"
    )


def names_alike(names: Sequence[str]) -> list[list[str]]:
    """Groups of names that differ in case and spaces alone."""
    return [[names[row] for row in rows] for rows in _rows_of(names, normal_name).values() if len(rows) > 1]


def class_names(config: PreTrainedConfig) -> tuple[str, ...]:
    """The classes of a model by `id2label`, one name for each output from 0 to the last one that is named.

    Names that occur twice get their index, as "N/A [12]": checkpoints of COCO with 91 outputs have such. So do outputs
    that `id2label` leaves out.
    """
    named = {int(index): str(name) for index, name in config.id2label.items()}
    names = [named.get(index, "unnamed") for index in range(max(named, default=-1) + 1)]
    repeated = {name for name, rows in _rows_of(names).items() if len(rows) > 1 or name == "unnamed"}
    return tuple(f"{name} [{index}]" if name in repeated else name for index, name in enumerate(names))


def are_placeholders(names: Sequence[str]) -> bool:
    """Whether the names are only numbers: transformers' LABEL_0, LABEL_1, ..., or 0, 1, ... of `datasets`."""
    return bool(names) and any(
        all(name == f"{prefix}{index}" for index, name in enumerate(names)) for prefix in ("LABEL_", "")
    )


def listing(names: Sequence[str], most: int = 30) -> str:
    """Number of names, and the first `most` of them, for a message."""
    shown = ", ".join(map(repr, names[:most]))
    return f"{len(names)} classes, {shown}{', ...' if len(names) > most else ''}"


def _rows_of(names: Sequence[str], key: Callable[[str], str] = str) -> dict[str, list[int]]:
    """Key of the names -> where names with this key stand."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(key(name), []).append(row)
    return rows
