"""Backbones that are random and would stay so; windowed nets after saving."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForObjectDetection

from crosskd_hf.create import DetectorSpec, build_detector
from crosskd_hf.data import CategoryMap
from crosskd_hf.models import GFLConfig, GFLForObjectDetection
from crosskd_hf.models.backbone import RandomBackboneWarning
from tests.tiny_backbone import as_if_loaded


def make(backbone: str = "test_resnet", **settings: Any) -> GFLForObjectDetection:
    sizes = {"fpn_channels": 16, "head_channels": 16, "norm_groups": 4, "num_labels": 3}
    return GFLForObjectDetection(GFLConfig(backbone=backbone, **sizes, **settings))


def outputs(model: GFLForObjectDetection, pixels: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        found = model.eval()(pixel_values=pixels)
    return found.logits, found.pred_boxes


# ---- Random and frozen ----


@pytest.mark.parametrize(
    ("settings", "held"),
    [
        ({}, "frozen_stages=1 and norm_eval=True"),
        ({"norm_eval": False}, "frozen_stages=1"),
        ({"frozen_stages": 0}, "norm_eval=True"),
        ({"backbone": "test_efficientnet_gn", "frozen_stages": 2}, "frozen_stages=2"),
    ],
)
def test_building_one_says_so(settings: dict[str, Any], held: str) -> None:
    with pytest.warns(RandomBackboneWarning, match=f"{held} keep it so: load weights, or .*frozen_stages=0, norm_eval"):
        model = make(**settings)
    assert " and ".join(model.backbone.held_at_random()) == held
    assert as_if_loaded(model).backbone.held_at_random() == []


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet_gn"])
def test_nothing_to_say_of_one_that_is_trained(tmp_path: Path, backbone: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = make(backbone, frozen_stages=0, norm_eval=False)
        as_if_loaded(model).save_pretrained(tmp_path)
        loaded = AutoModelForObjectDetection.from_pretrained(tmp_path, frozen_stages=1, norm_eval=True)
        build_detector(DetectorSpec("gfl", backbone, width=16), CategoryMap((1,), ("cat",)))
    assert loaded.backbone.held_at_random() == []


def test_a_random_one_without_gradient_counts_too() -> None:
    model = make(frozen_stages=0, norm_eval=False)
    model.backbone.requires_grad_(False)
    assert model.backbone.held_at_random() == ["requires_grad=False"]


# ---- Saved and loaded ----


@pytest.mark.parametrize(
    ("backbone", "arguments"),
    [
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)}),
        ("swinv2_tiny_window8_256", {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)}),
        ("swinv2_cr_tiny_ns_224", {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)}),
    ],
)
def test_windowed_nets_take_any_size_and_reload_bit_by_bit(
    tmp_path: Path, backbone: str, arguments: dict[str, Any]
) -> None:
    """Their position tables are buffers that aren't saved."""
    torch.manual_seed(0)
    model = make(backbone, backbone_arguments=arguments, frozen_stages=0)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path)
    for size in ((64, 96), (128, 64)):
        pixels = torch.randn(1, 3, *size)
        for ours, theirs in zip(outputs(model, pixels), outputs(loaded, pixels), strict=True):
            assert torch.equal(ours, theirs)
