"""A copy of a frozen teacher that makes the same of its images in fewer steps. It teaches, and nothing else.

Batch norms become a part of the convolutions in front of them, and weights that autocast would round in every pass are
kept rounded. Everything else is shared with the teacher, which stays as it is.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from transformers import PreTrainedModel

from ..models.pyramid import PyramidDetector

logger = logging.getLogger(__name__)

PROBE_EDGE = 64  # px of the image by which batch norms are found; any net takes it
PROBE_EDGE_OF_OTHERS = 256  # with enough cells for the queries of two-stage DETRs
_TOLERANCE = 1e-4  # largest difference after folding, of the largest value


class FrozenCopy:
    """See the module.

    Args:
        teacher: In evaluation mode.
        dtype: Type of autocast, in which the teacher will always run; None: it runs in float32.

    Attributes:
        model: The copy. It is the teacher itself where it can't be copied, or where nothing would be gained.
    """

    def __init__(self, teacher: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
        self.teacher, self.model = teacher, teacher
        self.dtype = dtype if isinstance(teacher, PyramidDetector) else None
        self._pairs: list[tuple[str, str]] = []
        self._rounded: list[str] = []
        if _is_plain(teacher):
            self._copy()

    def _copy(self) -> None:
        before = _probed(self.teacher)
        self._pairs = _pairs(self.teacher, before)
        folded = {conv for conv, _ in self._pairs}
        if self.dtype is not None:
            self._rounded = [name for name, module in _products(self.teacher) if name not in folded]
        if not self._pairs and not self._rounded:
            return
        shared = {id(tensor): tensor for tensor in (*self.teacher.parameters(), *self.teacher.buffers())}
        model = copy.deepcopy(self.teacher, shared)
        for _, norm in self._pairs:
            parent, _, name = norm.rpartition(".")
            module = model.get_submodule(norm)
            rest = [part for part in (getattr(module, "drop", None), getattr(module, "act", None)) if part is not None]
            setattr(model.get_submodule(parent), name, nn.Sequential(*rest) if rest else nn.Identity())
        self._fill(model, None)
        if not _same(before, _probed(model), [norm for _, norm in self._pairs]):
            logger.warning("The teacher's batch norms stay as they are: without them its features are others.")
            self._pairs, self._rounded = [], []
            return
        self._fill(model, self.dtype)
        self.model, self._versions = model, self._now()

    def refresh(self) -> None:
        """Follow the teacher, if its weights have changed: they are compared by their counts of changes."""
        if self.model is not self.teacher and self._versions != self._now():
            self._fill(self.model, self.dtype)
            self._versions = self._now()

    def _now(self) -> list[int]:
        modules = [self.teacher.get_submodule(name) for name in (*sum(self._pairs, ()), *self._rounded)]
        return [tensor._version for module in modules for tensor in (*module.parameters(), *module.buffers())]

    @torch.no_grad()
    def _fill(self, model: PreTrainedModel, dtype: torch.dtype | None) -> None:
        """Compute what the copy doesn't share."""
        for name, norm in self._pairs:
            conv, bn = self.teacher.get_submodule(name), self.teacher.get_submodule(norm)
            statistics: Any = bn.running_mean, bn.running_var, getattr(bn, "eps", 1e-5), bn.weight, bn.bias
            weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
            _set(model.get_submodule(name), weight.detach(), bias.detach(), dtype)
        for name in self._rounded if dtype is not None else ():
            module: Any = self.teacher.get_submodule(name)
            _set(model.get_submodule(name), module.weight, module.bias, dtype)


def _set(module: nn.Module, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> None:
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            setattr(module, name, nn.Parameter(value.to(dtype or value.dtype), requires_grad=False))


def _is_plain(model: nn.Module) -> bool:
    """Whether a copy does all that the model does: nothing hangs on its modules, and its weights are numbers."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for module in model.modules():
        if "forward" in vars(module) or any(getattr(module, name) for name in hooks):
            return False
    return all(type(parameter) is nn.Parameter and parameter.is_floating_point() for parameter in model.parameters())


def _is_norm(module: nn.Module) -> bool:
    """Batch norm with statistics of its own: torch's, timm's with an activation, or a frozen one of transformers."""
    known = isinstance(module, nn.BatchNorm2d) or type(module).__name__.endswith("FrozenBatchNorm2d")
    return known and isinstance(module.running_mean, Tensor) and isinstance(module.weight, Tensor)


def _products(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules whose forward is that of torch's convolutions or linear layers."""
    for name, module in model.named_modules():
        if type(module).forward in (nn.Conv2d.forward, nn.Linear.forward):
            yield name, module


def _pairs(model: nn.Module, probed: dict[str, tuple[Any, Any]]) -> list[tuple[str, str]]:
    """Convolutions and the norms that get their output as it is, by their names."""
    makers = {
        id(probed[name][1]): name
        for name, module in _products(model)
        if isinstance(module, nn.Conv2d) and name in probed
    }
    norms = [name for name, module in model.named_modules() if _is_norm(module) and name in probed]
    pairs = [(makers.get(id(probed[name][0])), name) for name in norms]
    return [(conv, norm) for conv, norm in pairs if conv is not None]


@torch.no_grad()
def _probed(model: PreTrainedModel) -> dict[str, tuple[Any, Any]]:
    """Input and output of the modules of a pass, by their names; empty if the model doesn't take a plain image.

    Modules that ran more than once are left out.
    """
    found: dict[str, tuple[Any, Any]] = {}
    with _recorded(model, found):
        own = isinstance(model, PyramidDetector)
        edge = PROBE_EDGE if own else PROBE_EDGE_OF_OTHERS
        image = torch.rand(1, 3, edge, edge, generator=torch.Generator().manual_seed(0))
        weight = next(model.parameters())
        try:
            image = image.to(weight.device, weight.dtype)
            model.backbone(image) if own else model(pixel_values=image)
        except Exception as error:  # of any net: then nothing is folded
            logger.info("The teacher's batch norms stay as they are: %s", error)
            return {}
    return {name: values for name, values in found.items() if values[1] is not None}


@contextmanager
def _recorded(model: nn.Module, found: dict[str, tuple[Any, Any]]) -> Iterator[None]:
    def recorder(name: str) -> Any:
        def record(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            found[name] = (inputs[0] if inputs else None, None if name in found else output)

        return record

    handles = [module.register_forward_hook(recorder(name)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _same(before: dict[str, tuple[Any, Any]], after: dict[str, tuple[Any, Any]], names: list[str]) -> bool:
    """Whether the modules `names` made the same of the image; tensors without values are taken for equal."""
    for name in names:
        if name not in after:
            return False
        own, other = before[name][1], after[name][1]
        if not own.is_meta and not (own - other).abs().max() <= _TOLERANCE * own.abs().max():
            return False
    return True
