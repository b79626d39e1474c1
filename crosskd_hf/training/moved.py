"""Options of distillation that once stood beside each other and now belong to their methods: how they are written."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T", bound=type)

# Which methods an option went to.
OWNERS: dict[str, tuple[str, ...]] = {
    "cut": ("crosskd",),
    "teacher_cut": ("crosskd",),
    "loss_weights": ("crosskd", "kd", "pkd"),
    "statistics": ("crosskd", "pkd"),
    "normalizer": ("crosskd", "kd"),
    "normalizer_floor": ("crosskd", "kd"),
    "beta": ("crosskd", "kd"),
    "temperature": ("crosskd", "kd"),
    "queries": ("crosskd",),
    "box_loss": ("crosskd",),
    "mapping": ("kd",),
}


def tell_of_moved_options(kind: T) -> T:
    """A class whose constructor answers an option that has moved with its new spelling."""
    construct = kind.__init__  # type: ignore[misc]

    @functools.wraps(construct)
    def init(self: Any, *args: Any, **options: Any) -> None:
        refuse(options.get("methods", ["crosskd"]), {name: options[name] for name in OWNERS if name in options})
        construct(self, *args, **options)

    kind.__init__ = init  # type: ignore[misc]
    return kind


def refuse_words(words: Sequence[str]) -> None:
    """Raise ValueError, with the new spelling, if a command line has options that have moved."""
    options: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            options[name] = [value] if value else []
        elif name:
            options[name].append(word)
    old = {key: " ".join(values) for key, values in options.items() if key in OWNERS}
    refuse(options.get("methods", ["crosskd"]), old)


def refuse(methods: Any, old: Mapping[str, Any]) -> None:
    """Raise ValueError, with the new spelling, if there are `old` options."""
    if not old:
        return
    named = [methods] if isinstance(methods, str) else [str(method) for method in methods]
    new = [_with_options(name, old) for name in named]
    raise ValueError(
        f"{', '.join(old)}: options of distillation have moved to the methods that they belong to. Write "
        f"methods={new}, on a command line --methods {' '.join(new)}; `crosskd-hf methods` lists all options."
    )


def _with_options(method: str, old: Mapping[str, Any]) -> str:
    said = [word for name, value in old.items() if method in OWNERS[name] for word in _say(method, name, value)]
    return f"{method}:{','.join(said)}" if said else method


def _say(method: str, name: str, value: Any) -> list[str]:
    if name not in ("loss_weights", "mapping"):
        return [] if value is None else [f"{name}={value}"]
    try:
        values = json.loads(value) if isinstance(value, str) else dict(value or {})
    except ValueError:
        values = {}
    if name == "mapping":
        return [f"{key}={item}" for key, item in values.items()]
    weights = {key.removeprefix("loss_").removesuffix("_kd"): weight for key, weight in values.items()}
    if method == "pkd":
        return [f"weight={weights['feat']}"] if "feat" in weights else []
    return [f"terms.{term}={weight}" for term, weight in weights.items() if term != "feat"]
