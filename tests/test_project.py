"""Facts that have to stand in two files agree, and the tests' own fences hold."""

import ast
import configparser
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import crosskd_hf

ROOT = Path(__file__).parent.parent
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def test_ruff_and_setup_mean_the_same_python() -> None:
    major, minor = re.fullmatch(r">=(\d+)\.(\d+)", SETUP["options"]["python_requires"]).groups()
    assert f'target-version = "py{major}{minor}"' in PYPROJECT
    assert f"Python {major}.{minor} or newer" in (ROOT / "README.md").read_text()


def test_requirements_are_ranges() -> None:
    required = SETUP["options"]["install_requires"].split() + SETUP["options.extras_require"]["dev"].split()
    assert len(required) > 10
    assert all(re.fullmatch(r"[\w-]+>=[\d.]+", requirement) for requirement in required)


def test_the_lowest_versions_are_those_of_the_requirements() -> None:
    """The recipe of `make test-lowest` writes a constraint for each of them."""
    (recipe,) = re.findall(
        r"^\tsed (.*) > \$\(LOWEST\)/constraints.txt$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    command = ["sed", *shlex.split(recipe.replace("$$", "$"))]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    options = [SETUP["options"]["install_requires"], *SETUP["options.extras_require"].values()]
    assert sorted(lines) == sorted(line.replace(">=", "==") for option in options for line in option.split())


@pytest.mark.parametrize("target", ["demo", "test"])
def test_readme_shows_what_the_makefile_makes(target: str) -> None:
    assert re.search(rf"^make {target}\b", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize("path", sorted((ROOT / "crosskd_hf" / "models").glob("*.py")), ids=lambda path: path.stem)
def test_models_import_siblings_only(path: Path) -> None:
    """As remote code they travel without the rest of the package, and only `from .x import y` is followed."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.split(".")[0] == "crosskd_hf"]
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"line {node.lineno} imports from outside of models"
            assert node.module in {sibling.stem for sibling in path.parent.glob("*.py")}, f"line {node.lineno}"
        elif isinstance(node, ast.ImportFrom):
            assert str(node.module).split(".")[0] != "crosskd_hf", f"line {node.lineno} imports the package by name"


def test_nothing_imports_the_command_line() -> None:
    importing = re.compile(
        r"^\s*(from|import) (crosskd_hf)?\.+cli\b|^\s*from (crosskd_hf|\.+) import .*\bcli\b", re.MULTILINE
    )
    sources = [path for path in (ROOT / "crosskd_hf").rglob("*.py") if path.name != "__main__.py"]
    assert [path for path in sources if importing.search(path.read_text())] == []


def test_the_package_hands_out_what_it_names() -> None:
    for name in crosskd_hf.__all__:
        assert getattr(crosskd_hf, name).__name__ == name
    assert set(crosskd_hf.__all__) <= set(dir(crosskd_hf))
    assert crosskd_hf.CrossKD(cut=2).name == "crosskd"
    with pytest.raises(AttributeError, match="'crosskd_hf' has no attribute 'Trainer'"):
        _ = crosskd_hf.Trainer


MOST_LINES = 40  # of a function's body, without its docstring: a screen


@pytest.mark.parametrize("path", sorted((ROOT / "crosskd_hf").rglob("*.py")), ids=lambda path: path.stem)
def test_a_function_fits_a_screen(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            first = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            lines = node.end_lineno - first[0].lineno + 1
            assert lines <= MOST_LINES, f"{node.name} (line {node.lineno}) has {lines} lines: split it"


@pytest.mark.parametrize(
    "statement", ["import crosskd_hf", "from crosskd_hf.cli.parser import make_parser; make_parser().format_help()"]
)
def test_package_and_help_are_there_without_torch(statement: str) -> None:
    code = f"import sys; {statement}; print(sorted(sys.modules.keys() & {{'torch', 'transformers'}}))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"


def test_what_prediction_leaves_out_and_when_detectors_are_registered() -> None:
    """With transformers, whichever is first; asking whether it is installed, as accelerate does, is no import of it."""
    code = """
import importlib.util, sys
import crosskd_hf
importlib.util.find_spec("transformers")
from transformers import AutoConfig
print(AutoConfig.for_model("crosskd_gfl").model_type, crosskd_hf.models.GFLConfig.model_type)
import crosskd_hf.inference.predict, crosskd_hf.inference.loading
absent = {"transformers.trainer", "datasets", "crosskd_hf.training", "crosskd_hf.distillation"}
print(*sorted(sys.modules.keys() & absent))
"""
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert printed == "crosskd_gfl crosskd_gfl\n\n"


def test_the_extra_all_has_what_the_others_have() -> None:
    extras = {name: set(text.split()) for name, text in SETUP["options.extras_require"].items()}
    assert extras["all"] == set().union(*(extras[name] for name in extras.keys() - {"all", "dev"}))
    assert {"tensorboard", "wandb", "video", "fast"} <= extras.keys()


class TestFences:
    def test_no_way_out(self) -> None:
        with pytest.raises(RuntimeError, match="tests run without a network"):
            socket.create_connection(("192.0.2.1", 80), timeout=1)  # TEST-NET-1 of RFC 5737
        with pytest.raises(RuntimeError, match="tests run without a network"):
            socket.getaddrinfo("huggingface.co", 443)

    def test_loopback_is_open(self) -> None:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=5) as client,
        ):
            assert client.getpeername() == server.getsockname()

    def test_offline_and_on_one_thread(self) -> None:
        from huggingface_hub.constants import is_offline_mode

        assert is_offline_mode()
        assert torch.get_num_threads() == 1

    def test_seeded(self, seed: int) -> None:
        value = torch.rand(1)
        assert torch.equal(value, torch.rand(1, generator=torch.Generator().manual_seed(seed)))
