"""PKD: features mimic features up to scale and offset of each channel (NeurIPS 2022)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...models.losses import LossPart
from ..adapters import adapter
from ..method import Method, MethodConfig, Paper, option
from ..passes import Batch, Cut, DetectorView, Needs, Pair, Pass, SplitHead, same_size
from ..statistics import Statistics, standardise

Location = Literal["neck", "cls", "reg", "cls+reg"]
AUTHORS = "configurations of the authors' code (jbwang1997/CrossKD)"
# The weight beside CrossKD by the teacher's kind of model; between kinds nothing is published.
WEIGHTS = {"crosskd_gfl": 6.0, "crosskd_faster_rcnn": 6.0, "crosskd_retinanet": 2.0, "crosskd_fcos": 2.0}
WEIGHTS |= {"crosskd_atss": 1.0}
OTHER_WEIGHT = 6.0
DETR_WEIGHT = 1.0  # between two memories nothing is published
HEAD_CUT = Cut(3)  # "third layer" of the towers (paper, Table 2)


class PKDMethod(Method):
    """See :class:`PKD`."""

    name = "pkd"
    terms = ("features",)
    paper = Paper(
        "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient",
        "NeurIPS 2022",
        "https://arxiv.org/abs/2207.02039",
    )
    families = "all, also student and teacher of different families"

    def __init__(self, config: "PKD", student: DetectorView, teacher: DetectorView):
        super().__init__(config, student, teacher)
        self.views = student, teacher
        self.branches = [] if config.location in (None, "neck") else config.location.split("+")
        if self.branches:
            widths = [_tap_widths(view) for view in self.views]
            pairs = {name: (widths[0][name], widths[1][name]) for name in self.branches}
        else:
            pairs = {f"{a}_to_{b}": (a, b) for a, b in zip(student.channels, teacher.channels, strict=True)}
        self.adapters = nn.ModuleDict({name: adapter(*pair) for name, pair in pairs.items()})

    @property
    def student_needs(self) -> Needs:
        return frozenset({HEAD_CUT}) if self.branches else frozenset({"features"})

    @property
    def teacher_needs(self) -> Needs:
        return self.student_needs

    def forward(self, student: Pass, teacher: Pass, batch: Batch) -> dict[str, LossPart]:
        """Half the squared distance of standardised maps, which is 1 - Pearson's correlation, summed over levels."""
        losses = [self._distance(*maps) for maps in self._maps(student, teacher)]
        images = float(len(batch.pixel_values))
        total = torch.stack(losses).sum()
        return {"features": LossPart(images * total, total.new_full((), images))}

    def _maps(self, student: Pass, teacher: Pass) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name of the adapter, the student's map and the teacher's, level by level."""
        if not self.branches:
            for own, target in zip(student.features, teacher.features, strict=True):
                yield f"{own.values.shape[1]}_to_{target.values.shape[1]}", own.values, target.values
            return
        taps, targets = (_split(v).taps(p, HEAD_CUT) for v, p in zip(self.views, (student, teacher), strict=True))
        for name in self.branches:
            for maps in zip(taps[name], targets[name], strict=True):
                yield name, *maps

    def _distance(self, name: str, own: Tensor, target: Tensor) -> Tensor:
        target = target.detach()
        own = same_size(self.adapters[name](own), target)
        statistics = self.config.statistics
        return (standardise(own, statistics) - standardise(target, statistics)).square().mean() / 2


@dataclass(frozen=True)
class PKD(MethodConfig):
    """Pearson correlation of the features, channel by channel and level by level; maps of another size are resized.

    Args:
        weight: None is the published one beside CrossKD: 6 for GFL and Faster R-CNN, 2 for RetinaNet and FCOS, 1 for
            ATSS; MMRazor's configurations of PKD alone use 6 or 10.
        statistics: Over what channels are standardised: each "image" by itself, which makes the loss independent of how
            a batch is split over processes and accumulation steps, or the local "batch", as the authors' code does.
        location: Features of the "neck", or of one or both towers of a dense head, after their third convolution
            (paper of CrossKD, Table 2; weight and details of these rows are unpublished).

    Raises:
        ValueError:
            "location needs": The towers have fewer than three convolutions.
    """

    method = PKDMethod
    published_numbers = {
        **{name.removeprefix("crosskd_"): {"weight": weight} for name, weight in WEIGHTS.items()},
        "others": {"weight": OTHER_WEIGHT},
        "DETR, of DETR": {"weight": DETR_WEIGHT},
    }

    weight: float | None = option(None, "Factor on the whole method.", AUTHORS, least=0)
    location: Location | None = option(None, "Where features are compared.", "paper of CrossKD, Table 2")
    statistics: Statistics = option("image", "Channels are standardised per image or per batch.", AUTHORS)

    def defaults(self, pair: Pair) -> dict[str, Any]:
        """The weight, and the location if both heads have towers."""
        student, teacher = pair
        known: dict[str, Any] = {"terms": {"features": 1.0}, "weight": WEIGHTS.get(teacher.name, OTHER_WEIGHT)}
        if teacher.kind == "queries" and student.kind == "queries":
            known["weight"] = DETR_WEIGHT
        if _towers(student) and _towers(teacher):
            known["location"] = "neck"
        return known


def _split(view: DetectorView) -> SplitHead:
    assert isinstance(view, SplitHead)
    return view


def _towers(view: DetectorView) -> bool:
    return isinstance(view, SplitHead) and view.depth is not None


def _tap_widths(view: DetectorView) -> dict[str, int]:
    depth = _split(view).depth or 0
    if depth < HEAD_CUT.index:
        raise ValueError(
            f"pkd: location needs {HEAD_CUT.index} convolutions in the towers, but the {view.role}'s have {depth}. "
            "Leave location='neck'."
        )
    return _split(view).tap_widths(HEAD_CUT)
