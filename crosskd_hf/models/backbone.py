"""Any timm net with pyramid features as the backbone of a detector."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from timm.layers.format import Format
from timm.models import FeatureListNet
from torch import Tensor, nn

from .net_variants import deform, pad_before_shift, stride_on_first_conv
from .nets import check_sizes, plain_net, select_features

# Constructor arguments that a family of nets needs to take images of any size.
_ANY_SIZE = {"strict_img_size": False, "always_partition": True}
FAMILY_ARGUMENTS: dict[str, dict[str, Any]] = {"swin": _ANY_SIZE, "swinv2": _ANY_SIZE}
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
NORMS = (*BATCH_NORMS, nn.GroupNorm, nn.LayerNorm)


class RandomBackboneWarning(UserWarning):
    """A backbone was built whose random weights are never trained, unless weights are loaded into it."""


@contextmanager
def weights_follow() -> Iterator[None]:
    """Inside of it detectors may be built without a :class:`RandomBackboneWarning`: weights are loaded next."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RandomBackboneWarning)
        yield


class Backbone(nn.Module):
    """Multi-scale features of a timm net.

    Args:
        name: timm model name without weights tag, e.g. "resnet50". "hf-hub:OWNER/NAME" reads name and arguments from
            the Hub, "local-dir:FOLDER" from a folder in timm's format; `load_weights()` reads the weights there too.
        strides: Strides of the features to return, finest first.
        arguments: Further arguments of the net's constructor.
        out_indices: timm's feature indices, instead of choosing features by their stride.
        frozen_stages: Stages without gradient: 0 = none, 1 = stem and the stage of stride 4, 2 = also the next, ...
        norm_eval: BatchNorm uses its running statistics in training too.
        freeze_norm: Scale and bias of all norm layers get no gradient.
        caffe_stride: ResNet bottlenecks stride on their first 1x1 convolution, as Caffe models do.
        output_norm: A LayerNorm on every returned feature (Swin detectors).
        pad_windows: Swin pads maps to whole windows before it shifts them, as in MMDetection; timm pads afterwards.
        last_channels: A 1x1 convolution with BatchNorm and ReLU6 to so many channels on the last feature
            (MobileNetV2's final layer, which timm's features leave out).
        deformable_strides: The 3x3 convolutions of a ResNet's stages of these strides are deformable (DCNv2).

    Raises:
        ValueError: The net has no pyramid features, or not those that were asked for; or it takes images of one size
            alone, and `arguments` don't say by `img_size` that this is known.
    """

    def __init__(
        self,
        name: str,
        strides: Sequence[int],
        arguments: dict[str, Any] | None = None,
        out_indices: Sequence[int] | None = None,
        frozen_stages: int = 0,
        norm_eval: bool = True,
        freeze_norm: bool = False,
        caffe_stride: bool = False,
        output_norm: bool = False,
        pad_windows: bool = False,
        last_channels: int | None = None,
        deformable_strides: Sequence[int] = (),
    ):
        super().__init__()
        self.source, self.norm_eval = name, norm_eval
        self.name, self.given_arguments = plain_net(name, arguments)
        self.arguments = {**FAMILY_ARGUMENTS.get(self.name.split("_")[0], {}), **(self.given_arguments or {})}
        self.net = timm.create_model(self.name, features_only=True, pretrained=False, **self.arguments)
        info = self.net.feature_info
        self.selected = select_features(name, info.reduction(), strides, out_indices)
        if "img_size" not in self.arguments:  # after the strides, which no size of images would mend
            check_sizes(self.name, self.net, self.arguments)
        self.channels = [info.channels()[index] for index in self.selected]
        # timm's feature lists hand features out as the net computes them; only Swin-like nets do so channels last.
        self.channels_last = isinstance(self.net, FeatureListNet) and self.net.output_fmt == Format.NHWC
        if caffe_stride:
            stride_on_first_conv(name, self.net)
        if deformable_strides:
            deform(name, self.net, deformable_strides)
        if pad_windows:
            pad_before_shift(name, self.net)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in self.channels) if output_norm else None
        self.last: nn.Module = nn.Identity()
        if last_channels is not None:
            conv = nn.Conv2d(self.channels[-1], last_channels, 1, bias=False)
            self.last = nn.Sequential(conv, nn.BatchNorm2d(last_channels), nn.ReLU6())
            self.channels[-1] = last_channels
        self.frozen_stages, self.freeze_norm = frozen_stages, freeze_norm
        self.freeze()
        self.train(self.training)  # norm_eval holds from the start, not only from the first call of `train`
        if self.held_at_random():
            text = f"The backbone {name} is random, and {' and '.join(self.held_at_random())} keep it so: load weights"
            warnings.warn(f"{text}, or build it with frozen_stages=0, norm_eval=False.", RandomBackboneWarning, 2)

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to one (B, C_l, H / stride_l, W / stride_l) map per stride, always channels first."""
        features = self.net(pixel_values)
        features = [features[index] for index in self.selected]
        if self.norms is not None:
            if not self.channels_last:
                features = [feature.permute(0, 2, 3, 1) for feature in features]
            features = [norm(feature) for norm, feature in zip(self.norms, features, strict=True)]
        if self.norms is not None or self.channels_last:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        return [*features[:-1], self.last(features[-1])]

    def train(self, mode: bool = True) -> "Backbone":
        """As of `nn.Module`, but BatchNorm stays in evaluation mode if `norm_eval`."""
        super().train(mode)
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, BATCH_NORMS):
                    module.eval()
        return self

    def load_weights(self, source: str | Path | None = None) -> None:
        """Load timm's classification weights into the net.

        Args:
            source: A weights tag of timm ("a1_in1k") or a file in timm's format (.safetensors, .pth); `None` takes
                timm's default weights. A tag or `None` downloads from the Hub.

        Raises:
            RuntimeError: The weights do not fit the net.
        """
        name, overlay = self.source, None
        if source is not None and Path(source).exists():
            overlay = {"file": str(source), "custom_load": False}
        elif source is not None:
            name = f"{self.name}.{source}"
        loaded = timm.create_model(
            name, features_only=True, pretrained=True, pretrained_cfg_overlay=overlay, **self.arguments
        )
        offsets = {key: value for key, value in self.net.state_dict().items() if ".conv_offset." in key}
        self.net.load_state_dict(loaded.state_dict() | offsets)  # which no classifier has

    def held_at_random(self) -> list[str]:
        """The settings that keep parts of a random net as they are; empty if something was loaded into it or learnt.

        A net is taken for random if the scales, shifts and statistics of all its norms are constants, as they are
        when a net is built. A net without norms is judged by its other vectors.
        """
        norms = [module for module in self.net.modules() if isinstance(module, NORMS)]
        vectors = [parameter for parameter in self.net.parameters() if parameter.ndim == 1]
        if not (are_untouched(norms) if norms else _are_constant(vectors)):
            return []
        held = [f"frozen_stages={self.frozen_stages}"] if self.frozen_stages else []
        if self.norm_eval and any(isinstance(norm, BATCH_NORMS) for norm in norms):
            held.append("norm_eval=True")
        if not held and not all(parameter.requires_grad for parameter in self.net.parameters() if parameter.ndim > 1):
            held.append("requires_grad=False")
        return held

    def freeze(self) -> None:
        """Take the gradient from `frozen_stages` and, with `freeze_norm`, from the norms.

        Done when the backbone is built, and once more after loading, which makes new parameters.
        """
        if self.freeze_norm:
            for module in self.modules():
                if isinstance(module, NORMS):
                    module.requires_grad_(False)
        if self.frozen_stages == 0:
            return
        info = self.net.feature_info
        names = [n for n, stride in zip(info.module_name(), info.reduction(), strict=True) if stride >= 4]
        if not 0 < self.frozen_stages <= len(names):
            raise ValueError(
                f"frozen_stages={self.frozen_stages}, but {self.name} has {len(names)} stages from stride 4 on: "
                f"choose 0 to {len(names)}."
            )
        last = names[self.frozen_stages - 1]
        stage = last.replace("block.", "stages.")  # what timm's wrapper of a whole net calls a stage
        prefixes = (f"{last}.", f"{last.replace('.', '_')}.", f"model.{last}.", f"model.{stage}.")  # lists are flat
        parameters = list(self.net.named_parameters())  # in the order of the forward pass
        found = [index for index, (key, _) in enumerate(parameters) if key.startswith(prefixes)]
        if not found:
            raise ValueError(
                f"frozen_stages={self.frozen_stages}, but timm doesn't tell which layers are the stages of "
                f"{self.name}: choose frozen_stages=0."
            )
        for _, parameter in parameters[: found[-1] + 1]:
            parameter.requires_grad_(False)


def are_untouched(norms: Iterable[nn.Module]) -> bool:
    """Whether scales, shifts and statistics of all `norms` are constants, as they are when a net is built."""
    return _are_constant([t for norm in norms for t in (*norm.parameters(), *norm.buffers())])


def _are_constant(vectors: Sequence[Tensor]) -> bool:
    return bool(vectors) and not vectors[0].is_meta and all(bool((v == v.flatten()[0]).all()) for v in vectors)
