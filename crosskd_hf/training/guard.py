"""Watches an update for values that aren't finite, at the price of one device synchronisation per update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor

_MOST_SAVED = 5  # batches of skipped updates; a run that goes on must not fill the disk


class NonFiniteLossError(RuntimeError):
    """A term of the loss, or the gradient, is NaN or infinite."""


class _Watched(NamedTuple):
    names: list[str]
    values: Tensor  # (number of parts,)
    inputs: Mapping[str, Any]


class NonFiniteGuard:
    """Collects the loss parts of the micro-batches of one update and judges them together.

    Args:
        folder: Where the batches of a bad update are saved, `step-N-rank-R.pt` (`torch.load(..., weights_only=True)`).
        rank: Number of this process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self.rank = rank
        self.skipped = 0
        self._watched: list[_Watched] = []
        self._bad: list[Tensor] = []

    def __len__(self) -> int:
        """Micro-batches of the present update that were noted."""
        return len(self._watched)

    def clear(self) -> None:
        """Forget the present update."""
        self._watched.clear()
        self._bad.clear()

    def watch(self, parts: Mapping[str, Tensor], inputs: Mapping[str, Any], bad: Tensor) -> None:
        """Note one micro-batch.

        Args:
            parts: Scalars by name, as this process computed them.
            inputs: The batch that they come from.
            bad: Scalar, above 0 if a part of any process is not finite; equal on all processes.
        """
        values = torch.stack([value.detach().float() for value in parts.values()])
        self._watched.append(_Watched(list(parts), values, inputs))
        self._bad.append(bad)

    def triggered(self, gradient_norm: Tensor | float | None) -> bool:
        """Whether the update is bad, the same answer on every process.

        Args:
            gradient_norm: Judged too; None to leave it out (a gradient scaler has its own way with infinite gradients).
        """
        bad = torch.stack(self._bad).ne(0).any() if self._bad else torch.tensor(False)
        if gradient_norm is not None:
            norm = torch.as_tensor(gradient_norm)
            bad = bad.to(norm.device) | ~torch.isfinite(norm)
        return bool(bad)

    def report(self, step: int, gradient_norm: Tensor | float | None) -> str:
        """Save the update's batches and say what is wrong. Every process must call it (it gathers).

        Args:
            step: Number of the update, starting with 1.
            gradient_norm: Of the update, for the message.
        """
        saved = self._save(step) if self.skipped < _MOST_SAVED else ""
        findings = [_finding(watched, self.rank) for watched in self._watched]
        findings = gather_object([finding for finding in findings if finding])
        if not findings:
            ids = [i for watched in self._watched for i in image_ids(watched.inputs)]
            findings = gather_object([f"every part is finite, image ids {ids} on process {self.rank}"])
            findings.insert(0, f"the gradient norm is {float(gradient_norm if gradient_norm is not None else 'nan')}")
        return f"Update {step} is not finite: {'; '.join(findings)}.{saved}"

    def _save(self, step: int) -> str:
        """What became of saving the batches; no failure may hide what is wrong, or keep other processes waiting."""
        path = self.folder / f"step-{step}-rank-{self.rank}.pt"
        batches = [
            {"inputs": _plain(w.inputs), "losses": dict(zip(w.names, w.values.tolist(), strict=True))}
            for w in self._watched
        ]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save(batches, path)
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
            return f" The batch could not be saved in {path} ({error})."
        return f" The batch is saved in {path}."


def image_ids(inputs: Mapping[str, Any]) -> list[int]:
    """The image ids of a batch, one an image, as far as its labels have them."""
    return [int(label["image_id"]) for label in inputs.get("labels", ()) if "image_id" in label]


def _finding(watched: _Watched, rank: int) -> str | None:
    pairs = zip(watched.names, watched.values.tolist(), strict=True)
    wrong = [f"{name} = {value}" for name, value in pairs if value - value != 0]
    if not wrong:
        return None
    return f"{', '.join(wrong)} for image ids {image_ids(watched.inputs)} on process {rank}"


def _plain(value: Any) -> Any:
    """`value` on the CPU, of plain dicts, lists and tensors, so that it loads without executing code."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
