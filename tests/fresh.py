"""Programs in a process that has imported the large libraries, and nothing of this package or its tests.

Such a process costs a fork, and not the eight seconds of processor time that importing torch, timm and transformers
takes. What those read from the environment when they are imported is that of the tests: a program that needs another
environment, or a process without these libraries, is a matter of `subprocess`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

LIBRARIES = ["torch", "torchvision.ops", "timm", "transformers.pipelines", "transformers.models.auto"]


class Finished(NamedTuple):
    """What a program left.

    Args:
        returncode: Its exit status.
        stdout, stderr: What it printed.
    """

    returncode: int
    stdout: str
    stderr: str


def run(program: str, *arguments: str, folder: Path, timeout: float = 120) -> Finished:
    """Run Python source.

    Args:
        program: The source.
        arguments: `sys.argv[1:]`.
        folder: Working directory.
        timeout: In seconds; the process is killed then.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with tempfile.TemporaryDirectory() as name:
        printed = [Path(name) / stream for stream in ("stdout", "stderr")]
        words = (program, arguments, str(folder), *map(str, printed))
        process = context.Process(target=_perform, args=words)
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
        assert process.exitcode is not None
        return Finished(process.exitcode, *(path.read_text() if path.exists() else "" for path in printed))


def _perform(program: str, arguments: tuple[str, ...], folder: str, stdout: str, stderr: str) -> None:
    for number, path in ((0, os.devnull), (1, stdout), (2, stderr)):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT
        os.dup2(os.open(path, flags), number)
    os.chdir(folder)
    sys.argv = ["-c", *arguments]
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})


def script(path: Path) -> str:
    """A program that runs a file as `python FILE` does."""
    return f"import runpy, sys\nsys.argv[0] = {str(path)!r}\nrunpy.run_path({str(path)!r}, run_name='__main__')"
