"""Everything public says what it is; losses, assigners, priors and distances say their shapes and where they stand."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import pytest

import crosskd_hf

MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(crosskd_hf.__path__, "crosskd_hf.")
    if not info.name.endswith("__main__")
)
SHAPES = re.compile(r"\((?:\.\.\.|[A-Z1]\w*)(?:, [^()]+)?\)")
SOURCES = re.compile(
    r"paper|section|eq\.|algorithm|\b[A-Z][A-Za-z-]+ (?:19|20)\d\d|configuration|official|choice of this project"
)
REFERENCE = re.compile(r"[Ss]ee :\w+:`")
NUMERIC = re.compile(r"(?:^|_)(?:loss|assign|prior_boxes|distances?)(?:_|$)")


def members(name: str) -> Iterator[tuple[str, Any, bool]]:
    """Public classes and functions that a module defines, and the public methods of its classes."""
    for key, value in vars(importlib.import_module(name)).items():
        if key.startswith("_") or getattr(value, "__module__", None) != name:
            continue
        if inspect.isclass(value):
            yield f"{name}.{key}", value, False
            for method, given in vars(value).items():
                plain = given.fget if isinstance(given, property) else getattr(given, "__func__", given)
                if not method.startswith("_") and inspect.isfunction(plain) and plain.__name__ != "<lambda>":
                    yield f"{name}.{key}.{method}", getattr(value, method), True
        elif inspect.isfunction(value):
            yield f"{name}.{key}", value, False


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_has_a_docstring(name: str) -> None:
    """An override may leave it to the method that it overrides."""
    assert importlib.import_module(name).__doc__ or name.endswith("__init__")
    silent = [where for where, value, _ in members(name) if not (inspect.getdoc(value) or "").strip()]
    assert silent == []


def numeric() -> list[tuple[str, str]]:
    found = {}
    for name in MODULES:
        if name.startswith(("crosskd_hf.models.", "crosskd_hf.distillation.")):
            for where, value, _ in members(name):
                if NUMERIC.search(where.rpartition(".")[2]) and not inspect.isclass(value):
                    found[where] = inspect.getdoc(value) or ""
    return sorted(found.items())


def test_numbers_say_their_shapes() -> None:
    silent = [where for where, text in numeric() if not (SHAPES.search(text) or REFERENCE.search(text))]
    assert silent == []


def test_numbers_say_their_source() -> None:
    """Geometry and base classes have none."""
    plain = ("crosskd_hf.models.boxes.", "crosskd_hf.models.dense.DenseHead.", "crosskd_hf.models.pyramid.")
    silent = [where for where, text in numeric() if not (SOURCES.search(text) or where.startswith(plain))]
    assert silent == []


def test_the_check_sees_what_it_is_meant_for() -> None:
    names = [where.removeprefix("crosskd_hf.") for where, _ in numeric()]
    assert {"models.gfl.GFLHead.loss", "models.assigners.assign_atss", "models.fcos.FCOSHead.prior_boxes"} <= set(names)
    assert "distillation.distances.box_distances" in names
    assert SHAPES.search("(B, N, 4) rows")
    assert not SHAPES.search("rows (all of them)")
