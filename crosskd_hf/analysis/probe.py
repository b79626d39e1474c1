"""What labels, student, teacher and cross-head say of the same locations of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ..create import Detector
from ..data.collators import DetectionCollator
from ..data.dataset import DetectionData
from ..distillation import CrossKD, Distiller
from ..distillation.detectors.dense import DenseView
from ..distillation.methods.crosskd import CrossKDMethod
from ..distillation.passes import Batch, Pass

FOREGROUND = 0.05
"""From this score on a teacher sees an object."""


class LocationScores(NamedTuple):
    """Class scores at the locations of all levels, level after level; of several anchors the highest.

    Args:
        labels: (B, L, K) 1 for the class of the object that the student's assigner gives a location, else 0.
        student, teacher: (B, L, K) in [0, 1], of the classes that both models know.
        cross: The teacher's head on the student's features at the cut, as CrossKD trains it.
        valid: (B, L) bool, locations outside of the padding.
        shapes: Height and width of each level's map.
    """

    labels: Tensor
    student: Tensor
    teacher: Tensor
    cross: Tensor
    valid: Tensor
    shapes: tuple[tuple[int, int], ...]

    @property
    def foreground(self) -> Tensor:
        """(B, L) bool: locations at which labels or teacher see an object."""
        return self.valid & ((self.labels.amax(-1) > 0) | (self.teacher.amax(-1) >= FOREGROUND))

    def maps(self, scores: Tensor) -> list[Tensor]:
        """(B, L) numbers as one (B, H, W) map for each level."""
        levels = scores.split([height * width for height, width in self.shapes], 1)
        return [level.unflatten(1, shape) for level, shape in zip(levels, self.shapes, strict=True)]


class Probe:
    """A student beside a teacher, both in evaluation mode, with CrossKD's cut in front of the teacher's last layers.

    Args:
        student, teacher: Dense detectors; the teacher gets pixels of its own kind.
        adapters: `distiller.safetensors` of the student's training, if student and teacher have different widths.

    Raises:
        ValueError: The pair can't be looked at so, or its adapters aren't known.
    """

    def __init__(self, student: Detector, teacher: Detector, adapters: Path | None = None) -> None:
        student.model.eval()
        self.student = student
        self.distiller = Distiller(student.model, teacher.model, [CrossKD()], student.processor, teacher.processor)
        views = self.distiller.pair
        if not (isinstance(views.student, DenseView) and isinstance(views.teacher, DenseView)):
            kinds = " and ".join(type(view.model).__name__ for view in views)
            raise ValueError(
                f"This figure shows scores at the locations of dense detectors, and {kinds} have none. Choose GFL, "
                "RetinaNet, FCOS, ATSS or TOOD; `analyse gradients` takes any pair."
            )
        self.anchors = tuple(view.priors_per_location for view in (views.student, views.teacher))
        if any(True for _ in self.distiller.parameters()):
            self._load(adapters)

    def _load(self, adapters: Path | None) -> None:
        if adapters is None or not adapters.is_file():
            raise ValueError(
                "Student and teacher have different widths, so that cross-head predictions need the adapters of the "
                f"student's training: {adapters or 'distiller.safetensors'} is not there. Give the folder of a student "
                "that was trained with crosskd and this teacher."
            )
        self.distiller.load_state_dict(load_file(adapters))

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self.distiller.close()

    @torch.no_grad()
    def scores(self, inputs: Mapping[str, Any]) -> LocationScores:
        """Of one batch of :func:`batches`."""
        distiller = self.distiller
        outputs = distiller.pair.student.model(**inputs, **distiller.student_request)
        batch = Batch(inputs["pixel_values"], inputs["pixel_mask"], inputs["labels"])
        own, target = distiller.pair.student.read(outputs, batch), distiller.pair.teacher.teacher_pass(batch)
        method = cast(CrossKDMethod, distiller.named_methods["crosskd"])
        (cross,) = method.comparisons(own, target)
        assert method.classes is not None
        assert own.valid is not None
        known = own.predictions[-1].of_classes(method.classes.student), cross.target, cross.prediction
        anchors = self.anchors[0], self.anchors[1], self.anchors[1]
        own_scores, target_scores, cross_scores = [
            _highest(each.logits.float().sigmoid(), count) for each, count in zip(known, anchors, strict=True)
        ]
        truth = _highest(_labels(own, method.classes.student), anchors[0])
        shapes = tuple(tuple(tap.shape[-2:]) for tap in method.views[0].taps(own, method.cuts[0])["cls"])
        valid = _highest(own.valid.float()[..., None], anchors[0])[..., 0] > 0
        levels = cast("tuple[tuple[int, int], ...]", shapes)
        return LocationScores(truth, own_scores, target_scores, cross_scores, valid, levels)


def _labels(own: Pass, classes: list[int]) -> Tensor:
    """(B, N, K) of the shared classes: 1 for the class of a positive."""
    assignment, count = own.assignment, own.predictions[-1].logits.shape[-1]
    assert assignment is not None
    hot = F.one_hot(assignment.labels.clamp(0, count - 1), count) * assignment.positive[..., None]
    return hot[..., classes].float()


def _highest(rows: Tensor, anchors: int) -> Tensor:
    """From (B, L * A, K) to (B, L, K)."""
    return rows.unflatten(1, (-1, anchors)).amax(2)


def batches(student: Detector, data: DetectionData, number: int, size: int = 4) -> Iterator[dict[str, Any]]:
    """The first images with objects, without augmentation, as the student sees them.

    Args:
        data: Its classes are found by name.
        number: So many images.
        size: Images of a batch.

    Raises:
        ValueError: The student doesn't know the classes, or no image has an object.
    """
    known = data.for_model(student.model.config, training=False).dataset
    rows = [row for row, objects in enumerate(known["objects"]) if len(objects["bbox"])][:number]
    if not rows:
        raise ValueError("No image of the data has an object, and the figure is about objects.")
    collator = DetectionCollator(student.processor)
    for start in range(0, len(rows), size):
        yield collator([known[row] for row in rows[start : start + size]])
