"""What the configurations of all detectors share: backbone and pyramid, dense head, two towers, square anchors."""

import itertools
import os
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from .bounds import MAX_LENGTH, Range, check_fields, check_kind, check_labels, check_net_arguments, check_plain_name
from .layers import FPNExtra


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
        """As of `PreTrainedConfig`, which reads files by it: names of backbone and attention must be plain words."""
        check_kind({key: value for key, value in config_dict.items() if key not in kwargs})
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


class DenseDetectorConfig(PyramidDetectorConfig):
    """Configuration shared by the dense detectors; see :class:`PyramidDetectorConfig` for backbone and pyramid.

    Args:
        head_channels: Width of the head.
        num_convs: Convolutions in a row in front of the predictors.
        norm_groups: Groups of the head's GroupNorm, `None` for no norm.
        stretch_cells: Cells divide the padded image evenly in whole pixels, as in torchvision's detectors, instead of
            lying a stride apart. The same where the image is a multiple of the coarsest stride.
        prior_probability: Initial score of every class.

    Raises:
        ValueError: A value out of range.
    """

    head_channels: int = 256
    num_convs: int = 4
    norm_groups: int | None = 32
    stretch_cells: bool = False
    prior_probability: float = 0.01

    ranges: ClassVar[dict[str, Range]] = {
        "head_channels": (1, 8192),
        "num_convs": (0, 64),
        "norm_groups": (1, 8192),
        "prior_probability": (1e-6, 1 - 1e-6),
    }

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.norm_groups is not None and self.head_channels % self.norm_groups:
            raise ValueError(
                f"head_channels={self.head_channels} cannot be split into norm_groups={self.norm_groups}: "
                f"choose a divisor, or None for no norm."
            )


class TwoTowerConfig(DenseDetectorConfig):
    """Configuration of :class:`TwoTowerHead`; see :class:`DenseDetectorConfig` for the shared fields.

    Args:
        conv_bias: Whether the towers' convolutions have a bias; `None` = only without a norm.
        reg_max: Largest bin of a distance distribution; `None` for a head that regresses numbers.
    """

    conv_bias: bool | None = None
    reg_max: int | None = None

    ranges = {"reg_max": (1, 1024)}


class SquareAnchorConfig(TwoTowerConfig):
    """Configuration of :class:`SquareAnchorHead`; see :class:`TwoTowerConfig` for the shared fields.

    Args:
        anchor_scale: Side of the square anchor of each location, in strides.
    """

    anchor_scale: float = 8.0

    ranges = {"anchor_scale": (0.01, 1024)}
