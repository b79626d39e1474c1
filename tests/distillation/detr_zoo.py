"""Tiny random DETR-type models, one of each family, and a padded batch for them."""

from typing import Any

import torch
import transformers
from torch import Tensor

from tests.tiny_backbone import as_if_loaded

SIZE = 64
SMALL = (28, 60)  # height and width of the second image: padding fills whole places of every stride
CLASSES = 5


def _timm(out_indices: list[int]) -> dict[str, Any]:
    return {
        "model_type": "timm_backbone",
        "backbone": "test_resnet",  # 32, 48, 192 and 96 channels at strides 4 to 32
        "num_channels": 3,
        "features_only": True,
        "use_pretrained_backbone": False,
        "out_indices": out_indices,
    }


def _encoder_decoder() -> dict[str, Any]:
    return {
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "num_queries": 10,
        "num_labels": CLASSES,
    }


def _hybrid() -> dict[str, Any]:
    return {
        **_encoder_decoder(),
        "backbone_config": _timm([2, 3, 4]),
        "encoder_in_channels": [48, 192, 96],
        "encoder_hidden_dim": 32,
        "decoder_in_channels": [32, 32, 32],
        "d_model": 32,
        "num_denoising": 8,
    }


def _vit(hidden: str) -> dict[str, Any]:
    return {
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_self_attention_heads": 4,
        "decoder_cross_attention_heads": 4,
        "decoder_ffn_dim": 32,
        "num_queries": 6,  # no more than places in the smaller image: those of its padding score all alike
        "group_detr": 2,
        "num_labels": CLASSES,
        "c2f_num_blocks": 1,
        "dropout": 0.0,
        "backbone_config": {
            "model_type": hidden,
            "image_size": SIZE,
            "patch_size": 16,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_windows": 4 if hidden == "lw_detr_vit" else 2,
            "out_indices": [1, 2],
        },
    }


_DEFORMABLE = {
    **_encoder_decoder(),
    "backbone_config": _timm([2, 3, 4]),
    "d_model": 64,  # its 32 norm groups need two values each on a map of one cell
    "two_stage_num_proposals": 10,
    "auxiliary_loss": True,
    "dropout": 0.0,
}
_FINE = {"decoder_n_points": [2, 2, 2], "max_num_bins": 8}
_ONE_LEVEL = {**_encoder_decoder(), "backbone_config": _timm([1, 2, 3, 4]), "dropout": 0.0}

# Name of a variant -> class prefix in transformers and settings.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deformable_detr": ("DeformableDetr", _DEFORMABLE),
    "deformable_detr box-refine": ("DeformableDetr", _DEFORMABLE | {"with_box_refine": True}),
    "deformable_detr two-stage": ("DeformableDetr", _DEFORMABLE | {"with_box_refine": True, "two_stage": True}),
    "rt_detr": ("RTDetr", _hybrid()),
    "rt_detr_v2": ("RTDetrV2", _hybrid()),
    "d_fine": ("DFine", _hybrid() | _FINE),
    "deimv2": ("Deimv2", _hybrid() | _FINE),
    "detr": ("Detr", _ONE_LEVEL | {"d_model": 32}),
    "conditional_detr": ("ConditionalDetr", _ONE_LEVEL | {"d_model": 32}),
    "dab-detr": ("DabDetr", _ONE_LEVEL | {"hidden_size": 32}),
    "lw_detr": ("LwDetr", _vit("lw_detr_vit") | {"projector_scale_factors": [2.0, 0.5]}),
    "rf_detr": ("RfDetr", _vit("rf_detr_dinov2") | {"num_feature_levels": 1}),
}


def build(name: str, seed: int = 0, **changes: Any) -> Any:
    """A model of one of `MODELS` in evaluation mode, with weights drawn from `seed`."""
    prefix, settings = MODELS[name]
    config = getattr(transformers, f"{prefix}Config")(**(settings | changes))
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForObjectDetection")(config)
    with torch.no_grad():  # fresh heads predict one box for all queries, and fresh norms can be applied twice
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += (0.05 if parameter.ndim > 1 else 0.2) * torch.randn_like(parameter)
    return as_if_loaded(model).eval()


def batch(images: int = 2) -> dict[str, Any]:
    """Two images, the second smaller than the padded size, and labels; the second has no objects."""
    mask = torch.ones(images, SIZE, SIZE, dtype=torch.long)
    mask[1:, SMALL[0] :] = 0
    mask[1:, :, SMALL[1] :] = 0
    pixels = torch.randn(images, 3, SIZE, SIZE) * mask[:, None]
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.3], [0.3, 0.6, 0.2, 0.2]])
    labels: list[dict[str, Tensor]] = [
        {"class_labels": torch.tensor([0, 3]), "boxes": boxes},
        *[{"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)}] * (images - 1),
    ]
    return {"pixel_values": pixels, "pixel_mask": mask, "labels": labels}
