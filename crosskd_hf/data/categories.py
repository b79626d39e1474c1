"""The one map between raw category ids, contiguous class indices and class names."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from .class_names import class_names, is_background, listing, match_names, normal_name
from .coco_json import is_integer
from .report import DataError, Finding, Place, found


@dataclass(frozen=True)
class CategoryMap:
    """Raw category id <-> contiguous index <-> name, used by labels, evaluation, saving and reloading.

    Args:
        raw_ids: the ids of the annotation file in contiguous order: `raw_ids[i]` is the raw id of class `i`.
        names: the class names in the same order.

    Raises:
        ValueError: if the two differ in length, are empty, or an id or a name occurs twice.
    """

    raw_ids: tuple[int, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.raw_ids) != len(self.names):
            raise ValueError(f"CategoryMap got {len(self.raw_ids)} raw_ids and {len(self.names)} names; give as many.")
        if not self.names:
            raise ValueError("CategoryMap got no category; a detector needs at least one class.")
        for field, values in (("raw_ids", self.raw_ids), ("names", self.names)):
            twice = [value for value, count in Counter(values).items() if count > 1]
            if twice:
                raise ValueError(f"CategoryMap.{field} holds {twice[:5]} more than once; make them unique.")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def id2label(self) -> dict[int, str]:
        """Contiguous index -> name, as `config.id2label` wants it."""
        return dict(enumerate(self.names))

    @property
    def label2id(self) -> dict[str, int]:
        """Name -> contiguous index, as `config.label2id` wants it."""
        return {name: index for index, name in enumerate(self.names)}

    @cached_property
    def _index(self) -> dict[int, int]:
        return {raw: index for index, raw in enumerate(self.raw_ids)}

    def to_contiguous(self, raw: int) -> int:
        """The class index in [0, K) of a raw id; KeyError if the id isn't in the map."""
        if raw not in self._index:
            raise KeyError(f"category id {raw} is not in the map, which holds {_some(self.raw_ids)}")
        return self._index[raw]

    def to_raw(self, index: int) -> int:
        """The raw id of class `index` in [0, K); IndexError outside of it."""
        if not 0 <= index < len(self):
            raise IndexError(f"class index {index} is outside [0, {len(self)})")
        return self.raw_ids[index]

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> CategoryMap:
        """Read the map that a model was saved with: `id2label`, and `category_ids`.

        The raw ids are 0..K-1 if there are no `category_ids`, or as many as a former head had classes.
        """
        names = class_names(config)
        raw_ids = config.to_dict().get("category_ids") or ()
        return cls(tuple(raw_ids) if len(raw_ids) == len(names) else tuple(range(len(names))), names)

    @classmethod
    def from_coco(cls, categories: Sequence[Mapping[str, Any]], used: Collection[int]) -> CategoryMap:
        """Read the `categories` of a COCO json, in the order of raw ids.

        A category which no annotation uses and which is the `supercategory` of others, but not its own, is left out:
        exports of Roboflow list such parents. So is an unused background, which LabelMe's exports list as the first
        class: no detector learns it. Every other listed category is kept.

        Args:
            categories: dicts with `id` (int), `name` (str) and maybe `supercategory` (str).
            used: the raw ids that annotations use.

        Raises:
            DataError: categories without an integer id or a name, or ids or names that occur twice.
        """
        sifted = sift_categories(categories, used)
        if sifted.faults:
            raise DataError(sifted.faults)
        return sifted.listed


class SiftedCategories(NamedTuple):
    """The `categories` of a COCO json, judged.

    Args:
        listed: the classes; if no entry is sound, those that annotations use, named by their ids.
        left_out: names of unused parents, and of an unused background.
        faults: entries without id or name, and ids or names that occur twice; the first of these counts.
    """

    listed: CategoryMap
    left_out: tuple[str, ...]
    faults: list[Finding]


def sift_categories(categories: Sequence[Mapping[str, Any]], used: Collection[int]) -> SiftedCategories:
    """Tell classes from unused parents, background and faulty entries; arguments as of `CategoryMap.from_coco`."""
    whole = [category for category in categories if _is_whole(category)]
    children = _children(whole)
    parents = [
        c
        for c in whole
        if c["id"] not in used
        and (is_background(c["name"]) or c["id"] not in children.get(normal_name(c["name"]), {c["id"]}))
    ]
    kept = [category for category in whole if category not in parents] or whole
    names_of = {int(category["id"]): category["name"] for category in reversed(kept)}
    ids = {name: raw for raw, name in names_of.items()} or {str(raw): int(raw) for raw in sorted(used) or [0]}
    raw_ids = sorted(ids.values())
    names = {raw: name for name, raw in ids.items()}
    listed = CategoryMap(tuple(raw_ids), tuple(names[raw] for raw in raw_ids))
    left_out = tuple(category["name"] for category in parents if category not in kept)
    return SiftedCategories(listed, left_out, _faults(categories, kept))


def match_categories(config: PreTrainedConfig, listed: CategoryMap, used: Collection[int] | None = None) -> CategoryMap:
    """The map between a model's classes and a data set's raw ids, by name (see `match_names`).

    Classes that the data set doesn't have get raw ids that nothing in it uses.

    Args:
        config: Of the model; its order of classes is kept.
        listed: The data set's own map.
        used: Raw ids that annotations use; others may be unknown to the model. None: all of `listed`.

    Raises:
        ValueError: The data set uses a class that the model doesn't know, or that may be one of several of its classes.
    """
    names = class_names(config)
    matches = match_names(listed.names, names)
    rows = list(zip(listed.names, listed.raw_ids, matches.indices, strict=True))
    unknown = [name for name, raw, index in rows if index < 0 and (used is None or raw in used)]
    choices = {name: matches.ambiguous[name] for name in unknown if name in matches.ambiguous}
    if choices:
        raise ValueError(
            f"The data set has classes that may be several of the model's: {choices}. Spell them as the model does."
        )
    if unknown:
        raise ValueError(
            f"The data set has classes that the model doesn't know: {unknown[:5]}. The model's are {listing(names)}. "
            f"Are they the same under other names? Then rename one of both."
        )
    raw_ids = {index: raw for _, raw, index in rows}
    free = max(listed.raw_ids) + 1
    return CategoryMap(tuple(raw_ids.get(index, free + index) for index in range(len(names))), names)


def _children(whole: Sequence[Mapping[str, Any]]) -> dict[str, set[int]]:
    """Supercategory, as a normal name -> ids of the categories that have it."""
    ids: dict[str, set[int]] = {}
    for category in whole:
        if isinstance(category.get("supercategory"), str):
            ids.setdefault(normal_name(category["supercategory"]), set()).add(category["id"])
    return ids


def _faults(categories: Sequence[Mapping[str, Any]], kept: Sequence[Mapping[str, Any]]) -> list[Finding]:
    nameless = [
        Place(f"categories[{number}]", detail=reprlib.repr(dict(category)))
        for number, category in enumerate(categories)
        if not _is_whole(category)
    ]
    message = "a category needs an integer 'id' and a string 'name' that isn't blank"
    findings = found("error", "category", message, "correct these entries of 'categories'", nameless)
    for key in ("id", "name"):
        counts = Counter(category[key] for category in kept)
        places = [Place("categories", detail=f"{key} {value!r}") for value, count in counts.items() if count > 1]
        message = f"a category {key} is listed more than once"
        fix = "keep one entry and point the annotations of the others to its id"
        findings += found("error", f"duplicate-category-{key}", message, fix, places)
    return findings


def _is_whole(category: Mapping[str, Any]) -> bool:
    name = category.get("name")
    return is_integer(category.get("id")) and isinstance(name, str) and bool(name.strip())


def _some(values: Sequence[int], most: int = 20) -> str:
    return str(list(values)) if len(values) <= most else f"{list(values[:most])} and {len(values) - most} more"
