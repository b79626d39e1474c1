"""Localization distillation: the teacher's distributions of box sides, at positives and around them (CVPR 2022)."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...models.losses import LossPart, distribution_kl
from ..method import Method, MethodConfig, option
from ..passes import Batch, ComparableHead, DetectorView, Needs, Pair, Pass, shared_classes
from ..regions import in_images, inside_boxes, valuable
from .imitation import LD as PAPER
from .imitation import LD_CODE

Quotient = Literal["diou", "released"]
Normalize = Literal["images", "official", "avg"]
SIDES = 4.0
RELEASED_IMAGES = 2.0  # of a process, in the released configurations

# What the released configurations and heads set, by the student's `model_type`; a factor of the second region is
# multiplied in, so that every term is divided by 4.
_GFL = {
    "region": "valuable",
    "temperature": 10.0,
    "cls_temperature": 2.0,
    "without_positives": False,
    "joint_sides": False,
    "terms": {"main": 0.25, "region": 0.0625, "cls": 10.0},
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "crosskd_gfl": _GFL,
    "crosskd_atss": _GFL | {"terms": {"main": 0.25, "region": 0.0375, "cls": 10.0}},
    "crosskd_fcos": _GFL | {"region": "inside"},
    "crosskd_retinanet": _GFL
    | {
        "cls_temperature": 8.0,
        "without_positives": True,
        "terms": {"main": 5.0, "region": 0.15, "cls": 10.0},
    },
}


class LDMethod(Method):
    """See :class:`LD`."""

    name = "ld"
    terms = ("main", "region", "cls")
    paper = PAPER
    families = "dense detectors that predict distributions of distances, of equal priors: GFL, the others with reg_max"

    def __init__(self, config: "LD", student: DetectorView, teacher: DetectorView):
        super().__init__(config, student, teacher)
        check_distributions(Pair(student, teacher))
        self.classes = shared_classes(student, teacher)

    @property
    def student_needs(self) -> Needs:
        return frozenset({"predictions", "assignment"})

    @property
    def teacher_needs(self) -> Needs:
        return frozenset({"predictions"})

    def prepare_student(self, student: DetectorView, teacher: DetectorView) -> None:
        """With `individual` the labels' losses of boxes are switched off."""
        if self.config.individual:
            student.without_box_labels()

    def forward(self, student: Pass, teacher: Pass, batch: Batch) -> dict[str, LossPart]:
        """One quotient for each level of the pyramid."""
        assert student.assignment is not None
        parts: dict[str, LossPart] = {}
        positive = student.assignment.positive.float()
        scores = student.predictions[-1].logits.detach().float().sigmoid().amax(-1)  # (B, N)
        if self.wants("main") or self.wants("region"):
            distance = self._distances(student, teacher)
            weights = {"main": scores * positive}
            if self.wants("region"):
                weights["region"] = self.region(student, batch) * (scores if self.config.region == "inside" else 1)
            parts = {name: self._divided(distance * w, w, student) for name, w in weights.items() if self.wants(name)}
        if self.wants("cls"):
            rows = self._class_distances(student, teacher) * positive
            parts["cls"] = LossPart(per_level(rows, student), per_level(positive, student))
        return parts

    @torch.no_grad()
    def region(self, student: Pass, batch: Batch) -> Tensor:
        """(B, N) weight of the second region's rows: the valuable locations, or those in a box that aren't positive."""
        config, assignment, priors = self.config, student.assignment, student.priors
        assert assignment is not None
        assert priors is not None
        if config.region == "inside":
            return (inside_boxes(priors.centers, batch.targets) & ~assignment.positive).float()
        value = valuable(priors, in_images(priors, batch), batch.targets, config.iou != "released")
        value = value if config.weights == "iou" else (value > 0).float()
        return value * ~assignment.positive if config.without_positives else value

    def _distances(self, student: Pass, teacher: Pass) -> Tensor:
        """(B, N): KL divergence, the mean over bins as in the released code, summed over the four sides."""
        own, target = student.predictions[-1].regression, teacher.predictions[-1].regression
        sides = 1 if self.config.joint_sides else 4
        own, target = (rows.unflatten(-1, (sides, -1)) for rows in (own, target))
        return distribution_kl(own, target, self.config.temperature or 1.0).sum(-1) / own.shape[-1]

    def _class_distances(self, student: Pass, teacher: Pass) -> Tensor:
        """(B, N): KL divergence between softmax distributions over the shared classes, the mean over classes."""
        assert self.classes is not None
        own = student.predictions[-1].of_classes(self.classes.student).logits
        target = teacher.predictions[-1].of_classes(self.classes.teacher).logits
        return distribution_kl(own, target, self.config.cls_temperature or 1.0) / own.shape[-1]

    def _divided(self, rows: Tensor, weight: Tensor, student: Pass) -> LossPart:
        totals = per_level(rows, student)
        if self.config.normalize == "avg":
            return LossPart(totals, (SIDES * weight.sum()).expand_as(totals))
        images = len(rows) / RELEASED_IMAGES if self.config.normalize == "images" else 1.0
        return LossPart(totals, torch.full_like(totals.detach(), SIDES * images))


def per_level(rows: Tensor, own: Pass) -> Tensor:
    """Sums of rows (B, N) over the batch and each level's rows, (L,)."""
    return torch.stack([rows[:, level].sum() for level in own.rows.values()])


def check_distributions(pair: Pair) -> None:
    """Raises ValueError if the heads don't predict distributions of the same priors' sides."""
    student, teacher = pair
    comparable = isinstance(student, ComparableHead) and isinstance(teacher, ComparableHead)
    if not (comparable and student.kind == "distribution" and teacher.same_rows(student)):  # type: ignore[attr-defined]
        raise ValueError(
            f"ld can't do {pair}: both heads must predict distributions of the distances of equal priors. Build both "
            "models with the same reg_max, such as reg_max=16 (GFL has distributions without it), and the same "
            "anchors; or choose crosskd, which works across heads."
        )


@dataclass(frozen=True)
class LD(MethodConfig):
    """Localization distillation, at the student's positives (term `main`) and in a second `region`, and distillation of
    classes (`cls`). None stands for what was published for the student's kind of head.

    Individual localization distillation is `LD(individual=True, terms={"region": 0, "cls": 0})`; self-distillation is
    `LD(terms={"region": 0, "cls": 0})` with a trained copy of the student as teacher.

    Args:
        iou: Overlap that tells the valuable locations: "diou" is the paper's distance IoU; "released", what the
            published figures were made with, divides the intersection by the anchor's area.
        region: The second region. "valuable": locations whose overlap with a box is below that of positives, but above
            a quarter of it. "inside": locations in a box that are not positive, of heads that regress from points.
        weights: Rows of the valuable region count by their "iou", as in the released code, or alike ("binary").
        normalize: "images" sums over rows as the released code does with 2 images in a process, however a batch is
            split over processes and accumulation steps. "official" sums over what a process sees at once: the loss
            grows with it. "avg" divides by the weights of the rows.
        temperature: Of the distributions of sides.
        cls_temperature: Of the classes.
        without_positives: Whether positives are taken out of the second region.
        individual: Labels no longer train the boxes.
        joint_sides: One softmax over the bins of all four sides, a fault of the released head for RetinaNet.

    Raises:
        ValueError:
            "both heads must predict distributions": A head has no distributions, or other priors.
            "can't be trained without its losses of boxes": `individual` needs a dense detector as student.
    """

    method = LDMethod
    published_numbers = {name.removeprefix("crosskd_"): numbers for name, numbers in PUBLISHED.items()}

    iou: Quotient | None = option(None, "Overlap that tells valuable locations.", "paper, section 3.3")
    region: Literal["valuable", "inside"] | None = option(None, "The second region.", LD_CODE)
    weights: Literal["iou", "binary"] | None = option(None, "How rows of the valuable region count.", LD_CODE)
    normalize: Normalize | None = option(None, "What the sums over rows are divided by.", LD_CODE)
    temperature: float | None = option(None, "Softmax temperature of sides.", LD_CODE, least=1e-6)
    cls_temperature: float | None = option(None, "Softmax temperature of classes.", LD_CODE, least=1e-6)
    without_positives: bool | None = option(None, "Positives stay out of the second region.", LD_CODE)
    individual: bool = option(False, "Labels do not train the boxes.", "paper, Table 5")
    joint_sides: bool | None = option(None, "One softmax over all four sides.", LD_CODE)

    def defaults(self, pair: Pair) -> dict[str, Any]:
        """By the student's head."""
        check_distributions(pair)
        known = {"normalize": "images"} | PUBLISHED.get(pair.student.name, _GFL)
        if (self.region or known["region"]) == "valuable":
            known |= {"iou": "diou", "weights": "iou"}
        else:
            known.pop("without_positives")
        weights = known["terms"] | (self.terms or {})
        boxes = ("temperature", "normalize", "joint_sides")
        regions = ("iou", "region", "weights", "without_positives")
        left_out = boxes * (not (weights["main"] or weights["region"])) + regions * (not weights["region"])
        left_out += ("cls_temperature",) * (not weights["cls"])
        return {name: value for name, value in known.items() if name not in left_out}
