"""Checkpoints of other libraries: read without running any code of theirs, written as a folder of ours."""

import hashlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedModel

from ..files import make_readable, without_folders
from ..text import one_line

# Where a file keeps its weights, the first that is there. MMDetection's EMA hook puts the average under "state_dict".
WEIGHT_KEYS = ("state_dict", "model")
MOST_EXPANSION = 4  # times the file's size; tied weights, which lie in a file once, stay far below
COUNTER = "num_batches_tracked"  # of BatchNorm; nothing depends on it, and old checkpoints don't have it


class CheckpointError(ValueError):
    """A checkpoint that can't be read or converted; the message says why and what to do."""


class _Inert:
    """Stands for classes and functions that a file names beside its weights: takes anything, does nothing."""

    def __new__(cls, *_: object) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


# What training frameworks leave beside the weights: logs (MMEngine's message hub), NumPy numbers, arguments, paths.
# None of these is looked up or imported; each becomes an `_Inert`, also `getattr`, which thereby reads nothing.
STAND_INS = (
    "argparse.Namespace",
    "builtins.getattr",
    "mmengine.config.config.Config",
    "mmengine.config.config.ConfigDict",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "mmcv.utils.config.ConfigDict",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
)


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a file, as float32 on the CPU, and what stands beside them as plain Python values.

    Args:
        state: Name to tensor, without the prefix "module." of a parallel wrapper.
        meta: The file's `meta`, empty if it has none.
        source: Name of the file.
        sha256: Of the file's content.
    """

    state: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    sha256: str = ""


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a `.pth` or `.safetensors` file. Nothing in it is executed: it is read by `torch.load(weights_only=True)`.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is truncated, is no checkpoint, names code, or would fill the memory.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    content = _load_safetensors(path) if path.suffix == ".safetensors" else _load(path)
    state: Mapping[str, Any] = next(
        (content[key] for key in WEIGHT_KEYS if isinstance(content.get(key), Mapping)), content
    )
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"{path} holds no weights: there are no tensors under {' or '.join(map(repr, WEIGHT_KEYS))}, nor among its "
            f"own keys {list(content)[:8]}."
        )
    _demand_real_size(path, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    meta = content.get("meta")
    return Checkpoint(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()},
        dict(meta) if isinstance(meta, Mapping) else {},
        path.name,
        hashlib.sha256(path.read_bytes()).hexdigest(),
    )


def _load_safetensors(path: Path) -> dict[str, Any]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise _broken(path, error) from None


def _load(path: Path) -> dict[str, Any]:
    _demand_real_size(path, _unpacked_size(path))
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in STAND_INS]):  # type: ignore[list-item]
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)|(?:call reduce for|Can only (?:build|create)) (.+)", str(error))
        if code is None:
            raise _broken(path, error) from None
        raise CheckpointError(
            f"{path} was refused, and nothing in it was executed: beside weights it holds '{code[1] or code[2]}', "
            f"which loading would run. If you trust the file, open it where it was made and save its weights alone: "
            f'torch.save({{"state_dict": checkpoint["state_dict"]}}, path), and give --config.'
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, OSError) as error:
        raise _broken(path, error) from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; needed is a dict of tensors.")
    return dict(content)


def _unpacked_size(path: Path) -> int:
    """Bytes in the records of a zip archive; 0 if it's none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(record.file_size for record in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return 0


def _demand_real_size(path: Path, content: int) -> None:
    """Raise a CheckpointError if few bytes stand for many: compressed records, or tensors that repeat one value."""
    size = path.stat().st_size
    if content > MOST_EXPANSION * size:
        raise CheckpointError(
            f"{path} was refused: its {size:,} bytes stand for {content:,} bytes of weights, which no training writes. "
            "Save it anew where it was made, each tensor with clone(), and without compressing the file."
        )


def _broken(path: Path, error: Exception) -> CheckpointError:
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    return CheckpointError(
        f"{path} ({path.stat().st_size:,} bytes) is truncated or no PyTorch checkpoint: {reason[:200]}. Fetch it again."
    )


def load_exactly(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load weights such that every parameter and buffer gets one and none is left over.

    Raises:
        CheckpointError: Names the missing, the left over and the differently shaped ones.
    """
    needed = {name: tensor.shape for name, tensor in model.state_dict().items()}
    missing = [name for name in needed if name not in state and not name.endswith(COUNTER)]
    unknown = [name for name in state if name not in needed]
    shapes = [
        f"{name}: {tuple(state[name].shape)} in the checkpoint, {tuple(shape)} in the model"
        for name, shape in needed.items()
        if name in state and state[name].shape != shape
    ]
    faults = {"missing": missing, "without a place": unknown, "of another shape": shapes}
    if any(faults.values()):
        listed = "; ".join(f"{len(names)} {what}: {names[:5]}" for what, names in faults.items() if names)
        raise CheckpointError(f"The checkpoint does not fit {type(model).__name__}: {listed}.")
    model.load_state_dict(dict(state), strict=False)


@dataclass(frozen=True)
class Conversion:
    """A converted detector.

    Args:
        model: In evaluation mode, with `id2label` and `category_ids`.
        processor: Its image processor, for ordinary RGB images.
        recognised: What the checkpoint was found to be, for people to read and to check.
    """

    model: PreTrainedModel
    processor: BaseImageProcessor
    recognised: dict[str, str]

    def __str__(self) -> str:
        width = max(map(len, self.recognised))
        return "\n".join(f"{key:{width}s}  {one_line(str(value), None)}" for key, value in self.recognised.items())

    def save(self, folder: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Write safetensors, config, processor and `conversion.json` (what was recognised).

        Raises:
            FileExistsError: `folder` is not empty and `overwrite` is not set.
        """
        folder = Path(folder)
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not overwrite):
            raise FileExistsError(f"{folder} is there already and not empty: choose another folder, or set overwrite.")
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        (folder / "conversion.json").write_text(json.dumps(without_folders(self.recognised), indent=2) + "\n")
        make_readable(folder)
        return folder
