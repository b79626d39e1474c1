"""Building blocks of detectors: initialised convolutions, the feature pyramid, towers that can be cut, rows of maps."""

import itertools
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

FPNExtra = Literal["on_output", "on_input", "max_pool"]


class Conv(nn.Conv2d):
    """A convolution that knows its own initial values, padded so that stride 1 keeps the size of its input.

    Args:
        in_channels, ..., dtype: As of `nn.Conv2d`, in its order: peft makes further layers of the class that it finds.
        std: Standard deviation of the initial weight; `None` draws Xavier-uniform weights.
        bias_value: Initial bias.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        std: float | None = 0.01,
        bias_value: float = 0.0,
    ):
        self.std, self.bias_value = std, bias_value
        if padding is None:
            edges = (kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size
            padding = edges[0] // 2, edges[1] // 2
        shape = in_channels, out_channels, kernel_size, stride, padding, dilation, groups
        super().__init__(*shape, bias=bias, padding_mode=padding_mode, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw the initial values that the constructor was given."""
        if self.std is None:
            init.xavier_uniform_(self.weight)
        else:
            init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            init.constant_(self.bias, self.bias_value)


def prior_bias(probability: float) -> float:
    """Bias at which a sigmoid classifier starts at `probability` (RetinaNet, section 4.1)."""
    return -math.log((1 - probability) / probability)


class ConvNormAct(nn.Module):
    """3x3 convolution, GroupNorm and ReLU. The ReLU is never in place: taps must keep their values."""

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int | None, bias: bool | None = None):
        super().__init__()
        self.conv = Conv(in_channels, out_channels, 3, bias=norm_groups is None if bias is None else bias)
        self.norm = nn.Identity() if norm_groups is None else nn.GroupNorm(norm_groups, out_channels)

    def forward(self, x: Tensor, activated: bool = True) -> Tensor:
        x = self.norm(self.conv(x))
        return F.relu(x) if activated else x


class Tower(nn.ModuleList):
    """A row of :class:`ConvNormAct` that can be entered and left between any two of them."""

    def __init__(self, in_channels: int, channels: int, depth: int, norm_groups: int | None, bias: bool | None = None):
        widths = [in_channels] + [channels] * depth
        super().__init__(ConvNormAct(a, b, norm_groups, bias) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None, activated: bool = True) -> Tensor:
        """Run the convolutions `start` (included) to `stop` (not included; `None` = the end).

        Without `activated` the activation of the last of them is left out.
        """
        layers = list(self)[start:stop]
        for layer in layers:
            x = layer(x, activated or layer is not layers[-1])
        return x


class Scale(nn.Module):
    """A learnable scalar, one per pyramid level, on the regression output."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def _at_least_two_wide(x: Tensor) -> Tensor:
    """A single column gets a zero one beside it, which changes nothing that a stride-2 convolution with padding makes.

    Without it torch's bfloat16 kernels for CPUs leave parts of the weight's gradient unwritten (2.15).
    """
    return F.pad(x, (0, 1)) if x.shape[-1] == 1 else x


class Neck(nn.Module):
    """The base of what turns the features of a backbone into a pyramid."""

    @classmethod
    def from_config(cls, in_channels: list[int], config: Any) -> "Neck":
        """The neck that a `PyramidDetectorConfig` describes, on backbone features of `in_channels`, finest first."""
        raise NotImplementedError


class FPN(Neck):
    """Feature pyramid network (CVPR 2017) with extra levels.

    Args:
        in_channels: Channels of the backbone features, finest first.
        channels: Channels of every output.
        num_levels: Number of outputs; those beyond the backbone's come from stride-2 convolutions.
        extra: Where the first extra level comes from: the last output, the last backbone feature ("on_input"), or, for
            Faster R-CNN, the last output subsampled without weights ("max_pool").
        extra_relu: ReLU in front of the second and later extra convolution.
    """

    def __init__(
        self, in_channels: list[int], channels: int, num_levels: int, extra: FPNExtra, extra_relu: bool = False
    ):
        super().__init__()
        self.extra, self.extra_relu = extra, extra_relu
        self.num_levels = num_levels
        self.lateral = nn.ModuleList(Conv(c, channels, 1, std=None) for c in in_channels)
        self.output = nn.ModuleList(Conv(channels, channels, 3, std=None) for _ in in_channels)
        num_extra = 0 if extra == "max_pool" else num_levels - len(in_channels)
        sources = [in_channels[-1] if extra == "on_input" else channels] + [channels] * num_extra
        self.downsample = nn.ModuleList(Conv(c, channels, 3, stride=2, std=None) for c in sources[:num_extra])

    @classmethod
    def from_config(cls, in_channels: list[int], config: Any) -> "FPN":
        """See :meth:`Neck.from_config`."""
        return cls(in_channels, config.fpn_channels, len(config.strides), config.fpn_extra, config.fpn_extra_relu)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Backbone maps (B, C_l, H_l, W_l) to `num_levels` maps (B, channels, H_l, W_l)."""
        merged = [lateral(feature) for lateral, feature in zip(self.lateral, features, strict=True)]
        for level in range(len(merged) - 1, 0, -1):
            finer = merged[level - 1]
            merged[level - 1] = finer + F.interpolate(merged[level], size=finer.shape[-2:], mode="nearest")
        outputs = [conv(feature) for conv, feature in zip(self.output, merged, strict=True)]

        source = features[-1] if self.extra == "on_input" else outputs[-1]
        for index, conv in enumerate(self.downsample):
            source = conv(_at_least_two_wide(F.relu(source) if self.extra_relu and index > 0 else source))
            outputs.append(source)
        while len(outputs) < self.num_levels:  # only "max_pool"
            outputs.append(F.max_pool2d(outputs[-1], 1, stride=2))
        return outputs


def maps_to_rows(maps: list[Tensor], width: int) -> Tensor:
    """One (B, A * width, H_l, W_l) map per level to (B, N, width) in float32."""
    return torch.cat([m.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, width)) for m in maps], 1).float()
