"""PKD between detectors of different kinds: of their feature maps, those of equal stride are compared.

A pyramid (dense detectors, Faster R-CNN) and an encoder's memory (DETR-type detectors) have no head in common, but both
are maps of the same image.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from crosskd_hf.models.losses import LossPart
from crosskd_hf.models.pyramid import PyramidDetector

from .base import Distiller
from .config import DistillationConfig
from .detr_families import FAMILIES, DecoderTap
from .pixels import PixelAdapter
from .pkd import PearsonKD

WEIGHT = 6.0  # the authors' for GFL and Faster R-CNN; between kinds nothing is published


class FeatureSource(Protocol):
    """Where a model's maps come from."""

    width: int
    request: dict[str, Any]  # further arguments of the model's forward

    def maps(self, outputs: Any) -> list[Tensor]:
        """Maps (B, C, H_l, W_l) of the model's latest pass, whose result is `outputs`."""


class Pyramid:
    """The pyramid of a dense detector or a Faster R-CNN."""

    def __init__(self, model: PyramidDetector):
        self.width = model.config.fpn_channels
        self.request = {"output_features": True}

    def maps(self, outputs: Any) -> list[Tensor]:
        """See :class:`FeatureSource`."""
        return outputs.features


class Memory:
    """The memory that a DETR-type detector's decoder reads; of a student, not that of mere predictions."""

    def __init__(self, model: PreTrainedModel, student: bool):
        self.width = FAMILIES[model.config.model_type].width(model.config)
        self.request: dict[str, Any] = {}
        self.tap = DecoderTap(model, layers=False, owner=self, predictions=not student)

    def maps(self, outputs: Any) -> list[Tensor]:
        """See :class:`FeatureSource`. Raises ValueError for encoders of one level, whose maps have no known shape."""
        trace = self.tap.take()
        if trace.level_shapes is None:
            raise ValueError(
                "PKD between detectors of different kinds needs an encoder that tells the shapes of its maps, such as "
                "Deformable DETR's or RT-DETR's; DETR's, Conditional DETR's and DAB-DETR's do not."
            )
        return trace.maps


class FeatureDistiller(Distiller):
    """PKD for two models of different kinds, such as a dense student of a Deformable DETR.

    Args:
        student, teacher: Each a detector of crosskd_hf or of the families in `FAMILIES`.
        config: Of it count `loss_weights` (`loss_feat_kd`) and `statistics`; `methods` must be ("pkd",).
        pixels: Turns the student's pixel values into the teacher's; `None` if both are normalised alike.

    If the widths differ, a trainable 1x1 convolution takes the student's maps to the teacher's width.

    Raises:
        ValueError: Other methods than PKD, which need two models of one kind.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        config: DistillationConfig,
        pixels: PixelAdapter | None = None,
    ):
        super().__init__(teacher)
        if tuple(config.methods) != ("pkd",):
            raise ValueError(
                f"methods={tuple(config.methods)} can't lead from {type(teacher).__name__} to "
                f"{type(student).__name__}: only models of one kind (dense, Faster R-CNN, DETR-type) can finish each "
                "other's features. What works between kinds is PKD on their feature maps, methods=('pkd',). For "
                "CrossKD choose a teacher of the student's kind."
            )
        self.config, self.pixels = config, pixels
        self.weights = config.weights({"loss_feat_kd": WEIGHT})
        self._sources = _source(student, student=True), _source(teacher, student=False)
        self.student_request = dict(self._sources[0].request)
        self.pearson = PearsonKD(
            self._sources[0].width, self._sources[1].width, self.weights["loss_feat_kd"], config.statistics
        )

    def forward(self, outputs: Any, inputs: Mapping[str, Any]) -> dict[str, LossPart]:
        """See :meth:`Distiller.forward`; `outputs` must come with `student_request`."""
        pixels = inputs["pixel_values"]
        student = by_stride(self._sources[0].maps(outputs), pixels)
        teacher = by_stride(self._teacher_maps(pixels, inputs.get("pixel_mask")), pixels)
        common = sorted(student.keys() & teacher.keys())
        if not common:
            raise ValueError(
                f"The student has maps of strides {sorted(student)}, the teacher of {sorted(teacher)}: PKD compares "
                "equal strides. Choose feature levels that both have."
            )
        return {"loss_feat_kd": self.pearson([student[s] for s in common], [teacher[s] for s in common])}

    @torch.no_grad()
    def _teacher_maps(self, pixels: Tensor, mask: Tensor | None) -> list[Tensor]:
        pixels = pixels if self.pixels is None else self.pixels(pixels, mask)
        source = self._sources[1]
        return source.maps(self.teacher(pixel_values=pixels, pixel_mask=mask, **source.request))

    def describe(self) -> dict[str, Any]:
        """See :meth:`Distiller.describe`."""
        return {
            "cut": None,
            "methods": list(self.config.methods),
            "statistics": self.config.statistics,
            "weights": dict(self.weights),
            "adapters": {name: list(tensor.shape) for name, tensor in self.named_parameters()},
        }


def _source(model: PreTrainedModel, student: bool) -> FeatureSource:
    return Pyramid(model) if isinstance(model, PyramidDetector) else Memory(model, student)


def by_stride(maps: list[Tensor], pixels: Tensor) -> dict[int, Tensor]:
    """Maps by their stride, the power of two nearest to the ratio of sizes; the first of a stride counts.

    Args:
        maps: (B, C, H_l, W_l) each, of one model.
        pixels: (B, 3, H, W).
    """
    found: dict[int, Tensor] = {}
    for feature in maps:
        ratio = math.prod(pixels.shape[-2:]) / math.prod(feature.shape[-2:])
        found.setdefault(2 ** round(math.log2(ratio) / 2), feature)
    return found
