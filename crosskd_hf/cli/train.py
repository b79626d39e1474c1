"""`crosskd-hf train`, `distill` and `report`: whole trainings, and the pictures of their runs."""

import argparse
from pathlib import Path

from .command import Add, Commands, Run, add_command, print_paths


def _add_train(commands: Commands, name: str, text: str) -> None:
    _add_training(commands, name, text, _train)


def _add_distill(commands: Commands, name: str, text: str) -> None:
    _add_training(commands, name, text, _distill)


def _add_training(commands: Commands, name: str, text: str, run: Run) -> None:
    """A command that reads the words of `HfArgumentParser` by itself, its help as well."""
    parser = commands.add_parser(name, help=text, add_help=False, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("-h", "--help", action="store_true", dest="full_help")
    parser.add_argument("--help-all", action="store_true")
    parser.set_defaults(run=run, own=None)


def _add_report(commands: Commands, name: str, text: str) -> None:
    parser = add_command(commands, name, _report, text, "example: crosskd-hf report run")
    parser.add_argument("folder", type=Path, help="of crosskd-hf train or distill")


def _train(arguments: argparse.Namespace) -> int:
    from ..experiments.command_line import help_text, make_parser
    from ..experiments.train import RunArguments, train_from_words
    from ..inference.evaluation import table

    if arguments.full_help or arguments.help_all:
        print(help_text(make_parser(RunArguments), arguments.help_all))
        return 0
    metrics, config = train_from_words(arguments.rest)
    if config.process_index == 0:
        print(table(metrics) if metrics else "not evaluated: no validation data was given")
        print(f"written to {config.output_dir}")
    return 0


def _distill(arguments: argparse.Namespace) -> int:
    from ..experiments.command_line import help_text, make_parser
    from ..experiments.distill import distill_from_words
    from ..experiments.plan import DistillArguments

    if arguments.full_help or arguments.help_all:
        print(help_text(make_parser(DistillArguments, "crosskd-hf distill"), arguments.help_all))
        return 0
    result = distill_from_words(arguments.rest)
    print(result)
    print(f"written to {result.folder}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from ..experiments.distill import report

    return print_paths(report(arguments.folder))


ADD: dict[str, Add] = {"train": _add_train, "distill": _add_distill, "report": _add_report}
