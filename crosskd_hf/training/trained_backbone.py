"""Refuses to train a student whose backbone is random and would stay so."""

from __future__ import annotations

import logging

from torch import Tensor, nn

from ..models.backbone import NORMS, Backbone, are_untouched

logger = logging.getLogger(__name__)


def demand_trained_backbone(model: nn.Module) -> None:
    """Refuse to train a student with a backbone that is random and would stay so.

    Raises:
        ValueError: The backbone is frozen or keeps its statistics, but nothing was loaded into it.
    """
    _demand_live_norms(model)
    for backbone in model.modules():
        held = backbone.held_at_random() if isinstance(backbone, Backbone) else []
        if held:
            raise ValueError(
                f"The student's backbone {backbone.name} is random, and {' and '.join(held)} would keep parts of it "
                "so. Load weights: from_pretrained, or model.backbone.load_weights(...) after building; or build it "
                "with frozen_stages=0, norm_eval=False."
            )


def _demand_live_norms(model: nn.Module) -> None:
    """The same for models of transformers, whose batch norms are most often frozen, by a class of their own.

    In a net that timm builds, the last norm of each residual block multiplies by 0 until it has learnt.
    """
    held = [module for module in model.modules() if _is_held_norm(module)]
    if any(isinstance(module, Backbone) for module in model.modules()) or not are_untouched(held):
        return
    off = sum(not bool(module.weight.any()) for module in held if isinstance(module.weight, Tensor))
    fixed = [name for name, p in model.named_parameters() if p.ndim > 1 and not p.requires_grad]
    what = f"The student's backbone is random: its {len(held)} frozen norms are as they were built"
    way_out = (
        "Load weights: from_pretrained of a trained detector, or those of timm, model.model.backbone.model."
        "load_state_dict(timm.create_model(..., features_only=True, pretrained=True).state_dict())"
    )
    if off:
        raise ValueError(
            f"{what}, and {off} of them multiply by 0, which switches their blocks off for good. {way_out}; or train "
            "from scratch on a net without batch norm, such as convnext_tiny, or fill the scales of the frozen norms "
            "with 1."
        )
    if fixed:
        raise ValueError(
            f"{what}, and {len(fixed)} weights without gradient would stay so, such as {fixed[0]}. {way_out}; or "
            "train all of it: model.requires_grad_(True)."
        )
    logger.warning("%s, so it is trained as a net without norms. %s.", what, way_out)


def _is_held_norm(module: nn.Module) -> bool:
    if "FrozenBatchNorm" in type(module).__name__:  # each family of transformers has its own class, and so has timm
        return True
    parameters = list(module.parameters()) if isinstance(module, NORMS) else []
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
