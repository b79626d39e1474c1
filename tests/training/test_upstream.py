"""The tables of what the trainers use of transformers are complete, and a release without one of them is refused."""

from __future__ import annotations

import ast
import builtins
import inspect
import re
import sys
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import Trainer, TrainerCallback

from crosskd_hf.training import coco_trainer, termination, upstream
from crosskd_hf.training.trainer import CrossKDTrainer
from crosskd_hf.training.upstream import ATTRIBUTES, CALLED, IMPORTED, MOMENTS, OVERRIDDEN, TRIED, UpstreamError
from tests.tiny_run import make_data, make_trainer

PACKAGE = Path(upstream.__file__).parents[1]
SOURCE = inspect.getsource(sys.modules[Trainer.__module__])
OURS = CrossKDTrainer.__mro__[: CrossKDTrainer.__mro__.index(Trainer)]
# Modules whose contents transformers documents, or that hold what its documented classes hand out.
DOCUMENTED = {"utils", "trainer_utils", "trainer_callback", "training_args", "image_utils", "image_processing_utils"}


def trees() -> Iterator[tuple[str, ast.Module]]:
    """Every module of the package, by its path inside of it."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


# ---- The tables are complete ----


def test_every_override_is_listed() -> None:
    overridden = {name for ours in OURS for name in vars(ours) if hasattr(Trainer, name) and not name.startswith("__")}
    assert overridden == {hook.name for hook in OVERRIDDEN}


def test_private_overrides_are_few() -> None:
    assert len([hook for hook in OVERRIDDEN if hook.name.startswith("_")]) == 7


@pytest.mark.parametrize("ours", OURS)
def test_overrides_take_what_upstream_passes(ours: type) -> None:
    for hook in OVERRIDDEN:
        if hook.name in vars(ours):
            parameters = inspect.signature(vars(ours)[hook.name]).parameters
            if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
                continue
            assert list(parameters)[1 : len(hook.parameters.split()) + 1] == hook.parameters.split(), hook.name


def test_every_moment_is_listed() -> None:
    kinds = (coco_trainer._Moments, termination._Termination)
    assert {name for kind in kinds for name in vars(kind) if name.startswith("on_")} == set(MOMENTS)


def defined(tree: ast.Module) -> set[str]:
    """Names that a module gives to functions, classes, arguments, variables and attributes of its own."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return names


def test_private_attributes_of_others_are_used_in_one_module() -> None:
    own = set().union(*(defined(tree) for path, tree in trees() if path != "training/upstream.py"))
    listed = {hook.name for hook in CALLED} | {name for _, name in ATTRIBUTES} | {hook.name for hook in OVERRIDDEN}
    found: dict[str, set[str]] = {}
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and re.match(r"_(?!_)", node.attr) and node.attr not in own:
                found.setdefault(node.attr, set()).add(path)
    for name in ("_replace", "_asdict", "_fields", "_BatchNorm", "_exit"):  # of named tuples, torch and os
        found.pop(name, None)
    assert {name: paths for name, paths in found.items() if paths != {"training/upstream.py"}} == {}
    assert found.keys() <= listed


def test_our_own_attributes_have_names_of_their_own() -> None:
    """Otherwise they would replace what `Trainer` keeps under the same name."""
    (theirs,) = (node for node in ast.parse(SOURCE).body if isinstance(node, ast.ClassDef) and node.name == "Trainer")
    private = {name for name in defined(ast.Module(body=[theirs], type_ignores=[])) if re.match(r"_[a-z]", name)}
    for ours in OURS:
        own = defined(ast.parse(inspect.getsource(ours)))
        assert private & own <= {hook.name for hook in OVERRIDDEN}, ours


def test_imports_from_undocumented_modules_are_listed() -> None:
    found: dict[str, set[str]] = {}
    for _, tree in trees():
        for node in ast.walk(tree):
            module = str(node.module) if isinstance(node, ast.ImportFrom) else ""
            if module.startswith("transformers.") and module.split(".")[1] not in DOCUMENTED:
                found.setdefault(module, set()).update(alias.name for alias in node.names)
    assert found == {module: set(names.split()) for module, names in IMPORTED.items()}


def test_the_lowest_release_is_that_of_the_requirements() -> None:
    setup = (PACKAGE.parent / "setup.cfg").read_text()
    lowest = re.search(r"transformers>=(\d+\.\d+)", setup)
    assert lowest is not None
    assert lowest[1] == TRIED[0]


# ---- A release that differs is refused ----


@cache
def release(change: tuple[str, str] = ("", "")) -> tuple[type, type]:
    """`Trainer` and `TrainerCallback` of transformers as it would be with every word `change[0]` spelt `change[1]`."""
    made = []
    for kind in (Trainer, TrainerCallback):
        source = inspect.getsource(sys.modules[kind.__module__])
        if change[0]:
            source = re.sub(rf"(?<!from \.)\b{change[0]}\b", change[1], source)  # a module may have that name
        module = types.ModuleType(f"{kind.__module__}_changed")
        module.__package__ = "transformers"
        sys.modules[module.__name__] = module
        try:
            exec(builtins.compile(source, f"{kind.__module__}.py", "exec"), module.__dict__)
        finally:
            del sys.modules[module.__name__]
        made.append(getattr(module, kind.__name__))
    return made[0], made[1]


def test_the_installed_release_fits() -> None:
    upstream.check()
    upstream.check(*release())


@pytest.mark.parametrize("name", [h.name for h in (*OVERRIDDEN, *CALLED) if f"def {h.name}(" in SOURCE])
def test_a_renamed_method_is_refused(name: str) -> None:
    renamed = release((name, f"{name}_renamed"))
    with pytest.raises(
        UpstreamError, match=f"Trainer has no {name} .*tried with transformers {TRIED[0]} to {TRIED[1]}"
    ):
        upstream.check(*renamed)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_renamed_moment_is_refused(moment: str) -> None:
    with pytest.raises(UpstreamError, match=f"Trainer doesn't call {moment} of its callbacks"):
        upstream.check(*release((moment, f"{moment}_renamed")))


@pytest.mark.parametrize("name", [name for owner, name in ATTRIBUTES if owner is Trainer])
def test_a_renamed_attribute_is_refused(name: str) -> None:
    with pytest.raises(UpstreamError, match=f"Trainer doesn't know {name}"):
        upstream.check(*release((name, f"{name}_renamed")))


def test_a_method_that_nobody_calls_any_more_is_refused() -> None:
    renamed, callback = release(("_save_checkpoint", "_write_checkpoint"))
    renamed = type("Trainer", (renamed,), {"_save_checkpoint": lambda self, model, trial: None})
    with pytest.raises(UpstreamError, match="Trainer doesn't call _save_checkpoint any more"):
        upstream.check(renamed, callback)


def test_other_parameters_are_refused() -> None:
    changed = type("Trainer", (Trainer,), {"_load_best_model": lambda self, model: None})
    with pytest.raises(UpstreamError, match=r"_load_best_model takes \(model\), not \(\)"):
        upstream.check(changed)


def test_everything_that_differs_is_named_at_once() -> None:
    changed = type("Trainer", (Trainer,), {"_load_best_model": lambda self, model: None, "log": lambda self: None})
    with pytest.raises(UpstreamError, match=r"_load_best_model takes .*; Trainer\.log takes"):
        upstream.check(changed)


def test_building_a_trainer_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise UpstreamError("doesn't fit")

    make_data(tmp_path)
    monkeypatch.setattr(upstream, "check", refuse)
    with pytest.raises(UpstreamError, match="doesn't fit"):
        make_trainer(tmp_path)


def test_attributes_of_other_classes_are_known_to_them() -> None:
    class Other:
        def prepare(self) -> Any:
            return self._prepared

    assert upstream._is_known(Other, "_prepared")
    assert not upstream._is_known(Other, "_is_accelerate_prepared")
    assert {owner.__name__ for owner, _ in ATTRIBUTES} == {
        "Trainer",
        "Accelerator",
        "TrainingArguments",
        "PreTrainedConfig",
    }
    assert transformers.__version__ == upstream.installed
