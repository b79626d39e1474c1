"""What `crosskd-hf methods` prints and docs/methods.md holds: every method with its options, from the dataclasses."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .method import METHODS, MethodConfig, spell_value, without_none

HEAD = """# Methods

`methods` says what is distilled. In Python, a method is an object: `CrossKDConfig(methods=[CrossKD(cut=2), PKD()])`.
On a command line or in a YAML file, a string means the same: `--methods crosskd:cut=2 pkd`. Several methods are added
up. The weight of a term is an option too: `crosskd:terms.reg=0`. An option whose default is *by the pair* gets its
value from the teacher's kind of head, as published where something was published. An option that can have no effect on
a pair is an error. A class of your own is named by its module: `--methods my_package.my_module:MyConfig:alpha=2`.
Losses are logged as `<method>/<term>`.

This page is printed by `crosskd-hf methods`; `crosskd-hf methods NAME` prints one method."""


def reference(name: str | None = None) -> str:
    """The page of all methods in Markdown, or the part of one.

    Raises:
        ValueError: There is no method of this name.
    """
    if name is not None:
        return method_section(type(MethodConfig.parse(name)))
    return "\n\n".join([HEAD, overview(), *(method_section(kind) for kind in METHODS.values())])


def overview() -> str:
    """What works where: the detectors and the terms of every method."""
    rows = [
        [f"[`{name}`](#{name}-{kind.__name__.lower()})", kind.method.families, ", ".join(kind.method.terms)]
        for name, kind in METHODS.items()
    ]
    return _table(["method", "works for", "terms"], rows)


def method_section(kind: type[MethodConfig]) -> str:
    """Purpose, source, detectors, terms, options and published numbers of a method."""
    method = kind.method
    summary, *paragraphs = inspect.cleandoc(kind.__doc__ or "").split("\n\n")
    prose = [text for text in paragraphs if not text.startswith(("Args:", "Raises:", "Attributes:"))]
    facts = [
        ("paper", "" if method.paper is None else str(method.paper)),
        ("detectors", method.families),
        ("terms", ", ".join(f"`{method.name}/{term}`" for term in method.terms)),
    ]
    return "\n\n".join(
        [
            f"## {method.name}: `{kind.__name__}`",
            _one_line(summary),
            *map(_one_line, prose),
            "\n".join(f"- {title}: {text}" for title, text in facts if text),
            _table(["option", "default", "values", "meaning", "source"], [_option_row(kind, f) for f in fields(kind)]),
            *_published(kind.published_numbers),
            *_messages(paragraphs),
        ]
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _option_row(kind: type[MethodConfig], entry: Field[Any]) -> list[str]:
    hint = without_none(get_type_hints(kind)[entry.name])
    default = "*by the pair*" if entry.default is None else f"`{spell_value(entry.default)}`"
    facts = entry.metadata
    return [f"`{entry.name}`", default, _values(hint, facts), facts.get("help", ""), facts.get("source", "")]


def _values(hint: Any, facts: Mapping[str, Any]) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    name = getattr(hint, "__name__", str(hint))
    least, most = facts.get("least"), facts.get("most")
    if least is None:
        return name
    return f"{name}, at least {spell_value(least)}" if most is None else f"{name} in [{least}, {most}]"


def _published(numbers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table of the published numbers, one column for each kind of teacher."""
    if not numbers:
        return []
    rows = [_flat(column) for column in numbers.values()]
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = [[f"`{name}`", *(spell_value(row[name]) if name in row else "" for row in rows)] for name in names]
    return ["Filled in, by what the teacher is:", _table(["", *numbers], table)]


def _messages(paragraphs: Sequence[str]) -> list[str]:
    """What stands under `Raises` in the docstring: the words of each message and their cause."""
    raised = _one_line(" ".join(text for text in paragraphs if text.startswith("Raises:")))
    pairs = re.findall(r'"([^"]+)": ([^"]+?)(?= "|$)', raised)
    return ["\n".join(f"- message `{words}`: {cause}" for words, cause in pairs)] if pairs else []


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    terms = {f"terms.{name}": weight for name, weight in options.get("terms", {}).items()}
    return {name: value for name, value in options.items() if name != "terms"} | terms


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
