"""The pages on trouble and reliability name what exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "crosskd_hf").rglob("*.py"))


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def words(node: ast.AST) -> str:
    """The literal parts of a message; what is filled in becomes a line break."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else "\n"
    if isinstance(node, ast.JoinedStr):
        return "".join(words(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return words(node.left) + words(node.right)
    return "\n"


def messages() -> Iterator[tuple[str, str]]:
    """Place and words of everything that is raised or warned of with a message of its own."""
    for path in PACKAGE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                call = node.exc
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "warning":
                call = node
            else:
                continue
            text = words(call.args[0]) if call.args else ""
            if text.strip():
                yield f"{path.relative_to(ROOT)}:{node.lineno}", text


def quoted() -> list[str]:
    """What the first columns of the tables of messages quote, and the messages of the methods' own page."""
    rows = [line for line in page("troubleshooting.md").splitlines() if line.startswith("| `")]
    of_methods = re.findall(r"^- message `([^`]+)`", page("methods.md"), re.MULTILINE)
    return [text for row in rows for text in re.findall(r"`([^`]+)`", row.split("|")[1])] + of_methods


def test_every_message_has_an_entry() -> None:
    known = quoted()
    missing = [f"{place} {text!r}" for place, text in messages() if not any(quote in text for quote in known)]
    assert not missing, "\n".join(missing)


def test_every_entry_is_a_message_or_a_kind_of_finding() -> None:
    source = "\n".join(text for _, text in messages())
    source += "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE)
    unknown = [quote for quote in quoted() if quote not in source]
    assert [quote for quote in unknown if not is_made_of(quote, source)] == []


def is_made_of(quote: str, source: str) -> bool:
    """Whether `quote` is a kind of finding whose last word is filled in, as that of `duplicate-category-{key}`."""
    first, hyphen, last = quote.rpartition("-")
    return bool(hyphen) and last.isalpha() and f'"{first}-{{' in source


def test_every_kind_of_finding_has_an_entry() -> None:
    from crosskd_hf.data.check_images import _FILE_FINDINGS

    pattern = re.compile(r"(?:found|Finding)\(\s*(?:\"(?:error|warning|note)\"|severity),\s*f?\"([a-z{}-]+)\"")
    kinds = {kind for path in PACKAGE for kind in pattern.findall(path.read_text(encoding="utf-8"))}
    kinds = {kind for kind in kinds if "{" not in kind} | set(_FILE_FINDINGS)
    assert len(kinds) > 25
    assert kinds <= set(quoted())


def test_methods_are_what_the_command_prints() -> None:
    from crosskd_hf.distillation.reference import reference

    assert page("methods.md") == reference() + "\n"  # crosskd-hf methods > docs/methods.md


def test_options_are_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    from crosskd_hf.cli import main

    assert main(["options"]) == 0
    assert page("options.md") == capsys.readouterr().out  # crosskd-hf options > docs/options.md


def test_every_option_has_help_default_and_source() -> None:
    rows = [line.split(" | ") for line in page("options.md").splitlines() if line.startswith("| `")]
    assert len(rows) > 90
    assert [row for row in rows if len(row) != 5 or not all(cell.strip("| ") for cell in row)] == []


@pytest.mark.parametrize("name", ["reliability.md", "troubleshooting.md"])
def test_named_tests_exist(name: str) -> None:
    for file, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page(name)):
        source = (ROOT / file).read_text(encoding="utf-8")
        assert not test or re.search(rf"(?:def|class) {test}\b", source), f"{file}::{test}"
