"""`docs/architecture.md` tells the way that a step really takes, and its picture shows the packages that there are."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from transformers import Trainer

import crosskd_hf
from crosskd_hf.training.trainer import CrossKDTrainer
from tests import tiny_run

ROOT = Path(__file__).parents[1]
PACKAGE = Path(crosskd_hf.__file__).parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
STEPS = re.findall(r"^\| \d+ \| `([\w.]+)` \| `([\w/]+\.py)` \|", PAGE, re.MULTILINE)


def house() -> Any:
    spec = importlib.util.spec_from_file_location("house", ROOT / "docs" / "house.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_that_of_the_code() -> None:
    """Packages and arrows; what stands in the boxes is the docstrings' matter. `python docs/house.py` draws it anew."""
    drawn = house()
    now, then = (
        [line for line in svg.splitlines() if line.startswith("<line") or "bold" in line]
        for svg in (drawn.picture(), (ROOT / "docs" / "house.svg").read_text(encoding="utf-8"))
    )
    assert now == then
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages <= {name for row in drawn.layers() for name in row}


def test_implied_arrows_are_left_out() -> None:
    essential = house().essential
    assert essential({("a", "b"), ("b", "c"), ("a", "c"), ("a", "d")}) == {("a", "b"), ("b", "c"), ("a", "d")}


def test_the_trainers_classes_are_those_of_the_page() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (?:`([\w/]+\.py)`|transformers) \|", PAGE, re.MULTILINE)
    classes = [kind for kind in reversed(CrossKDTrainer.__mro__) if issubclass(kind, Trainer)]
    assert [name for name, _ in rows] == [kind.__name__ for kind in classes]
    files = [Path(sys.modules[kind.__module__].__file__) for kind in classes[1:]]
    assert [file for _, file in rows[1:]] == [file.relative_to(PACKAGE).as_posix() for file in files]


def test_a_step_goes_the_way_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: dict[tuple[str, str], None] = {}

    def note(frame: FrameType, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            owner = frame.f_locals.get("self", frame.f_locals.get("cls"))
            kinds = (owner if isinstance(owner, type) else type(owner)).__mro__
            name = frame.f_code.co_name
            defining = [kind.__name__ for kind in kinds if name in vars(kind)] if owner is not None else []
            file = path.relative_to(PACKAGE).as_posix()
            entered.update({(f"{kind}.{name}", file): None for kind in defining} or {(name, file): None})

    step = CrossKDTrainer.training_step

    def traced(self: CrossKDTrainer, *args: Any, **kwargs: Any) -> Any:
        sys.setprofile(note)
        try:
            return step(self, *args, **kwargs)
        finally:
            sys.setprofile(None)

    monkeypatch.setattr(CrossKDTrainer, "training_step", traced)
    tiny_run.make_trainer(tmp_path, methods=["crosskd"], max_steps=1).train()
    assert len(STEPS) == 19
    order = list(entered)
    assert [place for place in STEPS if place not in entered] == []
    numbers = [order.index(place) for place in STEPS]
    assert numbers == sorted(numbers)
