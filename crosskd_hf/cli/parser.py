"""The commands there are, and the parser of the chosen one. Help on all of them needs no command's module."""

import argparse
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

DESCRIPTION = (
    "Train small object detectors with large ones as their teachers (CrossKD), with Hugging Face models and data."
)
EPILOG = """exit status: 0 all is well, 1 a check found faults or something went wrong, 2 wrong usage
--debug, or CROSSKD_DEBUG=1 in the environment, shows the traceback of an error"""

# Each command with its module, whose ADD has the function that adds the command's options, and what it does.
COMMANDS: dict[str, tuple[str, str]] = {
    "convert": ("convert", "Turn a checkpoint of another library into a model folder that from_pretrained loads."),
    "check-pair": (
        "distillation",
        "Say whether a teacher can teach a student, how, and at what cost. Exit status 1 if it can't.",
    ),
    "check-data": (
        "data",
        "Name every fault of a data set, with file, line and fix. Exit status 1 if training would be wrong.",
    ),
    "convert-data": ("data", "Check a data set of any known format, and write it as COCO jsons, one for each split."),
    "methods": ("distillation", "Print the distillation methods with their options, defaults, sources and detectors."),
    "train": (
        "train",
        "Train a student, with or without a teacher. Takes all options of transformers' TrainingArguments but --debug.",
    ),
    "distill": ("train", "Train a student twice, with and without a teacher, and say whether the teacher helped."),
    "report": ("train", "Make the curves and pictures of a finished run again."),
    "evaluate": ("inference", "Measure COCO AP of a model. Classes are matched by name."),
    "predict": ("inference", "Detect objects in images and videos; write pictures and predictions.json."),
    "cost": ("inference", "Compare parameters, multiply-adds and images a second of detectors."),
    "analyse": (
        "analyse",
        "The papers' figures of a student and its teachers on any data: each a picture and a csv file.",
    ),
    "options": ("about", "Print all options, as docs/options.md."),
    "env": ("about", "Print the versions of everything that matters, for a bug report."),
}


class _Version(argparse.Action):
    """Looks the version up only when it is asked for, because that takes as long as all other help."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"crosskd_hf {version('crosskd_hf')}")
        parser.exit()


def chosen_command(words: Sequence[str]) -> list[str]:
    """The command of a command line: its first word that is no option, if a command is called so."""
    return [word for word in words if not word.startswith("-")][:1]


def make_parser(*chosen: str) -> argparse.ArgumentParser:
    """The parser of `crosskd-hf`: the `chosen` commands with their options, the others as names with their help."""
    parser = argparse.ArgumentParser(
        "crosskd-hf", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show program's version number and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module, text) in COMMANDS.items():
        if name in chosen:
            importlib.import_module(f".{module}", __package__).ADD[name](commands, name, text)
        else:
            commands.add_parser(name, help=text)
    return parser


def parsers_of(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """The parsers of a parser's commands, by name."""
    choices = [action.choices for action in parser._actions if isinstance(action.choices, Mapping)]
    return {name: parsers[name] for parsers in choices for name in parsers}
