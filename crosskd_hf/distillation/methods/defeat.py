"""DeFeat: features of objects and of the background are imitated apart from each other (CVPR 2021)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...models.losses import LossPart
from ..adapters import Mixer
from ..method import Paper, option
from ..passes import Batch, DetectorView, Needs, Pair, Pass
from ..regions import cells_of_boxes, centers, inside_boxes, levels_of_boxes
from .imitation import LD_CODE, Form, Imitation, ImitationConfig, on_positive_levels, quotients

AUTHORS = "ggjy/DeFeat.pytorch"
PUBLISHED: dict[str, dict[str, Any]] = {
    "original": {"weight": 1.0, "adapter": True, "terms": {"foreground": 3.0, "background": 12.0}},
    "ld": {"weight": 2.0, "terms": {"foreground": 1.0, "background": 2.0}},
}


class DeFeatMethod(Imitation):
    """See :class:`DeFeat`."""

    name = "defeat"
    terms = ("foreground", "background")
    paper = Paper("Distilling Object Detectors via Decoupled Features", "CVPR 2021", "https://arxiv.org/abs/2103.14475")
    families = "all; positive_levels needs a detector whose locations are assigned to objects"

    def __init__(self, config: "DeFeat", student: DetectorView, teacher: DetectorView):
        super().__init__(config, student, teacher)
        # the original halves its squares and averages the levels
        self.share = 1.0 if config.preset == "ld" else 0.5 / len(student.strides)

    def make_adapter(self, source: int, target: int) -> nn.Module:
        """A 3x3 convolution; in LD's form, between different widths, a 1x1 one."""
        ld = self.config.preset == "ld"
        return super().make_adapter(source, target) if ld else Mixer(source, target, rectified=False)

    @property
    def wanted(self) -> Needs:
        if self.config.positive_levels:
            return frozenset({"assignment"})
        return frozenset({"priors"} if self.config.preset == "ld" else ())

    @torch.no_grad()
    def regions(self, student: Pass, teacher: Pass, batch: Batch) -> list[Tensor]:
        """Cells of the boxes of each level; in LD's form the locations inside of any box on every level."""
        features, targets = student.features, batch.targets
        if self.config.preset == "ld":
            shapes = [values.shape[-2:] for _, values in features]
            points = [inside_boxes(centers(feature, student), targets) for feature in features]
            return [inside.unflatten(1, shape).float() for inside, shape in zip(points, shapes, strict=True)]
        level = levels_of_boxes(targets, len(features))
        single = bool(self.config.single_cell)
        found = []
        for index, feature in enumerate(features):
            rows, columns = cells_of_boxes(feature, targets, single)
            there = (rows & (level == index)[..., None]).float()  # (B, G, H)
            found.append((there.mT @ columns.float() > 0).float())
        return found

    def forward(self, student: Pass, teacher: Pass, batch: Batch) -> dict[str, LossPart]:
        """One quotient for each level, of the objects' cells and of all others."""
        distances, inside = self.distances(student, teacher), self.regions(student, teacher, batch)
        outside = [1 - region for region in inside]
        if self.config.positive_levels:
            inside, outside = on_positive_levels(inside, student), on_positive_levels(outside, student)
        parts = {"foreground": quotients(distances, inside), "background": quotients(distances, outside)}
        return {name: part._replace(total=self.share * part.total) for name, part in parts.items()}


@dataclass(frozen=True)
class DeFeat(ImitationConfig):
    """Squared distance of features, mean over the cells of objects and mean over those of the background.

    The distillation of regions' class scores in the paper is not part of it; `kd` compares class scores.

    Args:
        preset: "original" is the authors' code, where a box has cells on one level by its size; "ld" the form of LD's
            comparison, where it has cells on all. Options that are None are filled in by it.
        weight: Factor on the whole method.
        adapter: A trainable 3x3 convolution that begins close to zero on each of the student's maps. The form "ld" has
            none, between different widths a 1x1 one.
        single_cell: Whether a box that is thinner than a cell marks one cell however long it is, as in the authors'
            code, instead of a row of cells.
        positive_levels: Whether levels without any positive of the student stay out, as in LD's code. Where a batch is
            split, such levels may differ from part to part.

    Raises:
        ValueError:
            "adapter=False, but the student's features are": Features of different widths need an adapter.
    """

    method = DeFeatMethod
    published_numbers = PUBLISHED

    weight: float | None = option(None, "Factor on the whole method.", f"{AUTHORS}; {LD_CODE}", least=0)
    preset: Form = option("original", "Whose form of the method.")
    single_cell: bool | None = option(None, "A thin box marks one cell, however long it is.", AUTHORS)
    positive_levels: bool | None = option(None, "Levels without any positive stay out.", LD_CODE)

    def defaults(self, pair: Pair) -> dict[str, Any]:
        """By the preset."""
        single = {"single_cell": False} if self.preset == "original" else {}
        return super().defaults(pair) | PUBLISHED[self.preset] | single | self.gate(pair)
