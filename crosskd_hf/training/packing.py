"""The labels of a batch go to the device in one copy: seven tensors an image would be as many copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class PackedLabels(list[dict[str, Any]]):
    """Labels of the images of a batch. The data loader pins them, and accelerate moves them, by the methods below."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedLabels:
        """The same labels on `device`; these if they are there."""
        tensors = [value for label in self for value in label.values() if isinstance(value, Tensor)]
        if all(tensor.device == torch.empty(0, device=device).device for tensor in tensors):
            return self
        return self._through(lambda packed: packed.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedLabels:
        """The same labels in one piece of pinned memory."""
        return self._through(lambda packed: packed.pin_memory())

    def _through(self, change: Callable[[Tensor], Tensor]) -> PackedLabels:
        """The labels with what `change` made of the bytes of all their tensors, (n,) uint8."""
        places = [(row, name, value) for row, label in enumerate(self) for name, value in label.items()]
        places = [place for place in places if isinstance(place[2], Tensor)]
        places.sort(key=lambda place: -place[2].element_size())  # each begins at a multiple of its elements' size
        if not places:
            return self
        packed = torch.cat([tensor.contiguous().reshape(-1).view(torch.uint8) for _, _, tensor in places])
        pieces = change(packed).split([tensor.numel() * tensor.element_size() for _, _, tensor in places])
        labels = PackedLabels(dict(label) for label in self)
        for (row, name, tensor), piece in zip(places, pieces, strict=True):
            labels[row][name] = piece.view(tensor.dtype).view(tensor.shape)
        return labels


class Packing:
    """A collator whose labels are :class:`PackedLabels`.

    Args:
        collator: Makes batches; without a list of labels they stay as they are.
    """

    def __init__(self, collator: Callable[[Sequence[Any]], Any]) -> None:
        self.collator = collator

    def __call__(self, examples: Sequence[Any]) -> Any:
        """The collator's batch."""
        batch = self.collator(examples)
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if isinstance(labels, list) and all(isinstance(label, Mapping) for label in labels):
            return {**batch, "labels": PackedLabels(dict(label) for label in labels)}
        return batch
