"""The table of commands: help comes from it alone, and one command does not import another's module."""

import subprocess
import sys
from pathlib import Path

import pytest

from crosskd_hf.cli.parser import COMMANDS, make_parser, parsers_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_where_the_table_says(name: str) -> None:
    """Its help is that of the table, and an unknown option of its own is told from one that it hands on."""
    parser = make_parser(name)
    assert list(parsers_of(parser)) == list(COMMANDS)
    assert COMMANDS[name][1].split()[0] in parser.format_help()
    chosen = parsers_of(parser)[name]
    for leaf in parsers_of(chosen).values() or [chosen]:
        assert callable(leaf.get_default("run"))
        assert leaf.get_default("own") is (None if name in ("train", "distill") else leaf)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--help"], set()),
        (["predict", "--help"], {"inference", "data_options", "command"}),
        (["convert", "mmdet", "--help"], {"convert", "command"}),
        (["check-data", "--help"], {"data", "data_options", "command"}),
        (["--version", "convert"], {"convert", "command"}),
    ],
)
def test_a_command_imports_no_other_command(words: list[str], expected: set[str]) -> None:
    code = f"""
import sys, crosskd_hf.cli
try:
    crosskd_hf.cli.main({words})
except SystemExit:
    print(*(name for name in sys.modules if name.startswith("crosskd_hf.") or name in ("torch", "transformers")))
"""
    last = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).splitlines()[-1]
    own = {name.removeprefix("crosskd_hf.cli.") for name in last.split() if name.startswith("crosskd_hf.cli.")}
    assert own - {"parser"} == expected
    assert set(last.split()) - {f"crosskd_hf.cli.{name}" for name in own} == {
        "crosskd_hf.cli",
        "crosskd_hf.lazy",
        "crosskd_hf.text",
    }


@pytest.mark.parametrize("module", ["crosskd_hf", "crosskd_hf.cli"])
def test_as_a_module(module: str) -> None:
    printed = subprocess.check_output([sys.executable, "-m", module, "--version"], cwd=ROOT, text=True)
    assert printed.startswith("crosskd_hf ")
