"""What detectors on a feature pyramid share, before any head: backbone, neck and their configuration."""

import itertools
import os
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
from transformers.utils import ModelOutput

from .assigners import Priors
from .backbone import Backbone
from .bounds import MAX_LENGTH, MAX_WEIGHTS, Range, check_fields, check_labels, check_net_arguments, check_plain_name
from .layers import FPN, Conv, FPNExtra, Neck
from .losses import LossPart, divide


class PyramidDetectorConfig(PreTrainedConfig):
    """Configuration of backbone and pyramid.

    Args:
        backbone: timm model name without weights tag. In Python also "hf-hub:OWNER/NAME" or "local-dir:FOLDER" of timm;
            the model that is built replaces it by the plain name, which alone is read from files.
        backbone_arguments: Further arguments of the timm net's constructor, of those in `NET_ARGUMENTS`.
        out_indices: timm's feature indices; by default the features are chosen by `backbone_strides`.
        backbone_strides: Strides of the backbone features that enter the pyramid.
        frozen_stages: Backbone stages without gradient: 0 = none, 1 = stem and the stage of stride 4, ...
        norm_eval: BatchNorm keeps its running statistics in training.
        freeze_norm: Scale and bias of the backbone's norm layers get no gradient.
        caffe_stride: ResNet bottlenecks stride on their first 1x1 convolution.
        output_norm: LayerNorm on every backbone feature (Swin).
        pad_windows: Swin pads to whole windows before it shifts (detectors trained with MMDetection).
        backbone_last_channels: Width of an extra 1x1 convolution on the last feature (MobileNetV2: 1280).
        deformable_strides: Stages of a ResNet whose 3x3 convolutions are deformable (DCNv2), by their strides.
        strides: Pixels per cell of each pyramid level.
        size_divisor: Cells in the padding of an image up to a multiple of this are background, those behind it don't
            count in the loss; what the other images of the batch are like never matters. None: all of the batch's do.
        fpn_channels: Width of the pyramid.
        fpn_extra: Where the first extra level comes from, see :class:`FPN`.
        fpn_extra_relu: ReLU in front of the second extra level.
        loss_weights: Weight of each loss by its key.
        category_ids: Raw category id of each class in the data set the model was trained on.

    Raises:
        ValueError: A value of another type or out of its range.
    """

    backbone: str = "resnet50"
    backbone_arguments: dict[str, Any] | None = None
    out_indices: list[int] | tuple[int, ...] | None = None
    backbone_strides: list[int] | tuple[int, ...] = (8, 16, 32)
    frozen_stages: int = 1
    norm_eval: bool = True
    freeze_norm: bool = False
    caffe_stride: bool = False
    output_norm: bool = False
    pad_windows: bool = False
    backbone_last_channels: int | None = None
    deformable_strides: list[int] | tuple[int, ...] = ()
    strides: list[int] | tuple[int, ...] = (8, 16, 32, 64, 128)
    size_divisor: int | None = 32
    fpn_channels: int = 256
    fpn_extra: FPNExtra = "on_output"
    fpn_extra_relu: bool = False
    loss_weights: dict[str, float] | None = None
    category_ids: list[int] | None = None

    default_loss_weights: ClassVar[dict[str, float]] = {}
    ranges: ClassVar[dict[str, Range]] = {
        "out_indices": (-MAX_LENGTH, MAX_LENGTH),
        "backbone_strides": (1, 4096),
        "frozen_stages": (0, MAX_LENGTH),
        "backbone_last_channels": (1, 8192),
        "deformable_strides": (4, 32),
        "strides": (1, 4096),
        "fpn_channels": (1, 8192),
        "size_divisor": (1, 8192),
    }
    keys_to_ignore_at_inference = ["loss_parts"]  # of transformers' Trainer, which takes outputs of tensors alone

    def __post_init__(self, **kwargs: Any) -> None:
        check_labels(kwargs.get("num_labels"), self.id2label)
        super().__post_init__(**kwargs)
        check_fields(self)
        check_net_arguments(self.backbone_arguments)
        self.loss_weights = {**self.default_loss_weights, **(self.loss_weights or {})}
        unknown = set(self.loss_weights) - set(self.default_loss_weights)
        if unknown:
            raise ValueError(
                f"loss_weights has {sorted(unknown)}; this detector has {list(self.default_loss_weights)}."
            )
        strides = list(self.strides)
        if not self.backbone_strides or list(self.backbone_strides) != strides[: len(self.backbone_strides)]:
            raise ValueError(
                f"backbone_strides={tuple(self.backbone_strides)} must be the first of strides={tuple(strides)}."
            )
        if any(finer * 2 != coarser for finer, coarser in itertools.pairwise(strides)):
            raise ValueError(f"strides={tuple(strides)} must double from level to level.")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As of `PreTrainedConfig`, which reads files by it: `backbone` of the dict must be a plain name."""
        read = super().from_dict(config_dict, **kwargs)
        if "backbone" not in kwargs:
            check_plain_name((read[0] if isinstance(read, tuple) else read).backbone)
        return read

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> Any:
        """As of `PreTrainedConfig`; `backbone` must be a plain name."""
        config = super().from_json_file(json_file)
        check_plain_name(config.backbone)
        return config


@dataclass
class DetectorOutput(ModelOutput):
    """What every detector returns.

    Args:
        loss: Scalar, with labels.
        loss_dict: Weighted parts of the loss, with labels.
        logits: Of the classes; their sigmoid is the score.
        pred_boxes: cxcywh relative to each unpadded image.
        features: Pyramid maps, on request.
        loss_parts: The loss before its division, with labels.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    features: list[Tensor] | None = None
    loss_parts: dict[str, LossPart] | None = None

    def set_loss(self, parts: dict[str, LossPart], divided: bool) -> None:
        """Fill in `loss_parts` and, if they shall be `divided`, `loss_dict` and `loss`; see :class:`LossPart`."""
        self["loss_parts"] = parts
        if not divided:
            return
        self["loss_dict"] = divide(parts)
        self["loss"] = torch.stack(list(self["loss_dict"].values())).sum()
        for name in ("loss_dict", "loss"):  # in the order of the fields, as code that counts outputs expects
            self.move_to_end(name, last=False)


def valid_priors(config: Any, priors: Priors, sizes: Tensor) -> Tensor:
    """Priors that are trained on, (B, N) bool: in images of `sizes` (B, 2), padded up to the detector's divisor.

    MMDetection's rule: the padding that an image has by itself is background, that which others bring is left out.
    """
    divisor = config.size_divisor
    if divisor is None:
        return torch.ones(len(sizes), len(priors.boxes), dtype=torch.bool, device=sizes.device)
    return priors.inside((sizes / divisor).ceil() * divisor)


class PyramidDetector(PreTrainedModel):
    """Backbone and feature pyramid. Children add their heads, then call `post_init`, and define `forward`.

    `neck_class` makes the pyramid: a child of :class:`Neck` that returns one map of `fpn_channels` for each
    of the configuration's `strides`.
    """

    config: PyramidDetectorConfig
    config_class: ClassVar[type[PreTrainedConfig]] = PyramidDetectorConfig
    neck_class: ClassVar[type[Neck]] = FPN
    base_model_prefix = ""
    main_input_name = "pixel_values"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # The pipeline's list of known detectors; here, so that it also holds for code loaded from beside the weights.
        MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES[cls.config_class.model_type] = cls.__name__

    def __init__(self, config: PyramidDetectorConfig):
        super().__init__(config)
        self.backbone = Backbone(
            config.backbone,
            config.backbone_strides,
            config.backbone_arguments,
            config.out_indices,
            config.frozen_stages,
            config.norm_eval,
            config.freeze_norm,
            config.caffe_stride,
            config.output_norm,
            config.pad_windows,
            config.backbone_last_channels,
            config.deformable_strides,
        )
        config.backbone, config.backbone_arguments = self.backbone.name, self.backbone.given_arguments
        self.neck = self.neck_class.from_config(self.backbone.channels, config)

    @classmethod
    def from_pretrained(cls, *arguments: Any, **settings: Any) -> Any:
        """As of `PreTrainedModel`; what the configuration freezes is frozen in the loaded model too."""
        loaded = super().from_pretrained(*arguments, **settings)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info=True
        model.backbone.freeze()
        return loaded

    def post_init(self) -> None:
        """Initialise what is not a timm net; called by children when all their modules are there."""
        count = sum(parameter.numel() for parameter in self.parameters())
        if self.device.type == "meta" and count > MAX_WEIGHTS:  # as `from_pretrained` builds it, before any allocation
            raise ValueError(f"This configuration is that of {count:.3g} weights; {MAX_WEIGHTS:.3g} is the limit.")
        for module in self.backbone.modules():
            # timm has initialised its net already; without this mark `post_init` would do it again, and worse.
            vars(module)["_is_hf_initialized"] = next(module.parameters(), torch.empty(0)).device.type != "meta"
        super().post_init()

    def pyramid(self, pixel_values: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to one (B, C, H / stride, W / stride) map per level."""
        if pixel_values.dtype == torch.uint8:
            raise ValueError(
                "pixel_values are uint8, as a data loader carries them: the model wants "
                "crosskd_hf.models.normalization.Normalizer(image_processor)(batch)."
            )
        return self.neck(self.backbone(pixel_values))

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        if isinstance(module, Conv):
            module.reset_parameters()
        elif hasattr(module, "init_non_persistent_buffers"):  # timm's protocol for nets built on the meta device
            module.init_non_persistent_buffers()
        else:
            super()._init_weights(module)
