"""A run as a file: what it was made of, to read, and to run again with `crosskd-hf train run.yaml`.

Paths are absolute, so that the file works from any folder, and every setting that the recipe chose is written down, so
that a later recipe changes nothing.
"""

from __future__ import annotations

import enum
import importlib.metadata
import json
import subprocess
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import yaml

from ..sources import near
from ..training.config import CrossKDConfig
from ..training.saving import RUN_FILE as NAME
from .recipe import CHOSEN

NOTES = ("command", "commit", "versions")
_PACKAGES = ("crosskd_hf", "torch", "torchvision", "transformers", "timm", "accelerate", "datasets")
_PATHS = (
    "data", "train_images", "train_annotations", "val_images", "val_annotations", "student", "teacher",
    "backbone_weights",
)  # fmt: skip
_ALWAYS = {"output_dir", "seed", "teacher_eval", *CHOSEN}  # even where it is the default of `CrossKDConfig`
_OF_THE_MACHINE = (
    "hub_token",
    "local_rank",
    "deepspeed",
    "fsdp",
    "accelerator_config",
    "logging_dir",
    "run_name",
    "resume_from_checkpoint",
)


def write_run_file(
    folder: str | Path, run: Any, args: CrossKDConfig | Mapping[str, Any], command: str = "train"
) -> Path:
    """Write all settings that differ from the defaults of `CrossKDConfig` or that the recipe chose, data and models.

    Args:
        folder: To write into.
        run: Dataclass of data and models.
        args: The settings that were used.
        command: That runs it again.
    """
    given = args.to_dict() if isinstance(args, CrossKDConfig) else args
    settings = {
        name: value
        for name, value in _plain(dict(given)).items()
        if name not in _OF_THE_MACHINE and (value != _DEFAULTS.get(name) or name in _ALWAYS)
    }
    own = {entry.name: getattr(run, entry.name) for entry in fields(run)}
    own = {name: _resolved(name, value) for name, value in own.items() if value not in (None, [])}
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    path = Path(folder) / NAME
    content = {"command": command, **own, **settings, "commit": commit_of(Path(__file__).parent), "versions": versions}
    path.write_text(yaml.safe_dump(_plain(content), sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def commit_of(folder: Path) -> str:
    """The commit of the clone that a folder lies in; empty if it lies in none."""
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def read_run_file(path: str | Path, known: list[str], command: str = "train") -> dict[str, Any]:
    """Settings from a YAML or JSON file.

    Args:
        path: The file.
        known: Names of options.
        command: That reads it.

    Raises:
        ValueError: It holds no settings, or such as there are none of.
    """
    text = Path(path).read_text(encoding="utf-8")
    content = json.loads(text) if Path(path).suffix == ".json" else yaml.safe_load(text)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no settings: needed are lines such as 'num_train_epochs: 12'.")
    if content.get("command", command) != command:
        raise ValueError(f"{path} is of another command: crosskd-hf {content['command']} {path} runs it again.")
    settings = {name: value for name, value in content.items() if name not in NOTES}
    for name in settings:
        if name not in known:
            raise ValueError(f"{path} has an unknown option {name!r}{near(str(name), known) or '.'}")
    return settings


def _default(entry: Field[Any]) -> Any:
    return None if entry.default_factory is MISSING else entry.default_factory()


def _resolved(name: str, value: Any) -> Any:
    """Paths that are there, from the root on; ids of the Hub and names of new models stay."""
    if isinstance(value, list | tuple):
        return [_resolved(name, entry) for entry in value]
    there = name in _PATHS and isinstance(value, str) and Path(value).expanduser().exists()
    return str(Path(value).expanduser().absolute()) if there else value


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
