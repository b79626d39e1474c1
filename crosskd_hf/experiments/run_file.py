"""A run as a file: what it was made of, to read, and to run again with `crosskd-hf train run.yaml`."""

from __future__ import annotations

import enum
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import yaml

from ..sources import near
from ..training.config import CrossKDConfig
from ..training.saving import RUN_FILE as NAME

NOTES = ("command", "versions")
_PACKAGES = ("crosskd_hf", "torch", "torchvision", "transformers", "timm", "accelerate", "datasets")
_OF_THE_MACHINE = ("hub_token", "local_rank", "deepspeed", "fsdp", "accelerator_config", "logging_dir", "run_name")


def write_run_file(
    folder: str | Path, run: Any, args: CrossKDConfig | Mapping[str, Any], command: str = "train"
) -> Path:
    """Write all settings that differ from the defaults of `CrossKDConfig`, those of the data and the models."""
    given = args.to_dict() if isinstance(args, CrossKDConfig) else args
    settings = {
        name: value
        for name, value in _plain(dict(given)).items()
        if name not in _OF_THE_MACHINE and (value != _DEFAULTS.get(name) or name in ("output_dir", "seed", "report_to"))
    }
    own = {entry.name: getattr(run, entry.name) for entry in fields(run)}
    own = {name: value for name, value in own.items() if value not in (None, [])}
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    path = Path(folder) / NAME
    content = {"command": command, **own, **settings, "versions": versions}
    path.write_text(yaml.safe_dump(_plain(content), sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def read_run_file(path: str | Path, known: list[str]) -> dict[str, Any]:
    """Settings from a YAML or JSON file.

    Args:
        path: The file.
        known: Names of options.

    Raises:
        ValueError: It holds no settings, or such as there are none of.
    """
    text = Path(path).read_text(encoding="utf-8")
    content = json.loads(text) if Path(path).suffix == ".json" else yaml.safe_load(text)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no settings: needed are lines such as 'num_train_epochs: 12'.")
    settings = {name: value for name, value in content.items() if name not in NOTES}
    for name in settings:
        if name not in known:
            raise ValueError(f"{path} has an unknown option {name!r}{near(str(name), known) or '.'}")
    return settings


def _default(entry: Field[Any]) -> Any:
    return None if entry.default_factory is MISSING else entry.default_factory()


def _plain(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(name): _plain(value) for name, value in content.items()}
    if isinstance(content, list | tuple | set):
        return [_plain(value) for value in content]
    if isinstance(content, enum.Enum):
        return content.value
    return content if isinstance(content, str | int | float | bool | None) else str(content)


_DEFAULTS = {
    entry.name: _plain(_default(entry) if entry.default is MISSING else entry.default)
    for entry in fields(CrossKDConfig)
}
