"""CrossKD: the student's half-done head features finish in the frozen teacher's head (CVPR 2024).

These cross-head predictions mimic the teacher's own. Label loss and teacher loss train different layers of the
student's head.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.losses import LossPart
from ..adapters import adapter
from ..distances import BoxLoss, Normalizer, class_scores, counted, mimic
from ..method import Method, MethodConfig, Paper, option
from ..passes import (
    Batch,
    ComparableHead,
    Comparison,
    Cut,
    DetectorView,
    Hold,
    Needs,
    Pair,
    Pass,
    Queries,
    SplitHead,
    shared_classes,
)
from ..statistics import Statistics, align

Strategy = Literal["a", "b", "c", "d"]
Region = Literal["P", "N", "P+N"]
AUTHORS = "configurations of the authors' code (jbwang1997/CrossKD)"

# What the authors' configurations and branches set, by what the teacher's rows mean; `statistics` and
# `normalizer_floor` are this project's (docs/distillation.md). An option that is missing here has no effect.
_DENSE = {
    "cut": 3,
    "strategy": "a",
    "region": "P+N",
    "beta": 1.0,
    "statistics": "image",
    "hold": "post",
    "normalizer": "teacher",
    "normalizer_floor": 1.0,
    "mask_padding": True,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "distribution": _DENSE | {"temperature": 1.0, "terms": {"cls": 1.0, "reg": 4.0, "centerness": 1.0}},
    "delta": _DENSE | {"terms": {"cls": 1.0, "reg": 1.0, "centerness": 1.0}},
    "distance": _DENSE | {"cut": 2, "terms": {"cls": 0.4, "reg": 0.75, "centerness": 0.0}},
    "regions": {"region": "P+N", "temperature": 3.0, "terms": {"cls": 0.5, "reg": 1.0}},
    "queries": {
        "beta": 0.0,
        "temperature": 1.0,
        "queries": "teacher",
        "box_loss": "l1_pixel",
        "terms": {"cls": 1.0, "reg": 1.0, "iou": 1.0},
    },
}


class CrossKDMethod(Method):
    """See :class:`CrossKD`."""

    name = "crosskd"
    terms = ("cls", "reg", "iou", "centerness")
    paper = Paper(
        "CrossKD: Cross-Head Knowledge Distillation for Object Detection",
        "CVPR 2024",
        "https://arxiv.org/abs/2306.11369",
    )
    families = "dense detectors, Faster R-CNN, DETR family; student and teacher of the same family"

    def __init__(self, config: "CrossKD", student: DetectorView, teacher: DetectorView):
        super().__init__(config, student, teacher)
        self.views = split_heads(Pair(student, teacher))
        hold, queries = config.hold or "post", config.queries or "teacher"
        self.cuts = Cut(config.cut or 0, hold, queries), Cut(config.teacher_cut or 0, hold, queries)
        self.views[1].check_cut(student, *self.cuts)
        self.strategy = config.strategy or "a"
        if self.strategy != "a":
            self._check_rows(Pair(student, teacher))
        self.classes = shared_classes(student, teacher) if self.views[1].by_class else None
        widths = [view.tap_widths(cut) for view, cut in zip(self.views, self.cuts, strict=True)]
        source, target = widths if self.strategy in "ac" else reversed(widths)
        self.adapters = nn.ModuleDict({name: adapter(width, target[name]) for name, width in source.items()})

    def _check_rows(self, pair: Pair) -> None:
        if not (isinstance(pair.teacher, ComparableHead) and pair.teacher.same_rows(pair.student)):
            raise ValueError(
                f"crosskd: strategy={self.strategy!r} compares predictions of both heads row by row, but rows of "
                f"{pair} mean different boxes. Use strategy='a', or heads of one kind."
            )

    @property
    def student_needs(self) -> Needs:
        return frozenset({self.cuts[0]})

    @property
    def teacher_needs(self) -> Needs:
        return frozenset({self.cuts[1]})

    def unreached(self, student: DetectorView) -> list[nn.Parameter]:
        """The student's layers behind the cut; with strategy (d) those in front of it, with (b) and (c) none."""
        behind = self.views[0].beyond_cut(self.cuts[0])
        if self.strategy == "a":
            return behind
        known = {id(parameter) for parameter in behind}
        return [p for p in student.model.parameters() if id(p) not in known] if self.strategy == "d" else []

    def forward(self, student: Pass, teacher: Pass, batch: Batch) -> dict[str, LossPart]:
        """Distances of the cross predictions from the teacher's own, or of what another strategy compares."""
        config = self.config
        pairs = [self._counted(pair, student, teacher, batch) for pair in self.comparisons(student, teacher)]
        softness = config.beta or 0.0, config.temperature or 1.0
        return mimic(pairs, config.terms, *softness, config.box_loss or "l1_pixel")

    # ---- What is compared ----

    def comparisons(self, student: Pass, teacher: Pass) -> Iterator[Comparison]:
        """What is compared: cross predictions with the teacher's own, one for each decoder layer; see `strategy`."""
        if self.strategy == "a":
            yield from self._crossed(self.views, self.cuts, student, teacher, self.classes and self.classes.teacher)
            return
        assert isinstance(self.views[1], ComparableHead)
        assert self.classes is not None
        rows = self.views[1].compare(student, teacher, self.classes)
        rows = rows._replace(confidence=class_scores(rows).amax(-1))  # the teacher's, whatever the target is
        with torch.set_grad_enabled(self.strategy == "d" and torch.is_grad_enabled()):
            if self.strategy == "c":
                (cross,) = self._crossed(self.views, self.cuts, student, teacher, self.classes.teacher)
            else:
                (cross,) = self._crossed(self.views[::-1], self.cuts[::-1], teacher, student, self.classes.student)
        finished = cross.prediction
        yield rows._replace(prediction=finished) if self.strategy == "d" else rows._replace(target=finished)

    def _crossed(
        self,
        views: tuple[SplitHead, SplitHead],
        cuts: tuple[Cut, Cut],
        source: Pass,
        own: Pass,
        classes: list[int] | None,
    ) -> Iterator[Comparison]:
        """Features of the first view's model at its cut, adapted and aligned, through the head of the second."""
        given, references = views[0].taps(source, cuts[0]), views[1].taps(own, cuts[1])
        features = {
            name: [
                self._adapted(name, feature, reference, cuts[1])
                for feature, reference in zip(maps, references[name], strict=True)
            ]
            for name, maps in given.items()
        }
        return views[1].cross(features, source, own, cuts[1], classes)

    def _adapted(self, name: str, feature: Tensor, reference: Tensor, cut: Cut) -> Tensor:
        """To the finishing head's width and statistics; the pyramid itself (cut 0) isn't rectified."""
        feature = self.adapters[name](feature)
        if self.config.statistics is None:
            return feature  # type: ignore[no-any-return]
        feature = align(feature, reference, self.config.statistics)
        return F.relu(feature) if cut.index else feature

    # ---- What counts ----

    def _counted(self, pair: Comparison, student: Pass, teacher: Pass, batch: Batch) -> Comparison:
        """Weights and normalizer of the rows by the options; detectors without an option have None there."""
        pair = counted(pair, self.config, student, teacher, batch)
        if self.config.region in ("P", "N"):
            assert pair.positive is not None
            row = pair.positive if self.config.region == "P" else ~pair.positive
            pair = pair._replace(class_weight=pair.weight * row)
        return pair


@dataclass(frozen=True)
class CrossKD(MethodConfig):
    """Cross-head distillation. None stands for what was published for the teacher's kind of head.

    Terms: `cls` between class scores, `reg` between boxes, `iou` between queries' boxes (with such a `box_loss`),
    `centerness` of heads that predict it.

    Args:
        cut: Convolution of the student's towers in front of which its head is cut, 0 (the pyramid) to their number.
            Faster R-CNN is always cut in front of its second stage, the DETR family between encoder and decoder.
        teacher_cut: The teacher's, if its towers differ.
        strategy: What is compared (supplement, Fig. 1): "a" cross predictions with the teacher's own, "b" the student's
            own with the teacher's features in the student's head, "c" the student's own with the cross predictions,
            "d" the teacher's features in the student's head with the teacher's own predictions.
        region: Rows whose classes are distilled (supplement, Table 1): positives, negatives or both.
        beta: Exponent of the quality focal loss between class scores; 0 is binary cross entropy.
        temperature: Of softmax distributions: of box sides, or of classes that compete.
        statistics: Over what channels are aligned: each "image" by itself, which makes a loss independent of how a
            batch is split over processes and accumulation steps, or the local "batch", as the authors' code does.
        hold: Whether features are taken after ("post", as the authors' in-place ReLU leaves them) or before ("pre")
            the activation in front of the cut.
        normalizer: Whose positives the losses are divided by; "score_sum" divides by the teacher's confidence.
        normalizer_floor: Smallest normalizer. The authors' FCOS uses 1e-6, which explodes on batches without objects.
        mask_padding: Whether rows in the padding of an image stay out. The authors' FCOS takes them in.
        queries: Whose decoder queries read the memories.
        box_loss: Distance of queries' boxes; "l1_pixel" is published, "l1+giou" relative L1 plus GIoU, "giou" GIoU.

    Raises:
        ValueError:
            "only models of one family can finish": The two detectors can't finish each other's features.
            "lies behind the predictors": The student's head has fewer convolutions.
            "mean different boxes": Strategies (b) to (d) need two heads of one kind.
    """

    method = CrossKDMethod
    published_numbers = PUBLISHED

    cut: int | None = option(None, "Tower convolution in front of which the student's head is cut.", AUTHORS, least=0)
    teacher_cut: int | None = option(None, "The teacher's cut, if it differs.", least=0)
    strategy: Strategy | None = option(None, "What is compared, (a) to (d).", "supplement, Fig. 1")
    region: Region | None = option(None, "Rows whose classes are distilled.", "supplement, Table 1")
    beta: float | None = option(None, "Exponent of the quality focal loss; 0 is BCE.", "paper, eq. 5", least=0)
    temperature: float | None = option(None, "Softmax temperature.", AUTHORS, least=1e-6)
    statistics: Statistics | None = option(None, "Channels are aligned per image or per batch.", AUTHORS)
    hold: Hold | None = option(None, "Features after or before the ReLU in front of the cut.", AUTHORS)
    normalizer: Normalizer | None = option(None, "Whose positives divide the losses.", AUTHORS)
    normalizer_floor: float | None = option(None, "Smallest normalizer.", AUTHORS, least=0)
    mask_padding: bool | None = option(None, "Rows in the padding stay out.", AUTHORS)
    queries: Queries | None = option(None, "Whose queries read the memories.", "supplement, Table 3")
    box_loss: BoxLoss | None = option(None, "Distance of queries' boxes.", "supplement, Table 3")

    def defaults(self, pair: Pair) -> dict[str, Any]:
        """By what the teacher's rows mean."""
        student, teacher = split_heads(pair)
        known = dict(PUBLISHED[teacher.kind])
        known.pop("beta" if teacher.softmax else "temperature" if teacher.kind == "queries" else "", None)
        if "cut" in known:
            depth = student.depth or 0
            self._check_depth(depth)
            known["cut"] = min(known["cut"], depth)
            known["teacher_cut"] = known["cut"] if self.cut is None else self.cut
            if not known["teacher_cut"]:
                known.pop("hold")
        terms = dict(known["terms"])
        if teacher.kind == "queries":
            chosen = {"l1_pixel": ("cls", "reg"), "giou": ("cls", "iou")}.get(self.box_loss or "l1_pixel", tuple(terms))
            terms = {name: terms[name] for name in chosen}
        if not teacher.has_centerness:
            terms.pop("centerness", None)
        return effective(known | {"terms": terms}, self.terms, teacher.kind)

    def _check_depth(self, depth: int) -> None:
        if self.cut is not None and self.cut > depth:
            raise ValueError(
                f"crosskd: cut={self.cut} lies behind the predictors, for the towers have {depth} convolutions: choose "
                f"0 to {depth}. Mimicking the teacher's predictions with the student's own is the method kd."
            )


def effective(known: dict[str, Any], given: dict[str, float] | None, kind: str) -> dict[str, Any]:
    """Without the options that concern only terms which are left out.

    Args:
        known: Options and `terms` of a pair.
        given: Weights of terms that the user gave.
        kind: What the teacher's rows mean.
    """
    divided = ("cls", "centerness", "reg") if kind in ("delta", "distance") else ("cls", "centerness")
    concerned = {
        "beta": ("cls",),
        "region": ("cls",),
        "temperature": ("reg",) if kind == "distribution" else ("cls",),
        "box_loss": ("reg", "iou"),
        "normalizer": divided,
        "normalizer_floor": divided,
    }
    weights = known["terms"] | (given or {})
    left_out = {name for name, terms in concerned.items() if not any(weights.get(term) for term in terms)}
    return {name: value for name, value in known.items() if name not in left_out}


def split_heads(pair: Pair) -> tuple[SplitHead, SplitHead]:
    """Both views, if each head can finish the other's features. Raises ValueError if they can't."""
    student, teacher = pair
    if not (isinstance(student, SplitHead) and isinstance(teacher, SplitHead) and student.family == teacher.family):
        raise ValueError(
            f"crosskd can't do {pair}: only models of one family can finish each other's features, and these are "
            f"{student.family} and {teacher.family}. Choose a teacher of the student's family, or a method that "
            "compares features, such as pkd."
        )
    return student, teacher
