"""Faster R-CNN: a pyramid, an RPN whose anchors are the priors, and a second stage that reads any pyramid."""

from typing import Any

from ...models.assigners import assign_max_iou
from ...models.faster_rcnn import FasterRCNNForObjectDetection, FasterRCNNOutput
from ..passes import Batch, DetectorView, Needs, Pass, Prediction, Role
from ..pixels import PixelAdapter


class FasterRCNNView(DetectorView):
    """A Faster R-CNN. Its rows are the regions that the student samples for its own loss."""

    family = "Faster R-CNN"
    offers = frozenset({"features", "predictions", "priors", "assignment"})
    kind = "regions"
    softmax = True

    def __init__(self, model: FasterRCNNForObjectDetection, role: Role, pixels: PixelAdapter | None = None) -> None:
        super().__init__(model, role, pixels)
        self.strides = self.all_strides = tuple(model.config.strides)
        self.channels = (model.config.fpn_channels,) * len(self.strides)

    def prepare(self, needs: Needs) -> dict[str, Any]:
        return {"output_features": True}

    def run(self, batch: Batch) -> FasterRCNNOutput:
        """The pyramid alone: neither proposals nor detections are needed of a teacher."""
        return FasterRCNNOutput(features=self.model.pyramid(self.own_pixels(batch)))

    def read(self, outputs: FasterRCNNOutput, batch: Batch) -> Pass:
        if outputs.features is None:
            raise ValueError(
                "The student's outputs hold no features: call the student with `**distiller.student_request`."
            )
        found = Pass(self.maps(outputs.features, self.all_strides))
        if self.needs & {"priors", "assignment"}:
            self._anchors(found, outputs, batch)
        rois, predictions = outputs.rois, outputs.predictions
        if rois is not None and predictions is not None:
            found.predictions = [Prediction(predictions.logits, predictions.deltas)]
        return found

    def _anchors(self, found: Pass, outputs: FasterRCNNOutput, batch: Batch) -> None:
        """The anchors of the RPN and what they are trained on, before a sample of them is drawn."""
        config, rpn = self.model.config, self.model.rpn
        found.priors = priors = rpn.anchors(outputs.features)
        if "assignment" in self.needs:
            limits = config.rpn_positive_iou, config.rpn_negative_iou, config.rpn_forced_iou
            rule = ("rpn", tuple(config.strides), config.anchor_scale, tuple(config.aspect_ratios), limits)
            found.assignment = batch.once(
                rule, lambda: assign_max_iou(priors, priors.inside(batch.sizes), batch.targets, *limits)
            )
            found.normalizer = found.assignment.count_positives()
