"""DETR-type detectors of transformers: an encoder's memory, and a decoder whose layers read it."""

from __future__ import annotations

import math
from typing import Any

import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

from ..detr_families import FAMILIES, DecoderTap, Trace
from ..passes import Batch, Cut, DetectorView, FeatureMap, Needs, Pass, Prediction, Role
from ..pixels import PixelAdapter


def detr_classes() -> list[type[PreTrainedModel]]:
    """The class of each entry of `FAMILIES`."""
    return [getattr(transformers, MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES[name]) for name in FAMILIES]


class DetrView(DetectorView):
    """A DETR-type detector. Its features are the encoder's memory as maps, its rows are the decoder's queries."""

    family = "DETR family"
    offers = frozenset({"features", "predictions"})
    kind = "queries"

    def __init__(self, model: PreTrainedModel, role: Role, pixels: PixelAdapter | None = None) -> None:
        super().__init__(model, role, pixels)
        self.facts = FAMILIES[model.config.model_type]
        self.softmax = self.facts.softmax
        self.strides = self.all_strides = self.facts.strides(model)
        self.channels = (self.facts.width(model.config),) * len(self.strides)
        self.tap: DecoderTap | None = None

    def prepare(self, needs: Needs) -> dict[str, Any]:
        cuts = [need for need in needs if isinstance(need, Cut)]
        answers = self.role == "teacher" and bool(cuts)
        layers = answers or "predictions" in needs or any(cut.queries == self.role for cut in cuts)
        self.close()
        self.tap = DecoderTap(self.model, layers, owner=self, predictions=self.role == "teacher")
        return {}

    def close(self) -> None:
        if self.tap is not None:
            self.tap.remove()

    def read(self, outputs: Any, batch: Batch) -> Pass:
        """The outputs aren't read: what the decoder was given is taken on its way."""
        assert self.tap is not None, "request comes first"
        trace = self.tap.take()
        found = Pass(self._maps(trace, batch), head=trace)
        if "predictions" in self.needs:
            found.predictions = self._predictions(trace)
        return found

    def _maps(self, trace: Trace, batch: Batch) -> list[FeatureMap]:
        if "features" not in self.needs:
            return []
        image = (int(batch.pixel_values.shape[-2]), int(batch.pixel_values.shape[-1]))
        height, width = image
        shapes = trace.level_shapes or [(math.ceil(height / s), math.ceil(width / s)) for s in self.all_strides]
        self._check(shapes, trace.memory, image)
        levels = trace.memory.split([rows * columns for rows, columns in shapes], 1)
        values = [level.mT.unflatten(2, shape) for level, shape in zip(levels, shapes, strict=True)]
        return self.maps(values, self.all_strides)

    def _check(self, shapes: list[Any], memory: Tensor, image: tuple[int, int]) -> None:
        """The strides were read from the configuration; here is the first place where they can be wrong."""
        strides = self.all_strides
        fits = len(shapes) == len(strides) and sum(rows * columns for rows, columns in shapes) == memory.shape[1]
        if not fits or any(
            abs(edge - pixels / stride) >= 1
            for shape, stride in zip(shapes, strides, strict=True)
            for edge, pixels in zip(shape, image, strict=True)
        ):
            raise ValueError(
                f"The {self.role}'s encoder gives maps of {shapes} cells ({memory.shape[1]} in all) for an image of "
                f"{image} pixels, but its configuration says strides {self.all_strides}. Methods that read features "
                "need the strides: take a backbone whose strides the configuration tells."
            )

    def _predictions(self, trace: Trace) -> list[Prediction]:
        layers = range(self.model.config.decoder_layers)
        contexts = [self.facts.context(self.model, trace, layer) for layer in layers]
        heads = [self.facts.predict(self.model, k, trace.hidden_states[k], contexts[k]) for k in layers]
        return [Prediction(head.logits, head.boxes) for head in heads]
