"""Do the tests notice faults? Puts one fault at a time into a copy of the package and runs the tests of its area.

    python benchmarks/mutants.py [--only models. training.ema] [--count 60] [--all] [--limit 60] [--json FILE]

The faults are those of `benchmarks/faults.py`; `--count` takes that many, spread evenly over the areas. Prints a line
for each, then a table in Markdown. Exit status 1 if a fault without a reason survives, if a fault's text is no longer
in the code, or if a test that caught one fails without any. `--json` writes each verdict as it comes; faults that were
caught before, by the same FILE, are not tried again. `--all` runs the whole default suite once more for each survivor.
"""

from __future__ import annotations

import argparse
import ast
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.faults import FAULTS, Fault  # noqa: E402

CARRIED = ("crosskd_hf", "tests", "docs", "examples", "benchmarks", "README.md", "CHANGELOG.md", "pyproject.toml")
CARRIED += ("setup.cfg", "Makefile")


class Verdict(NamedTuple):
    """What the tests said of a fault.

    Args:
        result: "caught", "survived", "slow" (no answer within the limit), "broken" (tests could not be collected, or
            the one that failed fails without the fault too).
        by: The first test that failed.
        seconds: Of wall-clock time.
    """

    result: str
    by: str
    seconds: float


def mutated(source: str, qualname: str, old: str, new: str) -> str:
    """`source` with a fault in one of its functions, classes or assignments.

    Args:
        source: A module.
        qualname: `function`, `Class.method`, `Class` or `NAME`; the fault must lie inside of it.
        old, new: What is replaced by what.

    Raises:
        LookupError: There is no such name, or `old` doesn't stand there exactly once.
    """
    node: Any = ast.parse(source)
    for name in qualname.split("."):
        node = next((child for child in node.body if name in _names(child)), None)
        if node is None:
            raise LookupError(f"there is no {qualname}")
    lines = source.splitlines(keepends=True)
    start, end = node.lineno - 1, node.end_lineno
    text = "".join(lines[start:end])
    if text.count(old) != 1:
        raise LookupError(f"{old!r} stands {text.count(old)} times in {qualname}")
    return "".join([*lines[:start], text.replace(old, new), *lines[end:]])


def _names(node: ast.stmt) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {getattr(node, "name", ""), *(target.id for target in targets if isinstance(target, ast.Name))}


def path_of(fault: Fault, root: Path) -> Path:
    """The file that a fault lies in."""
    return root / "crosskd_hf" / (fault.where.partition(":")[0].replace(".", "/") + ".py")


def changed_source(fault: Fault, root: Path) -> str:
    """The file of a fault with the fault in it; raises as :func:`mutated`."""
    source = path_of(fault, root).read_text(encoding="utf-8")
    return mutated(source, fault.where.partition(":")[2], fault.old, fault.new)


def lost(faults: Sequence[Fault]) -> dict[Fault, str]:
    """Those faults whose text is not in the code any more, and what is wrong with each."""
    found = {}
    for fault in faults:
        try:
            changed_source(fault, ROOT)
        except (LookupError, FileNotFoundError) as error:
            found[fault] = f"{fault.where}: {error}"
    return found


class Copy:
    """A copy of the working tree in which faults are tried; the tree itself is never touched.

    Args:
        folder: An empty folder.
        limit: Seconds of processor time for the tests of one fault.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        for name in CARRIED:
            source, target = ROOT / name, folder / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)

    def judge(self, fault: Fault) -> Verdict:
        """Run the tests of a fault's area with the fault in place.

        Raises:
            LookupError: See :func:`mutated`.
        """
        path = path_of(fault, self.folder)
        whole = path.read_text(encoding="utf-8")
        path.write_text(changed_source(fault, self.folder), encoding="utf-8")
        try:
            return self.run(fault.tests, self.limit)
        finally:
            path.write_text(whole, encoding="utf-8")

    def run(self, tests: Sequence[str], limit: int) -> Verdict:
        """Run tests, for `limit` seconds of processor time, in a process that has imported the large libraries only."""
        start, answer = time.perf_counter(), self.folder / "answer.json"
        answer.unlink(missing_ok=True)
        process = multiprocessing.get_context("fork").Process(target=_pytest, args=(self.folder, tests, limit))
        process.start()
        process.join(20 * limit)
        if process.is_alive():
            process.kill()
            process.join()
        seconds = time.perf_counter() - start
        if not answer.is_file():
            return Verdict("slow", "", seconds)
        code, by = json.loads(answer.read_text())
        return Verdict({0: "survived", 1: "caught"}.get(code, "broken"), by, seconds)


class Notes:
    """Verdicts in a json file, each written as it comes, and which tests passed without any fault.

    Args:
        path: The file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self.commit = path, _commit()
        content = json.loads(path.read_text()) if path and path.is_file() else {}
        self.rows: list[dict[str, Any]] = content.get("verdicts", [])
        self.passed: list[str] = content.get("passed", [])

    def caught(self, fault: Fault) -> Verdict | None:
        """What was noted of a fault that was caught before."""
        for row in self.rows:
            if _key(row) == _key(fault._asdict()) and row["result"] == "caught":
                return Verdict(row["result"], row["by"], row["seconds"])
        return None

    def add(self, fault: Fault, verdict: Verdict) -> None:
        """Note a verdict; it replaces that of an earlier run."""
        row = fault._asdict() | verdict._asdict() | {"commit": self.commit}
        self.rows = [*(other for other in self.rows if _key(other) != _key(row)), row]
        if self.path:
            content = {"passed": self.passed, "verdicts": self.rows}
            self.path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["where"], row["old"], row["new"]


def _commit() -> str:
    words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()


def chosen(faults: Sequence[Fault], count: int | None) -> list[Fault]:
    """`count` of the faults in their order, as many of each area as it has or an equal share; None chooses all."""
    areas: dict[str, list[Fault]] = {}
    for fault in faults:
        areas.setdefault(fault.where.split(".")[0], []).append(fault)
    left, picked = len(faults) if count is None else count, []
    for place, area in enumerate(sorted(areas.values(), key=len)):
        share = min(len(area), left // (len(areas) - place))
        picked += [area[step * len(area) // share] for step in range(share)]
        left -= share
    return [fault for fault in faults if fault in picked]


class _FirstFailure:
    """A plugin of pytest that remembers which test failed."""

    by = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        """See pytest."""
        self.by = self.by or (report.nodeid if report.failed else "")


def _pytest(folder: Path, tests: Sequence[str], limit: int) -> None:
    """The forked process: pytest over `tests`, its answer in a file."""
    import pytest

    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    os.setsid()  # a signal to the tests' process group stays there
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    with Path("log.txt").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    first = _FirstFailure()
    code = pytest.main(["-x", "-p", "no:cacheprovider", *(f"tests/{name}" for name in tests)], plugins=[first])
    from crosskd_hf import __file__ as package

    assert Path(package).is_relative_to(folder), package
    Path("answer.json").write_text(json.dumps([int(code), first.by]))


def _preload(cache: str) -> None:
    """Import what all tests import, offline as `tests/conftest.py` does; a fork then starts at once."""
    os.environ |= {"HF_HOME": cache, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    import datasets  # noqa: F401
    import pycocotools.cocoeval  # noqa: F401
    import timm  # noqa: F401
    import torchvision.transforms.v2  # noqa: F401
    from transformers import AutoModelForObjectDetection, Trainer  # noqa: F401


def _verdict(copy: Copy, fault: Fault, notes: Notes) -> Verdict:
    """What a fault's tests say of it. The test that fails has to pass without any fault."""
    verdict = copy.judge(fault)
    if verdict.result == "caught" and verdict.by not in notes.passed:
        if copy.run([verdict.by.removeprefix("tests/")], copy.limit).result != "survived":
            return verdict._replace(result="broken")
        notes.passed.append(verdict.by)
    return verdict


def _whole_suite(folder: Path, fault: Fault) -> Verdict:
    """The default tests with a fault that its area's tests don't see."""
    path = path_of(fault, folder)
    whole, start = path.read_text(encoding="utf-8"), time.perf_counter()
    path.write_text(changed_source(fault, folder), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider"]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    path.write_text(whole, encoding="utf-8")
    failed = [line for line in process.stdout.splitlines() if line.startswith("FAILED")]
    result = {0: "survived", 1: "caught"}.get(process.returncode, "broken")
    return Verdict(result, failed[0].split()[1] if failed else "", time.perf_counter() - start)


def _table(rows: Sequence[tuple[Fault, Verdict]]) -> str:
    lines = ["| fault | result | by |", "|---|---|---|"]
    for fault, verdict in rows:
        reason = f": {fault.survives}" if verdict.result == "survived" and fault.survives else ""
        by = verdict.by.removeprefix("tests/")
        lines.append(f"| `{fault.where}`: {fault.what} | {verdict.result}{reason} | {f'`{by}`' if by else ''} |")
    return "\n".join(lines).replace("||", "|")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="Begin of the places of those to be tried now.")
    parser.add_argument("--count", type=int, help="How many faults are tried (default: all).")
    parser.add_argument("--all", action="store_true", help="Run the whole default suite for each survivor.")
    parser.add_argument("--limit", type=int, default=60, help="Seconds of processor time for a fault's tests.")
    parser.add_argument("--json", type=Path, help="Write the verdicts there, and go on from those that are there.")
    return parser.parse_args()


def main() -> int:
    """Try the faults, one after the other."""
    options = _options()
    gone = lost(FAULTS)
    print("\n".join(gone.values()))
    faults = chosen([fault for fault in FAULTS if fault not in gone], options.count)
    faults = [fault for fault in faults if fault.where.startswith(tuple(options.only))]
    notes, rows = Notes(options.json), list[tuple[Fault, Verdict]]()
    with tempfile.TemporaryDirectory() as name:
        _preload(f"{name}/cache")
        (Path(name) / "tree").mkdir()
        copy = Copy(Path(name) / "tree", options.limit)
        for fault in faults:
            verdict = notes.caught(fault) or _verdict(copy, fault, notes)
            if options.all and verdict.result == "survived":
                verdict = _whole_suite(copy.folder, fault)
            notes.add(fault, verdict)
            rows.append((fault, verdict))
            print(f"{verdict.result:9} {verdict.seconds:5.0f} s  {fault.where}: {fault.what}  {verdict.by}", flush=True)
    caught = sum(verdict.result == "caught" for _, verdict in rows)
    print(f"\n{_table(rows)}\n\n{caught} of {len(rows)} caught")
    return int(bool(gone) or any(verdict.result != "caught" and not fault.survives for fault, verdict in rows))


if __name__ == "__main__":
    sys.exit(main())
