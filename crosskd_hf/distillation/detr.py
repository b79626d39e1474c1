"""CrossKD for DETR-type detectors: the student's encoder memory through the frozen teacher's decoder.

The cut is between encoder and decoder. Every layer of the teacher's decoder runs twice from the same query: on the
teacher's memory, which gives the target, and on the student's, which gives the cross prediction. Both are decoded by
the same head from the same reference, so gradient enters the student through its memory alone (or, with the student's
queries, through its decoder too). The student's own heads are never asked to agree with the teacher.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import is_scipy_available

from crosskd_hf.models.boxes import aligned_iou, image_sizes, to_absolute
from crosskd_hf.models.losses import LossPart, distribution_kl, quality_focal

from .base import Distiller
from .config import DistillationConfig, Queries
from .detr_families import FAMILIES, DecoderTap, DetrFamily, Prediction, Trace, first
from .pixels import PixelAdapter
from .pkd import PearsonKD

WEIGHTS = {"loss_cls_kd": 1.0, "loss_reg_kd": 1.0, "loss_iou_kd": 1.0, "loss_feat_kd": 1.0}


class DetrDistiller(Distiller):
    """Distils one DETR-type detector of transformers into another.

    Args:
        student, teacher: Models of the families in `FAMILIES`, of as many feature levels. The families may differ with
            the teacher's queries. Classes may differ: both operands of every distance come from the teacher's heads.
        config: Of it count `methods` (crosskd, pkd), `queries`, `box_loss`, `beta` (0 if not given: plain cross-entropy
            with soft targets, whose value at equality is the entropy of the target), `temperature` (of families with
            softmax classes, 1 if not given), `loss_weights` and `statistics` (of pkd).
        pixels: Turns the student's pixel values into the teacher's; `None` if both are normalised alike.

    The parts of layer l are named `d<l>.loss_cls_kd` and so on; their sums over layers are the paper's losses.
    If the widths differ, a trainable projection takes the student's memory to the teacher's width.

    Raises:
        ValueError: A family that isn't supported, other feature levels, or options that don't fit the pair.
        ImportError: scipy is missing, which the supervised loss of every DETR needs.

    Source: supplement of the paper, table 3, and what the authors' deformable-detr branch computes.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        config: DistillationConfig,
        pixels: PixelAdapter | None = None,
    ) -> None:
        super().__init__(teacher)
        if not is_scipy_available():
            raise ImportError("The matching of DETR-type models needs scipy, which is not installed: pip install scipy")
        self.family = check_pair(student, teacher, config.queries)
        _check_options(config)
        self.config, self.pixels = config, pixels
        self.num_queries = student.config.num_queries
        self.weights = config.weights(WEIGHTS)
        self.beta = config.beta or 0.0
        self.temperature = config.temperature or 1.0
        ours = FAMILIES[student.config.model_type].width(student.config)
        theirs = self.family.width(teacher.config)
        self.projector: nn.Linear | None = None
        if "crosskd" in config.methods and ours != theirs:
            self.projector = _projector(ours, theirs, config.queries)
        self.pearson: PearsonKD | None = None
        if "pkd" in config.methods:
            self.pearson = PearsonKD(ours, theirs, self.weights["loss_feat_kd"], config.statistics)
        self._student_tap = DecoderTap(student, layers=config.queries == "student", owner=self, predictions=False)
        self._teacher_tap = DecoderTap(teacher, layers=True, owner=self)

    def forward(self, outputs: Any, inputs: Mapping[str, Any]) -> dict[str, LossPart]:
        """Losses of the student's latest pass.

        Args:
            outputs: Of that pass. They aren't read: what the decoder was given is taken on its way.
            inputs: `pixel_values` (B, 3, H, W) and, for padded batches, `pixel_mask` (B, H, W).
        """
        pixels, mask = inputs["pixel_values"], inputs.get("pixel_mask")
        student = self._student_tap.take()
        teacher = self._run_teacher(pixels, mask)
        _check_levels(student, teacher)
        parts: dict[str, LossPart] = {}
        if "crosskd" in self.config.methods:
            memory = student.memory if self.projector is None else self.projector(student.memory)
            sizes = image_sizes(pixels, mask)
            for layer, (cross, target) in enumerate(self.predictions(memory, student, teacher)):
                parts |= {f"d{layer}.{key}": part for key, part in self._layer_parts(cross, target, sizes).items()}
        if self.pearson is not None:
            parts["loss_feat_kd"] = self.pearson(student.maps, teacher.maps)
        return parts

    def describe(self) -> dict[str, Any]:
        """What is distilled and how, for `distillation.json`."""
        return {
            "cut": "encoder memory",
            "methods": list(self.config.methods),
            "queries": self.config.queries,
            "box_loss": self.config.box_loss,
            "beta": self.beta,
            "temperature": self.temperature if self.family.softmax else None,
            "statistics": self.config.statistics,
            "weights": dict(self.weights),
            "decoder_layers": _decoder_layers(self.teacher),
            "adapters": {name: list(tensor.shape) for name, tensor in self.named_parameters()},
        }

    def silent_parameters(self, student: PreTrainedModel) -> list[nn.Parameter]:
        """The student's decoder and heads; its heads alone if its queries are used."""
        model: Any = student
        heads = [module for name, module in model.named_children() if name != "model"]
        modules = heads if self.config.queries == "student" else [*heads, model.model.decoder]
        return [parameter for module in modules for parameter in module.parameters()]

    def predictions(self, memory: Tensor, student: Trace, teacher: Trace) -> Iterator[tuple[Prediction, Prediction]]:
        """Cross prediction and target of every layer of the teacher's decoder.

        Args:
            memory: (B, S, C) of the student, in the teacher's width.
            student, teacher: Passes of the two decoders on the same images.
        """
        model: Any = self.teacher
        for layer in range(_decoder_layers(model)):
            module = model.model.decoder.layers[layer]
            arguments = teacher.layers[layer]
            if self.config.queries == "teacher":
                context = self._frozen(self.family.context, teacher, layer)
                with torch.no_grad():
                    target = self.family.predict(model, layer, teacher.hidden_states[layer], context)
            else:
                own = self.family.own_queries(self.num_queries, student)
                context = tuple(tensor[:, own] for tensor in self._frozen(self.family.context, student, layer))
                arguments = arguments | _query_arguments(student.layers[layer], self.family.query_arguments, own)
                held = arguments | {"hidden_states": arguments["hidden_states"].detach()}
                target = self.family.predict(model, layer, first(module(**held)), context)
            hidden = first(module(**{**arguments, "encoder_hidden_states": memory}))
            yield self.family.predict(model, layer, hidden, context), target

    def remove_hooks(self) -> None:
        """Take the hooks off both models; this also happens when the distiller is garbage-collected."""
        self._student_tap.remove()
        self._teacher_tap.remove()

    def __enter__(self) -> "DetrDistiller":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove_hooks()

    @torch.no_grad()
    def _run_teacher(self, pixels: Tensor, mask: Tensor | None) -> Trace:
        pixels = pixels if self.pixels is None else self.pixels(pixels, mask)
        self.teacher(pixel_values=pixels, pixel_mask=mask)
        return self._teacher_tap.take()

    @torch.no_grad()
    def _frozen(self, context: Any, trace: Trace, layer: int) -> tuple[Tensor, ...]:
        return context(self.teacher, trace, layer)

    def _layer_parts(self, cross: Prediction, target: Prediction, sizes: Tensor) -> dict[str, LossPart]:
        """Distances of one layer, all (B, Q) rows weighted and summed; confidence weighs the boxes."""
        confidence, distance = self._class_distance(cross.logits, target.logits)
        boxes, goal = cross.boxes.float(), target.boxes.float()
        pixels, goal_pixels = to_absolute(boxes, sizes), to_absolute(goal, sizes)
        rows = {"loss_cls_kd": distance}
        if self.config.box_loss == "l1_pixel":
            rows["loss_reg_kd"] = confidence * (pixels - goal_pixels).abs().sum(-1)
        if self.config.box_loss == "l1+giou":
            rows["loss_reg_kd"] = confidence * (boxes - goal).abs().sum(-1)
        if self.config.box_loss in ("l1+giou", "giou"):
            rows["loss_iou_kd"] = confidence * (1 - aligned_iou(pixels, goal_pixels, generalized=True))
        queries = confidence.new_tensor(confidence.numel())
        return {
            key: LossPart(self.weights[key] * row.sum(), queries)
            if key == "loss_cls_kd"
            else LossPart(self.weights[key] * row.sum(), 4 * confidence.sum(), floor=1e-7)
            for key, row in rows.items()
        }

    def _class_distance(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Confidence of the target and distance of the classes, both (B, Q)."""
        logits, target = logits.float(), target.float()
        if self.family.softmax:
            return target.softmax(-1)[..., :-1].amax(-1), distribution_kl(logits, target, self.temperature)
        probability = target.sigmoid()
        return probability.amax(-1), quality_focal(logits, probability.detach(), self.beta).sum(-1)


def check_pair(student: PreTrainedModel, teacher: PreTrainedModel, queries: Queries = "teacher") -> DetrFamily:
    """The teacher's family, if the student's memory can go through its decoder.

    Raises:
        ValueError: It can't; the message says why and what can be done.
    """
    family, own = FAMILIES[teacher.config.model_type], FAMILIES[student.config.model_type]
    given, needed = own.levels(student.config), family.levels(teacher.config)
    if given != needed:
        raise ValueError(
            f"The student's memory has {given} feature levels, the teacher's decoder reads {needed}. Build the student "
            f"with num_feature_levels={needed} and a backbone of the same strides, or choose a teacher with {given}."
        )
    if queries == "student" and (student.config.model_type != teacher.config.model_type or not family.student_queries):
        raise ValueError(
            f"queries='student' needs two models of one family whose heads look at one layer alone; given are "
            f"'{student.config.model_type}' and '{teacher.config.model_type}'. Use queries='teacher'."
        )
    if queries == "student" and _decoder_layers(student) < _decoder_layers(teacher):
        raise ValueError(
            f"The student's decoder has {_decoder_layers(student)} layers, so there are no queries for the teacher's "
            f"{_decoder_layers(teacher)}. Use queries='teacher', or give the student as many decoder_layers."
        )
    return family


def _check_options(config: DistillationConfig) -> None:
    if "kd" in config.methods:
        raise ValueError(
            "methods has 'kd', which compares predictions at the same places; the queries of two DETR-type models have "
            "no such order. Use methods=('crosskd',), or ('crosskd', 'pkd')."
        )
    if config.cut is not None or config.teacher_cut is not None:
        raise ValueError("DETR-type models are always cut between encoder and decoder: leave cut and teacher_cut out.")


def _projector(ours: int, theirs: int, queries: Queries) -> nn.Linear:
    if queries == "student":
        raise ValueError(
            f"The student's queries are {ours} wide, the teacher's decoder is {theirs}. Use queries='teacher', where "
            "only the memory has to be projected, or give both the same d_model."
        )
    return nn.Linear(ours, theirs)


def _decoder_layers(model: Any) -> int:
    """Layers that have heads: D-FINE keeps further ones for training its own distillation."""
    return model.config.decoder_layers


def _check_levels(student: Trace, teacher: Trace) -> None:
    ours, theirs = student.level_shapes, teacher.level_shapes
    lengths = student.memory.shape[1], teacher.memory.shape[1]
    if lengths[0] != lengths[1] or (ours is not None and theirs is not None and ours != theirs):
        raise ValueError(
            f"The student's memory has levels of {ours or lengths[0]} places, the teacher's of {theirs or lengths[1]}: "
            "their strides differ. Take backbones and feature levels of equal strides."
        )


def _query_arguments(arguments: Mapping[str, Any], names: tuple[str, ...], own: slice) -> dict[str, Any]:
    """Those arguments of a student's decoder layer that belong to its queries; references carry no gradient."""
    taken = {name: arguments[name] for name in names if arguments.get(name) is not None}
    taken = {name: tensor[:, own] for name, tensor in taken.items()}
    if "reference_points" in taken:
        taken["reference_points"] = taken["reference_points"].detach()
    return taken
