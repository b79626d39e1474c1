"""Dense detectors on a pyramid: GFL, RetinaNet, FCOS, ATSS and every other child of `DenseDetector`."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...models.assigners import Assignment, Priors
from ...models.dense import DenseDetector, DenseDetectorOutput, DenseHead, Taps
from ...models.pyramid import valid_priors
from ..classes import ClassMap
from ..passes import (
    Batch,
    BoxKind,
    ComparableHead,
    Comparison,
    Cut,
    DetectorView,
    Needs,
    Pass,
    Prediction,
    Role,
    SplitHead,
    rows_of_levels,
)
from ..pixels import PixelAdapter


class DenseView(SplitHead, ComparableHead):
    """A dense detector. Its rows are the priors of all levels; `Pass.head` holds its taps at every cut that is needed.

    Taps are named "cls" and "reg", one map for each level.
    """

    family = "dense detectors"
    head_modules = ("head",)
    offers = frozenset({"features", "predictions", "priors", "assignment"})

    def __init__(self, model: DenseDetector, role: Role, pixels: PixelAdapter | None = None) -> None:
        super().__init__(model, role, pixels)
        self.strides = self.all_strides = tuple(model.config.strides)
        self.channels = (model.config.fpn_channels,) * len(self.strides)
        self.cuts: list[Cut] = []

    @property
    def head(self) -> DenseHead:
        """The model's head."""
        return self.model.head  # type: ignore[no-any-return]

    @property
    def kind(self) -> BoxKind:  # type: ignore[override]
        """What the head's regression rows mean."""
        return self.head.regression_kind

    @property
    def has_centerness(self) -> bool:  # type: ignore[override]
        return self.head.centerness is not None

    @property
    def depth(self) -> int:  # type: ignore[override]
        """Convolutions of a tower."""
        return self.head.num_convs

    @property
    def priors_per_location(self) -> int:  # type: ignore[override]
        return self.head.priors_per_location

    def without_box_labels(self) -> None:
        boxes = dict.fromkeys(self.head.weights.keys() & {"loss_bbox", "loss_dfl"}, 0.0)
        self.head.weights.update(boxes)
        self.model.config.loss_weights = self.model.config.loss_weights | boxes

    # ---- Passes ----

    def prepare(self, needs: Needs) -> dict[str, Any]:
        cuts = sorted({need for need in needs if isinstance(need, Cut)}, key=lambda cut: (cut.hold, cut.index))
        self.cuts = cuts
        features = "features" in needs or len(cuts) > 1 or any(cut.hold == "pre" for cut in cuts)
        arguments: dict[str, Any] = {"output_features": features}
        if needs - {"features"}:
            arguments["cut"] = cuts[0].index if cuts else 0
        if self.role == "teacher":  # whose boxes are nobody's detections
            arguments["output_boxes"] = False
        return arguments

    def read(self, outputs: DenseDetectorOutput, batch: Batch) -> Pass:
        found = Pass()
        if self.arguments["output_features"] and outputs.features is None:
            raise ValueError(f"The {self.role}'s outputs hold no features: pass `**distiller.student_request`.")
        if "features" in self.needs:
            found.features = self.maps(outputs.features or [], self.all_strides)
        if "cut" not in self.arguments:
            return found
        if outputs.predictions is None or outputs.priors is None or outputs.taps is None:
            raise ValueError(f"The {self.role}'s outputs hold no taps: pass `**distiller.student_request`.")
        priors, head = outputs.priors, self.head
        found.predictions = [Prediction(*outputs.predictions)]
        found.decode = lambda regression: head.decode(regression, priors)
        found.priors, found.head = priors, self._taps(outputs)
        found.valid = self._valid(outputs, priors, batch)
        found.rows = rows_of_levels(self.all_strides, priors)
        if self.cuts or "assignment" in self.needs:
            found.assignment = self._assignment(outputs, priors, found.valid, batch)
            found.normalizer = head.normalizer(priors, found.assignment)
        return found

    def _taps(self, outputs: DenseDetectorOutput) -> dict[Cut, Taps]:
        taps = {}
        for cut in self.cuts:
            taken = cut.hold == "post" and cut.index == self.arguments["cut"]
            taps[cut] = outputs.taps if taken else self.head.tap(outputs.features or [], cut.index, cut.hold == "post")
        return taps  # type: ignore[return-value]

    def _valid(self, outputs: DenseDetectorOutput, priors: Priors, batch: Batch) -> Tensor:
        """Priors that are trained on: those of the student's loss, or the same again where cells lie alike."""
        known = outputs.valid
        make = (lambda: valid_priors(self.model.config, priors, batch.sizes)) if known is None else (lambda: known)
        key = "valid", self.head.grid, self.head.priors_per_location, self.model.config.size_divisor
        return batch.once(key, make)

    def _assignment(self, outputs: DenseDetectorOutput, priors: Priors, valid: Tensor, batch: Batch) -> Assignment:
        """What the priors are trained on: that of the student's loss, or the same again where both assign alike."""
        head, rule = self.head, (self.head.assignment_rule, self.model.config.size_divisor)
        if outputs.assignment is not None:
            return batch.once(rule, lambda: outputs.assignment)  # type: ignore[return-value]
        if not batch.labels:
            raise ValueError("The batch has no labels, which the distillation of predictions needs.")
        rows = outputs.predictions
        assert rows is not None
        boxes = partial(head.decode, rows.regression, priors)
        return batch.once(rule, lambda: head.assign(priors, valid, batch.targets, rows, boxes()))

    # ---- The head in two halves ----

    def check_cut(self, student: DetectorView, cut: Cut, own: Cut) -> None:
        assert isinstance(student, DenseView)
        student.head.check_cut(cut.index)
        self.head.check_cut(own.index)
        if student.all_strides != self.all_strides:
            raise ValueError(
                f"The student's pyramid has strides {student.all_strides}, the teacher's {self.all_strides}. "
                f"Distillation needs the same levels: build the student with strides={self.all_strides}."
            )

    def tap_widths(self, cut: Cut) -> dict[str, int]:
        return dict.fromkeys(Taps._fields, self.head.tap_width(cut.index))

    def taps(self, own: Pass, cut: Cut) -> dict[str, list[Tensor]]:
        return own.head[cut]._asdict()  # type: ignore[no-any-return]

    def cross(
        self, features: dict[str, list[Tensor]], source: Pass, own: Pass, cut: Cut, classes: list[int] | None
    ) -> Iterator[Comparison]:
        finished = Prediction(*self.head.finish(Taps(**features), cut.index))
        yield self._comparison(finished.of_classes(classes), own.predictions[-1].of_classes(classes), own)

    def beyond_cut(self, cut: Cut) -> list[nn.Parameter]:
        return self.head.parameters_from(cut.index)

    def _comparison(self, prediction: Prediction, target: Prediction, own: Pass) -> Comparison:
        assert own.decode is not None
        assert own.assignment is not None
        assert own.normalizer is not None
        weight, positive = own.assignment.weight, own.assignment.positive
        return Comparison(prediction, target, self.kind, False, own.decode, weight, positive, own.normalizer)

    # ---- Row by row ----

    def same_rows(self, student: DetectorView) -> bool:
        if not isinstance(student, DenseView):
            return False
        own, other = self.head, student.head
        if (own.regression_kind, own.regression_width) != (other.regression_kind, other.regression_width):
            return False
        if own.priors_per_location != other.priors_per_location or len(self.all_strides) != len(student.all_strides):
            return False
        shapes = [(2, 2)] * len(self.all_strides)
        priors = [head.priors(shapes, torch.device("cpu")) for head in (own, other)]
        probe = torch.linspace(-2, 2, own.regression_width).expand(1, len(priors[0].boxes), -1)
        return torch.equal(own.decode(probe, priors[0]), other.decode(probe, priors[1]))

    def same_priors(self, student: DetectorView) -> bool:
        if not isinstance(student, DenseView):
            return False
        pairs = [(self.head.prior_boxes(s), student.head.prior_boxes(s)) for s in self.all_strides]
        return all(torch.equal(own, other) for own, other in pairs)

    def compare(self, student: Pass, own: Pass, classes: ClassMap) -> Comparison:
        mine, target = student.predictions[-1], own.predictions[-1]
        return self._comparison(mine.of_classes(classes.student), target.of_classes(classes.teacher), own)
