"""MMDetection's `.pth` files to models with processor and class names: every detector that this library has."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from transformers import (
    BaseImageProcessor,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

from crosskd_hf.models import (
    DETECTORS,
    ATSSConfig,
    DenseDetector,
    FasterRCNNConfig,
    FCOSConfig,
    GFLConfig,
    RetinaNetConfig,
)
from crosskd_hf.models.backbone import weights_follow
from crosskd_hf.models.box_coders import DeltaCoder
from crosskd_hf.models.processors import image_processor

from .checkpoint import Checkpoint, CheckpointError, Conversion, load_exactly, read_checkpoint
from .class_names import choose_names, set_classes
from .deformable_detr import convert_deformable_detr
from .mmdet import convert_mmdet
from .mmdet_config import MMDetSettings, parse_config, read_config, read_settings

State = Mapping[str, Tensor]
Converted = tuple[PreTrainedModel, BaseImageProcessor]

SIZE = {"shortest_edge": 800, "longest_edge": 1333}
# Not weights of the detector: normalisation constants, and the second set of MMDetection 2.x's EMA.
NOT_WEIGHTS = ("data_preprocessor.", "ema_")


# Which of MMDetection's heads predict as ours do.
HEADS: dict[type[PreTrainedConfig], frozenset[str]] = {
    ATSSConfig: frozenset({"ATSSHead"}),
    FCOSConfig: frozenset({"FCOSHead"}),
    FasterRCNNConfig: frozenset({"RPNHead"}),
    GFLConfig: frozenset({"GFLHead", "LDHead"}),
    RetinaNetConfig: frozenset({"RetinaHead", "FreeAnchorRetinaHead", "PISARetinaHead"}),
}
# What detectors without a field for it have built in.
BUILT_IN: dict[str, Any] = {"scales_per_octave": 1, "aspect_ratios": [1.0]}


def convert_mmdet_checkpoint(
    path: str | os.PathLike[str],
    config: str | os.PathLike[str] | None = None,
    labels: Sequence[str] | None = None,
) -> Conversion:
    """Convert an MMDetection checkpoint: GFL, ATSS, FCOS, RetinaNet, Faster R-CNN or Deformable DETR.

    Args:
        path: The `.pth` file. Nothing in it is executed.
        config: MMDetection's config file, if the checkpoint doesn't hold its text. It is read, not executed.
        labels: Class names in the order of training; by default those in the checkpoint, COCO's 80 or VOC's 20.

    Raises:
        FileNotFoundError: A file isn't there.
        ValueError: The file is broken or holds code, the detector or an option of it is unknown, a tensor is missing or
            has no place, or the classes have no names. Every message says which.
    """
    checkpoint = read_checkpoint(path)
    state = {name: tensor for name, tensor in checkpoint.state.items() if not name.startswith(NOT_WEIGHTS)}
    settings = read_settings(_config(checkpoint, config))
    model, processor = next(family for family in FAMILIES if family.mark in state or not family.mark).convert(
        state, settings
    )
    names = choose_names(model.config.num_labels, labels, _embedded_names(checkpoint.meta))
    set_classes(model.config, names)
    return Conversion(model.eval(), processor, _describe(checkpoint, model, settings, processor, len(state)))


def _config(checkpoint: Checkpoint, path: str | os.PathLike[str] | None) -> Mapping[str, Any]:
    """The given config, else the one in the checkpoint."""
    if path is not None:
        return read_config(path)
    embedded = checkpoint.meta.get("cfg", checkpoint.meta.get("config"))
    if isinstance(embedded, str) and embedded.strip():
        return parse_config(embedded)
    if isinstance(embedded, Mapping) and embedded:
        return embedded
    raise CheckpointError(
        f"{checkpoint.source} holds no config, and its weights alone don't tell everything, such as the order of "
        f"colours: give MMDetection's config file with --config. It is read as text, not executed."
    )


def _embedded_names(meta: Mapping[str, Any]) -> list[str] | None:
    data = meta.get("dataset_meta")
    names = data.get("classes", data.get("CLASSES")) if isinstance(data, Mapping) else meta.get("CLASSES")
    return [str(name) for name in names] if isinstance(names, tuple | list) and names else None


def _convert_pyramid(state: State, settings: MMDetSettings) -> Converted:
    config, converted = convert_mmdet(state, settings.options)
    heads = HEADS[type(config)]
    if settings.head_type is not None and settings.head_type not in heads:
        raise CheckpointError(
            f"The tensors have the names of {type(config).__name__.removesuffix('Config')}, but the config's head is "
            f"{settings.head_type}, which predicts otherwise. Can be converted: {', '.join(sorted(heads))}."
        )
    _apply(config, settings.fields)
    with weights_follow():
        model = DETECTORS[type(config)](config)
    load_exactly(model, converted)
    pixels = {"image_mean": settings.image_mean, "image_std": settings.image_std}
    return model, image_processor(config, **{"size": SIZE} | pixels | settings.processor)


def _apply(config: PreTrainedConfig, fields: Mapping[str, Any]) -> None:
    """Write the options of the config file into ours; those that ours doesn't have must be what is built in."""
    built_in = {**BUILT_IN, "anchor_strides": list(config.strides)}
    detector = DETECTORS[type(config)]
    coder = detector.head_class.box_coder(config) if issubclass(detector, DenseDetector) else None
    if isinstance(coder, DeltaCoder):
        built_in["delta_std"] = list(coder.std)
    known = config.to_dict()
    for name, given in fields.items():
        value = list(given) if isinstance(given, tuple) else given
        if name in known:
            setattr(config, name, value)
        elif name in built_in and value != built_in[name]:
            raise CheckpointError(
                f"The config has {name}={value}, and {type(config).__name__.removesuffix('Config')} here has "
                f"{built_in[name]} built in: this variant can't be expressed."
            )


def _convert_detr(state: State, settings: MMDetSettings) -> Converted:
    first = "backbone.conv1.weight"
    if settings.options.bgr and first in state:
        state = {**state, first: state[first].flip(1)}
    config, converted = convert_deformable_detr(state, num_queries=settings.num_queries)
    config.backbone_config.use_pretrained_backbone = False
    model, loading = DeformableDetrForObjectDetection.from_pretrained(
        None, config=config, state_dict=converted, output_loading_info=True
    )
    faults = {what: sorted(map(str, names)) for what, names in loading.items() if names}
    if faults:
        raise CheckpointError(f"The checkpoint does not fit {type(model).__name__}: {faults}.")
    size = settings.processor.get("size", SIZE)
    return model, DeformableDetrImageProcessor(size=size, image_mean=settings.image_mean, image_std=settings.image_std)


class Family(NamedTuple):
    """Detectors that are converted alike."""

    mark: str  # a tensor that only they have
    convert: Callable[[State, MMDetSettings], Converted]


FAMILIES = (
    Family("level_embed", _convert_detr),
    Family("", _convert_pyramid),  # RPNs and dense heads are told apart there; the error names what is known
)


def _describe(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    settings: MMDetSettings,
    processor: BaseImageProcessor,
    count: int,
) -> dict[str, str]:
    config, names = model.config, list(model.config.id2label.values())
    fields = config.to_dict()
    backbone = fields.get("backbone") or config.backbone_config.backbone
    options = [name for name, value in vars(settings.options).items() if value]
    listed = ("norm_groups", "reg_max", "strides", "fpn_extra", "with_box_refine", "two_stage", "num_queries")
    return {
        "checkpoint": f"{checkpoint.source} (sha256 {checkpoint.sha256[:12]}), {count} tensors, all mapped",
        "detector": type(model).__name__,
        "backbone": f"{backbone}{', Caffe style' if settings.options.caffe_style else ''}",
        "head": ", ".join(f"{name}={fields[name]}" for name in listed if name in fields),
        "options": ", ".join(options) or "none",
        "classes": f"{len(names)}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}",
        "pixels": f"RGB, mean {_rounded(processor.image_mean)}, std {_rounded(processor.image_std)}"
        + (" (BGR in the checkpoint, folded into the first convolution)" if settings.options.bgr else ""),
        "size": f"{dict(processor.size)}",
    }


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]
