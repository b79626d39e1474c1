"""The processes that tests run programs in (`tests/fresh.py`)."""

from pathlib import Path

from tests import fresh

PROGRAM = """
import os, sys
print(sys.argv[1:], os.getcwd(), file=sys.stderr)
print(sorted({"torch", "transformers", "crosskd_hf", "datasets", "tests.conftest"} & sys.modules.keys()))
sys.exit(3)
"""


def test_a_program_finds_the_libraries_and_nothing_of_the_package(tmp_path: Path) -> None:
    done = fresh.run(PROGRAM, "a", "b", folder=tmp_path)
    assert done == (3, "['torch', 'transformers']\n", f"['a', 'b'] {tmp_path}\n")


def test_an_error_and_a_program_that_does_not_end(tmp_path: Path) -> None:
    failed = fresh.run("1 / 0", folder=tmp_path)
    assert (failed.returncode, failed.stderr.splitlines()[-1]) == (1, "ZeroDivisionError: division by zero")
    assert fresh.run("import time\ntime.sleep(60)", folder=tmp_path, timeout=0.5).returncode < 0
