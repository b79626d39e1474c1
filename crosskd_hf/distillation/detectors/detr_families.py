"""The facts that tell one DETR-type architecture of transformers from another, and nothing else.

All of them are an encoder that makes a memory and a decoder whose layers read it, called with keyword arguments. What
differs is where the heads sit, what a box is refined from, and how queries are multiplied in training.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.backbone_utils import BackboneMixin
from transformers.models.d_fine.modeling_d_fine import distance2bbox, weighting_function
from transformers.models.lw_detr.modeling_lw_detr import refine_bboxes

from ..passes import Prediction
from .decoder_tap import Trace

# Arguments of a decoder layer that belong to the queries; all others belong to the memory or to the whole batch.
QUERY_ARGUMENTS = (
    "hidden_states",
    "object_queries_position_embeddings",
    "query_position_embeddings",
    "position_embeddings",
    "query_sine_embed",
    "reference_points",
)


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
        predict: The model's heads after layer l on hidden states (B, Q, C) and such a context: logits (B, Q, K), where
            K counts "no object" as the last class if `softmax`, and boxes (B, Q, 4), cxcywh in [0, 1].
        strides: Pixels per cell of each level of the memory, from the model.
        classifier: The last layer of the class head of a decoder layer, from the model.
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
    strides: Callable[[Any], tuple[int, ...]]
    classifier: Callable[[Any], Any]
    width: Callable[[Any], int] = lambda config: config.d_model
    softmax: bool = False
    student_queries: bool = True
    query_arguments: tuple[str, ...] = QUERY_ARGUMENTS
    own_queries: Callable[[int, Trace], slice] = lambda count, trace: slice(None)
    reads_mask: bool = True


def _backbone_strides(model: Any) -> tuple[int, ...]:
    """Strides of the maps that a convolutional backbone hands out, finest first; of one of no known kind the usual."""
    for module in model.model.modules():
        if "feature_info" in vars(module):  # a net of timm
            return tuple(module.feature_info.reduction())
        if isinstance(module, BackboneMixin):  # a net of transformers: stage i halves the image i + 1 times
            return tuple(2 ** (index + 1) for index in module.out_indices)
    return (4, 8, 16, 32)


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


def _one_of_all_layers(model: Any) -> Any:
    return model.class_embed


def _first_of_the_model(model: Any) -> Any:
    return model.class_embed[0]


def _first_of_the_decoder(model: Any) -> Any:
    return model.model.decoder.class_embed[0]


def _named_in_full(model: Any) -> Any:
    return model.class_labels_classifier


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
    _layer_reference,
    _rt_detr_predict,
    _hybrid_strides,
    _first_of_the_decoder,
    own_queries=_last_queries,
    reads_mask=False,
)
_D_FINE = DetrFamily(
    _d_fine_context, _d_fine_predict, _hybrid_strides, _first_of_the_decoder, student_queries=False, reads_mask=False
)
_LW_DETR = DetrFamily(
    _lw_detr_context, _lw_detr_predict, _patch_strides, _one_of_all_layers, own_queries=_first_queries
)

FAMILIES: dict[str, DetrFamily] = {
    "deformable_detr": DetrFamily(_deformable_context, _deformable_predict, _multi_scale_strides, _first_of_the_model),
    "rt_detr": _RT_DETR,
    "rt_detr_v2": _RT_DETR,
    "d_fine": _D_FINE,
    "deimv2": _D_FINE,
    "detr": DetrFamily(_no_context, _detr_predict, _last_stride, _named_in_full, softmax=True, query_arguments=_MASKED),
    "conditional_detr": DetrFamily(
        _conditional_context, _conditional_predict, _last_stride, _named_in_full, query_arguments=_MASKED
    ),
    "dab-detr": DetrFamily(
        _dab_context,
        _dab_predict,
        _last_stride,
        _one_of_all_layers,
        width=lambda config: config.hidden_size,
        query_arguments=_MASKED,
    ),
    "lw_detr": _LW_DETR,
    "rf_detr": _LW_DETR,
}
