"""What the modules of the commands share: how a command is added, and how the files that it wrote are told."""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

Run = Callable[[argparse.Namespace], int]
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Add = Callable[[Commands, str, str], None]


def add_command(commands: Commands, name: str, run: Run, text: str, more: str = "") -> argparse.ArgumentParser:
    """Add a command.

    Args:
        commands: Where it is added.
        name: What the user types.
        run: What it does with the parsed words; returns the exit status.
        text: Its help.
        more: Stands below the help on its options, such as examples.
    """
    parser = commands.add_parser(
        name, help=text, description=text, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run, own=parser)
    return parser


def print_paths(paths: Iterable[Path]) -> int:
    """Print where files were written, a line each; returns the exit status of success."""
    for path in paths:
        print(path)
    return 0
