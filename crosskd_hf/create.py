"""A new detector for a data set: architecture, timm backbone, classes and starting weights in one call."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import timm
from timm.models.resnet import ResNet
from transformers import PreTrainedModel

from .data.categories import CategoryMap
from .models import DETECTORS, DenseDetectorConfig
from .models.backbone import weights_follow

ARCHITECTURES = {config.model_type.removeprefix("crosskd_"): config for config in DETECTORS}


@dataclass(frozen=True)
class DetectorSpec:
    """What a new detector is made of.

    Args:
        architecture: "gfl", "retinanet", "fcos", "atss", "tood" or "faster_rcnn".
        backbone: timm model name, e.g. "resnet50".
        backbone_weights: "timm" for timm's own weights, which come from the Hub, or "TAG" of them, or a file in timm's
            format. `None` starts from random weights: then nothing is frozen, and ResNets get GroupNorm, because
            BatchNorm with frozen statistics cannot be trained from scratch.
        width: Channels of pyramid and towers.
        fields: Further fields of the configuration.
    """

    architecture: str = "gfl"
    backbone: str = "resnet50"
    backbone_weights: str | None = None
    width: int = 256
    fields: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, text: str, **others: Any) -> "DetectorSpec":
        """From "architecture:backbone", e.g. "gfl:resnet18"."""
        architecture, _, backbone = text.partition(":")
        return cls(architecture, backbone or "resnet50", **others)


def build_detector(spec: DetectorSpec, categories: CategoryMap) -> PreTrainedModel:
    """Make a detector of the classes in `categories`.

    Raises:
        ValueError: Unknown architecture, or a backbone without pyramid features.
    """
    if spec.architecture not in ARCHITECTURES:
        raise ValueError(f"architecture={spec.architecture!r}: choose one of {', '.join(ARCHITECTURES)}.")
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
        model.backbone.load_weights(None if spec.backbone_weights == "timm" else spec.backbone_weights)
    return model


def _is_resnet(backbone: str) -> bool:
    return timm.is_model(backbone) and timm.model_entrypoint(backbone).__module__ == ResNet.__module__
