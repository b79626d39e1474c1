"""Distillation between dense detectors: any teacher head for any student head on the same strides."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from crosskd_hf.models.assigners import Assignment, Priors, Targets
from crosskd_hf.models.boxes import image_sizes
from crosskd_hf.models.dense import DenseDetector, DenseDetectorOutput, Predictions, Taps
from crosskd_hf.models.losses import LossPart

from .base import Distiller
from .classes import match_classes
from .config import DistillationConfig
from .cross_head import CrossHead
from .mapper import CrossHeadMapper, same_coding
from .mimic import WEIGHTS, Rows, mimic
from .pixels import PixelAdapter
from .pkd import PearsonKD


class Published(NamedTuple):
    """What the authors' configurations set per detector: the cut, and the weight of PKD added to CrossKD."""

    cut: int = 3
    pkd_weight: float = 6.0


PUBLISHED = {
    "crosskd_gfl": Published(3, 6.0),
    "crosskd_retinanet": Published(3, 2.0),
    "crosskd_fcos": Published(2, 2.0),
    "crosskd_atss": Published(3, 1.0),
}


class Pass(NamedTuple):
    """What the losses need of one model's pass over a batch; the teacher's has no targets of its own."""

    predictions: Predictions
    boxes: Tensor
    taps: Taps
    priors: Priors

    @classmethod
    def of(cls, outputs: DenseDetectorOutput) -> "Pass":
        """Raises ValueError if the outputs were made without `cut`."""
        predictions, boxes, taps, priors = outputs.predictions, outputs.boxes, outputs.taps, outputs.priors
        if predictions is None or boxes is None or taps is None or priors is None:
            raise ValueError("The outputs hold no taps: call the student with distiller.student_request.")
        return cls(predictions, boxes, taps, priors)


class DenseDistiller(Distiller):
    """CrossKD, plain KD and PKD for a pair of dense detectors.

    Args:
        student, teacher: Models with the same strides. Widths may differ: adapters are made where they do.
        config: Methods and their settings.
        pixels: Turns the student's pixel values into the teacher's; `None` if both are normalised alike.

    Raises:
        ValueError: Strides differ, the cut is out of range, no class is shared, or the heads cannot mimic each other.
    """

    def __init__(
        self,
        student: DenseDetector,
        teacher: DenseDetector,
        config: DistillationConfig,
        pixels: PixelAdapter | None = None,
    ):
        super().__init__(teacher)
        self.config, self.pixels = config, pixels
        _check_strides(student, teacher)
        self.classes = match_classes(student.config, teacher.config)
        published = PUBLISHED.get(teacher.config.model_type, Published())
        self.cut = config.cut if config.cut is not None else min(published.cut, student.head.num_convs)
        self.teacher_cut = config.teacher_cut if config.teacher_cut is not None else self.cut
        methods = set(config.methods)
        if "crosskd" in methods and self.cut == student.head.num_convs + 1:
            methods = methods - {"crosskd"} | {"kd"}  # behind the predictors are the student's own predictions
        self.weights = config.weights(
            _published_weights(teacher) | {"loss_feat_kd": published.pkd_weight if "pkd" in methods else 0.0}
        )
        _check_centerness(teacher, self.weights)
        self.beta = 1.0 if config.beta is None else config.beta
        self.temperature = 1.0 if config.temperature is None else config.temperature
        self._student_head = [student.head]  # for its normalizer; hidden from the module tree
        self.same_rule = student.head.assignment_rule == teacher.head.assignment_rule
        self.plain = "kd" in methods
        self.cross_head = self._cross_head(student, teacher) if "crosskd" in methods else None
        self.pearson = self._pearson(student, teacher) if "pkd" in methods else None
        self.mapper = self._mapper(student, teacher) if self.plain else None
        self.student_request = {"cut": self.cut if self.cross_head else 0, "output_features": "pkd" in methods}

    def _cross_head(self, student: DenseDetector, teacher: DenseDetector) -> CrossHead:
        student.head.check_cut(self.cut)
        teacher.head.check_cut(self.teacher_cut)
        widths = student.head.tap_width(self.cut), teacher.head.tap_width(self.teacher_cut)
        return CrossHead(*widths, self.teacher_cut, self.config.statistics)

    def _mapper(self, student: DenseDetector, teacher: DenseDetector) -> CrossHeadMapper | None:
        if same_coding(student.head, teacher.head):
            return None
        if self.cross_head is not None:
            raise ValueError(
                "methods=('crosskd', 'kd') between different heads would add losses with different normalizers under "
                "one name. Choose one of the two; 'crosskd' works better across heads."
            )
        options = self.config.mapper_options()
        compared = WEIGHTS["distribution" if options.as_distribution else "delta"]
        self.weights |= self.config.weights(compared | {"loss_centerness_kd": 0.0})
        return CrossHeadMapper(student.head, teacher.head, options)

    def _pearson(self, student: DenseDetector, teacher: DenseDetector) -> PearsonKD:
        widths = student.config.fpn_channels, teacher.config.fpn_channels
        return PearsonKD(*widths, self.weights["loss_feat_kd"], self.config.statistics)

    def forward(self, outputs: DenseDetectorOutput, inputs: Mapping[str, Any]) -> dict[str, LossPart]:
        """See :meth:`Distiller.forward`; `outputs` must come with `student_request`."""
        target = self._teacher_pass(inputs)
        parts: dict[str, LossPart] = {}
        if self.cross_head is not None or self.plain:
            parts = self._prediction_parts(outputs, Pass.of(target), inputs)
        if self.pearson is not None:
            if outputs.features is None or target.features is None:
                raise ValueError("The outputs hold no features: call the student with distiller.student_request.")
            parts["loss_feat_kd"] = self.pearson(outputs.features, target.features)
        return parts

    def _prediction_parts(
        self, outputs: DenseDetectorOutput, target: Pass, inputs: Mapping[str, Any]
    ) -> dict[str, LossPart]:
        student, head = Pass.of(outputs), self.teacher.head
        if outputs.assignment is None or outputs.targets is None:
            raise ValueError("The outputs hold no targets: distillation of predictions needs a batch with labels.")
        goal = self._select(target.predictions, self.classes.teacher)
        own = self._select(student.predictions, self.classes.student)
        if self.mapper is not None:
            return self._mapped(self.mapper, own, goal, (student.priors, target.priors), outputs.assignment)
        assignment = self._teacher_assignment(outputs.assignment, outputs.targets, target, inputs)
        if self.config.normalizer == "teacher":
            normalizer = head.normalizer(target.priors, assignment)
        elif self.config.normalizer == "student":
            normalizer = self._student_head[0].normalizer(student.priors, outputs.assignment)
        else:
            normalizer = (goal.logits.sigmoid().amax(-1) * assignment.weight).sum()
        rows = Rows(target.priors, assignment, normalizer, self.config.normalizer_floor)
        settings = (goal, rows, self.weights, self.beta, self.temperature)
        parts: dict[str, LossPart] = {}
        if self.cross_head is not None:
            cross = self.cross_head(student.taps, target.taps, head)
            parts = mimic(head, self._select(cross, self.classes.teacher), *settings)
        if self.plain:
            parts = {key: _add(part, parts.get(key)) for key, part in mimic(head, own, *settings).items()}
        return parts

    @torch.no_grad()
    def _teacher_pass(self, inputs: Mapping[str, Any]) -> DenseDetectorOutput:
        pixel_values, pixel_mask = inputs["pixel_values"], inputs.get("pixel_mask")
        if self.pixels is not None:
            pixel_values = self.pixels(pixel_values, pixel_mask)
        cut = self.teacher_cut if self.cross_head is not None else 0
        return self.teacher(pixel_values, pixel_mask, cut=cut, output_features=self.pearson is not None)

    def _teacher_assignment(
        self, assignment: Assignment, targets: Targets, target: Pass, inputs: Mapping[str, Any]
    ) -> Assignment:
        """What the teacher's priors would be trained on: the student's assignment, where both assign alike."""
        if self.same_rule:
            return assignment
        valid = target.priors.inside(image_sizes(inputs["pixel_values"], inputs.get("pixel_mask")))
        return self.teacher.head.assign(target.priors, valid, targets, target.predictions, target.boxes)

    def _mapped(
        self,
        mapper: CrossHeadMapper,
        own: Predictions,
        goal: Predictions,
        priors: tuple[Priors, Priors],
        assignment: Assignment,
    ) -> dict[str, LossPart]:
        """Plain KD between different heads, over the student's rows; `priors` of student and teacher."""
        goals = mapper.goals(goal, priors[1], priors[0], assignment)
        normalizer = self._student_head[0].normalizer(priors[0], assignment)
        if self.config.normalizer == "score_sum":
            normalizer = goals.confidence.sum()
        rows = Rows(priors[0], assignment, normalizer, self.config.normalizer_floor)
        return mapper.mimic(own, goals, rows, self.weights, self.beta)

    def _select(self, predictions: Predictions, classes: list[int]) -> Predictions:
        if classes == list(range(predictions.logits.shape[-1])):
            return predictions
        return predictions._replace(logits=predictions.logits[..., classes])

    def describe(self) -> dict[str, Any]:
        """See :meth:`Distiller.describe`."""
        return {
            "methods": list(self.config.methods),
            "cut": self.cut if self.cross_head is not None else None,
            "teacher_cut": self.teacher_cut if self.cross_head is not None else None,
            "loss_weights": self.weights,
            "beta": self.beta,
            "temperature": self.temperature,
            "mapping": None if self.mapper is None else asdict(self.mapper.options),
            "statistics": self.config.statistics,
            "normalizer": self.config.normalizer,
            "adapters": sorted({name.rsplit(".", 1)[0] for name, _ in self.named_parameters()}),
            "classes": {"teacher": self.classes.teacher, "student": self.classes.student},
            "classes_not_distilled": self.classes.unknown,
        }

    def silent_parameters(self, student: DenseDetector) -> list[nn.Parameter]:
        """The student's tower convolutions from the cut on, and its predictors, unless plain KD trains them."""
        if self.plain or self.cross_head is None:
            return []
        return student.head.parameters_from(self.cut)


def _add(part: LossPart, other: LossPart | None) -> LossPart:
    return part if other is None else part._replace(total=part.total + other.total)


def _published_weights(teacher: DenseDetector) -> dict[str, float]:
    weights = WEIGHTS[teacher.head.regression_kind]
    return weights if teacher.head.centerness is not None else weights | {"loss_centerness_kd": 0.0}


def _check_centerness(teacher: DenseDetector, weights: dict[str, float]) -> None:
    if weights["loss_centerness_kd"] and teacher.head.centerness is None:
        raise ValueError(
            f"loss_weights gives loss_centerness_kd={weights['loss_centerness_kd']}, but {type(teacher).__name__} "
            f"predicts no centerness. Leave this weight out."
        )


def _check_strides(student: DenseDetector, teacher: DenseDetector) -> None:
    if list(student.config.strides) != list(teacher.config.strides):
        raise ValueError(
            f"The student's pyramid has strides {tuple(student.config.strides)}, the teacher's "
            f"{tuple(teacher.config.strides)}. Distillation needs the same levels: build the student with "
            f"strides={tuple(teacher.config.strides)}."
        )
