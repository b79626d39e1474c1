"""Fine-grained feature imitation: features at the anchors that overlap an object about as well as the best one."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...models.boxes import pairwise_iou, row_of
from ...models.losses import LossPart
from ..adapters import Mixer
from ..method import Paper, option
from ..passes import Batch, DetectorView, Needs, Pair, Pass
from ..regions import anchors, by_locations, in_images, levels_of_boxes
from .imitation import LD_CODE, Imitation, ImitationConfig, on_positive_levels, quotients

AUTHORS = "twangnh/Distilling-Object-Detectors"
PORT = "ggjy/DeFeat.pytorch"
PUBLISHED: dict[str, dict[str, Any]] = {
    "original": {
        "weight": 0.01,
        "adapter": True,
        "start": 400,
        "normalizer": "locations",
        "one_level": False,
        "inclusive": True,
        "mask_padding": False,
    },
    "fpn": {
        "weight": 3.0,
        "adapter": True,
        "start": 0,
        "normalizer": "elements",
        "one_level": True,
        "inclusive": False,
        "mask_padding": False,
    },
    "ld": {
        "weight": 2.0,
        "start": 0,
        "normalizer": "elements",
        "one_level": False,
        "inclusive": False,
        "mask_padding": True,
    },
}


class FineGrainedMethod(Imitation):
    """See :class:`FineGrained`."""

    name = "fine_grained"
    paper = Paper(
        "Distilling Object Detectors with Fine-Grained Feature Imitation",
        "CVPR 2019",
        "https://arxiv.org/abs/1906.03609",
    )
    families = "all; detectors without anchors get squares of 8 strides"

    def __init__(self, config: "FineGrained", student: DetectorView, teacher: DetectorView):
        super().__init__(config, student, teacher)
        # the original halves its squares; its port averages the levels too
        self.share = {"original": 0.5, "fpn": 0.5 / len(student.strides), "ld": 1.0}[config.preset]

    def make_adapter(self, source: int, target: int) -> nn.Module:
        """A 3x3 convolution, in the original with a ReLU; in LD's form, between different widths, a 1x1 one."""
        preset = self.config.preset
        return super().make_adapter(source, target) if preset == "ld" else Mixer(source, target, preset == "original")

    def check_length(self, updates: int) -> None:
        if self.config.start >= updates:
            raise ValueError(
                f"fine_grained: start={self.config.start}, but the run has {updates} updates: the loss would be zero "
                "throughout. Train longer, or give a smaller start; start=0 counts from the first update."
            )

    @property
    def wanted(self) -> Needs:
        return frozenset({"assignment" if self.config.positive_levels else "priors"})

    @torch.no_grad()
    def regions(self, student: Pass, teacher: Pass, batch: Batch) -> list[Tensor]:
        """Locations with an anchor whose IoU with some box is above `threshold` times the box's largest."""
        config, targets = self.config, batch.targets
        priors, rows = anchors(student)
        outer = row_of((0, 0, 1, 1), priors.boxes) * config.inclusive
        overlap = pairwise_iou(targets.boxes + outer, priors.boxes + outer)  # (B, G, N)
        if config.mask_padding:
            overlap *= in_images(priors, batch)[:, None]
        if config.one_level:
            level = torch.full_like(priors.strides, -1)
            for index, feature in enumerate(student.features):
                level[rows[feature.stride]] = index
            overlap *= levels_of_boxes(targets, len(student.features))[..., None] == level
        near = (overlap > config.threshold * overlap.amax(-1, keepdim=True)) & targets.mask[..., None]
        regions = by_locations(near.any(1), student.features, rows)
        return on_positive_levels(regions, student) if config.positive_levels else regions

    def forward(self, student: Pass, teacher: Pass, batch: Batch) -> dict[str, LossPart]:
        """One quotient for each level; zero before the update `start`."""
        distances = self.distances(student, teacher)
        part = quotients(distances, self.regions(student, teacher, batch))
        share = self.share * (batch.update >= self.config.start)
        if self.config.normalizer == "locations":
            share *= teacher.features[0].values.shape[1]
        return {"features": part._replace(total=share * part.total)}


@dataclass(frozen=True)
class FineGrained(ImitationConfig):
    """Squared distance of features near objects, which the student's own anchors point out.

    Args:
        preset: "original" is the authors' code for one map, "fpn" its port for pyramids in DeFeat's code, "ld" the form
            of LD's comparison. Options that are None are filled in by it.
        weight: Factor on the whole method.
        adapter: A trainable 3x3 convolution that begins close to zero on each of the student's maps; in the original
            with a ReLU. The form "ld" has none, between different widths a 1x1 one.
        start: The loss is zero before this update of the run. A run that ends before it is refused.
        threshold: An anchor is near a box if their IoU is above so much of the box's largest IoU with any anchor.
        normalizer: Sums of squares are divided by the "locations" of the region, or by their "elements", channels too.
        one_level: Each box has anchors on one level alone, by its size.
        inclusive: Boxes include the pixels of their right and bottom ends.
        mask_padding: Whether anchors stay out of padding that other images of the batch bring.
        positive_levels: Whether levels without any positive of the student stay out, as in LD's code. Where a batch is
            split, such levels may differ from part to part.

    Raises:
        ValueError:
            "adapter=False, but the student's features are": Features of different widths need an adapter.
            "the loss would be zero throughout": The run ends before `start`.
    """

    method = FineGrainedMethod
    published_numbers = PUBLISHED

    weight: float | None = option(None, "Factor on the whole method.", f"{AUTHORS}; {PORT}; {LD_CODE}", least=0)
    preset: Literal["original", "fpn", "ld"] = option("original", "Whose form of the method.")
    start: int | None = option(None, "Updates of the run before the loss counts.", AUTHORS, least=0)
    threshold: float = option(0.5, "Share of a box's largest IoU.", "paper, section 3.2", least=0, most=0.999)
    normalizer: Literal["locations", "elements"] | None = option(None, "What sums are divided by.", AUTHORS)
    one_level: bool | None = option(None, "Each box has anchors on one level, by its size.", PORT)
    inclusive: bool | None = option(None, "Boxes include their last pixels.", AUTHORS)
    mask_padding: bool | None = option(None, "Anchors in the padding stay out.", LD_CODE)
    positive_levels: bool | None = option(None, "Levels without any positive stay out.", LD_CODE)

    def defaults(self, pair: Pair) -> dict[str, Any]:
        """By the preset."""
        return super().defaults(pair) | PUBLISHED[self.preset] | self.gate(pair)
