"""Backbones take images of any size, or say when they are built that they don't."""

from typing import Any

import pytest
import torch

from crosskd_hf.models.backbone import Backbone, RandomBackboneWarning

TINY = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("swinv2_tiny_window8_256", TINY),
        pytest.param("swinv2_cr_tiny_224", {}, marks=pytest.mark.slow),
        pytest.param("mvitv2_tiny", {}, marks=pytest.mark.slow),
        pytest.param("twins_svt_small", {}, marks=pytest.mark.slow),
    ],
)
def test_any_size_is_taken(name: str, arguments: dict[str, Any]) -> None:
    backbone = Backbone(name, (8, 16, 32), arguments).eval()
    for height, width in ((64, 96), (160, 128)):
        with torch.no_grad():
            features = backbone(torch.randn(2, 3, height, width))
        expected = [
            (2, channels, height // stride, width // stride)
            for channels, stride in zip(backbone.channels, (8, 16, 32), strict=True)
        ]
        assert [tuple(feature.shape) for feature in features] == expected


def test_stages_of_a_net_that_timm_wraps_whole() -> None:
    with pytest.warns(RandomBackboneWarning, match="frozen_stages=1 keep it so"):
        backbone = Backbone("mvitv2_tiny", (8, 16, 32), frozen_stages=1)
    frozen = {name.split(".")[2] for name, p in backbone.net.named_parameters() if not p.requires_grad}
    assert frozen == {"proj", "0"}  # of the patches' embedding and of the first stage
    arguments = {"embed_dims": [8] * 4, "depths": [1] * 4, "num_heads": [1] * 4}
    with pytest.raises(ValueError, match="doesn't tell which layers are the stages of twins_svt_small"):
        Backbone("twins_svt_small", (8, 16, 32), arguments, frozen_stages=1)


@pytest.mark.parametrize(
    "name",
    ["maxvit_nano_rw_256", "halonet26t", *(pytest.param(n, marks=pytest.mark.slow) for n in ("coatnet_nano_rw_224",
     "botnet26t_256", "efficientformer_l1", "visformer_tiny"))],
)  # fmt: skip
def test_one_size_alone_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} does not take images of all sizes.*'img_size': \[\d+, \d+\]"):
        Backbone(name, (8, 16, 32))


def test_one_size_on_purpose() -> None:
    backbone = Backbone("maxvit_nano_rw_256", (8, 16, 32), {"img_size": [64, 64]}).eval()
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 64, 64))
    assert [feature.shape[-1] for feature in features] == [8, 4, 2]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "cait_xxs24_224"])
def test_features_of_one_stride_are_told_before_the_size(name: str) -> None:
    """Images of one size, which such a net asks for too, would not make a pyramid of it."""
    with pytest.raises(ValueError, match=rf"{name} has features of strides \[16, 16, 16\], none of stride \[8, 32\]"):
        Backbone(name, (8, 16, 32), {"depth": 3})
