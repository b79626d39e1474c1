"""The pages that build something of a reader's own: their blocks run as they stand, one after the other."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from crosskd_hf import cli
from crosskd_hf.distillation import METHODS
from crosskd_hf.distillation.detectors import VIEWS
from tests.test_code_blocks import ROOT, blocks, commands

FILE = re.compile(r"# (\w+\.py)\n")


def run(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write those blocks of Python that begin with the name of a file, and run the others as one program."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    for registry in (METHODS, VIEWS):
        for name in registry:  # as they were, when the page is done
            monkeypatch.setitem(registry, name, registry[name])
    program: dict[str, object] = {"__name__": "__main__"}
    for code in blocks(page, "python"):
        named = FILE.match(code)
        if named is not None:
            (folder / named[1]).write_text(code, encoding="utf-8")
        else:
            exec(compile(code, "a block of the page", "exec"), program)


def text(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_write_your_own_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = text("own_method.md")
    run(page, tmp_path, monkeypatch)
    assert (tmp_path / "student" / "model.safetensors").is_file()
    assert "'attention/map'" in capsys.readouterr().out
    (line, *_) = (line for block in blocks(page, "sh") for line in commands(block))
    assert cli.main(shlex.split(line)[1:]) == 0
    assert "| `power` | `2` | float, at least 1 | Exponent of the activations. |" in capsys.readouterr().out


def test_add_a_detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(text("own_detector.md"), tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    assert "'eval_map'" in printed
    assert "{'fitnets/features': " in printed
