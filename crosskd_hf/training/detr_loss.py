"""The supervised losses of transformers' DETR-type models, term by term, each with what it is divided by.

Transformers divides these losses by a number of boxes that it counts itself: for DETR, Deformable, Conditional and
DAB-DETR the mean over processes divided by the number of processes once more (their loss grows with that number), for
RT-DETR, D-FINE and DEIMv2 each process's own number; micro-batches are never taken together. :class:`DetrLoss` takes
the place of one model's `loss_function`. Transformers still matches and computes, but gives sums instead of quotients,
so every term is a :class:`~crosskd_hf.models.losses.LossPart` like those of our own detectors. Nothing outside of that
one model changes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..distillation.detectors.detr_families import FAMILIES
from ..models.boxes import aligned_iou
from ..models.losses import LossPart
from . import upstream
from .loss_parts import INNER_LAYER, MATCHED, UNMATCHED, balanced

# Weights of terms by the kind of model, on top of transformers' own. The class loss of Deformable DETR weighs 2 as
# published (the authors' code and MMDetection's configs); transformers has no such weight. Its 5 and 2 for boxes agree.
WEIGHTS = {"deformable_detr": {"loss_ce": 2.0}}

Labels = Sequence[Mapping[str, Tensor]]

_UNWEIGHTED: Mapping[str, float] = {}
_WEIGHT_SUM_FLOOR = 1e-6  # of DETR's class term, whose normalizer is a sum of class weights
_TINY = 1e-30  # transformers divides by areas however small they are
_NO_CLASS = -1e4  # a logit whose probability is 0, and so is its loss
_NAME = re.compile(r"(?P<term>loss_[a-z_]+?)(?:(?P<dn>_dn)|(?P<aux>_aux))?(?:_(?P<layer>\d+))?(?P<enc>_enc)?")


class DetrLoss:
    """What a model of transformers calls as its `loss_function`.

    Args:
        function: The loss function of transformers that the model has by itself.
        weights: Further weights of terms, by their name in the last layer.

    Source: the definitions are transformers'. One differs: denoising queries that only fill up an image with fewer
    objects than its neighbours have no loss, because their number depends on how a batch is spread over processes.
    """

    def __init__(self, function: Any, weights: Mapping[str, float] = _UNWEIGHTED) -> None:
        upstream.criterion_of(function)
        self.function = function
        self.weights = dict(weights)

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, LossPart], Any]:
        """Takes the arguments of `function`.

        Returns:
            The loss of this batch alone, its terms as of :meth:`parts`, and the predictions of inner layers.
        """
        parts, auxiliary = self.parts(*args, **kwargs)
        counts = torch.stack([part.normalizer for part in parts.values()])
        losses = {name: part.total / part.normalizer.clamp(min=part.floor) for name, part in parts.items()}
        return torch.stack(list(balanced(losses, parts, counts).values())).sum(), parts, auxiliary

    def parts(
        self, logits: Tensor, labels: Labels, device: Any, pred_boxes: Tensor, config: Any, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, LossPart], Any]:
        """The terms by name, and the predictions of inner layers.

        Returns:
            Weighted parts: `loss_*` of the last decoder layer, `d<l>.loss_*` of inner ones, `enc_loss_*` of proposals
            and `d<l>.dn_loss_*` of denoising queries, which are 0 in a batch without objects. All batches have the
            same names in the same order.
        """
        recorded: list[Any] = []

        def criterion(*arguments: Any, **options: Any) -> Any:
            recorded.append(_recording(upstream.criterion_of(self.function))(*arguments, **options))
            return recorded[0]

        function = upstream.with_criterion(self.function, criterion)
        given = (logits, labels, device, pred_boxes, config, *args)
        with torch.autocast(logits.device.type, enabled=False):
            weights, _, auxiliary = function(*map(_wide, given), **{key: _wide(value) for key, value in kwargs.items()})
        parts = _renamed(_weighted(recorded[0], weights.tolist(), logits.device), self.weights)
        denoises = getattr(config, "num_denoising", 0) and config.auxiliary_loss
        if denoises and kwargs.get("denoising_meta_values") is None:
            parts |= _nothing_to_denoise(parts)
        return parts, auxiliary


def take_over(model: PreTrainedModel) -> bool:
    """Give a model whose loss is one of transformers' DETR losses a :class:`DetrLoss`; repeating is safe.

    Returns:
        Whether its loss is a :class:`DetrLoss` now. A loss function of the user's own is left alone.

    Raises:
        UpstreamError: The loss of transformers is not what it was in the releases that were tried.
    """
    if is_taken_over(model):
        return True
    kind = model.config.model_type
    function = upstream.detection_loss(model, needed=kind in FAMILIES)
    if function is None:
        return False
    model.loss_function = DetrLoss(function, WEIGHTS.get(kind, _UNWEIGHTED))
    return True


def is_taken_over(model: PreTrainedModel) -> bool:
    """Whether the loss of `model` is a :class:`DetrLoss`."""
    return getattr(model, "loss_type", None) is not None and isinstance(model.loss_function, DetrLoss)


def proposal_parts(model: PreTrainedModel, outputs: ModelOutput, labels: Labels) -> dict[str, LossPart]:
    """The loss of a two-stage Deformable DETR's proposals, which transformers leaves out.

    Without it the first stage of a student trained from scratch would stay as it was drawn. Proposals know one class,
    foreground, on the first channel: the one by which they are ranked. Weights are those of the decoder's layers.

    Args:
        model: With a :class:`DetrLoss`.
        outputs: Of its pass with labels.
        labels: Per image `class_labels` (n,) and `boxes` (n, 4), cxcywh relative to the unpadded image; n may be 0.

    Returns:
        `enc_loss_ce`, `enc_loss_bbox`, `enc_loss_giou`; nothing for other models: transformers supervises their
        proposals already, or they have none.

    Source: Deformable DETR (ICLR 2021), appendix A.4; MMDetection's `deformable_detr_head`.
    """
    logits = outputs.get("enc_outputs_class")
    if logits is None or model.config.model_type != "deformable_detr":
        return {}
    boxes = _wide(outputs["enc_outputs_coord_logits"]).sigmoid()
    foreground = [{**label, "class_labels": torch.zeros_like(label["class_labels"])} for label in labels]
    no_inner_layers = (logits[None], boxes[None])
    parts, _ = model.loss_function.parts(logits, foreground, logits.device, boxes, model.config, *no_inner_layers)
    return {f"enc_{name}": part for name, part in parts.items()}


# ---- What transformers computes, as sums ----


class _Recording:
    """Mixed into a criterion of transformers: its terms are sums, and `normalizers` holds what each is divided by."""

    matcher: nn.Module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.matcher = _OnDevice(self.matcher)
        self.normalizers: list[tuple[float, float]] = []  # with their floors, in the order of the terms
        self.terms: dict[str, Tensor] = {}
        weights = getattr(self, "weight_dict", {})
        if "loss_ddf" in weights:
            weights |= {MATCHED: weights["loss_ddf"], UNMATCHED: weights["loss_ddf"]}

    def forward(self, outputs: dict[str, Any], targets: Labels) -> dict[str, Tensor]:
        """Unit vectors by the names of the terms, so that any weighted sum of them is the vector of the weights."""
        meta, layers = outputs.get("denoising_meta_values"), outputs.get("dn_auxiliary_outputs")
        if meta is not None and layers is not None:
            real = _real_denoising_queries(targets, layers[0]["logits"], meta["dn_num_group"])
            outputs = outputs | {"dn_auxiliary_outputs": [_without_fillers(layer, real) for layer in layers]}
        if not torch.distributed.is_initialized():  # a number of boxes is read where the first output is
            outputs = {"on_host": torch.empty(0), **outputs}
        self.terms = super().forward(outputs, targets)  # type: ignore[misc]
        return dict(zip(self.terms, torch.eye(len(self.terms)), strict=True))

    def get_loss(
        self, loss: str, outputs: dict[str, Tensor], targets: Labels, indices: Any, num_boxes: float
    ) -> dict[str, Tensor]:
        """The sums of one kind of term for one layer's predictions; `num_boxes` isn't read."""
        if loss == "cardinality":  # a number for a log, no loss
            return {}
        if loss == "local" and "pred_corners" in outputs:
            terms, counts = self._local(outputs, targets, indices)
        else:
            terms, counts = super().get_loss(loss, outputs, targets, indices, 1.0), {}  # type: ignore[misc]
        matched = sum(len(queries) for queries, _ in indices)
        boxes = sum(len(target["class_labels"]) for target in targets) * getattr(self, "group_detr", 1)
        if "loss_ce" in terms and hasattr(self, "eos_coef"):  # DETR's weighted mean over queries
            queries = outputs["logits"].shape[0] * outputs["logits"].shape[1]
            counts["loss_ce"] = matched + self.eos_coef * (queries - matched)
            terms["loss_ce"] = terms["loss_ce"] * counts["loss_ce"]
        for name in terms:
            if name in getattr(self, "weight_dict", terms):  # transformers drops the others
                floor = _WEIGHT_SUM_FLOOR if name == "loss_ce" and counts else 1.0
                self.normalizers.append((counts.get(name, float(max(matched, boxes))), floor))
        return terms

    def loss_boxes(
        self, outputs: dict[str, Tensor], targets: Labels, indices: Any, num_boxes: float
    ) -> dict[str, Tensor]:
        """L1 and GIoU of matched boxes. Transformers compares all boxes with all, and waits for the device twice."""
        image, query = _places(indices)
        boxes = outputs["pred_boxes"][image, query]
        goal = torch.cat([target["boxes"][box] for target, (_, box) in zip(targets, indices, strict=True)])
        found, wanted = (box_convert(each, "cxcywh", "xyxy") for each in (boxes, goal))
        distance = 1 - aligned_iou(found, wanted, generalized=True, eps=_TINY)
        return {"loss_bbox": (boxes - goal).abs().sum() / num_boxes, "loss_giou": distance.sum() / num_boxes}

    def _local(
        self, outputs: dict[str, Tensor], targets: Labels, indices: Any
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """D-FINE's terms on box distributions, matched and unmatched queries apart: the two means of one term.

        Transformers computes both, each on predictions without the other's queries.
        """
        given = {name: value for name, value in outputs.items() if name != "real"}
        image, query = _places(indices)
        boxes = torch.cat([target["boxes"][box] for target, (_, box) in zip(targets, indices, strict=True)])
        rest = torch.ones_like(given["logits"][..., 0], dtype=torch.bool) & outputs.get("real", torch.tensor(True))
        rest[image, query] = False
        every, none = torch.arange(len(query)), torch.arange(0)
        one = {name: value[image, query][None] for name, value in given.items()}
        other = {name: value[rest][None] for name, value in given.items()}
        compute = functools.partial(super().get_loss, "local")  # type: ignore[misc]
        matched = compute(one, [{"boxes": boxes}], [(every, every)], 1.0)
        unmatched = compute(other, [{"boxes": boxes[:0]}], [(none, none)], 1.0)
        counts = {MATCHED: 4.0 * len(query), UNMATCHED: 4.0 * other["logits"].shape[1]}  # four sides of a box
        terms = {MATCHED: matched.pop("loss_ddf"), UNMATCHED: unmatched.pop("loss_ddf")}
        return matched | {name: value * counts[name] for name, value in terms.items()}, counts


class _OnDevice(nn.Module):
    """A matcher whose pairs go to the device in one copy; transformers sends those of each image, and waits for it."""

    def __init__(self, matcher: nn.Module) -> None:
        super().__init__()
        self.matcher = matcher

    def forward(self, outputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> list[tuple[Tensor, Tensor]]:
        pairs = [column for pair in self.matcher(outputs, *args, **kwargs) for column in pair]
        packed = torch.cat(pairs).to(outputs["logits"].device, non_blocking=True)
        moved = packed.split([len(column) for column in pairs])
        return list(zip(moved[::2], moved[1::2], strict=True))


def _places(indices: Any) -> tuple[Tensor, Tensor]:
    """Image and query of each matched pair, image by image."""
    image = torch.cat([torch.full_like(queries, number) for number, (queries, _) in enumerate(indices)])
    return image, torch.cat([queries for queries, _ in indices])


@functools.cache
def _recording(criterion: type) -> type:
    return type(f"Recording{criterion.__name__}", (_Recording, criterion), {})


def _real_denoising_queries(targets: Labels, logits: Tensor, groups: int) -> Tensor:
    """(B, Q) whether a denoising query belongs to an object. Groups hold as many as the image with most objects has."""
    most = logits.shape[1] // (2 * groups)  # each group is a positive and a negative half
    counts = torch.tensor([len(target["class_labels"]) for target in targets], device=logits.device)
    return torch.arange(logits.shape[1], device=logits.device) % most < counts[:, None]


def _without_fillers(layer: dict[str, Tensor], real: Tensor) -> dict[str, Tensor]:
    return layer | {"logits": layer["logits"].masked_fill(~real[..., None], _NO_CLASS), "real": real}


def _weighted(recorded: _Recording, weights: Sequence[float], device: torch.device) -> dict[str, LossPart]:
    """The recorded terms of weight above 0, under the names of transformers."""
    counts = [torch.full((), float(count), device=device) for count, _ in recorded.normalizers]  # copies would wait
    rows = zip(recorded.terms.items(), weights, counts, recorded.normalizers, strict=True)
    return {name: LossPart(term * weight, count, floor) for (name, term), weight, count, (_, floor) in rows if weight}


def _renamed(parts: Mapping[str, LossPart], weights: Mapping[str, float]) -> dict[str, LossPart]:
    """`parts` under our names, weighted. RT-DETR and its kin keep the proposals as the last of the inner layers."""
    matches = {name: match for name in parts if (match := _NAME.fullmatch(name)) is not None}
    proposals = max((int(match["layer"]) for match in matches.values() if match["aux"]), default=None)
    renamed = {}
    for name, match in matches.items():
        term, layer = match["term"], match["layer"]
        if match["enc"] or (match["aux"] and int(layer) == proposals):
            term = f"enc_{term}"
        elif layer is not None:
            term = f"d{layer}.{'dn_' if match['dn'] else ''}{term}"
        part = parts[name]
        renamed[term] = part._replace(total=part.total * weights.get(match["term"], 1.0))
    return renamed


def _nothing_to_denoise(parts: Mapping[str, LossPart]) -> dict[str, LossPart]:
    """The denoising terms of a batch without objects: other processes may have some, under these names."""
    inner = [name for name in parts if INNER_LAYER.match(name)]
    layers = 1 + len({name.split(".")[0] for name in inner})
    names = [name[3:] for name in inner if name.startswith("d0.")] or [name for name in parts if name[:4] != "enc_"]
    zero = torch.zeros_like(next(iter(parts.values())).normalizer)
    return {f"d{layer}.dn_{name}": LossPart(zero, zero) for layer in range(layers) for name in names}


def _wide(value: Any) -> Any:
    """Half-precision tensors as float32, in which matching and losses are computed."""
    is_half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_half else value
