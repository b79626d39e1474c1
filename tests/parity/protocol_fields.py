"""What the comparisons of the protocol share: one field of a file beside ours, and what may differ by how much."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Field:
    """One published value beside ours.

    Args:
        name: Where it stands in the file.
        published, ours: Numbers, words, or nested lists and dicts of them.
        atol: Numbers may differ by so much.
        remains: Key of `REMAINING` if the difference is known and stays.
    """

    name: str
    published: Any
    ours: Any
    atol: float = 0.0
    remains: str | None = None

    @property
    def equal(self) -> bool:
        """Whether the two agree within the tolerance."""
        return same(self.published, self.ours, self.atol)

    @property
    def error(self) -> float:
        """Largest difference of two numbers; infinite where shapes or words differ."""
        try:
            published, ours = (np.asarray(value, dtype=np.float64) for value in (self.published, self.ours))
        except (TypeError, ValueError):
            return 0.0 if self.equal else float("inf")
        if published.shape != ours.shape:
            return float("inf")
        return float(np.abs(published - ours).max(initial=0.0))


UNKNOWN = "a key that this comparison does not know"


def beside(
    name: str,
    published: Any,
    ours: Any,
    atol: float = 0.0,
    remains: Mapping[str, str] | None = None,
) -> Iterator[Field]:
    """A field for every value of a part of a file; one that ours has no word for differs.

    Args:
        name: Of the part.
        published: Nested dicts, lists and values.
        ours: The same in the same words. What the file leaves out is not compared.
        atol: Numbers may differ by so much.
        remains: Keys of `REMAINING` by the names of fields.
    """
    nested = isinstance(published, dict) and isinstance(ours, dict)
    if nested or (is_list_of_parts(published) and is_list_of_parts(ours) and len(published) == len(ours)):
        keys = published if nested else range(len(published))
        for key in keys:
            child = f"{name}.{key}" if nested else f"{name}[{key}]"
            value = ours.get(key, UNKNOWN) if nested else ours[key]
            yield from beside(child, published[key], value, atol, remains)
        return
    yield Field(name, published, ours, atol, (remains or {}).get(name))


def unknown(name: str, part: Mapping[str, Any], known: Iterable[str]) -> Iterator[Field]:
    """A field for every key of a part of a file that the comparison does not know."""
    for key in sorted(part.keys() - set(known)):
        yield Field(f"{name}.{key}".lstrip("."), part[key], UNKNOWN)


def is_list_of_parts(value: Any) -> bool:
    """Whether a value is a list of dicts."""
    return isinstance(value, list) and any(isinstance(entry, dict) for entry in value)


def same(published: Any, ours: Any, atol: float) -> bool:
    """Equality of nested values; tuples count as lists, and numbers may differ by `atol`."""
    if isinstance(published, dict) and isinstance(ours, dict):
        return published.keys() == ours.keys() and all(same(published[key], ours[key], atol) for key in published)
    if isinstance(published, list | tuple) and isinstance(ours, list | tuple):
        return len(published) == len(ours) and all(same(a, b, atol) for a, b in zip(published, ours, strict=True))
    if is_number(published) and is_number(ours):
        return abs(published - ours) <= atol
    return type(published) is type(ours) and bool(published == ours)


def is_number(value: Any) -> bool:
    """Whether a value is a number; a truth value is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def numbers(values: Iterable[Any]) -> list[float]:
    """A flat list of floats of a tensor or an array."""
    return [float(value) for value in values]


def report(title: str, fields: Sequence[Field], known: dict[str, Any], most: int = 8) -> bool:
    """Print a file's line, the differences that remain, and the fields that differ. Returns whether all is well."""
    different = [field for field in fields if not field.equal]
    wrong = [field for field in different if field.remains not in known]
    kept = [field for field in different if field.remains in known]
    tail = f", {len(kept)} in the table of differences" if kept else ""
    print(
        f"{'FAIL' if wrong else 'ok  '}  {title:44s} {len(fields)} fields, {len(fields) - len(different)} equal{tail}"
    )
    for field in kept:
        print(f"      in the table ({field.remains}): {field.name}: {short(field.published)}, here {short(field.ours)}")
    for field in wrong[:most]:
        print(f"      {field.name}: {short(field.published)} published, {short(field.ours)} here ({field.error:.2g})")
    if len(wrong) > most:
        print(f"      and {len(wrong) - most} more")
    return not wrong


def short(value: Any) -> str:
    """A value in at most 90 characters."""
    text = str(value)
    return text if len(text) <= 90 else f"{text[:87]}..."
