"""Command lines over dataclasses of options: what was given, slips of the pen, and help that starts with our own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from ..sources import near
from ..training.config import CrossKDConfig
from ..training.moved import refuse_words
from .run_file import read_run_file

# Options of TrainingArguments that a first help shows, beside this package's own.
COMMON = (
    "output_dir", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "max_steps", "seed", "bf16", "fp16", "use_cpu", "dataloader_num_workers", "resume_from_checkpoint", "report_to",
    "eval_strategy", "save_strategy", "push_to_hub", "hub_model_id",
)  # fmt: skip


@dataclass(frozen=True)
class Words:
    """A command line.

    Args:
        words: Without the file.
        settings: What the file says.
        names: Of all options that were given, in either.
    """

    words: tuple[str, ...]
    settings: dict[str, Any]
    names: frozenset[str]

    @classmethod
    def of(cls, words: Sequence[str], parser: HfArgumentParser) -> Words:
        """Read a file of settings, if one comes first."""
        settings: dict[str, Any] = {}
        if words and Path(words[0]).suffix in (".yaml", ".yml", ".json") and not words[0].startswith("-"):
            settings = read_run_file(words[0], [action.dest for action in parser._actions], parser.prog.split()[-1])
            words = words[1:]
        options = {option: action.dest for action in parser._actions for option in action.option_strings}
        spelt = [word.split("=")[0] for word in words if word.startswith("--")]
        exact = {options[word] for word in spelt if word in options}
        partly = {word for word in spelt if word not in options}
        names = exact | {options[o] for word in partly for o in options if o.startswith(word)}
        return cls(tuple(words), settings, frozenset(names | set(settings)))


def make_parser(kind: type, prog: str = "crosskd-hf train") -> HfArgumentParser:
    """A parser of `kind` and `CrossKDConfig`."""
    parser = HfArgumentParser((kind, CrossKDConfig), prog=prog, allow_abbrev=True)
    parser.set_defaults(report_to="none")
    return parser


def parse(parser: HfArgumentParser, given: Words) -> tuple[Any, CrossKDConfig]:
    """Options and settings.

    Raises:
        ValueError: An option that there is not, with near names.
    """
    refuse_words(list(given.words))
    parser.set_defaults(**given.settings)
    options, config, rest = parser.parse_args_into_dataclasses(list(given.words), return_remaining_strings=True)
    known = [action.option_strings[0] for action in parser._actions if action.option_strings]
    for word in rest:
        spelt = word.split("=")[0]
        hint = near(spelt.replace("-", "_").replace("__", "--", 1), known) if word.startswith("-") else ""
        raise ValueError(f"Unknown option or value {spelt!r}{hint or '.'} `{parser.prog} --help-all` lists all.")
    return options, config


def help_text(parser: HfArgumentParser, everything: bool) -> str:
    """The help: this package's options and the most common ones of TrainingArguments, or all."""
    own = {*CrossKDConfig.__annotations__, *COMMON}
    trainers = {entry.name for entry in fields(CrossKDConfig)} - own
    if not everything:
        for action in parser._actions:
            if action.dest in trainers or action.dest.removeprefix("no_") in trainers:
                action.help = argparse.SUPPRESS
        parser.epilog = "--help-all lists the other options too, which are those of transformers' TrainingArguments."
    return parser.format_help()
