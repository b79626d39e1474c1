"""Backbones of tests, which download nothing."""

from typing import TypeVar

import torch
from torch import nn

from crosskd_hf.models.backbone import NORMS
from crosskd_hf.models.pyramid import PyramidDetector

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def as_if_loaded(model: Model) -> Model:
    """The same model, with norms in its backbone that are not constant any more, as if weights had been loaded.

    Of a model of transformers these are the frozen batch norms.
    """
    generator = torch.Generator().manual_seed(0)
    net = model.backbone.net if isinstance(model, PyramidDetector) else model
    for norm in net.modules():
        if "FrozenBatchNorm" in type(norm).__name__ or (net is not model and isinstance(norm, NORMS)):
            norm.bias += 1e-3 * torch.rand(norm.bias.shape, generator=generator)
    return model
