"""Dense detectors on a pyramid: GFL, RetinaNet, FCOS, ATSS and every other child of `DenseDetector`."""

from typing import Any

from ...models.assigners import Assignment, Priors
from ...models.dense import DenseDetector, DenseDetectorOutput, DenseHead
from ..passes import Batch, BoxKind, Cut, DetectorView, Needs, Pass, Prediction, Role
from ..pixels import PixelAdapter


class DenseView(DetectorView):
    """A dense detector. Its rows are the priors of all levels."""

    family = "dense detectors"
    offers = frozenset({"features", "predictions", "priors", "assignment"})

    def __init__(self, model: DenseDetector, role: Role, pixels: PixelAdapter | None = None) -> None:
        super().__init__(model, role, pixels)
        self.strides = self.all_strides = tuple(model.config.strides)
        self.channels = (model.config.fpn_channels,) * len(self.strides)

    @property
    def head(self) -> DenseHead:
        """The head, as it is at present."""
        return self.model.head  # type: ignore[no-any-return]

    @property
    def kind(self) -> BoxKind:  # type: ignore[override]
        return self.head.regression_kind

    @property
    def has_centerness(self) -> bool:  # type: ignore[override]
        return self.head.centerness is not None

    def prepare(self, needs: Needs) -> dict[str, Any]:
        self._cut = min((need.index for need in needs if isinstance(need, Cut)), default=0)
        self._rows = bool(needs - {"features"})
        return {"output_features": "features" in needs} | ({"cut": self._cut} if self._rows else {})

    def read(self, outputs: DenseDetectorOutput, batch: Batch) -> Pass:
        found = Pass(self.maps(outputs.features or [], self.all_strides) if "features" in self.needs else [])
        if not self._rows:
            return found
        if outputs.predictions is None or outputs.priors is None:
            raise ValueError("The student's outputs hold no taps: call the student with `**distiller.student_request`.")
        priors, head = outputs.priors, self.head
        found.predictions = [Prediction(*outputs.predictions)]
        found.decode = lambda regression: head.decode(regression, priors)
        found.priors, found.head = priors, outputs.taps
        if self.needs - {"features", "predictions", "priors"}:
            found.assignment = self._assignment(outputs, priors, batch)
            found.normalizer = head.normalizer(priors, found.assignment)
        return found

    def _assignment(self, outputs: DenseDetectorOutput, priors: Priors, batch: Batch) -> Assignment:
        """What the priors are trained on: the student's own, or the same again where both assign alike."""
        head = self.head
        if outputs.assignment is not None:
            return batch.once(head.assignment_rule, lambda: outputs.assignment)  # type: ignore[return-value]
        if not batch.labels:
            raise ValueError("The batch has no labels, which the distillation of predictions needs.")
        rows, boxes = outputs.predictions, outputs.boxes
        assert rows is not None
        assert boxes is not None
        return batch.once(
            head.assignment_rule, lambda: head.assign(priors, priors.inside(batch.sizes), batch.targets, rows, boxes)
        )
