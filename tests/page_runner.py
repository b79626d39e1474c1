"""Runs what README and pages show: blocks of Python and shell in their order, in one folder, made small for a test."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from crosskd_hf import cli

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"# ([\w./]+\.(?:py|yaml))\n")
# Commands that a test can't run as they stand, and where each of them is tried.
ELSEWHERE = {
    "make demo": "the example without arguments; tests/experiments/test_example.py runs it with less data",
    "make test": "this very run",
    "python3 -m venv": "installing needs a network; continuous integration installs before it tests",
    ". .venv/bin/activate": "continuous integration calls the programs of the environment",
    "pip install": "installing needs a network; continuous integration installs before it tests",
    "git clone": "needs a network",
    "mv BCCD_Dataset": "the data set of tests/test_pages.py lies there",
    "wget": "needs a network",
    "jupyter": "tests/test_notebook.py runs the notebook",
    "torchrun": "tests/training/test_distributed.py launches by it",
    "accelerate launch": "tests/experiments/test_example.py and tests/training/test_distributed.py launch",
    "crosskd-hf convert mmdet": "tests/convert converts files of this form; the published ones need a network",
    "crosskd-hf convert torchvision": "tests/convert converts models of this form; the published ones need a network",
}
# What makes a command small enough for a test, and keeps it from asking for pretrained weights.
SMALL = {
    "train": "--max_steps 2 --shortest_edge 64 --longest_edge 64 --width 16 --use_cpu",
    "cost": "--no-speed --size 64 64",
}
SMALL["distill"] = SMALL["train"]
TINY = (
    (re.compile(r"\b(gfl|faster_rcnn|fcos):(?:resnet\d+|mobilenetv2_100)\b"), r"\1:test_resnet"),
    (re.compile(r"make_shapes\('photos', size=128\)"), "make_shapes('photos', 6, 3, 64)"),
    (re.compile(r"--train_teacher "), ""),
    (re.compile(r"rt_detr_v2:resnet18 --teacher PekingU/rtdetr_v2_r50vd"), "gfl:test_resnet --teacher TEACHER"),
)


def blocks(text: str, language: str) -> list[str]:
    return [code for name, code in BLOCK.findall(text) if name == language]


def commands(block: str) -> list[str]:
    """The commands of a shell block, continued lines joined, without comments."""
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.join(shlex.split(line, comments=True)) for line in lines if line.split("#")[0].strip()]


def tiny(text: str) -> str:
    """The same with networks that a test can train."""
    for pattern, replacement in TINY:
        text = pattern.sub(replacement, text)
    return text


def elsewhere(command: str) -> bool:
    return command.startswith(tuple(ELSEWHERE))


def run_command(command: str, folder: Path) -> None:
    """Run one command of a page; the command line of this package in this process."""
    program, *words = shlex.split(tiny(command))
    if program == "crosskd-hf":
        words += SMALL.get(words[0], "").split()
        if words[0] in ("train", "distill") and "--patience" not in words:
            words += ["--eval_strategy", "no"]
        try:
            status = cli.main(words)
        except SystemExit as stop:  # --version, --help
            status = int(stop.code or 0)
        assert status == 0, command
    else:
        assert program == "python", f"{command}: run it, or say in ELSEWHERE where it is tried"
        subprocess.run([sys.executable, *words], cwd=folder, check=True, capture_output=True, timeout=300)


def run_page(text: str, folder: Path) -> None:
    """Run all blocks of a page in their order; a block that begins with the name of a file is written as that file.

    The blocks of Python are one program. `folder` is the working directory.
    """
    program: dict[str, object] = {"__name__": "__main__"}
    for language, code in BLOCK.findall(text):
        named = NAMED.match(code)
        if named is not None:
            (folder / named[1]).write_text(code, encoding="utf-8")
        elif language == "python":
            exec(compile(tiny(code), "a block of the page", "exec"), program)
        elif language in ("bash", "sh"):
            for command in commands(code):
                if not elsewhere(command):
                    run_command(command, folder)
