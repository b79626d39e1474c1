"""Batches of images with like orientation, which need less padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


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
        order = torch.randperm(len(self), generator=generator)
        runs, rest = [], []
        for group in (order[self.portrait[order]], order[~self.portrait[order]]):
            full = len(group) // self.batch_size * self.batch_size
            runs += list(group[:full].split(self.batch_size)) if full else []
            rest.append(group[full:])
        mixed = torch.cat(rest)
        for run in torch.randperm(len(runs), generator=generator).tolist():
            yield from runs[run].tolist()
        yield from mixed.tolist()
