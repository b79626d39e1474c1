"""Where the weights of a new detector's backbone come from."""

from __future__ import annotations

import logging
from dataclasses import replace

import huggingface_hub
import timm
from huggingface_hub import constants

from .spec import DetectorSpec

logger = logging.getLogger(__name__)

_FILES = ("model.safetensors", "pytorch_model.bin")


def find_weights(spec: DetectorSpec, wanted: str | None) -> DetectorSpec:
    """The spec with `backbone_weights`; "auto" becomes "timm" if these can be had at once, and None otherwise."""
    if wanted != "auto":
        return replace(spec, backbone_weights=None if wanted == "none" else wanted)
    if not spec.backbone:  # a transformer's own
        return replace(spec, backbone_weights=None)
    if are_at_hand(spec.backbone):
        return replace(spec, backbone_weights="timm")
    logger.warning(
        "No pretrained weights of the backbone %s are at hand (not in the cache, and the Hub doesn't answer): it "
        "starts from random weights, which takes many more epochs and images. backbone_weights='timm' insists on them.",
        spec.backbone,
    )
    return replace(spec, backbone_weights=None)


def are_at_hand(backbone: str) -> bool:
    """Whether timm's default weights of a net lie in the cache, or on a Hub that answers. Takes no retries."""
    given = None if ":" in backbone else timm.get_pretrained_cfg(backbone)
    if given is None or not given.hf_hub_id:
        return False
    repository = given.hf_hub_id
    if repository.endswith("/"):
        repository += f"{given.architecture}.{given.tag}" if given.tag else given.architecture
    cached = (huggingface_hub.try_to_load_from_cache(repository, name) for name in _FILES)
    if any(isinstance(path, str) for path in cached):
        return True
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        return any(huggingface_hub.file_exists(repository, name) for name in _FILES)
    except Exception:  # whatever the client of the day raises without a network
        return False
