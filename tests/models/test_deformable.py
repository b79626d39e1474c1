"""Deformable convolutions in a backbone: what they compute, start from, save, and read from MMDetection."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosskd_hf.convert.backbones import recognise_backbone
from crosskd_hf.models import GFLConfig, GFLForObjectDetection
from crosskd_hf.models.backbone import Backbone, weights_follow
from crosskd_hf.models.net_variants import DeformableConv

STRIDES = (8, 16, 32)


def tiny(**settings: Any) -> Backbone:
    """A ResNet of a few bottleneck blocks."""
    with weights_follow():
        return Backbone("resnet50", STRIDES, {"layers": [1, 2, 1, 1]}, deformable_strides=STRIDES, **settings)


def reference(conv: DeformableConv, x: Tensor) -> Tensor:
    """The formula with bilinear sampling by hand: for every tap the moved map, times its strength and weight."""
    moves = conv.conv_offset(x)
    offset, strength = moves[:, :18], moves[:, 18:].sigmoid()
    height, width = moves.shape[-2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    groups, total = conv.groups, 0
    for tap in range(9):
        y = rows * conv.stride[0] - 1 + tap // 3 + offset[:, 2 * tap]
        x_ = columns * conv.stride[1] - 1 + tap % 3 + offset[:, 2 * tap + 1]
        padded = F.pad(x, (1, 1, 1, 1))  # zeros around, where grid_sample fades out too
        grid = torch.stack([(x_ + 1) / (padded.shape[-1] - 1), (y + 1) / (padded.shape[-2] - 1)], -1) * 2 - 1
        moved = F.grid_sample(padded, grid, align_corners=True) * strength[:, tap : tap + 1]
        total = total + F.conv2d(moved, conv.weight[:, :, tap // 3, tap % 3][..., None, None], groups=groups)
    return total


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_every_tap_is_moved_and_weighted(stride: int, groups: int) -> None:
    torch.manual_seed(0)
    conv = DeformableConv(nn.Conv2d(8, 12, 3, stride=stride, padding=1, groups=groups, bias=False)).double()
    nn.init.normal_(conv.conv_offset.weight, std=0.2)
    nn.init.normal_(conv.conv_offset.bias, std=0.5)
    x = torch.randn(2, 8, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(conv(x), reference(conv, x))


def test_a_new_one_is_the_plain_convolution_at_half_strength() -> None:
    plain = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)
    conv, x = DeformableConv(plain), torch.randn(1, 8, 11, 13)
    torch.testing.assert_close(conv(x), plain(x) / 2)
    conv(x).square().sum().backward()
    assert conv.conv_offset.weight.grad.abs().sum() > 0
    assert conv.weight.grad.abs().sum() > 0


def test_stages_of_the_given_strides_alone() -> None:
    backbone = tiny()
    found = [name for name, module in backbone.net.named_modules() if isinstance(module, DeformableConv)]
    assert found == ["layer2.0.conv2", "layer2.1.conv2", "layer3.0.conv2", "layer4.0.conv2"]
    shapes = [tuple(feature.shape[-2:]) for feature in backbone(torch.zeros(1, 3, 64, 96))]
    assert shapes == [(8, 12), (4, 6), (2, 3)]


@pytest.mark.parametrize(("name", "strides"), [("resnet18", [8]), ("resnet50", [5]), ("mobilenetv2_100", [8])])
def test_other_nets_are_refused(name: str, strides: list[int]) -> None:
    with weights_follow(), pytest.raises(ValueError, match="has no stage of bottleneck blocks there"):
        Backbone(name, STRIDES, deformable_strides=strides)


def test_classification_weights_load_and_the_offsets_stay(tmp_path: Path) -> None:
    source, backbone = Backbone("resnet50", STRIDES, {"layers": [1, 2, 1, 1]}, norm_eval=False), tiny()
    torch.save(source.net.state_dict(), tmp_path / "net.pth")
    backbone.net.layer2[0].conv2.conv_offset.bias.data.fill_(0.5)
    backbone.load_weights(tmp_path / "net.pth")
    assert torch.equal(backbone.net.layer2[0].conv2.weight, source.net.layer2[0].conv2.weight)
    assert bool((backbone.net.layer2[0].conv2.conv_offset.bias == 0.5).all())


def test_a_detector_saves_and_reloads(tmp_path: Path) -> None:
    config = GFLConfig(
        backbone="resnet50",
        backbone_arguments={"layers": [1, 1, 1, 1]},
        deformable_strides=[8, 16, 32],
        fpn_channels=16,
        head_channels=16,
        norm_groups=4,
        num_labels=2,
    )
    with weights_follow():
        model = GFLForObjectDetection(config).eval()
    nn.init.normal_(model.backbone.net.layer3[0].conv2.conv_offset.weight)
    model.save_pretrained(tmp_path)
    again = GFLForObjectDetection.from_pretrained(tmp_path).eval()
    assert list(again.config.deformable_strides) == [8, 16, 32]
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, again(pixels).logits)


class TestMMDetection:
    @staticmethod
    def shapes(channels: int = 27, name: str = "resnet101", width: int = 4) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            backbone = Backbone(name, STRIDES, deformable_strides=STRIDES, frozen_stages=0)
        shapes = {f"backbone.{key}": tuple(value.shape) for key, value in backbone.net.state_dict().items()}
        return {k: (channels, *v[1:]) if k.endswith("conv_offset.weight") else v for k, v in shapes.items()}

    @pytest.mark.parametrize("name", ["resnet101", "resnext101_32x4d"])
    def test_stages_are_recognised(self, name: str) -> None:
        fields = recognise_backbone(self.shapes(name=name), caffe_style=False)
        assert (fields["backbone"], fields["deformable_strides"]) == (name, [8, 16, 32])

    def test_other_kinds_are_refused(self) -> None:
        partial = self.shapes()
        del partial["backbone.layer3.5.conv2.conv_offset.weight"]
        head = {**self.shapes(), "bbox_head.cls_convs.3.conv.conv_offset.weight": (27, 256, 3, 3)}
        for shapes in (self.shapes(18), partial, head):
            with pytest.raises(ValueError, match="Unknown deformable convolution"):
                recognise_backbone(shapes, caffe_style=False)
