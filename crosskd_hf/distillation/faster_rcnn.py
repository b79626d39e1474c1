"""Cross-head distillation of Faster R-CNN: the student's pyramid, read by the frozen teacher's second stage.

The cut is in front of the whole RoI head. The regions are those that the student samples for its own loss; the RPN is
not distilled. Pyramids are not aligned (the authors tried and removed it).
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosskd_hf.models.faster_rcnn import FasterRCNNForObjectDetection, FasterRCNNOutput
from crosskd_hf.models.losses import LossPart, distribution_kl
from crosskd_hf.models.roi_head import RoIPredictions, RoIs, select_boxes
from crosskd_hf.models.rpn import count_rows

from .base import Distiller
from .classes import match_classes
from .config import DistillationConfig
from .pixels import PixelAdapter
from .pkd import PearsonKD

# The authors' configuration of Faster R-CNN (branch faster-rcnn).
WEIGHTS = {"loss_cls_kd": 0.5, "loss_reg_kd": 1.0}
PKD_WEIGHT = 6.0
TEMPERATURE = 3.0


class FasterRCNNDistiller(Distiller):
    """CrossKD, plain KD and PKD for a pair of Faster R-CNNs.

    Args:
        student, teacher: Models with the same strides. If the widths of their pyramids differ, a trainable 1x1
            convolution takes the student's to the teacher's.
        config: Of it count `methods`, `loss_weights`, `temperature` (3 if not given) and `statistics` (of pkd).
        pixels: Turns the student's pixel values into the teacher's; `None` if both are normalised alike.

    Raises:
        ValueError: Strides differ, no class is shared, one of the two is class-agnostic, or a cut was given.
    """

    teacher: FasterRCNNForObjectDetection

    def __init__(
        self,
        student: FasterRCNNForObjectDetection,
        teacher: FasterRCNNForObjectDetection,
        config: DistillationConfig,
        pixels: PixelAdapter | None = None,
    ):
        super().__init__(teacher)
        self.config, self.pixels = config, pixels
        _check_pair(student, teacher, config)
        self.classes = match_classes(student.config, teacher.config)
        self.weights = config.weights(WEIGHTS | {"loss_feat_kd": PKD_WEIGHT if "pkd" in config.methods else 0.0})
        self.temperature = TEMPERATURE if config.temperature is None else config.temperature
        self.cross, self.plain = "crosskd" in config.methods, "kd" in config.methods
        widths = student.config.fpn_channels, teacher.config.fpn_channels
        self.adapter: nn.Module = nn.Identity()
        if self.cross and widths[0] != widths[1]:
            self.adapter = nn.Conv2d(*widths, 1)
        self.pearson: PearsonKD | None = None
        if "pkd" in config.methods:
            self.pearson = PearsonKD(*widths, self.weights["loss_feat_kd"], config.statistics)
        self.student_request = {"output_features": True}

    def forward(self, outputs: FasterRCNNOutput, inputs: Mapping[str, Any]) -> dict[str, LossPart]:
        """See :meth:`Distiller.forward`; `outputs` must come with `student_request` and from a pass with labels."""
        features = self._teacher_pyramid(inputs)
        head, rois = self.teacher.roi_head, outputs.rois
        if rois is None or outputs.features is None or outputs.predictions is None:
            raise ValueError(
                "The outputs hold no regions or features: call the student with labels and distiller.student_request."
            )
        parts: dict[str, LossPart] = {}
        if self.cross or self.plain:
            with torch.no_grad():
                target = self._select(head(features, rois.boxes), self.classes.teacher)
            if self.cross:
                adapted = [self.adapter(feature) for feature in outputs.features]
                cross = self._select(head(adapted, rois.boxes), self.classes.teacher)
                parts = self._mimic(cross, target, rois)
            if self.plain:
                own = self._mimic(self._select(outputs.predictions, self.classes.student), target, rois)
                parts = {key: _add(part, parts.get(key)) for key, part in own.items()}
        if self.pearson is not None:
            parts["loss_feat_kd"] = self.pearson(outputs.features, features)
        return parts

    @torch.no_grad()
    def _teacher_pyramid(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """The teacher's pyramid; neither its RPN nor its detections are needed."""
        pixel_values = inputs["pixel_values"]
        if self.pixels is not None:
            pixel_values = self.pixels(pixel_values, inputs.get("pixel_mask"))
        return self.teacher.pyramid(pixel_values)

    def _mimic(self, predictions: RoIPredictions, target: RoIPredictions, rois: RoIs) -> dict[str, LossPart]:
        """Distances of `predictions` from `target`, both of the shared classes and the background."""
        number = count_rows(rois.positive, rois.mask & ~rois.positive)
        divergence = distribution_kl(predictions.logits, target.logits, self.temperature) * rois.mask
        score, best = target.logits.softmax(-1)[..., :-1].max(-1)  # (B, R)
        score = score * rois.mask
        boxes, goal = select_boxes(predictions.deltas, best), select_boxes(target.deltas, best)
        distance = F.l1_loss(boxes, goal, reduction="none").sum(-1) * score
        return {
            "loss_cls_kd": LossPart(self.weights["loss_cls_kd"] * divergence.sum(), number),
            "loss_reg_kd": LossPart(self.weights["loss_reg_kd"] * distance.sum(), 4 * score.sum(), floor=1e-7),
        }

    def _select(self, predictions: RoIPredictions, classes: list[int]) -> RoIPredictions:
        """Keep some classes and, always, the background."""
        background = predictions.logits.shape[-1] - 1
        if classes == list(range(background)):
            return predictions
        deltas = predictions.deltas
        return RoIPredictions(
            predictions.logits[..., [*classes, background]], deltas if deltas.shape[2] == 1 else deltas[:, :, classes]
        )

    def describe(self) -> dict[str, Any]:
        """See :meth:`Distiller.describe`."""
        return {
            "methods": list(self.config.methods),
            "cut": "in front of the RoI head" if self.cross else None,
            "loss_weights": self.weights,
            "temperature": self.temperature,
            "statistics": self.config.statistics,
            "adapters": sorted({name.rsplit(".", 1)[0] for name, _ in self.named_parameters()}),
            "classes": {"teacher": self.classes.teacher, "student": self.classes.student},
            "classes_not_distilled": self.classes.unknown,
        }

    def silent_parameters(self, student: FasterRCNNForObjectDetection) -> list[nn.Parameter]:
        """The student's RPN and, unless plain KD trains it, its RoI head."""
        heads = [student.rpn] if self.plain else [student.rpn, student.roi_head]
        return [parameter for head in heads for parameter in head.parameters()]


def _add(part: LossPart, other: LossPart | None) -> LossPart:
    return part if other is None else part._replace(total=part.total + other.total)


def _check_pair(
    student: FasterRCNNForObjectDetection, teacher: FasterRCNNForObjectDetection, config: DistillationConfig
) -> None:
    if config.cut is not None or config.teacher_cut is not None:
        raise ValueError(
            f"cut={config.cut}, teacher_cut={config.teacher_cut}: Faster R-CNN is always cut in front of its RoI head. "
            f"Leave both unset."
        )
    for name in ("strides", "backbone_strides"):
        given, needed = (tuple(model.config.to_dict()[name]) for model in (student, teacher))
        if given != needed:
            raise ValueError(
                f"The student has {name}={given}, the teacher {needed}. Distillation needs the same levels: build the "
                f"student with {name}={needed}."
            )
    if "kd" in config.methods and student.config.class_agnostic != teacher.config.class_agnostic:
        raise ValueError(
            f"Plain KD compares boxes one by one, but class_agnostic is {student.config.class_agnostic} for the "
            f"student and {teacher.config.class_agnostic} for the teacher. Use methods=('crosskd',), which works "
            f"across heads."
        )
