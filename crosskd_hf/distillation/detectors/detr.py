"""DETR-type detectors of transformers: an encoder's memory, and a decoder whose layers read it.

The cut is between encoder and decoder. Every layer of the teacher's decoder runs twice from the same query: on the
teacher's memory, which gives the target, and on the student's, which gives the cross prediction. Both are decoded by
the same head from the same reference, so gradient enters the student through its memory alone (or, with the student's
queries, through its decoder too). The student's own heads are never asked to agree with the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

from ...models.boxes import to_absolute
from ..passes import Batch, Comparison, Cut, DetectorView, FeatureMap, Needs, Pass, Prediction, Role, SplitHead
from ..pixels import PixelAdapter
from .decoder_tap import DecoderTap, Trace, first
from .detr_families import FAMILIES


def detr_classes() -> list[type[PreTrainedModel]]:
    """The class of each entry of `FAMILIES`."""
    return [getattr(transformers, MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES[name]) for name in FAMILIES]


class DetrView(SplitHead):
    """A DETR-type detector. Its features are the encoder's memory as maps, its rows are the decoder's queries.

    What its decoder gets is taken on the way: hooks are on the model as long as the view lives, or until :meth:`close`.
    `Pass.head` holds that :class:`Trace`. Its tap is named "memory", (B, S, C).
    """

    family = "DETR family"
    offers = frozenset({"features", "predictions"})
    kind = "queries"
    by_class = False  # both operands come from the teacher's heads, which know what its queries mean

    def __init__(self, model: PreTrainedModel, role: Role, pixels: PixelAdapter | None = None) -> None:
        super().__init__(model, role, pixels)
        self.facts = FAMILIES[model.config.model_type]
        self.softmax = self.facts.softmax
        self.strides = self.all_strides = self.facts.strides(model)
        self.channels = (self.facts.width(model.config),) * len(self.strides)
        self.tap: DecoderTap | None = None

    @property
    def layers(self) -> int:
        """Decoder layers that have heads: D-FINE keeps further ones for training its own distillation."""
        return self.model.config.decoder_layers  # type: ignore[no-any-return]

    # ---- Passes ----

    def prepare(self, needs: Needs) -> dict[str, Any]:
        cuts = [need for need in needs if isinstance(need, Cut)]
        answers = bool(cuts) and self.role == "teacher"
        layers = answers or "predictions" in needs or any(cut.queries == self.role for cut in cuts)
        self.close()
        self.tap = DecoderTap(self.model, layers, owner=self, predictions=self.role == "teacher")
        return {}

    def close(self) -> None:
        super().close()
        if self.tap is not None:
            self.tap.remove()

    def read(self, outputs: Any, batch: Batch) -> Pass:
        """The outputs aren't read: what the decoder was given is taken on its way."""
        assert self.tap is not None, "request comes first"
        trace = self.tap.take()
        trace.own_queries = self.facts.own_queries(self.model.config.num_queries, trace)
        found = Pass(self._maps(trace, batch), head=trace, decode=lambda boxes: to_absolute(boxes, batch.sizes))
        if "predictions" in self.needs:
            found.predictions = self._predictions(trace)
        return found

    def _maps(self, trace: Trace, batch: Batch) -> list[FeatureMap]:
        if "features" not in self.needs:
            return []
        image = height, width = int(batch.pixel_values.shape[-2]), int(batch.pixel_values.shape[-1])
        shapes = trace.level_shapes or [(math.ceil(height / s), math.ceil(width / s)) for s in self.all_strides]
        self._check_shapes(shapes, trace.memory, image)
        levels = trace.memory.split([rows * columns for rows, columns in shapes], 1)
        values = [level.mT.unflatten(2, shape) for level, shape in zip(levels, shapes, strict=True)]
        return self.maps(values, self.all_strides)

    def _check_shapes(self, shapes: list[tuple[int, int]], memory: Tensor, image: tuple[int, int]) -> None:
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
                f"{image} pixels, but its configuration says strides {strides}. Methods that read features need the "
                "strides: take a backbone whose strides the configuration tells."
            )

    def _predictions(self, trace: Trace) -> list[Prediction]:
        """Of the queries that are there at inference too."""
        own = trace.own_queries
        found = []
        for layer in range(self.layers):
            head = self.facts.predict(
                self.model, layer, trace.hidden_states[layer], self.facts.context(self.model, trace, layer)
            )
            found.append(Prediction(head.logits[:, own], head.regression[:, own]))
        return found

    # ---- The decoder on another memory ----

    def check_cut(self, student: DetectorView, cut: Cut, own: Cut) -> None:
        assert isinstance(student, DetrView)
        given, needed = len(student.all_strides), len(self.all_strides)
        if given != needed:
            raise ValueError(
                f"The student's memory has {given} feature levels, the teacher's decoder reads {needed}. Build the "
                f"student with num_feature_levels={needed} and a backbone of the same strides, or choose a teacher "
                f"with {given}."
            )
        if own.queries == "student":
            self._check_student_queries(student)

    def _check_student_queries(self, student: DetrView) -> None:
        names = student.name, self.name
        if names[0] != names[1] or not self.facts.student_queries:
            raise ValueError(
                f"queries='student' needs two models of one family whose heads look at one layer alone; given are "
                f"'{names[0]}' and '{names[1]}'. Use queries='teacher'."
            )
        if student.layers < self.layers:
            raise ValueError(
                f"The student's decoder has {student.layers} layers, so there are no queries for the teacher's "
                f"{self.layers}. Use queries='teacher', or give the student as many decoder_layers."
            )
        if student.channels[:1] != self.channels[:1]:
            raise ValueError(
                f"The student's queries are {student.channels[0]} wide, the teacher's decoder is {self.channels[0]}. "
                "Use queries='teacher', where only the memory has to be adapted, or give both the same d_model."
            )

    def tap_widths(self, cut: Cut) -> dict[str, int]:
        return {"memory": self.facts.width(self.model.config)}

    def taps(self, own: Pass, cut: Cut) -> dict[str, list[Tensor]]:
        return {"memory": [own.head.memory]}

    def cross(
        self, features: dict[str, list[Tensor]], source: Pass, own: Pass, cut: Cut, classes: list[int] | None
    ) -> Iterator[Comparison]:
        _check_levels(source.head, own.head)
        (memory,), trace = features["memory"], own.head
        for layer in range(self.layers):
            module, arguments = self.model.model.decoder.layers[layer], trace.layers[layer]
            if cut.queries == "teacher":
                context = self._frozen_context(trace, layer)
                with torch.no_grad():
                    target = self.facts.predict(self.model, layer, trace.hidden_states[layer], context)
            else:  # as in the authors' code, the content of a query is constant in the target, its position is not
                queries = source.head.own_queries
                context = tuple(tensor[:, queries] for tensor in self._frozen_context(source.head, layer))
                arguments = arguments | self._query_arguments(source.head.layers[layer], queries)
                held = arguments | {"hidden_states": arguments["hidden_states"].detach()}
                target = self.facts.predict(self.model, layer, first(module(**held)), context)
            hidden = first(module(**{**arguments, "encoder_hidden_states": memory}))
            yield self._comparison(self.facts.predict(self.model, layer, hidden, context), target, own)

    def beyond_cut(self, cut: Cut) -> list[nn.Parameter]:
        """Decoder and heads; the heads alone if the decoder's queries are used."""
        heads = [module for name, module in self.model.named_children() if name != "model"]
        modules = heads if cut.queries == "student" else [*heads, self.model.model.decoder]
        return [parameter for module in modules for parameter in module.parameters()]

    def _comparison(self, prediction: Prediction, target: Prediction, own: Pass) -> Comparison:
        assert own.decode is not None
        weight = target.logits.new_ones(target.logits.shape[:2], dtype=torch.float32)
        number = weight.new_full((), weight.numel())
        pair = Comparison(prediction, target, "queries", self.softmax, own.decode, weight, None, number)
        logits = target.logits.float()  # as the boxes of a target, its confidence isn't constant to a student's query
        scores = logits.softmax(-1)[..., :-1] if self.softmax else logits.sigmoid()
        return pair._replace(confidence=scores.amax(-1))

    @torch.no_grad()
    def _frozen_context(self, trace: Trace, layer: int) -> tuple[Tensor, ...]:
        return self.facts.context(self.model, trace, layer)

    def _query_arguments(self, arguments: dict[str, Any], own: slice) -> dict[str, Any]:
        """Those arguments of a student's decoder layer that belong to its queries; references carry no gradient."""
        names = [name for name in self.facts.query_arguments if arguments.get(name) is not None]
        taken = {name: arguments[name][:, own] for name in names}
        if "reference_points" in taken:
            taken["reference_points"] = taken["reference_points"].detach()
        return taken


def _check_levels(student: Trace, teacher: Trace) -> None:
    ours, theirs = student.level_shapes, teacher.level_shapes
    lengths = student.memory.shape[1], teacher.memory.shape[1]
    if lengths[0] != lengths[1] or (ours is not None and theirs is not None and ours != theirs):
        raise ValueError(
            f"The student's memory has levels of {ours or lengths[0]} locations, the teacher's of "
            f"{theirs or lengths[1]}: their strides differ. Take backbones and feature levels of equal strides."
        )
