"""The facts that tell one DETR-type architecture of transformers from another, and nothing else.

All of them are an encoder that makes a memory and a decoder whose layers read it, called with keyword arguments. What
differs is where the heads sit, what a box is refined from, and how queries are multiplied in training.
"""

import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.backbone_utils import BackboneMixin
from transformers.models.d_fine.modeling_d_fine import distance2bbox, weighting_function
from transformers.models.lw_detr.modeling_lw_detr import refine_bboxes
from transformers.utils import ModelOutput

# Arguments of a decoder layer that belong to the queries; all others belong to the memory or to the whole batch.
QUERY_ARGUMENTS = (
    "hidden_states",
    "object_queries_position_embeddings",
    "query_position_embeddings",
    "position_embeddings",
    "query_sine_embed",
    "reference_points",
)


class Prediction(NamedTuple):
    """What the heads say of Q queries after one decoder layer."""

    logits: Tensor  # (B, Q, K), with softmax families K counts "no object" as the last class
    boxes: Tensor  # (B, Q, 4) cxcywh in [0, 1], relative to the unpadded image


@dataclass
class Trace:
    """One pass of a decoder: arguments by name, of it and of each layer, and what each layer and the decoder gave."""

    arguments: dict[str, Any]
    layers: list[dict[str, Any]] = field(default_factory=list)
    hidden_states: list[Tensor] = field(default_factory=list)  # per layer (B, Q, C)
    output: ModelOutput | None = None

    @property
    def memory(self) -> Tensor:
        """What the decoder reads, (B, S, C)."""
        return self.arguments["encoder_hidden_states"]

    @property
    def level_shapes(self) -> list[tuple[int, int]] | None:
        """(height, width) of each level of the memory; None where the decoder isn't told (one level)."""
        shapes = self.arguments.get("spatial_shapes_list")
        return None if shapes is None else [(int(height), int(width)) for height, width in shapes]

    @property
    def maps(self) -> list[Tensor]:
        """The memory as maps (B, C, H_l, W_l); a row of places where the shapes aren't known."""
        shapes = self.level_shapes or [(1, self.memory.shape[1])]
        levels = self.memory.split([height * width for height, width in shapes], 1)
        return [level.mT.unflatten(2, shape) for level, shape in zip(levels, shapes, strict=True)]


class DecoderTap:
    """Hooks that keep the latest pass of a decoder until it is taken.

    Args:
        model: A detection model of transformers; its decoder is `model.model.decoder`. Copies and pickles of it work;
            there the hooks keep nothing.
        layers: Whether to keep the arguments and outputs of the layers too.
        owner: The hooks are taken off when it is garbage-collected; with None they stay until `remove`.
        predictions: Whether to keep passes in evaluation mode without gradient too. A teacher's are all like that; a
            student's are evaluation.
    """

    def __init__(self, model: Any, layers: bool, owner: object | None = None, predictions: bool = True) -> None:
        decoder = model.model.decoder
        self._open, self._predictions = True, predictions
        self._latest: Trace | None = None
        self._handles = [
            decoder.register_forward_pre_hook(self._enter, with_kwargs=True),
            decoder.register_forward_hook(self._leave),
        ]
        for layer in decoder.layers if layers else ():
            self._handles += [
                layer.register_forward_pre_hook(self._enter_layer, with_kwargs=True),
                layer.register_forward_hook(self._leave_layer),
            ]
        if owner is not None:
            weakref.finalize(owner, self.remove).atexit = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Nobody takes what a copy's hooks find, and the tensors of a pass don't belong into a pickled model."""
        return _closed_tap, ()

    def _enter(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._open and (self._predictions or decoder.training or torch.is_grad_enabled()):
            self._latest = Trace(_by_name(decoder, args, kwargs))

    def _enter_layer(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._latest is not None and self._latest.output is None:  # not in a cross pass, not when recomputing
            self._latest.layers.append(_by_name(layer, args, kwargs))

    def _leave_layer(self, layer: Any, args: tuple[Any, ...], output: Any) -> None:
        if self._latest is not None and self._latest.output is None:
            self._latest.hidden_states.append(first(output))

    def _leave(self, decoder: Any, args: tuple[Any, ...], output: ModelOutput) -> None:
        if self._latest is not None:
            self._latest.output = output

    def take(self) -> Trace:
        """Hand out the latest pass and forget it.

        Raises:
            RuntimeError: The model has not been run since the last call.
        """
        trace, self._latest = self._latest, None
        if trace is None or trace.output is None:
            raise RuntimeError(
                "No pass of the decoder to distil from: run the model once before each call of the distiller, the very "
                "model (or a wrapper of it) that the distiller was built with, and a student not just to predict (in "
                "evaluation mode without gradient)."
            )
        return trace

    def remove(self) -> None:
        """Take the hooks off the model, and forget its latest pass."""
        self._latest = None
        for handle in self._handles:
            handle.remove()


def _closed_tap() -> DecoderTap:
    tap = DecoderTap.__new__(DecoderTap)
    tap._open, tap._predictions, tap._latest, tap._handles = False, False, None, []
    return tap


def first(output: Any) -> Tensor:
    """Hidden states of a decoder layer, which some families return in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _by_name(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = inspect.signature(module.forward).parameters
    return dict(zip(names, args, strict=False)) | kwargs


def inverse_sigmoid(values: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)) for x in [0, 1], numerator and denominator at least `eps`, as in every DETR of transformers."""
    values = values.clamp(0, 1)
    return (values.clamp(min=eps) / (1 - values).clamp(min=eps)).log()


def refine(delta: Tensor, reference: Tensor) -> Tensor:
    """Move references (..., 2 or 4) in [0, 1] by (..., 4) on the logit scale; points have no size to start from."""
    start = inverse_sigmoid(reference.float())
    if reference.shape[-1] == 2:
        start = torch.cat([start, torch.zeros_like(start)], -1)
    return (delta.float() + start).sigmoid()


Context = tuple[Tensor, ...]  # (B, Q, ...) each: what the heads need besides hidden states, without gradient


@dataclass(frozen=True)
class DetrFamily:
    """One architecture.

    Args:
        context: What layer l's heads need besides hidden states, from the model and the pass whose queries are used.
        predict: The model's heads after layer l on hidden states (B, Q, C) and such a context.
        levels: Number of feature levels of the memory, from the config.
        strides: Pixels per cell of each level of the memory, from the model.
        width: Channels of the memory, from the config.
        softmax: Whether classes compete and the last one is "no object", rather than one sigmoid per class.
        student_queries: Whether heads of the teacher can continue from the student's queries.
        query_arguments: Arguments of a decoder layer that go with the queries rather than with the memory.
        own_queries: Where in a pass the queries are that are there at inference too, from their number.
        reads_mask: Whether padding matters to it: its boxes are relative to the unpadded image. Otherwise they are
            relative to all the pixels that it gets, and images must not be padded.
    """

    context: Callable[[Any, Trace, int], Context]
    predict: Callable[[Any, int, Tensor, Context], Prediction]
    levels: Callable[[Any], int]
    strides: Callable[[Any], tuple[int, ...]]
    width: Callable[[Any], int] = lambda config: config.d_model
    softmax: bool = False
    student_queries: bool = True
    query_arguments: tuple[str, ...] = QUERY_ARGUMENTS
    own_queries: Callable[[int, Trace], slice] = lambda count, trace: slice(None)
    reads_mask: bool = True


def _feature_levels(config: Any) -> int:
    return config.num_feature_levels


def _one_level(config: Any) -> int:
    return 1


def _backbone_strides(model: Any) -> tuple[int, ...]:
    """Strides of the maps that a convolutional backbone hands out, finest first."""
    for module in model.model.modules():
        if "feature_info" in vars(module):  # a net of timm
            return tuple(module.feature_info.reduction())
        if isinstance(module, BackboneMixin):  # a net of transformers: stage i halves the image i + 1 times
            return tuple(2 ** (index + 1) for index in module.out_indices)
    raise ValueError(f"No backbone was found in {type(model).__name__}, so the strides of its features are unknown.")


def _doubled(strides: Sequence[int], levels: int) -> tuple[int, ...]:
    """The first `levels` strides; where there are fewer, each further one is twice the one before."""
    found = list(strides)[:levels]
    while len(found) < levels:
        found.append(2 * found[-1])
    return tuple(found)


def _multi_scale_strides(model: Any) -> tuple[int, ...]:
    return _doubled(_backbone_strides(model)[-model.config.num_feature_levels :], model.config.num_feature_levels)


def _last_stride(model: Any) -> tuple[int, ...]:
    return _backbone_strides(model)[-1:]


def _hybrid_strides(model: Any) -> tuple[int, ...]:
    return _doubled(model.config.feat_strides, model.config.num_feature_levels)


def _patch_strides(model: Any) -> tuple[int, ...]:
    """A vision transformer's one map, scaled to each level by the projector."""
    config = model.config
    scales = config.to_dict().get("projector_scale_factors") or [1.0] * config.num_feature_levels
    return tuple(round(config.backbone_config.patch_size / scale) for scale in scales)


# Deformable DETR: heads on the model. Without box refinement the reference is one point for all layers.
def _deformable_context(model: Any, trace: Trace, layer: int) -> Context:
    output: Any = trace.output
    if layer == 0:
        return (trace.arguments["reference_points"].detach(),)
    return (output.intermediate_reference_points[:, layer - 1].detach(),)


def _deformable_predict(model: Any, layer: int, hidden: Tensor, context: Context) -> Prediction:
    return Prediction(model.class_embed[layer](hidden), refine(model.bbox_embed[layer](hidden), context[0]))


# RT-DETR and RT-DETRv2: heads in the decoder; in training the denoising queries come first.
def _layer_reference(model: Any, trace: Trace, layer: int) -> Context:
    return (trace.layers[layer]["reference_points"][:, :, 0].detach(),)


def _rt_detr_predict(model: Any, layer: int, hidden: Tensor, context: Context) -> Prediction:
    decoder = model.model.decoder
    return Prediction(decoder.class_embed[layer](hidden), refine(decoder.bbox_embed[layer](hidden), context[0]))


def _last_queries(count: int, trace: Trace) -> slice:
    return slice(trace.arguments["inputs_embeds"].shape[1] - count, None)


# D-FINE and DEIMv2: a layer adds to the box distribution of the layer before and reads that layer's hidden states.
def _d_fine_context(model: Any, trace: Trace, layer: int) -> Context:
    output: Any = trace.output
    initial = output.initial_reference_points[:, 0].detach()
    previous = trace.layers[layer]["hidden_states"].detach()
    corners = initial.new_zeros(())
    for index in range(layer):
        before = trace.layers[index]["hidden_states"].detach() if index else 0
        corners = corners + model.model.decoder.bbox_embed[index](trace.hidden_states[index].detach() + before)
    return initial, (previous if layer else torch.zeros_like(previous)), corners


def _d_fine_predict(model: Any, layer: int, hidden: Tensor, context: Context) -> Prediction:
    decoder = model.model.decoder
    initial, previous, corners = context
    corners = decoder.bbox_embed[layer](hidden + previous) + corners
    bins = weighting_function(decoder.max_num_bins, decoder.up, decoder.reg_scale)
    boxes = distance2bbox(initial, decoder.integral(corners, bins), decoder.reg_scale)
    return Prediction(decoder.lqe_layers[layer](decoder.class_embed[layer](hidden), corners), boxes)


# DETR, Conditional DETR: one head for all layers after a common norm, which transformers applies to the last layer
# once more if it is asked for auxiliary losses.
def _normed(model: Any, layer: int, hidden: Tensor) -> Tensor:
    decoder = model.model.decoder
    hidden = decoder.layernorm(hidden)
    twice = model.config.auxiliary_loss and layer == len(decoder.layers) - 1
    return decoder.layernorm(hidden) if twice else hidden


# Their mask of the padded memory has a row for every query: (B, 1, Q, S).
_MASKED = (*QUERY_ARGUMENTS, "encoder_attention_mask")


def _no_context(model: Any, trace: Trace, layer: int) -> Context:
    return ()


def _detr_predict(model: Any, layer: int, hidden: Tensor, context: Context) -> Prediction:
    hidden = _normed(model, layer, hidden)
    return Prediction(model.class_labels_classifier(hidden), model.bbox_predictor(hidden).float().sigmoid())


def _conditional_context(model: Any, trace: Trace, layer: int) -> Context:
    output: Any = trace.output
    return (output.reference_points.transpose(0, 1).detach(),)


def _conditional_predict(model: Any, layer: int, hidden: Tensor, context: Context) -> Prediction:
    hidden = _normed(model, layer, hidden)
    return Prediction(model.class_labels_classifier(hidden), refine(model.bbox_predictor(hidden), context[0]))


# DAB-DETR: as above, but every layer has its own references.
def _dab_context(model: Any, trace: Trace, layer: int) -> Context:
    output: Any = trace.output
    return (output.reference_points[layer].detach(),)


def _dab_predict(model: Any, layer: int, hidden: Tensor, context: Context) -> Prediction:
    hidden = model.model.decoder.layernorm(hidden)
    return Prediction(model.class_embed(hidden), refine(model.bbox_predictor(hidden), context[0]))


# LW-DETR and RF-DETR: no refinement between layers; in training queries come in groups, the first is inference's.
def _lw_detr_context(model: Any, trace: Trace, layer: int) -> Context:
    return (trace.arguments["reference_points"].detach(),)


def _lw_detr_predict(model: Any, layer: int, hidden: Tensor, context: Context) -> Prediction:
    hidden = model.model.decoder.layernorm(hidden)
    return Prediction(model.class_embed(hidden), refine_bboxes(context[0].float(), model.bbox_embed(hidden).float()))


def _first_queries(count: int, trace: Trace) -> slice:
    return slice(count)


_RT_DETR = DetrFamily(
    _layer_reference, _rt_detr_predict, _feature_levels, _hybrid_strides, own_queries=_last_queries, reads_mask=False
)
_D_FINE = DetrFamily(
    _d_fine_context, _d_fine_predict, _feature_levels, _hybrid_strides, student_queries=False, reads_mask=False
)
_LW_DETR = DetrFamily(_lw_detr_context, _lw_detr_predict, _feature_levels, _patch_strides, own_queries=_first_queries)

FAMILIES: dict[str, DetrFamily] = {
    "deformable_detr": DetrFamily(_deformable_context, _deformable_predict, _feature_levels, _multi_scale_strides),
    "rt_detr": _RT_DETR,
    "rt_detr_v2": _RT_DETR,
    "d_fine": _D_FINE,
    "deimv2": _D_FINE,
    "detr": DetrFamily(_no_context, _detr_predict, _one_level, _last_stride, softmax=True, query_arguments=_MASKED),
    "conditional_detr": DetrFamily(
        _conditional_context, _conditional_predict, _one_level, _last_stride, query_arguments=_MASKED
    ),
    "dab-detr": DetrFamily(
        _dab_context,
        _dab_predict,
        _one_level,
        _last_stride,
        width=lambda config: config.hidden_size,
        query_arguments=_MASKED,
    ),
    "lw_detr": _LW_DETR,
    "rf_detr": _LW_DETR,
}
