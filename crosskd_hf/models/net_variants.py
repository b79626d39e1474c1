"""What detectors change of timm's nets: strides as in Caffe, deformable convolutions, and Swin's padding."""

from collections.abc import Sequence
from typing import Any

import timm
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from torchvision.ops import deform_conv2d


def stride_on_first_conv(name: str, net: nn.Module) -> None:
    """Let bottlenecks of a ResNet stride in their first convolution, as Caffe's do, or raise `ValueError`."""
    bottlenecks = [m for m in net.modules() if isinstance(m, timm.models.resnet.Bottleneck)]
    if not bottlenecks:
        raise ValueError(f"caffe_stride is for ResNets of bottleneck blocks (resnet50 and deeper), not for {name}.")
    for block in bottlenecks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)


class DeformableConv(nn.Conv2d):
    """A modulated deformable convolution (DCNv2, CVPR 2019): every tap has its own offset and strength at every cell.

    It starts as the plain convolution at half strength, as in the paper, since the new part is zero.

    Args:
        conv: The convolution that it takes the place of: its weight goes on.
    """

    def __init__(self, conv: nn.Conv2d):
        shape = conv.in_channels, conv.out_channels, conv.kernel_size
        settings = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}
        super().__init__(*shape, bias=conv.bias is not None, **settings)  # type: ignore[arg-type]
        self.weight, self.bias = conv.weight, conv.bias
        taps = conv.kernel_size[0] * conv.kernel_size[1]
        settings.pop("groups")
        self.conv_offset = nn.Conv2d(conv.in_channels, 3 * taps, conv.kernel_size, **settings)  # type: ignore[arg-type]
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W'); the first two thirds of `conv_offset` are (y, x) shifts in cells."""
        moves = self.conv_offset(x)
        taps = moves.shape[1] // 3
        offset, strength = moves[:, : 2 * taps], moves[:, 2 * taps :].sigmoid()
        where = self.stride, self.padding, self.dilation
        return deform_conv2d(x, offset, self.weight, self.bias, *where, mask=strength)  # type: ignore[arg-type]


def deform(name: str, net: nn.Module, strides: Sequence[int]) -> None:
    """Put a `DeformableConv` for the 3 x 3 convolutions of the stages of these strides, or raise `ValueError`."""
    info: Any = net.feature_info
    stages = dict(zip(info.reduction(), info.module_name(), strict=True))
    for stride in strides:
        stage = getattr(net, stages.get(stride, ""), None)
        blocks = [m for m in stage.modules() if isinstance(m, timm.models.resnet.Bottleneck)] if stage else []
        if not blocks:
            raise ValueError(
                f"deformable_strides has {stride}, but {name} has no stage of bottleneck blocks there: they are for "
                "ResNets and ResNeXts of 50 layers or more, at strides 4, 8, 16 and 32."
            )
        for block in blocks:
            block.conv2 = DeformableConv(block.conv2)


class PadFirstSwinBlock(SwinTransformerBlock):
    """A Swin block that sees maps of whole windows only, so that shifting wraps around behind the padding."""

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        pad_height, pad_width = -height % self.window_size[0], -width % self.window_size[1]
        return super()._attn(F.pad(x, (0, 0, 0, pad_width, 0, pad_height)))[:, :height, :width]


def pad_before_shift(name: str, net: nn.Module) -> None:
    """Make the shifted blocks of a Swin a `PadFirstSwinBlock`, or raise `ValueError`."""
    blocks = [module for module in net.modules() if isinstance(module, SwinTransformerBlock)]
    if not blocks:
        raise ValueError(f"pad_windows is for Swin transformers, not for {name}.")
    for block in blocks:
        block.__class__ = PadFirstSwinBlock
