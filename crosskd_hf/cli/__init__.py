"""The command `crosskd-hf`: thin over the library. Only the chosen command's module is imported."""

import argparse
import os
import sys
from collections.abc import Sequence

from ..text import escape_on_output, lines, one_line
from .parser import chosen_command, make_parser

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Words after the program's name; by default those of the process.

    Returns:
        The exit status.
    """
    escape_on_output()
    words = list(sys.argv[1:] if argv is None else argv)
    arguments, rest = make_parser(*chosen_command(words)).parse_known_args(words)
    if rest and arguments.own is not None:
        _refuse(rest, arguments.own)
    arguments.rest = rest
    try:
        status = int(arguments.run(arguments))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if arguments.debug or os.environ.get("CROSSKD_DEBUG", "0") not in ("", "0"):
            raise
        known = isinstance(error, ValueError | OSError)
        kind = "" if known else f"{type(error).__name__}: "
        hint = "" if known else " (run again with --debug to see where)"
        print(f"error: {kind}{lines(str(error))}{hint}", file=sys.stderr)
        return 1


def _refuse(words: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Stop with what a command doesn't know, and the options that are spelt nearly like it."""
    from ..sources import near

    known = [action.option_strings[0] for action in parser._actions if action.option_strings]
    unknown = next((word.split("=")[0] for word in words if word.startswith("-")), "")
    hint = near(unknown.replace("_", "-"), known) if unknown else ""
    parser.error(f"unrecognized arguments: {one_line(' '.join(words))}{hint}")
