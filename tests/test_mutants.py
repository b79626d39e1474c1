"""What `benchmarks/mutants.py` does before any test runs. It checks itself that its faults are in the present code."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.faults import FAULTS
from benchmarks.mutants import ROOT, Notes, Verdict, chosen, lost, mutated

SOURCE = """LIMIT = 2


class A:
    def f(self):
        return 1 + 1


def f():
    return 1
"""


def test_a_fault_lies_in_its_function_alone() -> None:
    assert mutated(SOURCE, "A.f", "1 + 1", "2") == SOURCE.replace("1 + 1", "2")
    assert mutated(SOURCE, "f", "1", "2") == SOURCE.removesuffix("1\n") + "2\n"
    assert mutated(SOURCE, "LIMIT", "2", "3") == SOURCE.replace("LIMIT = 2", "LIMIT = 3")


def test_a_text_that_is_gone_is_an_error() -> None:
    with pytest.raises(LookupError, match="'1' stands 2 times in A.f"):
        mutated(SOURCE, "A.f", "1", "2")
    with pytest.raises(LookupError, match="there is no A.g"):
        mutated(SOURCE, "A.g", "1", "2")
    gone = FAULTS[0]._replace(old="what nobody writes")
    assert lost([FAULTS[0], gone]) == {gone: f"{gone.where}: 'what nobody writes' stands 0 times in _scale"}


def test_every_area_has_faults_and_tests() -> None:
    areas = {fault.where.split(".")[0] for fault in FAULTS}
    assert areas == {"models", "distillation", "training", "data", "inference"}
    assert len({(fault.where, fault.old, fault.new) for fault in FAULTS}) == len(FAULTS) >= 60


def test_every_area_has_its_share_of_the_faults_that_are_tried() -> None:
    counts = Counter(fault.where.split(".")[0] for fault in chosen(FAULTS, 60))
    assert counts == dict.fromkeys(["models", "distillation", "training", "data", "inference"], 12)
    assert chosen(FAULTS, None) == [*FAULTS]


def test_what_was_caught_is_not_tried_again(tmp_path: Path) -> None:
    caught, survivor = Verdict("caught", "test_a", 1.0), Verdict("survived", "", 2.0)
    notes = Notes(tmp_path / "notes.json")
    notes.passed.append("test_a")
    for fault, verdict in ((FAULTS[0], survivor), (FAULTS[1], caught), (FAULTS[0], survivor)):
        notes.add(fault, verdict)
    again = Notes(tmp_path / "notes.json")
    assert (len(again.rows), again.passed) == (2, ["test_a"])
    assert (again.caught(FAULTS[0]), again.caught(FAULTS[1]), again.caught(FAULTS[2])) == (None, caught, None)


@pytest.mark.parametrize("name", sorted({name for fault in FAULTS for name in fault.tests}))
def test_the_tests_of_a_fault_exist(name: str) -> None:
    file, *parts = name.partition("[")[0].split("::")
    source = (ROOT / "tests" / file).read_text(encoding="utf-8")
    assert [part for part in parts if not re.search(rf"(?:def|class) {part}\b", source)] == []
