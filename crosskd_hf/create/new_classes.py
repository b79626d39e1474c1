"""A detector's head for other classes: rows of shared names are kept, the others start anew.

Which weights depend on the classes is not written down for any detector. Two models are built that differ by one class,
and the tensors that differ in shape are those: classifiers of every layer, boxes of each class, class embeddings of
denoising queries. How their rows belong to the classes follows from how many rows one class more brings along.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..data.categories import CategoryMap
from ..data.class_names import are_placeholders, class_names, listing, match_names
from ..models import DETECTORS
from ..models.backbone import weights_follow

logger = logging.getLogger(__name__)

RARE = -math.log(99)  # bias of a class that is seen with probability 0.01 at first (focal loss, ICCV 2017)
_CLASS_MAJOR = "regressor."  # rows (class, coordinate) of Faster R-CNN; all others are (anchor, class)


@dataclass(frozen=True)
class NewClasses:
    """What became of a head.

    Args:
        kept: Names of the classes whose rows come from the former head.
        new: Names of those that start anew.
        dropped: So many classes of the former head are gone.
        tensors: Names of the tensors that hold rows of classes.
    """

    kept: tuple[str, ...]
    new: tuple[str, ...]
    dropped: int
    tensors: tuple[str, ...]

    def __str__(self) -> str:
        kept = listing(self.kept, 10) if self.kept else "no class"
        new = listing(self.new, 10) if self.new else "none"
        return (
            f"The head keeps the weights of {kept}; new are {new}; {self.dropped} of its former classes are dropped "
            f"({len(self.tensors)} tensors)."
        )


def with_classes(model: PreTrainedModel, categories: CategoryMap) -> tuple[PreTrainedModel, NewClasses]:
    """A detector with other classes, or with the same in another order.

    Args:
        model: A trained detector; it is left as it is.
        categories: The classes that are wanted, in their order.

    Returns:
        A model of the same architecture in which everything but the rows of new classes is that of `model`, and what
        was kept. Classes are the same if `match_names` says so; a model without names keeps nothing, unless it has as
        many classes: then its own are taken for those that are wanted.
    """
    own = class_names(model.config)
    if are_placeholders(own):
        rows = list(range(len(own))) if len(own) == len(categories) else [-1] * len(categories)
    else:
        matches = match_names(categories.names, own)
        rows = matches.indices
        for name, choices in matches.ambiguous.items():
            logger.warning("The class %r may be one of several of the model's, %s: it starts anew.", name, choices)
    fresh = _build(model, categories)
    wider = _build(model, _one_more(categories))
    axes = _rows_per_class(fresh, wider)
    state, old = fresh.state_dict(), model.state_dict()
    for name, each in axes.items():
        if fresh.config.model_type not in _own_types() and _is_bias(name, state[name], each):
            state[name] = torch.full_like(state[name], RARE)
        state[name] = _taken_over(state[name], old[name], rows, len(own), each, _CLASS_MAJOR in name)
    fresh.load_state_dict({name: state[name] if name in axes else old[name] for name in state})
    for name, parameter in model.named_parameters():
        fresh.get_parameter(name).requires_grad_(parameter.requires_grad)
    fresh.train(model.training)
    kept = tuple(name for name, row in zip(categories.names, rows, strict=True) if row >= 0)
    new = tuple(name for name, row in zip(categories.names, rows, strict=True) if row < 0)
    return fresh, NewClasses(kept, new, len(own) - len(kept), tuple(axes))


def _own_types() -> set[str]:
    return {config.model_type for config in DETECTORS}


def _is_bias(name: str, tensor: Tensor, rows: tuple[int, int]) -> bool:
    """Whether a tensor is the bias of a sigmoid classifier: of softmax ones another row is "no object"."""
    return name.endswith("bias") and tensor.ndim == 1 and rows == (1, 0)


def _build(model: PreTrainedModel, categories: CategoryMap) -> PreTrainedModel:
    """A random model of the same architecture with other classes, in the same place and precision."""
    config = copy.deepcopy(model.config)
    parts: list[Any] = [config, getattr(config, "backbone_config", None)]
    for part in parts:  # the weights of `model` follow
        if getattr(part, "use_pretrained_backbone", False):
            part.use_pretrained_backbone = False
    name_classes(config, categories)
    with weights_follow():
        built = type(model)(config)
    return built.to(dtype=model.dtype, device=model.device)


def name_classes(config: PreTrainedConfig, categories: CategoryMap) -> None:
    """Write the classes into a configuration."""
    config.id2label, config.label2id = categories.id2label, categories.label2id
    config.category_ids = list(categories.raw_ids)


def _one_more(categories: CategoryMap) -> CategoryMap:
    name = "one more"
    while name in categories.names:
        name += "!"
    return CategoryMap((*categories.raw_ids, max(categories.raw_ids) + 1), (*categories.names, name))


def _rows_per_class(fresh: PreTrainedModel, wider: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Name of each tensor with rows of classes -> rows of each class, and further rows ("no object", padding)."""
    axes, count = {}, fresh.config.num_labels
    larger = wider.state_dict()
    for name, tensor in fresh.state_dict().items():
        if tensor.shape != larger[name].shape:
            each = larger[name].shape[0] - tensor.shape[0]
            axes[name] = (each, tensor.shape[0] - each * count)
    return axes


def _taken_over(
    fresh: Tensor, old: Tensor, rows: Sequence[int], classes: int, layout: tuple[int, int], class_major: bool
) -> Tensor:
    """`fresh` with the rows of known classes, and all further rows, from `old`.

    Args:
        fresh: (each * K + further, ...).
        old: (each * `classes` + further, ...).
        rows: Of each of the K classes its index in `old`, or -1.
        classes: Number of classes of `old`.
        layout: `each` and `further`.
        class_major: Whether the rows of a class lie together, or those of an anchor.
    """
    each, further = layout
    new, result = len(rows), fresh.clone()
    for index, row in enumerate(rows):
        if row < 0:
            continue
        if class_major:
            result[index * each : (index + 1) * each] = old[row * each : (row + 1) * each]
        else:
            result[index : each * new : new] = old[row : each * classes : classes]
    if further:
        result[each * new :] = old[each * classes :]
    return result
