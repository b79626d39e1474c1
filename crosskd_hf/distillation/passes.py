"""What a method sees: a batch, one pass of the student and one of the teacher; and what a detector has to offer it."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..models.assigners import Assignment, Priors, Targets
from ..models.boxes import image_sizes
from .classes import ClassMap, match_classes
from .pixels import PixelAdapter

T = TypeVar("T")
Role = Literal["student", "teacher"]
# What a head's `regression` rows mean. A distance of two boxes is chosen by it.
BoxKind = Literal["distribution", "delta", "distance", "regions", "queries"]
Hold = Literal["post", "pre"]
Queries = Literal["teacher", "student"]


class FeatureMap(NamedTuple):
    """One level of the features that a detector's head reads.

    Args:
        stride: Pixels of the input image per cell.
        values: (B, C, H, W).
    """

    stride: int
    values: Tensor


class Prediction(NamedTuple):
    """Raw output of a head for N rows: priors level after level, sampled regions, or queries.

    Args:
        logits: (B, N, K); where classes compete (`DetectorView.softmax`) K counts the background as the last class.
        regression: (B, N, 4 [* M]) as the head makes them, (B, R, K or 1, 4) of regions, cxcywh in [0, 1] of queries.
            `Pass.decode` makes boxes of them.
        centerness: (B, N) logits, of heads that have them.
    """

    logits: Tensor
    regression: Tensor
    centerness: Tensor | None = None

    def of_classes(self, classes: list[int] | None) -> Prediction:
        """The logits of `classes` alone, in this order; None keeps all."""
        if classes is None or classes == list(range(self.logits.shape[-1])):
            return self
        return self._replace(logits=self.logits[..., classes])


@dataclass
class Batch:
    """What any method may ask of the data.

    Args:
        pixel_values: (B, 3, H, W) as the student sees them, padded on the right and at the bottom.
        pixel_mask: (B, H, W), 1 inside each image, 0 in its padding. None: no padding.
        labels: Per image `class_labels` (n,) and `boxes` (n, 4), cxcywh relative to the unpadded image.
        update: Optimiser updates before this one, in the whole run.
    """

    pixel_values: Tensor
    pixel_mask: Tensor | None
    labels: list[dict[str, Tensor]]
    update: int = 0
    _known: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def sizes(self) -> Tensor:
        """(B, 2) height and width of each image without its padding, pixels."""
        return image_sizes(self.pixel_values, self.pixel_mask)

    @cached_property
    def targets(self) -> Targets:
        """Ground truth, padded to the image with most boxes."""
        return Targets.from_labels(self.labels, self.sizes)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returned when it was called for `key` first: student and teacher share what is equal for both."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]  # type: ignore[no-any-return]


@dataclass
class Pass:
    """One model's pass over a batch, as far as some method `needs` it; the rest is empty. A teacher's has no gradient.

    Args:
        features: Maps that the head reads, of the strides that both models have ("features").
        predictions: The model's own, one for each decoder layer, the last one being its result ("predictions").
        decode: From `Prediction.regression` to boxes, xyxy pixels ("predictions").
        priors: Anchors or points of the cells; of a Faster R-CNN those of its RPN ("priors", "assignment").
        valid: (B, N) bool, priors that the model is trained on: not those in the padding that other images bring.
        rows: Where in `priors` and `assignment` those of a stride are ("priors", "assignment").
        assignment: Ground truth of each prior by the model's own rule ("assignment").
        normalizer: What the model divides sums over its priors by ("assignment").
        head: What the model's own view needs to finish another model's features; nobody else reads it (:class:`Cut`).
    """

    features: list[FeatureMap] = field(default_factory=list)
    predictions: list[Prediction] = field(default_factory=list)
    decode: Callable[[Tensor], Tensor] | None = None
    priors: Priors | None = None
    valid: Tensor | None = None
    rows: dict[int, slice] = field(default_factory=dict)
    assignment: Assignment | None = None
    normalizer: Tensor | None = None
    head: Any = None


@dataclass(frozen=True)
class Cut:
    """Where a head is cut, so that it can finish the other model's features. A view reads of it what its family has.

    Args:
        index: Tower convolutions in front of the cut.
        hold: Whether features are held after ("post") or before ("pre") the activation in front of the cut.
        queries: Whose queries a decoder answers.
    """

    index: int = 0
    hold: Hold = "post"
    queries: Queries = "teacher"


Need = Literal["features", "predictions", "priors", "assignment"] | Cut
Needs = frozenset[Need]


class Comparison(NamedTuple):
    """Two predictions of the same rows, and what their distance depends on.

    Args:
        prediction: With gradient.
        target: Without.
        kind: What the regression rows of both mean.
        softmax: Whether classes compete, the background being the last.
        decode: From regression rows to boxes, xyxy pixels.
        weight: (B, N), 0 for rows that take no part.
        positive: (B, N) bool, rows with an object; None where no row is assigned to one.
        normalizer: What sums over rows are divided by,
        floor: but at least this.
        confidence: (B, N) how much the box of a row counts; None: the target's highest class score.
        class_weight: (B, N) how much the classes of a row count; None: as `weight`.
    """

    prediction: Prediction
    target: Prediction
    kind: BoxKind
    softmax: bool
    decode: Callable[[Tensor], Tensor]
    weight: Tensor
    positive: Tensor | None
    normalizer: Tensor
    floor: float = 1.0
    confidence: Tensor | None = None
    class_weight: Tensor | None = None


class DetectorView(abc.ABC):
    """What a method may ask of a detector. One class for each family; :data:`~.detectors.VIEWS` finds it.

    Args:
        model: The bare model. A teacher is frozen and in evaluation mode.
        role: Student or teacher.
        pixels: Turns the student's pixel values into this model's. None: the same.

    A child names its `family` and what it `offers`, and sets `strides` and `channels` in its constructor. The
    `head_modules` of the model can be taken over from a teacher of equal head.
    """

    family: ClassVar[str]
    offers: Needs = frozenset({"features"})
    head_modules: ClassVar[tuple[str, ...]] = ()
    kind: BoxKind
    softmax: bool = False
    has_centerness: bool = False

    def __init__(self, model: PreTrainedModel, role: Role, pixels: PixelAdapter | None = None) -> None:
        self.model: Any = model
        self.role, self.pixels = role, pixels
        self.strides: tuple[int, ...] = ()
        self.channels: tuple[int, ...] = ()
        self.needs: Needs = frozenset()
        self.arguments: dict[str, Any] = {}

    def __str__(self) -> str:
        return f"{type(self.model).__name__} ({self.role})"

    @property
    def name(self) -> str:
        """The `model_type`, by which published numbers are found."""
        return str(self.model.config.model_type)

    def keep(self, strides: tuple[int, ...]) -> None:
        """Restrict `strides`, `channels` and every pass's `features` to these strides, in this order."""
        self.channels = tuple(self.channels[self.strides.index(stride)] for stride in strides)
        self.strides = strides

    def request(self, needs: Needs) -> dict[str, Any]:
        """Further arguments of the model's forward, so that :meth:`read` finds what is needed. Called once.

        Raises:
            ValueError: The family has something of it not at all.
        """
        missing = sorted(str(need) for need in needs if not isinstance(need, Cut) and need not in self.offers)
        offered = ", ".join(sorted(map(str, self.offers)))
        if missing:
            raise ValueError(
                f"The {self.role} {type(self.model).__name__} has no {', '.join(missing)}; it offers {offered}. Choose "
                "a method that needs nothing else."
            )
        self.needs, self.arguments = needs, self.prepare(needs)
        return self.arguments

    @abc.abstractmethod
    def prepare(self, needs: Needs) -> dict[str, Any]:
        """What :meth:`request` returns for needs that the family has."""

    @abc.abstractmethod
    def read(self, outputs: Any, batch: Batch) -> Pass:
        """The model's pass, from what its forward returned on the batch with the arguments of :meth:`request`."""

    @torch.no_grad()
    def teacher_pass(self, batch: Batch) -> Pass:
        """Run the model on the batch, in its own pixels and without gradient."""
        return self.read(self.run(batch), batch)

    def again(self, own: Pass) -> Pass:
        """A teacher's pass for another pass of the student over the same batch."""
        return own

    def run(self, batch: Batch) -> Any:
        """The model's outputs on the batch. A child leaves out what nobody needs."""
        return self.model(pixel_values=self.own_pixels(batch), pixel_mask=batch.pixel_mask, **self.arguments)

    def own_pixels(self, batch: Batch) -> Tensor:
        """(B, 3, H, W) pixel values as this model wants them."""
        if self.pixels is None:
            return batch.pixel_values
        return self.pixels(batch.pixel_values, batch.pixel_mask)

    def maps(self, features: list[Tensor], strides: tuple[int, ...]) -> list[FeatureMap]:
        """The maps of the kept strides, from all of the model's maps and their strides."""
        if "features" not in self.needs:
            return []
        found = dict(zip(strides, features, strict=True))
        return [FeatureMap(stride, found[stride]) for stride in self.strides]

    def without_box_labels(self) -> None:
        """Switch off the losses by which labels train the model's boxes, now and in what is saved of it.

        Raises:
            ValueError: The family can't.
        """
        raise ValueError(f"The {self.role} {type(self.model).__name__} can't be trained without its losses of boxes.")

    def close(self) -> None:
        """Take off the model what the view has put on it."""
        self.arguments = {}


class SplitHead(DetectorView):
    """A detector whose head can be cut, and can finish features of another detector of its family.

    Attributes:
        by_class: Whether only the classes that both models know are compared.
        depth: Convolutions in a row, in front of each of which the head can be cut; None if there is one cut only.
    """

    by_class: bool = True
    depth: int | None = None

    @abc.abstractmethod
    def check_cut(self, student: DetectorView, cut: Cut, own: Cut) -> None:
        """Raises ValueError, saying what can be done, if this head can't finish what the student has at `cut`.

        Args:
            student: The other model, of the same family.
            cut: Where the student's head is cut.
            own: Where this head is cut.
        """

    @abc.abstractmethod
    def tap_widths(self, cut: Cut) -> dict[str, int]:
        """Channels of the features at the cut by the name of the tap, equal names for all of the family."""

    @abc.abstractmethod
    def taps(self, own: Pass, cut: Cut) -> dict[str, list[Tensor]]:
        """Features of this model's pass at the cut by the name of the tap: maps (B, C, H, W) or a memory (B, S, C)."""

    @abc.abstractmethod
    def cross(
        self, features: dict[str, list[Tensor]], source: Pass, own: Pass, cut: Cut, classes: list[int] | None
    ) -> Iterator[Comparison]:
        """What this head makes of another model's features, as `prediction`, beside what it makes of its own.

        Args:
            features: Of the other model at its cut, adapted to this head; as of :meth:`taps`.
            source: Pass of the other model,
            own: and of this view's model, on the same batch.
            cut: Where this head is cut.
            classes: This model's classes that are compared; None if not `by_class`.

        Yields:
            One comparison for each decoder layer, in order.
        """

    @abc.abstractmethod
    def beyond_cut(self, cut: Cut) -> list[nn.Parameter]:
        """Parameters that features from in front of the cut never pass in this model."""


class ComparableHead(DetectorView):
    """A detector whose predictions can be compared row by row with those of another detector of its family.

    Attributes:
        compared: What :meth:`compare` reads of this model's pass.
        priors_per_location: Rows at each location of a map.
    """

    compared: Needs = frozenset({"predictions", "assignment"})
    priors_per_location: int = 1

    @abc.abstractmethod
    def same_rows(self, student: DetectorView) -> bool:
        """Whether a row of both heads means the same box, so that rows are compared as they are."""

    @abc.abstractmethod
    def same_priors(self, student: DetectorView) -> bool:
        """Whether both heads have the same priors at every location, whatever they predict of them."""

    @abc.abstractmethod
    def compare(self, student: Pass, own: Pass, classes: ClassMap) -> Comparison:
        """The student's own predictions, as `prediction`, beside this model's of the same rows.

        Args:
            student, own: Passes of both models on the same batch.
            classes: Those that are compared.
        """


class Pair(NamedTuple):
    """A student and its teacher."""

    student: DetectorView
    teacher: DetectorView

    def __str__(self) -> str:
        student, teacher = type(self.student.model).__name__, type(self.teacher.model).__name__
        return f"a {student} that learns from a {teacher}"


def rows_of_levels(strides: Sequence[int], priors: Priors) -> dict[int, slice]:
    """Where in the rows of `priors` those of each level are, by the level's stride."""
    ends = list(itertools.accumulate(priors.level_lengths, initial=0))
    return {stride: slice(*bounds) for stride, bounds in zip(strides, itertools.pairwise(ends), strict=True)}


def same_size(feature: Tensor, target: Tensor) -> Tensor:
    """`feature` (B, C, H, W) resized to the height and width of `target`, where they differ."""
    if feature.shape[-2:] == target.shape[-2:]:
        return feature
    return F.interpolate(feature, size=target.shape[-2:], mode="bilinear", align_corners=False)


def shared_classes(student: DetectorView, teacher: DetectorView) -> ClassMap:
    """The classes that both models know, by name. Raises ValueError if there is none."""
    return match_classes(student.model.config, teacher.model.config)
