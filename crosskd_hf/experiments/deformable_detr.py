"""New Deformable DETRs as published for CrossKD: two stages, box refinement, a timm backbone."""

from __future__ import annotations

import math
from typing import Any

import timm
import torch
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

from ..data.categories import CategoryMap


def new_deformable_detr(
    backbone: str,
    categories: CategoryMap,
    weights: str | None = None,
    *,
    d_model: int = 256,
    feature_levels: int = 4,
    encoder_layers: int = 6,
    decoder_layers: int = 6,
    num_queries: int = 300,
    **fields: Any,
) -> DeformableDetrForObjectDetection:
    """A two-stage Deformable DETR with box refinement, as the paper's teacher and student are.

    Args:
        backbone: timm model name.
        categories: Its classes.
        weights: "timm" for timm's own weights, or a tag of them (downloads); None: random.
        d_model, feature_levels, encoder_layers, decoder_layers, num_queries: The defaults are the published numbers.
        fields: Further fields of the configuration.
    """
    config = DeformableDetrConfig(
        backbone_config={
            "model_type": "timm_backbone",
            "backbone": backbone,
            "num_channels": 3,
            "features_only": True,
            "use_pretrained_backbone": False,
            "out_indices": [-3, -2, -1],
        },
        two_stage=True,
        with_box_refine=True,
        num_queries=num_queries,
        two_stage_num_proposals=num_queries,
        d_model=d_model,
        encoder_ffn_dim=4 * d_model,
        decoder_ffn_dim=4 * d_model,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        num_feature_levels=feature_levels,
        class_cost=2,
        auxiliary_loss=True,
        id2label=categories.id2label,
        label2id=categories.label2id,
        **fields,
    )
    config.category_ids = list(categories.raw_ids)
    model = DeformableDetrForObjectDetection(config)
    with torch.no_grad():  # transformers draws heads that see an object of every class everywhere, of any size
        for head in model.class_embed:
            head.bias.fill_(-math.log(99))
        for head in model.bbox_embed:
            head.layers[-1].weight.zero_()
            head.layers[-1].bias.zero_()
        for projection in model.model.input_proj:  # MMDetection's have no bias: it stays zero
            projection[0].bias.zero_().requires_grad_(False)
    if weights is not None:
        name = backbone if weights == "timm" else f"{backbone}.{weights}"
        _load_backbone(model.model.backbone.model, name)
    return model


def _load_backbone(module: torch.nn.Module, name: str) -> None:
    """timm's weights, with their batch norm statistics; stem and first stage of ResNets are frozen."""
    pretrained = timm.create_model(name, pretrained=True, features_only=True, out_indices=(-3, -2, -1))
    module.load_state_dict(pretrained.state_dict())
    freeze_stem(module)


def freeze_stem(backbone: torch.nn.Module) -> None:
    """Take the gradient from the stem and the first stage of a ResNet, as published."""
    for key, parameter in backbone.named_parameters():
        if key.startswith(("conv1.", "bn1.", "layer1.")):
            parameter.requires_grad_(False)
