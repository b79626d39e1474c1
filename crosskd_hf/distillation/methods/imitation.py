"""What methods of feature imitation share: the squared distance of both models' features over a region of each map."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...models.losses import LossPart
from ..adapters import adapter
from ..method import Method, MethodConfig, option
from ..passes import Batch, DetectorView, Pass, same_size


@dataclass(frozen=True)
class ImitationConfig(MethodConfig):
    """Options of every method of feature imitation.

    Args:
        adapter: A trainable 1x1 convolution on each of the student's maps. False compares the maps as they are, which
            needs equal widths.

    Raises:
        ValueError:
            "adapter=False, but the student's features are": Features of different widths need an adapter.
    """

    adapter: bool = option(True, "A trainable 1x1 convolution on each of the student's maps.")


class Imitation(Method):
    """Mean squared error of the student's adapted features, over a region of each level. The levels are added up."""

    def __init__(self, config: Any, student: DetectorView, teacher: DetectorView):
        super().__init__(config, student, teacher)
        pairs = list(zip(student.channels, teacher.channels, strict=True))
        differing = [pair for pair in pairs if pair[0] != pair[1]]
        if not config.adapter and differing:
            raise ValueError(
                f"{self.name}: adapter=False, but the student's features are {differing[0][0]} wide and the teacher's "
                f"{differing[0][1]}. Leave adapter=True."
            )
        self.adapters = nn.ModuleList(adapter(*pair, always=config.adapter) for pair in pairs)

    def region(self, level: int, student: Pass, teacher: Pass, batch: Batch) -> Tensor | None:
        """(B, H, W) in [0, 1]: where the student imitates the teacher's map of a level. None: everywhere."""
        return None

    def forward(self, student: Pass, teacher: Pass, batch: Batch) -> dict[str, LossPart]:
        """One quotient for each level: squared distances in the region over its cells times channels."""
        totals, counts = [], []
        for level, (own, target) in enumerate(zip(student.features, teacher.features, strict=True)):
            goal = target.values.detach().float()
            distance = (self.adapters[level](same_size(own.values, goal)).float() - goal).square().mean(1)  # (B, H, W)
            region = self.region(level, student, teacher, batch)
            totals.append(distance.sum() if region is None else (distance * region).sum())
            counts.append(distance.new_tensor(float(distance.numel())) if region is None else region.sum())
        return {"features": LossPart(torch.stack(totals), torch.stack(counts))}
