"""MMDetection's Deformable DETR checkpoints to `DeformableDetrForObjectDetection`: dict in, config and dict out.

Both libraries hold the same modules under other names. Two things differ: the attention among queries keeps query,
key and value in one matrix there and in three here, and the convolutions of the neck have no bias there (zero here).
The plain, box-refine and two-stage variants are told apart by what the checkpoint holds.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import DeformableDetrConfig

# Blocks per stage and whether they are bottlenecks: all that tells one ResNet checkpoint from another.
RESNETS: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}

# mmdet name -> our name, in the order in which they are tried. {} of the attention stands for q, k and v.
RULES: tuple[tuple[str, str], ...] = (
    (r"^level_embed$", "model.level_embed"),
    (r"^backbone\.(.*)$", r"model.backbone.model.\1"),
    (r"^neck\.convs\.(\d+)\.conv\.(.*)$", r"model.input_proj.\1.0.\2"),
    (r"^neck\.convs\.(\d+)\.gn\.(.*)$", r"model.input_proj.\1.1.\2"),
    (r"^neck\.extra_convs\.(\d+)\.conv\.(.*)$", r"model.input_proj.<extra \1>.0.\2"),
    (r"^neck\.extra_convs\.(\d+)\.gn\.(.*)$", r"model.input_proj.<extra \1>.1.\2"),
    (r"^bbox_head\.cls_branches\.(\d+)\.(.*)$", r"class_embed.\1.\2"),
    (r"^bbox_head\.reg_branches\.(\d+)\.0\.(.*)$", r"bbox_embed.\1.layers.0.\2"),
    (r"^bbox_head\.reg_branches\.(\d+)\.2\.(.*)$", r"bbox_embed.\1.layers.1.\2"),
    (r"^bbox_head\.reg_branches\.(\d+)\.4\.(.*)$", r"bbox_embed.\1.layers.2.\2"),
    (r"^(encoder|decoder)\.layers\.(\d+)\.ffn\.layers\.0\.0\.(.*)$", r"model.\1.layers.\2.mlp.fc1.\3"),
    (r"^(encoder|decoder)\.layers\.(\d+)\.ffn\.layers\.1\.(.*)$", r"model.\1.layers.\2.mlp.fc2.\3"),
    (r"^encoder\.layers\.(\d+)\.norms\.0\.(.*)$", r"model.encoder.layers.\1.self_attn_layer_norm.\2"),
    (r"^encoder\.layers\.(\d+)\.norms\.1\.(.*)$", r"model.encoder.layers.\1.final_layer_norm.\2"),
    (r"^encoder\.layers\.(\d+)\.self_attn\.(.*)$", r"model.encoder.layers.\1.self_attn.\2"),
    (r"^decoder\.layers\.(\d+)\.norms\.0\.(.*)$", r"model.decoder.layers.\1.self_attn_layer_norm.\2"),
    (r"^decoder\.layers\.(\d+)\.norms\.1\.(.*)$", r"model.decoder.layers.\1.encoder_attn_layer_norm.\2"),
    (r"^decoder\.layers\.(\d+)\.norms\.2\.(.*)$", r"model.decoder.layers.\1.final_layer_norm.\2"),
    (r"^decoder\.layers\.(\d+)\.self_attn\.attn\.in_proj_(weight|bias)$", r"model.decoder.layers.\1.self_attn.{}.\2"),
    (r"^decoder\.layers\.(\d+)\.self_attn\.attn\.out_proj\.(.*)$", r"model.decoder.layers.\1.self_attn.o_proj.\2"),
    (r"^decoder\.layers\.(\d+)\.cross_attn\.(.*)$", r"model.decoder.layers.\1.encoder_attn.\2"),
    (r"^memory_trans_fc\.(.*)$", r"model.enc_output.\1"),
    (r"^memory_trans_norm\.(.*)$", r"model.enc_output_norm.\1"),
    (r"^pos_trans_fc\.(.*)$", r"model.pos_trans.\1"),
    (r"^pos_trans_norm\.(.*)$", r"model.pos_trans_norm.\1"),
    (r"^query_embedding\.weight$", "model.query_position_embeddings.weight"),
    (r"^reference_points_fc\.(.*)$", r"model.reference_points.\1"),
)


def names_in_transformers(name: str, backbone_levels: int = 3) -> tuple[str, ...]:
    """Our names of one mmdet parameter: one, or three if it holds query, key and value above each other.

    Args:
        name: Parameter or buffer of mmdet's `DeformableDETR`.
        backbone_levels: Feature maps taken from the backbone; the neck's extra convolutions are counted after them.

    Raises:
        ValueError: No rule knows the name.
    """
    for pattern, replacement in RULES:
        match = re.match(pattern, name)
        if match:
            ours = match.expand(replacement)
            ours = re.sub(r"<extra (\d+)>", lambda extra: str(backbone_levels + int(extra[1])), ours)
            return tuple(ours.format(part) for part in ("q_proj", "k_proj", "v_proj")) if "{}" in ours else (ours,)
    raise ValueError(
        f"'{name}' is no parameter of mmdet's DeformableDETR (3.x names). Is this checkpoint of another detector or of "
        "mmdet 2.x? Convert it with mmdet's own upgrade script first, and pass its 'state_dict'."
    )


def convert_deformable_detr(
    state_dict: Mapping[str, Tensor],
    *,
    heads: int = 8,
    num_queries: int | None = None,
    dropout: float = 0.1,
    id2label: dict[int, str] | None = None,
    with_box_refine: bool | None = None,
) -> tuple[DeformableDetrConfig, dict[str, Tensor]]:
    """Config and state dict of `DeformableDetrForObjectDetection` from an mmdet 3.x `DeformableDETR` state dict.

    Build the model with `DeformableDetrForObjectDetection.from_pretrained(None, config=config, state_dict=state)`;
    `load_state_dict` alone would not untie the heads of the layers.

    Args:
        state_dict: Names to tensors, the `state_dict` entry of the checkpoint, with a ResNet backbone of strides
            8, 16 and 32.
        heads: Attention heads; shapes don't tell it (8 in every published checkpoint).
        num_queries: Queries of a two-stage model, which has no query embedding to count (300 if not given).
        dropout: Of the transformer; a checkpoint doesn't tell it (mmdet: 0.1).
        id2label: Names of the classes; `LABEL_<i>` if not given.
        with_box_refine: Whether every decoder layer has heads of its own; if not given, they are compared.

    Raises:
        ValueError: A name that no rule knows, or shapes that fit no supported model.
    """
    two_stage = "memory_trans_fc.weight" in state_dict
    levels = _count(state_dict, r"neck\.convs\.(\d+)\.conv\.weight")
    refine = _has_own_heads(state_dict) if with_box_refine is None else with_box_refine
    if two_stage and not refine:
        raise ValueError(
            "The checkpoint is of a two-stage model whose decoder layers share one head (with_box_refine=False). "
            "Transformers has two stages with box refinement only, so this variant can't be converted."
        )
    config = _config(state_dict, levels=levels, heads=heads, with_box_refine=refine, two_stage=two_stage)
    config.dropout = dropout
    _set_queries(config, num_queries)
    if id2label is not None:
        if len(id2label) != config.num_labels:
            raise ValueError(f"id2label names {len(id2label)} classes, the checkpoint predicts {config.num_labels}.")
        config.id2label = id2label
        config.label2id = {label: index for index, label in id2label.items()}
    return config, _state(state_dict, levels, with_box_refine=refine, two_stage=two_stage)


def _has_own_heads(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether layers differ: one shared head is saved once per layer."""
    first, second = (f"bbox_head.reg_branches.{layer}.0.weight" for layer in (0, 1))
    return second in state_dict and not torch.equal(state_dict[first], state_dict[second])


def _set_queries(config: DeformableDetrConfig, given: int | None) -> None:
    if given is None:
        return
    if not config.two_stage and given != config.num_queries:
        raise ValueError(
            f"num_queries={given}, but the checkpoint has embeddings of {config.num_queries} queries: leave it out. "
            "Only two-stage models need it."
        )
    config.num_queries = config.two_stage_num_proposals = given


def _config(
    state_dict: Mapping[str, Tensor], *, levels: int, heads: int, with_box_refine: bool, two_stage: bool
) -> DeformableDetrConfig:
    attention_rows = _shape(state_dict, "encoder.layers.0.self_attn.attention_weights.weight")[0]
    decoder_rows = _shape(state_dict, "decoder.layers.0.cross_attn.attention_weights.weight")[0]
    feature_levels, d_model = _shape(state_dict, "level_embed")
    if attention_rows % (heads * feature_levels) or d_model % heads:
        raise ValueError(f"{heads} heads don't divide {attention_rows} attention weights: pass the right `heads`.")
    queries = 300 if two_stage else _shape(state_dict, "query_embedding.weight")[0]
    return DeformableDetrConfig(
        backbone_config={
            "model_type": "timm_backbone",
            "backbone": _resnet(state_dict),
            "num_channels": 3,
            "features_only": True,
            "use_pretrained_backbone": False,
            "out_indices": [2, 3, 4][-levels:],
        },
        d_model=d_model,
        num_labels=_shape(state_dict, "bbox_head.cls_branches.0.weight")[0],
        num_queries=queries,
        two_stage_num_proposals=queries,
        two_stage=two_stage,
        with_box_refine=with_box_refine,
        num_feature_levels=feature_levels,
        encoder_layers=_count(state_dict, r"encoder\.layers\.(\d+)\.norms\.0\.weight"),
        decoder_layers=_count(state_dict, r"decoder\.layers\.(\d+)\.norms\.0\.weight"),
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_n_points=attention_rows // (heads * feature_levels),
        decoder_n_points=decoder_rows // (heads * feature_levels),
        encoder_ffn_dim=_shape(state_dict, "encoder.layers.0.ffn.layers.0.0.weight")[0],
        decoder_ffn_dim=_shape(state_dict, "decoder.layers.0.ffn.layers.0.0.weight")[0],
        class_cost=2,  # mmdet's matching costs; the weights of its losses are in crosskd_hf.training.detr_loss
        bbox_cost=5,
        giou_cost=2,
        auxiliary_loss=True,
    )


def _state(
    state_dict: Mapping[str, Tensor], levels: int, *, with_box_refine: bool, two_stage: bool
) -> dict[str, Tensor]:
    converted: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if name.endswith("num_batches_tracked"):  # frozen batch norm doesn't count
            continue
        ours = names_in_transformers(name, levels)
        converted.update(zip(ours, tensor.chunk(len(ours)) if len(ours) > 1 else (tensor,), strict=True))
    for name in [name for name in converted if re.match(r"model\.input_proj\.\d+\.0\.weight", name)]:
        bias = name.replace("weight", "bias")
        converted.setdefault(bias, converted[name].new_zeros(len(converted[name])))
    if not with_box_refine:  # one head, saved once per layer: the last is what mmdet's loading leaves in it
        last = _count(converted, r"bbox_embed\.(\d+)\.layers\.0\.weight") - 1
        for name in converted:
            converted[name] = converted[re.sub(r"^(class|bbox)_embed\.\d+", rf"\1_embed.{last}", name)]
    shared = (("bbox_embed.",) if with_box_refine else ()) + (("class_embed.",) if two_stage else ())
    if shared:  # the decoder holds the same heads, for its own refinement
        converted |= {f"model.decoder.{name}": tensor for name, tensor in converted.items() if name.startswith(shared)}
    return converted


def _resnet(state_dict: Mapping[str, Tensor]) -> str:
    stages = tuple(_count(state_dict, rf"backbone\.layer{stage}\.(\d+)\.conv1\.weight") for stage in (1, 2, 3, 4))
    name = RESNETS.get((stages, "backbone.layer1.0.conv3.weight" in state_dict))
    if name is None:
        raise ValueError(
            f"No ResNet has stages of {stages} blocks; supported backbones: {', '.join(sorted(RESNETS.values()))}. "
            "Checkpoints with other backbones can't be converted."
        )
    return name


def _count(state_dict: Mapping[str, Tensor], pattern: str) -> int:
    """Number of distinct indices that `pattern` finds among the names."""
    return len({match[1] for match in (re.fullmatch(pattern, name) for name in state_dict) if match})


def _shape(state_dict: Mapping[str, Tensor], name: str) -> torch.Size:
    if name not in state_dict:
        raise ValueError(
            f"The checkpoint has no '{name}', so it isn't a Deformable DETR of mmdet 3.x. "
            "Pass the dict under its 'state_dict' key."
        )
    return state_dict[name].shape
