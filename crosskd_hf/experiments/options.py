"""What `crosskd-hf options` prints and docs/options.md holds: the options of trainings, commands and examples."""

from __future__ import annotations

import argparse
import enum
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..distillation.method import spell_value, without_none
from ..training.config import OURS, CrossKDConfig, Help
from .comparison_options import ComparisonOptions, DenseOptions, DetrOptions
from .plan import DistillArguments
from .train import RunArguments

HEAD = """# Options

An option has the same name in Python (`CrossKDConfig(ema_decay=0.9998)`), on a command line (`--ema_decay 0.9998`) and
in a YAML file. `--methods` and the options of each method are on a page of their own: [methods](methods.md). *Source*
says where a default comes from; a default of this project is a choice that nobody published.

This page is printed by `crosskd-hf options`."""

_OF_TRAIN = {entry.name for entry in fields(RunArguments)}


def reference(commands: Iterable[argparse.ArgumentParser]) -> str:
    """The page in Markdown.

    Args:
        commands: Parsers of the commands that have options of their own.
    """
    own = [entry for entry in fields(CrossKDConfig) if entry.name in CrossKDConfig.__annotations__]
    sections = [
        HEAD,
        "## Training: `CrossKDConfig`",
        "Everything of `transformers.TrainingArguments` holds too. These options are this package's own, or have "
        "another default here.",
        _fields(CrossKDConfig, own),
        "## Data and model of `crosskd-hf train`",
        _fields(RunArguments, fields(RunArguments)),
        "## `crosskd-hf distill` beside those",
        _fields(DistillArguments, [entry for entry in fields(DistillArguments) if entry.name not in _OF_TRAIN]),
        *(text for command in commands for text in (f"## `{command.prog}`", _actions(command))),
        "## Data and steps of both examples",
        _fields(ComparisonOptions, fields(ComparisonOptions)),
        *_example("distill_coco.py", DenseOptions),
        *_example("distill_deformable_detr.py", DetrOptions),
    ]
    return "\n\n".join(sections)


def _example(name: str, kind: type[ComparisonOptions]) -> list[str]:
    shared = {entry.name for entry in fields(ComparisonOptions)}
    own = [entry for entry in fields(kind) if entry.name not in shared]
    return [f"## `examples/{name}` alone", _fields(kind, own)]


def _fields(kind: type, chosen: Sequence[Field[Any]]) -> str:
    hints = get_type_hints(kind)
    rows = []
    for entry in chosen:
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        text: Help = entry.metadata["help"]
        rows.append([f"`{entry.name}`", _default(default), _kind(hints[entry.name]), text, text.source])
    return _table(["option", "default", "kind", "meaning", "source"], rows)


def _actions(parser: argparse.ArgumentParser) -> str:
    """The arguments of a command, but those that every command has."""
    rows = []
    for action in parser._actions:
        if action.dest in ("help", "debug"):
            continue
        name = action.option_strings[0] if action.option_strings else action.dest.upper()
        required = not action.option_strings and action.nargs not in ("?", "*")
        default = "required" if required else _default(action.default)
        kind = "bool" if action.nargs == 0 else _kind(action.type or str)
        text = re.sub(r" \(default: [^)]*\)", "", str(action.help))
        rows.append([f"`{name}`", default, kind, f"{text[:1].upper()}{text[1:]}.", OURS])
    return _table(["option", "default", "kind", "meaning", "source"], rows)


def _default(value: Any) -> str:
    if value is MISSING:
        return "required"
    if value is None:
        return "*none*"
    if isinstance(value, list):
        return " ".join(f"`{spell_value(item)}`" for item in value) or "*none*"
    return f"`{value.value if isinstance(value, enum.Enum) else spell_value(value)}`"


def _kind(hint: Any) -> str:
    kind = without_none(hint)
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    if get_origin(kind) is list:
        return f"list of {get_args(kind)[0].__name__}"
    if get_args(kind):
        return " or ".join(sorted(_kind(part) for part in get_args(kind) if part is not type(None)))
    return {"Path": "path", "str": "text"}.get(kind.__name__, kind.__name__)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)
