"""The one map between raw category ids, contiguous class indices and class names."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedConfig

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
        """Read the map that a model was saved with: `id2label`, and `category_ids` (absent or None: ids 0..K-1)."""
        names = tuple(config.id2label[index] for index in range(len(config.id2label)))
        raw_ids = config.to_dict().get("category_ids")
        return cls(tuple(range(len(names))) if raw_ids is None else tuple(raw_ids), names)

    @classmethod
    def from_coco(cls, categories: Sequence[Mapping[str, Any]], used: Collection[int]) -> CategoryMap:
        """Read the `categories` of a COCO json, in the order of raw ids.

        A category which no annotation uses and which is the `supercategory` of another one is left out: exports of
        Roboflow list such parents. Every other listed category is kept.

        Args:
            categories: dicts with `id` (int), `name` (str) and maybe `supercategory` (str).
            used: the raw ids that annotations use.

        Raises:
            DataError: categories without an integer id or a name, or ids or names that occur twice.
        """
        faults = category_faults(categories)
        if faults:
            raise DataError(faults)
        parents = [c.get("supercategory") for c in categories if c.get("supercategory") != c["name"]]
        kept = [c for c in categories if c["id"] in used or c["name"] not in parents]
        ordered = sorted(kept or categories, key=lambda c: int(c["id"]))
        return cls(tuple(int(c["id"]) for c in ordered), tuple(c["name"] for c in ordered))


def category_faults(categories: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """What is wrong with the `categories` of a COCO json: entries without id or name, ids or names that occur twice."""
    nameless = [
        Place(f"categories[{number}]", detail=reprlib.repr(dict(category)))
        for number, category in enumerate(categories)
        if not _is_whole(category)
    ]
    message = "a category needs an integer 'id' and a string 'name'"
    findings = found("error", "category", message, "correct these entries of 'categories'", nameless)
    for key in ("id", "name"):
        counts = Counter(category[key] for category in categories if _is_whole(category))
        places = [Place("categories", detail=f"{key} {value!r}") for value, count in counts.items() if count > 1]
        message = f"a category {key} is listed more than once"
        fix = "keep one entry and point the annotations of the others to its id"
        findings += found("error", f"duplicate-category-{key}", message, fix, places)
    return findings


def distinct_categories(categories: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The entries that have id and name, the first one of each id and of each name."""
    whole = [category for category in categories if _is_whole(category)]
    of_id = {int(category["id"]): category for category in reversed(whole)}
    return list({category["name"]: category for category in of_id.values()}.values())


def _is_whole(category: Mapping[str, Any]) -> bool:
    return is_integer(category.get("id")) and isinstance(category.get("name"), str)


def _some(values: Sequence[int], most: int = 20) -> str:
    return str(list(values)) if len(values) <= most else f"{list(values[:most])} and {len(values) - most} more"
