"""New dense detectors and Faster R-CNN on timm backbones."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
from timm.models.resnet import ResNet
from transformers import PreTrainedModel

from ..convert.backbone_file import load_backbone_file
from ..data.categories import CategoryMap
from ..models import DETECTORS, DenseDetectorConfig
from ..models.backbone import Backbone, weights_follow
from .spec import DetectorSpec

ARCHITECTURES = {config.model_type.removeprefix("crosskd_"): config for config in DETECTORS}


def build_dense(spec: DetectorSpec, categories: CategoryMap) -> PreTrainedModel:
    """A new detector of this package; `spec.architecture` is one of `ARCHITECTURES`.

    Raises:
        ValueError: A backbone without pyramid features.
    """
    config_class = ARCHITECTURES[spec.architecture]
    fields: dict[str, Any] = {
        "backbone": spec.backbone,
        "fpn_channels": spec.width,
        "id2label": categories.id2label,
        "label2id": categories.label2id,
        "category_ids": list(categories.raw_ids),
    }
    if issubclass(config_class, DenseDetectorConfig):
        fields["head_channels"] = spec.width
        if config_class.norm_groups is not None:
            fields["norm_groups"] = min(32, spec.width // 4)
    else:
        fields["rpn_channels"], fields["fc_channels"] = spec.width, 4 * spec.width
    if spec.backbone_weights is None:
        fields["frozen_stages"], fields["norm_eval"] = 0, False
        if _is_resnet(spec.backbone):
            fields["backbone_arguments"] = {"norm_layer": "groupnorm1"}
    config = config_class(**fields | dict(spec.fields))
    with weights_follow() if spec.backbone_weights is not None else nullcontext():
        model = DETECTORS[config_class](config)
    if spec.backbone_weights is not None:
        _load(model.backbone, spec.backbone_weights)
    return model


def _load(backbone: Backbone, weights: str) -> None:
    if Path(weights).is_file() or Path(weights).suffix in (".pth", ".pkl", ".safetensors"):
        load_backbone_file(backbone, weights)
    else:
        backbone.load_weights(None if weights == "timm" else weights)


def _is_resnet(backbone: str) -> bool:
    return timm.is_model(backbone) and timm.model_entrypoint(backbone).__module__ == ResNet.__module__
