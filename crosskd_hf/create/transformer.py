"""New DETR-type detectors of transformers on a timm backbone, and image processors for them."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import timm
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForObjectDetection,
    BaseImageProcessor,
    ConditionalDetrImageProcessor,
    DeformableDetrImageProcessor,
    DetrImageProcessor,
    PreTrainedModel,
    RfDetrImageProcessor,
    RTDetrImageProcessor,
)

from ..data.categories import CategoryMap
from .spec import DetectorSpec, ImageSize

logger = logging.getLogger(__name__)

HYBRID = ("rt_detr", "rt_detr_v2", "d_fine", "deimv2")  # convolutions and attention between backbone and decoder
PATCHES = ("lw_detr", "rf_detr")  # on a vision transformer of their own, and no other backbone
ONE_LEVEL = ("detr", "conditional_detr", "dab_detr")
TRANSFORMERS = ("deformable_detr", *HYBRID, *ONE_LEVEL, *PATCHES)

_PROCESSORS: dict[str, type[BaseImageProcessor]] = {
    "deformable_detr": DeformableDetrImageProcessor,
    "lw_detr": DeformableDetrImageProcessor,
    "rf_detr": RfDetrImageProcessor,
    "detr": DetrImageProcessor,
    "conditional_detr": ConditionalDetrImageProcessor,
    "dab_detr": ConditionalDetrImageProcessor,
} | dict.fromkeys(HYBRID, RTDetrImageProcessor)


def build_transformer(spec: DetectorSpec, categories: CategoryMap) -> PreTrainedModel:
    """A new detector of transformers.

    A Deformable DETR has two stages and box refinement, as the teacher and the student of the CrossKD paper have.

    Args:
        spec: `architecture` is one of `TRANSFORMERS`; `width` is the model's `d_model`; `fields` go to its
            configuration, such as `num_queries`.
        categories: Its classes.

    Raises:
        ValueError: A backbone that doesn't fit.
    """
    kind = "dab-detr" if spec.architecture == "dab_detr" else spec.architecture
    config = AutoConfig.for_model(kind, **_settings(spec) | dict(spec.fields))
    config.id2label, config.label2id = categories.id2label, categories.label2id
    config.category_ids = list(categories.raw_ids)
    model = AutoModelForObjectDetection.from_config(config)
    _start_rare(model)
    if spec.backbone_weights is not None:
        _load_backbone(model, spec)
    elif spec.architecture not in PATCHES:
        _warn_of_frozen_statistics(model, spec.backbone)
    return model


def build_processor(spec: DetectorSpec, image_size: ImageSize | None) -> BaseImageProcessor:
    """The image processor of a new detector; `image_size` None is the family's usual one."""
    kind = _PROCESSORS[spec.architecture]
    settings: dict[str, Any] = {}
    if spec.architecture in HYBRID:
        settings |= {"do_normalize": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    if image_size is not None and spec.architecture in (*HYBRID, "rf_detr"):  # they stretch images to a square
        side = max(64, 32 * round(image_size.shortest_edge / 32))
        settings["size"] = {"height": side, "width": side}
    elif image_size is not None:
        settings["size"] = image_size.as_size()
    return kind(**settings)


def fit_queries(spec: DetectorSpec, image_size: ImageSize | None) -> DetectorSpec:
    """The spec with no more queries than small images have locations to choose them from (else 300)."""
    if (
        image_size is None
        or spec.architecture not in ("deformable_detr", *HYBRID)
        or "num_queries" in dict(spec.fields)
    ):
        return spec
    locations = sum((image_size.shortest_edge // stride) ** 2 for stride in (8, 16, 32))
    return replace(spec, fields=(*spec.fields, ("num_queries", min(300, max(1, locations // 2)))))


def _settings(spec: DetectorSpec) -> dict[str, Any]:
    width = spec.width
    common: dict[str, Any] = {"d_model": width, "encoder_ffn_dim": 4 * width, "decoder_ffn_dim": 4 * width}
    if spec.architecture in PATCHES:
        if spec.backbone:
            raise ValueError(f"{spec.architecture} has a backbone of its own: say {spec.architecture!r} alone.")
        return {}
    if not timm.is_model(spec.backbone):
        raise ValueError(f"timm has no backbone {spec.backbone!r}; timm.list_models() has all names.")
    if spec.architecture in HYBRID:
        channels = timm.create_model(spec.backbone, features_only=True, pretrained=False).feature_info.channels()[-3:]
        return common | {
            "backbone_config": _timm(spec.backbone, [-3, -2, -1]),
            "encoder_in_channels": channels,
            "encoder_hidden_dim": width,
            "decoder_in_channels": [width] * 3,
            "freeze_backbone_batch_norms": spec.backbone_weights is not None,
        }
    if spec.architecture in ONE_LEVEL:
        if spec.architecture == "dab_detr":
            common["hidden_size"] = common.pop("d_model")
        return common | {"backbone_config": _timm(spec.backbone, [-4, -3, -2, -1]), "auxiliary_loss": False}
    return common | {
        "backbone_config": _timm(spec.backbone, [-3, -2, -1]),
        "two_stage": True,
        "with_box_refine": True,
        "two_stage_num_proposals": dict(spec.fields).get("num_queries", 300),
        "class_cost": 2,
        "auxiliary_loss": True,
    }


def _timm(name: str, out_indices: list[int]) -> dict[str, Any]:
    return {
        "model_type": "timm_backbone",
        "backbone": name,
        "num_channels": 3,
        "features_only": True,
        "use_pretrained_backbone": False,
        "out_indices": out_indices,
    }


@torch.no_grad()
def _start_rare(model: PreTrainedModel) -> None:
    """Heads of a new Deformable DETR see an object of every class everywhere, of any size; let them see few."""
    if model.config.model_type != "deformable_detr":
        return
    for head in model.class_embed:
        head.bias.fill_(-math.log(99))
    for head in model.bbox_embed:
        head.layers[-1].weight.zero_()
        head.layers[-1].bias.zero_()


def _net(model: nn.Module) -> nn.Module | None:
    """timm's net inside a model of transformers."""
    return next((module for module in model.modules() if "feature_info" in vars(module)), None)


def _load_backbone(model: PreTrainedModel, spec: DetectorSpec) -> None:
    """timm's weights, with their batch norm statistics; stem and first stage of ResNets are frozen."""
    net = _net(model)
    if net is None:
        raise ValueError(f"{spec.architecture} has a backbone of its own: leave out backbone_weights.")
    tag = "" if spec.backbone_weights == "timm" else f".{spec.backbone_weights}"
    indices = (-4, -3, -2, -1) if spec.architecture in ONE_LEVEL else (-3, -2, -1)
    given = timm.create_model(f"{spec.backbone}{tag}", pretrained=True, features_only=True, out_indices=indices)
    known = set(net.state_dict())  # frozen norms don't count their batches
    net.load_state_dict({name: value for name, value in given.state_dict().items() if name in known})
    for name, parameter in net.named_parameters():
        if name.startswith(("conv1.", "bn1.", "layer1.")):
            parameter.requires_grad_(False)


def _warn_of_frozen_statistics(model: PreTrainedModel, backbone: str) -> None:
    net = _net(model)
    frozen = net is not None and any("FrozenBatchNorm" in type(module).__name__ for module in net.modules())
    if frozen:
        logger.warning(
            "The backbone %s starts from random weights, and transformers freezes its batch norms at a mean of 0 and a "
            "variance of 1: give backbone_weights='timm', or a backbone without batch norm.",
            backbone,
        )
