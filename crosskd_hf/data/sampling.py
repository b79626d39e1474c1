"""Batches of images with like orientation, which need less padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch.utils.data import Sampler


def batches_of_one_orientation(
    order: Iterable[int], is_portrait: Callable[[int], bool], batch_size: int
) -> Iterator[list[int]]:
    """Indices in batches that are all portrait, or all landscape and square, as MMDetection makes them.

    A batch comes as soon as it is full. What is left at the end of the two kinds is put together, portraits first, and
    the last of these batches may be smaller.
    """
    buckets: tuple[list[int], list[int]] = ([], [])
    for index in order:
        bucket = buckets[not is_portrait(index)]
        bucket.append(index)
        if len(bucket) == batch_size:
            yield list(bucket)
            bucket.clear()
    rest = [*buckets[0], *buckets[1]]
    for start in range(0, len(rest), batch_size):
        yield rest[start : start + batch_size]


class ByShape(Sampler[int]):
    """All indices, from the widest image to the highest: those that are padded alike come together.

    Args:
        widths, heights: of every image of the data set, in px.
    """

    def __init__(self, widths: Sequence[int], heights: Sequence[int]):
        shape = torch.tensor(list(heights[:])) / torch.tensor(list(widths[:]))
        self.order: list[int] = shape.argsort(stable=True).tolist()

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)


class AspectRatioSampler(Sampler[int]):
    """Random order of indices in which every run of `batch_size` is all landscape (square included) or all portrait.

    It is a sampler of indices, so it fits `Trainer._get_train_sampler` and any `DataLoader`; every index comes exactly
    once an epoch. Images left over from the two groups share the last batches. All processes draw the same order.

    Args:
        widths, heights: of every image of the data set, in px: `dataset["width"]`, `dataset["height"]`.
        batch_size: length of a run; the batch size of a process, or a multiple of it (times processes and accumulation
            steps: then the order doesn't depend on how the total batch is split).
        seed: of the order; `set_epoch` draws another one for every epoch.
    """

    def __init__(self, widths: Sequence[int], heights: Sequence[int], batch_size: int, seed: int = 0):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if len(widths) != len(heights):
            raise ValueError(f"got {len(widths)} widths and {len(heights)} heights; give one of each per image")
        self.portrait = torch.tensor(list(heights[:])) > torch.tensor(
            list(widths[:])
        )  # [:] reads a data set's column at once
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of `epoch` from now on (accelerate's loaders call it)."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.portrait)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self), generator=generator).tolist()
        portrait = self.portrait.tolist()
        for batch in batches_of_one_orientation(order, portrait.__getitem__, self.batch_size):
            yield from batch
