"""The checks of a data set's classes: the map in use, each annotation's label, and what is wrong or odd about them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .categories import CategoryMap, sift_categories
from .check_boxes import annotation_places
from .class_names import match_names, names_alike
from .coco_json import CocoTable, Ints, positions
from .report import Finding, Place, found


class JudgedCategories(NamedTuple):
    """The classes of a table's G annotations.

    Args:
        categories: the map in use.
        labels: (G,) contiguous class; -1 if the category is unknown.
        findings: errors and notes.
    """

    categories: CategoryMap
    labels: Ints
    findings: list[Finding]


def check_categories(table: CocoTable, image_rows: Ints, given: CategoryMap | None) -> JudgedCategories:
    """Judge the categories of a table; with a `given` map, its classes are found in the table by name.

    Args:
        table: the annotation file as columns.
        image_rows: (G,) row of each annotation's image; -1 if there is none.
        given: the map of the training split, where another split is judged.
    """
    used = {int(raw) for raw in np.unique(table.annotation_categories)}
    listed, left_out, findings = sift_categories(table.categories, used)
    findings += _alike(listed)
    if given is None:
        categories, index_of = listed, np.arange(len(listed))
    else:
        categories, index_of = given, np.array(match_names(listed.names, given.names).indices)
        findings += _disagreements(listed, given, used)
        rows = zip(listed.names, listed.raw_ids, index_of.tolist(), strict=True)
        left_out += tuple(name for name, raw, index in rows if index < 0 and raw not in used)
    places = positions(np.array(listed.raw_ids, dtype=np.int64), table.annotation_categories)
    labels = np.where(places < 0, -1, index_of[places])
    findings += _unknown(table, image_rows, labels, listed, categories)
    raw_ids = categories.raw_ids if given is None else listed.raw_ids
    return JudgedCategories(categories, labels, [*findings, *_notes(categories, labels, raw_ids, left_out)])


def _alike(listed: CategoryMap) -> list[Finding]:
    groups = [Place("categories", detail=", ".join(map(repr, group))) for group in names_alike(listed.names)]
    message = "names of different classes differ in case and spaces only: they are found by exact spelling"
    fix = "give one class one name, or different classes names that nobody mixes up"
    return found("warning", "category-alike", message, fix, groups)


def _disagreements(listed: CategoryMap, given: CategoryMap, used: set[int]) -> list[Finding]:
    """Where the table's list of categories and the given map don't say the same."""
    matches = match_names(listed.names, given.names)
    names = dict(zip(given.raw_ids, given.names, strict=True))
    renamed, moved, spelt, unclear = [], [], [], []
    for raw, name, index in zip(listed.raw_ids, listed.names, matches.indices, strict=True):
        here = Place("categories", detail=f"id {raw} is {name!r} here and {names.get(raw)!r} in the given map")
        if index >= 0:
            if given.names[index] != name:
                spelt.append(Place("categories", detail=f"{name!r} is {given.names[index]!r} in the given map"))
            if names.get(raw, given.names[index]) != given.names[index]:
                moved.append(here)
        elif raw in used and name in matches.ambiguous:
            choices = " or ".join(map(repr, matches.ambiguous[name]))
            unclear.append(Place("categories", detail=f"{name!r} may be {choices}"))
        elif raw in used and raw in names:
            renamed.append(here)
    same = "use the same names in both splits"
    return [
        *found("error", "category-name", "a category is named otherwise than in the given map", same, renamed),
        *found("error", "category-ambiguous", "a category may be several of the given map", same, unclear),
        *found("warning", "category-moved", "ids differ from the given map: classes are found by name", same, moved),
        *found("note", "category-spelling", "names differ from the given map in case and spaces only", "", spelt),
    ]


def _unknown(
    table: CocoTable, image_rows: Ints, labels: Ints, listed: CategoryMap, categories: CategoryMap
) -> list[Finding]:
    """Annotations of no class."""
    unknown = np.flatnonzero(labels < 0)
    names = dict(zip(listed.raw_ids, listed.names, strict=True))
    raw_ids = table.annotation_categories[unknown].tolist()
    described = (f"category_id {raw}" + (f" ({names[raw]!r})" if raw in names else "") for raw in raw_ids)
    places = [
        place._replace(detail=detail)
        for place, detail in zip(annotation_places(table, image_rows, unknown), described, strict=True)
    ]
    known = ", ".join(f"{raw} {name!r}" for raw, name in zip(categories.raw_ids[:20], categories.names, strict=False))
    fix = f"list the category in 'categories' of this split and of the training split (known: {known})"
    return found("error", "unknown-category", "the annotation's category is not known", fix, places)


def _notes(
    categories: CategoryMap, labels: Ints, raw_ids: tuple[int, ...], left_out: tuple[str, ...]
) -> Iterator[Finding]:
    counts = np.bincount(labels[labels >= 0], minlength=len(categories))
    unused = [Place(name) for name, count in zip(categories.names, counts.tolist(), strict=True) if not count]
    gaps = [Place("categories", detail=f"ids {list(raw_ids[:20])}")]
    mapped = raw_ids != tuple(range(1, len(raw_ids) + 1))
    parents = [Place(name) for name in left_out]
    yield from found("note", "category-ids", "ids are not 1..K; they are mapped to 0..K-1", "", gaps if mapped else ())
    yield from found("note", "category-unused", "no annotation has this category", "", unused)
    yield from found("note", "category-left-out", "the category has no annotation and is not in the map", "", parents)
