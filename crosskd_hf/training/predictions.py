"""Outputs of an evaluation, kept for a user's `compute_metrics`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from accelerate.utils import gather_object
from transformers.trainer_pt_utils import nested_detach, nested_numpify

Kept: TypeAlias = tuple[Any, list[Any]]
"""One batch: its outputs as arrays (a tuple, unless preprocessing made something else), and its images' labels."""


class KeptPredictions:
    """The outputs and labels of this process's batches, on the CPU.

    Args:
        preprocess: Shrinks outputs, from (outputs, labels) of a batch; None keeps them as they are.
    """

    def __init__(self, preprocess: Callable[[Any, Any], Any] | None = None) -> None:
        self.preprocess = preprocess
        self._batches: list[list[Kept]] = []

    def begin_batch(self) -> None:
        """The next parts belong to another batch of the data loader."""
        self._batches.append([])

    def add(self, outputs: Mapping[str, Any], labels: Sequence[Any], ignored: Sequence[str] = ()) -> None:
        """Keep a part of a batch: images that went through the model together.

        Args:
            outputs: What the model returned; its `loss` and what is `ignored` are left out, as `Trainer` does.
            labels: One dict an image.
            ignored: Names of outputs.
        """
        kept = nested_detach(tuple(value for name, value in outputs.items() if name not in {"loss", *ignored}))
        if self.preprocess is not None:
            kept = self.preprocess(kept, labels)
        self._batches[-1].append((nested_numpify(kept), [nested_numpify(dict(label)) for label in labels]))

    def gathered(self, images: int) -> list[Kept]:
        """The parts of all processes in the order of the data. Every process must call it.

        Args:
            images: In the data set; what samplers repeat to fill up the last batches is cut off.
        """
        per_process = gather_object([self._batches])
        rounds = [part for batches in zip(*per_process, strict=True) for batch in batches for part in batch]
        whole = []
        for predictions, labels in rounds:
            count, size = min(images, len(labels)), len(labels)
            images -= count
            if count > 0:
                whole.append((_first(predictions, count, size), labels[:count]))
        return whole


def _first(value: Any, count: int, size: int) -> Any:
    """The first `count` of `size` images in arrays, wherever these lie in `value`."""
    if count == size:
        return value
    if isinstance(value, Mapping):
        return {name: _first(item, count, size) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_first(item, count, size) for item in value)
    return value[:count] if getattr(value, "ndim", 0) and len(value) == size else value
