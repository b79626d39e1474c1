"""What detectors on a feature pyramid share, before any head: backbone, neck and their configuration."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
from transformers.utils import ModelOutput

from .assigners import Priors
from .backbone import Backbone
from .bounds import MAX_WEIGHTS
from .configuration import PyramidDetectorConfig
from .layers import FPN, Conv, Neck
from .losses import LossPart, divide


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
