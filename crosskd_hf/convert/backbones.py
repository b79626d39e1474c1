"""Backbones of MMDetection checkpoints in timm's names."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
Rules = list[tuple[str, str]]

RESNETS = {
    (2, 2, 2, 2): {"basic": "resnet18"},
    (3, 4, 6, 3): {"basic": "resnet34", "bottleneck": "resnet50"},
    (3, 4, 23, 3): {"bottleneck": "resnet101"},
    (3, 8, 36, 3): {"bottleneck": "resnet152"},
}
# (depth of the third stage, channels of the first 3x3 convolution, its input channels): groups x width.
RESNEXTS = {
    (6, 128, 4): "resnext50_32x4d",
    (23, 128, 4): "resnext101_32x4d",
    (23, 256, 4): "resnext101_64x4d",
    (23, 256, 8): "resnext101_32x8d",
}
RESNET_RULES: Rules = [(r"backbone\.((?:conv1|bn1|layer\d+)\..+)", r"backbone.net.\1")]

SWIN_TINY_DEPTHS = (2, 2, 6, 2)
SWIN_RULES: Rules = [
    (r"backbone\.patch_embed\.projection\.(.+)", r"backbone.net.patch_embed.proj.\1"),
    (r"backbone\.patch_embed\.norm\.(.+)", r"backbone.net.patch_embed.norm.\1"),
    (r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.attn\.w_msa\.(.+)", r"backbone.net.layers_\1.blocks.\2.attn.\3"),
    (
        r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.ffn\.layers\.0\.0\.(.+)",
        r"backbone.net.layers_\1.blocks.\2.mlp.fc1.\3",
    ),
    (r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.ffn\.layers\.1\.(.+)", r"backbone.net.layers_\1.blocks.\2.mlp.fc2.\3"),
    (r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.(norm\d\..+)", r"backbone.net.layers_\1.blocks.\2.\3"),
]


def recognise_backbone(shapes: Shapes, caffe_style: bool) -> dict[str, Any]:
    """Configuration fields of the backbone in a checkpoint.

    Raises:
        ValueError: A backbone that is not known.
    """
    if "backbone.patch_embed.projection.weight" in shapes:
        return _recognise_swin(shapes)
    if "backbone.conv2.conv.weight" in shapes:
        return _recognise_mobilenet(shapes)
    depths = tuple(_blocks(shapes, rf"backbone\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    kind = "bottleneck" if "backbone.layer1.0.conv3.weight" in shapes else "basic"
    if depths not in RESNETS or kind not in RESNETS[depths] or "backbone.conv1.weight" not in shapes:
        raise ValueError(
            f"Unknown backbone: stages of {depths} {kind} blocks. Known are ResNet-18/34/50/101/152, ResNeXt, "
            f"MobileNetV2 and Swin-T."
        )
    name = RESNETS[depths][kind]
    width, inputs = shapes["backbone.layer1.0.conv2.weight"][:2]
    if kind == "bottleneck" and width != inputs:
        groups = (depths[2], width, inputs)
        if groups not in RESNEXTS:
            raise ValueError(f"Unknown ResNeXt: {width} channels in groups of {inputs} in the first stage.")
        name = RESNEXTS[groups]
    deformable = _recognise_deformable(shapes, depths)
    return {"backbone": name, "caffe_stride": caffe_style, "freeze_norm": caffe_style, **deformable}


def _recognise_deformable(shapes: Shapes, depths: tuple[int, ...]) -> dict[str, Any]:
    """The field for modulated deformable convolutions (DCNv2), where there are some.

    Raises:
        ValueError: They are of another kind, outside of the backbone, or in a part of a stage.
    """
    found = [name for name in shapes if name.endswith(".conv_offset.weight")]
    strides = []
    for stage, depth in enumerate(depths, start=1):
        names = [f"backbone.layer{stage}.{block}.conv2.conv_offset.weight" for block in range(depth)]
        if all(shapes.get(name, ())[:1] == (27,) for name in names):
            strides.append(2 ** (stage + 1))
            found = [name for name in found if name not in names]
    if found:
        raise ValueError(
            f"Unknown deformable convolution: {found[0]} of shape {tuple(shapes[found[0]])}. Known is DCNv2 with one "
            "group of offsets (27 channels) in all blocks of a ResNet's stage."
        )
    return {"deformable_strides": strides} if strides else {}


def backbone_rules(backbone: str) -> Rules:
    """Rules from MMDetection's to our names of a timm net's parameters."""
    if backbone.startswith("swin"):
        return _swin_rules()
    if backbone.startswith("mobilenetv2"):
        return _mobilenet_rules()
    return RESNET_RULES


def unused(backbone: str, last_channels: int | None) -> re.Pattern[str]:
    """Names of tensors that this backbone has in a checkpoint without using them."""
    if backbone.startswith("mobilenetv2") and last_channels is None:
        return re.compile(r"backbone\.conv2\.")
    return re.compile(r"backbone\..*relative_position_index$")  # Swin: given by the window size


def rearrange(name: str, tensor: Tensor) -> Tensor:
    """Bring the channels of Swin's patch merging into timm's order.

    MMDetection unfolds 2x2 patches channel by channel (c, y, x); timm concatenates the four pixels in the order
    (0, 0), (1, 0), (0, 1), (1, 1), that is (x, y, c).
    """
    if not re.search(r"backbone\.stages\.\d+\.downsample\.(norm|reduction)\.", name):
        return tensor
    rows = tensor.unflatten(-1, (-1, 2, 2))  # (..., c, y, x)
    return rows.movedim((-1, -2, -3), (-3, -2, -1)).flatten(-3)  # (..., x, y, c)


def fold_channel_order(state: dict[str, Tensor]) -> None:
    """Flip the input channels of the first convolution in place: weights for BGR become weights for RGB."""
    name = "backbone.net.conv1.weight"
    if name not in state:
        raise ValueError("Channel order can be folded into ResNets only.")
    state[name] = state[name].flip(1)


def _recognise_swin(shapes: Shapes) -> dict[str, Any]:
    depths = tuple(_blocks(shapes, rf"backbone\.stages\.{stage}\.blocks\.(\d+)\.") for stage in range(4))
    width = shapes["backbone.patch_embed.projection.weight"][0]
    if depths != SWIN_TINY_DEPTHS or width != 96:
        raise ValueError(f"Unknown Swin: depths {depths}, width {width}. Known is Swin-T: {SWIN_TINY_DEPTHS}, 96.")
    return {"backbone": "swin_tiny_patch4_window7_224", "output_norm": True, "pad_windows": True, "frozen_stages": 0}


def _swin_rules() -> Rules:
    # The merging in front of a stage stands at the end of the stage before in MMDetection.
    merging = [
        (rf"backbone\.stages\.{stage}\.downsample\.(.+)", rf"backbone.net.layers_{stage + 1}.downsample.\1")
        for stage in range(3)
    ]
    norms = [(rf"backbone\.norm{stage}\.(.+)", rf"backbone.norms.{stage - 1}.\1") for stage in (1, 2, 3)]
    return SWIN_RULES + merging + norms


def _recognise_mobilenet(shapes: Shapes) -> dict[str, Any]:
    last = shapes["backbone.conv2.conv.weight"][0]
    if last != 1280 or shapes["backbone.conv1.conv.weight"][0] != 32:
        raise ValueError(f"Unknown MobileNetV2 of last width {last}: known is the one of multiplier 1.")
    # The final convolution is part of every checkpoint, but a pyramid that takes the stage before it leaves it unused.
    inputs = [
        shape[1] for name, shape in shapes.items() if re.fullmatch(r"neck\.lateral_convs\.\d+\.conv\.weight", name)
    ]
    used = last if inputs and inputs[-1] == last else None
    return {"backbone": "mobilenetv2_100", "backbone_last_channels": used, "frozen_stages": 0}


def _mobilenet_rules() -> Rules:
    norm = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
    rules = [
        (r"backbone\.conv1\.conv\.weight", "backbone.net.conv_stem.weight"),
        (rf"backbone\.conv1\.bn\.{norm}", r"backbone.net.bn1.\1"),
        (r"backbone\.conv2\.conv\.weight", "backbone.last.0.weight"),
        (rf"backbone\.conv2\.bn\.{norm}", r"backbone.last.1.\1"),
    ]
    for stage in range(1, 8):  # the first stage does not expand, and timm calls its projection otherwise
        parts = {"expand_conv": "conv_pw", "depthwise_conv": "conv_dw", "linear_conv": "conv_pwl"}
        if stage == 1:
            parts = {"depthwise_conv": "conv_dw", "linear_conv": "conv_pw"}
        for place, (part, ours) in enumerate(parts.items(), start=1):
            source = rf"backbone\.layer{stage}\.(\d+)\.{part}"
            target = rf"backbone.net.blocks.{stage - 1}.\1"
            rules.append((rf"{source}\.conv\.weight", rf"{target}.{ours}.weight"))
            rules.append((rf"{source}\.bn\.{norm}", rf"{target}.bn{place}.\2"))
    return rules


def _blocks(shapes: Shapes, pattern: str) -> int:
    return len({match[1] for name in shapes if (match := re.match(pattern, name))})
