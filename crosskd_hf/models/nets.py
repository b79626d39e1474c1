"""Which timm net a backbone is, which of its features a detector reads, and which sizes of images the net takes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from timm.layers.halo_attn import HaloAttn
from torch import nn

from .bounds import check_net_arguments, check_plain_name


def plain_net(name: str, arguments: dict[str, Any] | None) -> tuple[str, dict[str, Any] | None]:
    """timm's own name of a net, and its arguments.

    Args:
        name: A plain name, or "hf-hub:OWNER/NAME[@REVISION]" or "local-dir:FOLDER", whose `config.json` is read.
        arguments: Given ones; they go before those of the file.

    Raises:
        ValueError: The file has arguments that a configuration may not set, or doesn't name an architecture.
    """
    scheme, _, location = name.partition(":")
    if not location:
        return name, arguments
    if scheme == "local-dir":
        path = Path(location) / "config.json"
    elif scheme in ("hf-hub", "hf_hub"):
        repository, _, revision = location.partition("@")
        path = Path(hf_hub_download(repository, "config.json", revision=revision or None))
    else:
        raise ValueError(f"backbone={name!r}: give a timm name, hf-hub:OWNER/NAME or local-dir:FOLDER.")
    saved = json.loads(path.read_text(encoding="utf-8"))
    plain, arguments = str(saved.get("architecture")), {**(saved.get("model_args") or {}), **(arguments or {})}
    check_plain_name(plain)
    check_net_arguments(arguments)
    return plain, arguments or None


def select_features(
    name: str, reductions: list[int], strides: Sequence[int], out_indices: Sequence[int] | None
) -> list[int]:
    """Indices of the features of these strides, or of those that were asked for; `ValueError` if there are none."""
    if out_indices is not None:
        selected = [index % len(reductions) for index in out_indices if -len(reductions) <= index < len(reductions)]
        if len(selected) != len(out_indices) or [reductions[index] for index in selected] != list(strides):
            raise ValueError(
                f"out_indices={tuple(out_indices)} of {name}, whose features have strides {reductions}, do not give "
                f"the strides {tuple(strides)}. Leave out_indices unset to have them chosen by stride."
            )
        return selected
    last = {stride: index for index, stride in enumerate(reductions)}
    missing = [stride for stride in strides if stride not in last]
    if missing:
        raise ValueError(
            f"{name} has features of strides {reductions}, none of stride {missing}. "
            f"Choose a timm net with pyramid features (timm.create_model(..., features_only=True))."
        )
    return [last[stride] for stride in strides]


def check_sizes(name: str, net: nn.Module, arguments: dict[str, Any]) -> None:
    """Find a net whose windows or position tables fit images of one size alone, by a pass that computes nothing."""
    settings = timm.get_pretrained_cfg(name)
    suspect = settings is None or settings.fixed_input_size or any(isinstance(m, HaloAttn) for m in net.modules())
    if not suspect or any(parameter.is_meta for parameter in net.parameters()):  # from_pretrained: once built already
        return
    with torch.device("meta"), torch.no_grad():
        twin = timm.create_model(name, features_only=True, pretrained=False, **arguments).eval()
        try:
            twin(torch.empty(1, 3, 160, 96))
        except (AssertionError, RuntimeError, ValueError) as error:
            height, width = (256, 256) if settings is None else settings.input_size[1:]
            raise ValueError(
                f"{name} does not take images of all sizes, which detectors get: its windows or position tables are "
                f"made for {height} x {width} px. Choose another net, such as swinv2_tiny_window8_256, convnext_tiny "
                f"or resnet50; or make all images one size: backbone_arguments={{'img_size': [{height}, {width}]}}, "
                f"and an image processor with size={{'height': {height}, 'width': {width}}}."
            ) from error
