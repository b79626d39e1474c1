"""Random order and augmentation that depend on the seed, the epoch and the image alone.

Not on the number of processes, workers or images a batch, and not on where a run was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import BaseImageProcessor

from ..data.collators import DetectionCollator
from ..data.transforms import Record

_PRIMES = (1_000_003, 998_244_353, 2_147_483_647)  # keep the seeds of neighbouring runs, epochs and images apart


class RandomOrder(Sampler[int]):
    """The indices 0 to `length` - 1 in random order; another one for every epoch."""

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of `epoch` from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from torch.randperm(self.length, generator=generator).tolist()


class ReproducibleCollator(DetectionCollator):
    """A `DetectionCollator` whose transform starts from a seed of its own for every image, and every `copy` of it.

    Args:
        image_processor: As of `DetectionCollator`.
        transform: Draws from torch's global generator.
        seed: Of the run.
        num_classes: As of `DetectionCollator`.
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        transform: Callable[[Record], Record],
        seed: int,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(image_processor, transform, num_classes)
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change

    def set_epoch(self, epoch: int) -> None:
        """Draw the augmentation of `epoch` from now on."""
        self._epoch.fill_(epoch)

    def _record(self, example: Mapping[str, Any]) -> Record:
        seed = self.seed * _PRIMES[0] + int(self._epoch) * _PRIMES[1] + int(example["image_id"])
        seed += int(example.get("copy", 0)) * _PRIMES[2]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed % 2**63)
            return super()._record(example)
