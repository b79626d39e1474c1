"""What a package imports only when somebody asks for it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec


def from_modules(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose public names are imported from their modules on first use (PEP 562).

    Args:
        package: Its full name.
        modules: For each public name the module that defines it, relative to the package.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(modules[name], package), name)

    return get


def import_after(name: str, dependent: str) -> None:
    """Import the module `dependent` as soon as `name` is imported: now, if it already is."""
    if name in sys.modules:
        importlib.import_module(dependent)
    else:
        sys.meta_path.insert(0, _Follower(name, dependent))


class _Follower:
    """Lets the usual finders find a module, and imports another one after it.

    A finder of `sys.meta_path` without the base class in `importlib.abc`, whose import would take half the time of a
    `crosskd-hf --help`.
    """

    def __init__(self, name: str, dependent: str) -> None:
        self.name, self.dependent = name, dependent

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec of the awaited module with a loader that goes on to the dependent one; None for all others."""
        if name != self.name:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((each for each in specs if each is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(self._execute, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec

    def _execute(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        execute(module)
        if self in sys.meta_path:  # a spec may be asked for and never used
            sys.meta_path.remove(self)
            importlib.import_module(self.dependent)
