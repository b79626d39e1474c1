"""What a student was distilled from: `distillation.json` beside its weights."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import PreTrainedModel

from ..files import without_folders
from . import upstream

logger = logging.getLogger(__name__)

FILE = "distillation.json"
_PACKAGES = ("crosskd_hf", "torch", "transformers", "accelerate", "timm")


def weight_hash(model: nn.Module) -> str:
    """SHA-256 over the state dict in the order of names: name, dtype, shape and bytes of every tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def describe(teacher: PreTrainedModel, teacher_hash: str, distillation: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `distillation.json`.

    Args:
        teacher: The frozen teacher. Its Hub id is named; one from a folder is known by its hash alone.
        teacher_hash: Its :func:`weight_hash`.
        distillation: `Distiller.describe()`.
    """
    return {
        "teacher": {
            "class": type(teacher).__name__,
            "name_or_path": _public_name(teacher),
            "revision": upstream.commit_of(teacher.config),
            "sha256": teacher_hash,
        },
        "distillation": dict(distillation),
        "versions": {package: _version(package) for package in _PACKAGES},
    }


def hub_id(content: Mapping[str, Any] | None) -> str | None:
    """The Hub id of the teacher that `content` describes, or None if it is of local origin, or there is none."""
    return None if content is None else content["teacher"]["name_or_path"]


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `distillation.json` into `folder`."""
    text = json.dumps(without_folders(content), indent=2, sort_keys=True)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def hide_base(folder: Path, student: PreTrainedModel) -> None:
    """Take the folder of the student that peft adapts out of what peft wrote into `folder`; a Hub id stays."""
    (folder / "README.md").unlink(missing_ok=True)  # peft's own card
    for path in folder.rglob("adapter_config.json"):
        content = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": _public_name(student)}
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_same_teacher(folder: Path, teacher_hash: str | None) -> None:
    """Refuse to resume a distillation with another teacher than the one it began with.

    Args:
        folder: The checkpoint.
        teacher_hash: Of the present teacher; None without one.

    Raises:
        ValueError: the hashes differ, or only one of the two runs has a teacher.
    """
    path = folder / FILE
    saved = json.loads(path.read_text(encoding="utf-8"))["teacher"] if path.is_file() else None
    saved_hash = saved["sha256"] if saved else None
    if saved_hash == teacher_hash:
        return
    was = f"the teacher {saved['name_or_path'] or saved['class']!r} (sha256 {saved_hash})" if saved else "no teacher"
    now = f"a teacher with sha256 {teacher_hash}" if teacher_hash else "no teacher"
    raise ValueError(
        f"{folder} was written by a run with {was}, but this run has {now}. Give the same teacher weights to "
        "resume, or start a new run from the checkpoint: load it with from_pretrained and call train() "
        "without resume_from_checkpoint."
    )


def warn_of_changes(folder: Path, content: Mapping[str, Any] | None) -> None:
    """Warn if a resumed distillation has other settings than the checkpoint's.

    Args:
        folder: The checkpoint.
        content: As of :func:`describe`, for the present run; None without a teacher.
    """
    if content is None:
        return
    saved = json.loads((folder / FILE).read_text(encoding="utf-8"))["distillation"]
    if not isinstance(saved["methods"], dict):
        logger.warning("%s was written by an earlier version, whose settings of distillation aren't compared.", folder)
        return
    now, then = dict(_leaves(json.loads(json.dumps(content["distillation"])))), dict(_leaves(saved))
    changed = sorted(key for key in {*now, *then} if now.get(key) != then.get(key))
    if changed:
        told = "; ".join(f"{key}: {then.get(key)} -> {now.get(key)}" for key in changed)
        logger.warning("The distillation goes on with other settings than %s had: %s", folder, told)


def _public_name(model: PreTrainedModel) -> str | None:
    """The Hub id that a model was loaded by; None for a folder, whose name is nobody else's business."""
    name = model.config.name_or_path
    try:
        validate_repo_id(name)
    except ValueError:
        return None
    return None if Path(name).exists() else str(name)


def _leaves(content: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no mapping, by its keys joined with dots."""
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
