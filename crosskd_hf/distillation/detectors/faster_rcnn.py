"""Faster R-CNN: a pyramid, an RPN whose anchors are the priors, and a second stage that reads any pyramid.

The cut is in front of the whole second stage. The regions are those that the student samples for its own loss.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...models.assigners import assign_max_iou
from ...models.faster_rcnn import FasterRCNNForObjectDetection, FasterRCNNOutput
from ...models.pyramid import valid_priors
from ...models.roi_head import RoIHead, RoIPredictions, RoIs, select_boxes
from ...models.rpn import count_rows
from ..classes import ClassMap
from ..passes import (
    Batch,
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


@dataclass
class Regions:
    """What `Pass.head` holds.

    Args:
        pyramid: Maps (B, C, H_l, W_l) of all levels.
        rois: Of a student's pass with labels.
        predictions: Without gradient, of the model's own head on its own pyramid for the other model's regions, once
            they were asked for.
    """

    pyramid: list[Tensor]
    rois: RoIs | None = None
    predictions: RoIPredictions | None = None


class FasterRCNNView(SplitHead, ComparableHead):
    """A Faster R-CNN. Its rows are the regions that the student samples for its own loss, its tap is "pyramid"."""

    family = "Faster R-CNN"
    head_modules = ("rpn", "roi_head")
    kind = "regions"
    softmax = True

    def __init__(self, model: FasterRCNNForObjectDetection, role: Role, pixels: PixelAdapter | None = None) -> None:
        super().__init__(model, role, pixels)
        self.strides = self.all_strides = tuple(model.config.strides)
        self.channels = (model.config.fpn_channels,) * len(self.strides)
        # A teacher has no regions of its own: it answers for the student's, see `compare` and `cross`.
        own: Needs = frozenset({"predictions"}) if role == "student" else frozenset()
        shared: Needs = frozenset({"features", "priors", "assignment"})
        self.compared, self.offers = own, shared | own

    @property
    def head(self) -> RoIHead:
        """The second stage."""
        return self.model.roi_head  # type: ignore[no-any-return]

    # ---- Passes ----

    def prepare(self, needs: Needs) -> dict[str, Any]:
        return {"output_features": True}

    def run(self, batch: Batch) -> FasterRCNNOutput:
        """The pyramid alone: neither proposals nor detections are needed of a teacher."""
        return FasterRCNNOutput(features=self.model.pyramid(self.own_pixels(batch)))

    def again(self, own: Pass) -> Pass:
        """Its answers for regions are forgotten: the student's regions may be others."""
        return replace(own, head=Regions(own.head.pyramid, None))

    def read(self, outputs: FasterRCNNOutput, batch: Batch) -> Pass:
        if outputs.features is None:
            raise ValueError(f"The {self.role}'s outputs hold no features: pass `**distiller.student_request`.")
        found = Pass(self.maps(outputs.features, self.all_strides), head=Regions(outputs.features, outputs.rois))
        if self.needs & {"priors", "assignment"}:
            self._anchors(found, outputs.features, batch)
        if outputs.rois is not None and outputs.predictions is not None:
            found.predictions = [Prediction(outputs.predictions.logits, outputs.predictions.deltas)]
        return found

    def _anchors(self, found: Pass, features: list[Tensor], batch: Batch) -> None:
        """The anchors of the RPN and what they are trained on, before a sample of them is drawn."""
        config = self.model.config
        found.priors = priors = self.model.rpn.anchors(features)
        found.valid = valid = valid_priors(config, priors, batch.sizes)
        found.rows = rows_of_levels(self.all_strides, priors)
        if "assignment" in self.needs:
            limits = config.rpn_positive_iou, config.rpn_negative_iou, config.rpn_forced_iou
            anchors = self.all_strides, config.anchor_scale, tuple(config.aspect_ratios)
            rule = "rpn", anchors, limits, config.size_divisor
            found.assignment = batch.once(rule, lambda: assign_max_iou(priors, valid, batch.targets, *limits))
            found.normalizer = found.assignment.count_positives()

    # ---- The head on another pyramid ----

    def check_cut(self, student: DetectorView, cut: Cut, own: Cut) -> None:
        for name in ("strides", "backbone_strides"):
            given, needed = (tuple(view.model.config.to_dict()[name]) for view in (student, self))
            if given != needed:
                raise ValueError(
                    f"The student has {name}={given}, the teacher {needed}. Distillation needs the same levels: build "
                    f"the student with {name}={needed}."
                )

    def tap_widths(self, cut: Cut) -> dict[str, int]:
        return {"pyramid": self.model.config.fpn_channels}

    def taps(self, own: Pass, cut: Cut) -> dict[str, list[Tensor]]:
        return {"pyramid": own.head.pyramid}

    def cross(
        self, features: dict[str, list[Tensor]], source: Pass, own: Pass, cut: Cut, classes: list[int] | None
    ) -> Iterator[Comparison]:
        rois = _rois(source)
        finished = self.head(features["pyramid"], rois.boxes)
        yield self._comparison(_select(finished, classes), _select(self._answer(own, rois), classes), rois)

    def beyond_cut(self, cut: Cut) -> list[nn.Parameter]:
        return [parameter for head in (self.model.rpn, self.head) for parameter in head.parameters()]

    @torch.no_grad()
    def _answer(self, own: Pass, rois: RoIs) -> RoIPredictions:
        """What this model says of the student's regions, on its own pyramid. Computed once for a pass."""
        if own.head.predictions is None:
            own.head.predictions = self.head(own.head.pyramid, rois.boxes)
        return own.head.predictions  # type: ignore[no-any-return]

    def _comparison(self, prediction: RoIPredictions, target: RoIPredictions, rois: RoIs) -> Comparison:
        """Boxes are those of the class of which the target is most confident."""
        best = target.logits.softmax(-1)[..., :-1].argmax(-1)  # (B, R)
        return Comparison(
            Prediction(prediction.logits, select_boxes(prediction.deltas, best)),
            Prediction(target.logits, select_boxes(target.deltas, best)),
            kind="regions",
            softmax=True,
            decode=lambda deltas: self.head.decode(RoIPredictions(deltas, deltas[:, :, None]), rois.boxes)[:, :, 0],
            weight=rois.mask.float(),
            positive=rois.positive,
            normalizer=count_rows(rois.positive, rois.mask & ~rois.positive),
        )

    # ---- Row by row ----

    def same_rows(self, student: DetectorView) -> bool:
        if not isinstance(student, FasterRCNNView):
            return False
        return bool(student.model.config.class_agnostic == self.model.config.class_agnostic)

    def same_priors(self, student: DetectorView) -> bool:
        return True  # both answer for the student's regions

    def compare(self, student: Pass, own: Pass, classes: ClassMap) -> Comparison:
        rois, mine = _rois(student), student.predictions[-1]
        prediction = RoIPredictions(mine.logits, mine.regression)
        target = self._answer(own, rois)
        return self._comparison(_select(prediction, classes.student), _select(target, classes.teacher), rois)


def _rois(student: Pass) -> RoIs:
    if student.head.rois is None:
        raise ValueError(
            "The student's outputs hold no regions: call the student with labels and `**distiller.student_request`."
        )
    return student.head.rois  # type: ignore[no-any-return]


def _select(predictions: RoIPredictions, classes: list[int] | None) -> RoIPredictions:
    """Keep some classes and, always, the background."""
    background = predictions.logits.shape[-1] - 1
    if classes is None or classes == list(range(background)):
        return predictions
    deltas = predictions.deltas
    return RoIPredictions(
        predictions.logits[..., [*classes, background]], deltas if deltas.shape[2] == 1 else deltas[:, :, classes]
    )
