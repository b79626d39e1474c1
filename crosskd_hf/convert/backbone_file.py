"""Weights of a backbone from a file: MMDetection's and torchvision's names for ResNets, and timm's format."""

import os
from pathlib import Path

from crosskd_hf.models.backbone import Backbone

from .checkpoint import COUNTER, CheckpointError, read_checkpoint

PREFIX = "backbone."


def load_backbone_file(backbone: Backbone, path: str | os.PathLike[str]) -> None:
    """Load classification weights into a new backbone. Nothing in the file is executed.

    The classifier, and of a whole detector all but its backbone, is left out. The order of the channels is that of the
    file: a net whose images were BGR, as Caffe's, needs an image processor with `channel_order="bgr"`.

    Args:
        backbone: Of a model of this library.
        path: `.pth` or `.safetensors`, with the names of torchvision's ResNets (which MMDetection's have too), or in
            timm's format.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is a pickle of Caffe2 or Detectron, or its tensors don't fit the net.
    """
    path = Path(path)
    if path.suffix == ".pkl":
        raise CheckpointError(
            f"{path} is a pickle, which may run code when it is read, and is refused. Take the same weights as "
            "OpenMMLab publishes them (resnet50_caffe and the like, .pth), or save them from PyTorch as .safetensors."
        )
    state = {name.removeprefix(PREFIX): tensor for name, tensor in read_checkpoint(path).state.items()}
    own = backbone.net.state_dict()
    missing = [name for name in own if name not in state and not name.endswith(COUNTER)]
    if missing and len(missing) > len(own) // 2:  # other names throughout: timm knows more of them
        backbone.load_weights(path)
        return
    shapes = [name for name in own if name in state and state[name].shape != own[name].shape]
    if missing or shapes:
        raise CheckpointError(
            f"{path} doesn't fit the backbone {backbone.name}: {len(missing)} tensors are missing ({missing[:3]}), "
            f"{len(shapes)} have another shape ({shapes[:3]}). Give the weights of this very net."
        )
    backbone.net.load_state_dict({name: state[name] for name in own if name in state}, strict=False)
