"""What methods of feature imitation share: the squared distance of both models' features over a region of each map."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...models.losses import LossPart
from ..adapters import adapter
from ..method import Method, MethodConfig, Paper, option
from ..passes import Batch, DetectorView, Needs, Pair, Pass, same_size
from ..regions import positives

LD = Paper("Localization Distillation for Dense Object Detection", "CVPR 2022", "https://arxiv.org/abs/2102.12252")
LD_CODE = "HikariTJU/LD"
Form = Literal["original", "ld"]


@dataclass(frozen=True)
class ImitationConfig(MethodConfig):
    """Options of every method of feature imitation. A child has a default of `weight`, or none if it has presets.

    Args:
        adapter: A trainable convolution on each of the student's maps. False compares the maps as they are, which needs
            equal widths.

    Raises:
        ValueError:
            "adapter=False, but the student's features are": Features of different widths need an adapter.
    """

    adapter: bool | None = option(None, "A trainable convolution on each of the student's maps.")

    def defaults(self, pair: Pair) -> dict[str, Any]:
        """Without an adapter, but between different widths, as in LD's comparison."""
        known = super().defaults(pair)
        return known | {"adapter": pair.student.channels != pair.teacher.channels}

    def gate(self, pair: Pair) -> dict[str, Any]:
        """The default of `positive_levels`, where the student assigns its locations to objects."""
        return {"positive_levels": False} if "assignment" in pair.student.offers else {}


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
        self.adapters = nn.ModuleList(self.make_adapter(*pair) if config.adapter else nn.Identity() for pair in pairs)
        self._student_needs = self.needs | (self.wanted & student.offers)

    def make_adapter(self, source: int, target: int) -> nn.Module:
        """A trainable adapter from the student's channels to the teacher's."""
        return adapter(source, target, always=True)

    @property
    def wanted(self) -> Needs:
        """What the student's pass holds if its detector has it."""
        return frozenset()

    @property
    def student_needs(self) -> Needs:
        return self._student_needs

    @property
    def teacher_needs(self) -> Needs:
        return frozenset({"features"})

    def regions(self, student: Pass, teacher: Pass, batch: Batch) -> Sequence[Tensor | None]:
        """(B, H, W) of each level, in [0, 1]: where the student imitates the teacher's map. None: everywhere."""
        return [None] * len(student.features)

    def distances(self, student: Pass, teacher: Pass) -> list[Tensor]:
        """(B, H, W) of each level: squared distance, mean over channels (FitNets, ICLR 2015, eq. 3)."""
        found = []
        for layer, own, target in zip(self.adapters, student.features, teacher.features, strict=True):
            wanted = target.values.detach().float()
            found.append((layer(same_size(own.values, wanted)).float() - wanted).square().mean(1))
        return found

    def forward(self, student: Pass, teacher: Pass, batch: Batch) -> dict[str, LossPart]:
        """One quotient for each level: squared distances in the region over its cells times channels."""
        regions = self.regions(student, teacher, batch)
        return {"features": quotients(self.distances(student, teacher), regions)}


def quotients(distances: Sequence[Tensor], regions: Sequence[Tensor | None]) -> LossPart:
    """Of each level the distances (B, H, W) inside of its region, and the size of the region."""
    totals, counts = [], []
    for distance, region in zip(distances, regions, strict=True):
        totals.append(distance.sum() if region is None else (distance * region).sum())
        counts.append(distance.new_full((), distance.numel()) if region is None else region.sum())
    return LossPart(torch.stack(totals), torch.stack(counts))


def on_positive_levels(regions: Sequence[Tensor], student: Pass) -> list[Tensor]:
    """The regions of those levels on which some location of the batch is assigned to an object; the others empty."""
    levels = zip(regions, student.features, strict=True)
    return [region * positives(feature, student).any() for region, feature in levels]
