"""Distances between two predictions of the same rows, chosen by what the rows mean. In float32."""

from collections.abc import Collection, Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.boxes import aligned_iou
from ..models.losses import LossPart, distribution_kl, quality_focal
from .passes import Batch, Comparison, Pass

BoxLoss = Literal["l1_pixel", "l1+giou", "giou"]
Normalizer = Literal["teacher", "student", "score_sum"]


def mimic(
    pairs: Iterable[Comparison],
    terms: Collection[str],
    beta: float = 1.0,
    temperature: float = 1.0,
    box_loss: BoxLoss = "l1_pixel",
) -> dict[str, LossPart]:
    """Distances of each pair's `prediction` from its `target` (CrossKD, eq. 4 and 5).

    No gradient flows into a target, unless a decoder's view lets it flow into the boxes of the student's queries.

    Args:
        pairs: One comparison for each decoder layer; every term has one quotient of each.
        terms: Of "cls", "reg", "iou" and "centerness", those to compute. What the rows don't have is left out.
        beta: Exponent of the quality focal loss between independent class scores.
        temperature: Of softmax distributions: classes that compete, and distances of box sides.
        box_loss: Distance of queries' boxes.
    """
    found: dict[str, list[LossPart]] = {}
    for pair in pairs:
        parts: dict[str, LossPart] = {}
        if "cls" in terms:
            weight = pair.weight if pair.class_weight is None else pair.class_weight
            total = (class_distance(pair, beta, temperature) * weight).sum()
            parts["cls"] = LossPart(total, pair.normalizer, pair.floor)
        if "reg" in terms or "iou" in terms:
            parts |= _box_parts(pair, temperature, box_loss)
        if "centerness" in terms and pair.target.centerness is not None and pair.positive is not None:
            total = (_centerness_distance(pair) * pair.positive).sum()
            parts["centerness"] = LossPart(total, pair.normalizer, pair.floor)
        for name in parts.keys() & terms:
            found.setdefault(name, []).append(parts[name])
    return {name: stack(found[name]) for name in terms if name in found}


def counted(pair: Comparison, config: Any, student: Pass, teacher: Pass, batch: Batch) -> Comparison:
    """Weights and normalizer of the rows by a method's `normalizer`, `normalizer_floor` and `mask_padding`.

    An option that is None leaves things as they are.
    """
    weight, normalizer = pair.weight, pair.normalizer
    if config.mask_padding is False:
        assert teacher.valid is not None
        weight = weight.masked_fill(~teacher.valid, 1.0)
    if config.normalizer == "student":
        assert student.normalizer is not None
        normalizer = student.normalizer
    if config.normalizer == "score_sum":
        confidence = class_scores(pair).amax(-1) if pair.confidence is None else pair.confidence
        normalizer = (confidence * weight).sum()
    floor = pair.floor if config.normalizer_floor is None else config.normalizer_floor
    return pair._replace(weight=weight, normalizer=normalizer, floor=floor)


def stack(parts: list[LossPart]) -> LossPart:
    """One term of several quotients; a single one stays a scalar."""
    if len(parts) == 1:
        return parts[0]
    totals, normalizers = (torch.stack([part[index].float() for part in parts]) for index in (0, 1))  # type: ignore[union-attr]
    return LossPart(totals, normalizers, parts[0].floor)


@torch.no_grad()
def class_scores(pair: Comparison) -> Tensor:
    """The target's scores (B, N, K) in [0, 1], without those of the background."""
    logits = pair.target.logits.float()
    return logits.softmax(-1)[..., :-1] if pair.softmax else logits.sigmoid()


def class_distance(pair: Comparison, beta: float, temperature: float) -> Tensor:
    """(B, N): KL divergence where classes compete, otherwise quality focal loss, summed (CrossKD, eq. 5)."""
    if pair.softmax:
        return distribution_kl(pair.prediction.logits, pair.target.logits, temperature)
    return quality_focal(pair.prediction.logits, class_scores(pair), beta).sum(-1)


def _centerness_distance(pair: Comparison) -> Tensor:
    assert pair.prediction.centerness is not None
    assert pair.target.centerness is not None
    target = pair.target.centerness.detach().sigmoid()
    return F.binary_cross_entropy_with_logits(pair.prediction.centerness, target, reduction="none")


def _box_parts(pair: Comparison, temperature: float, box_loss: BoxLoss) -> dict[str, LossPart]:
    """Boxes are divided by what the rows weigh, those of anchors and points by the head's own normalizer."""
    confidence = (class_scores(pair).amax(-1) if pair.confidence is None else pair.confidence) * pair.weight
    rows = {name: (row * confidence).sum() for name, row in box_distances(pair, temperature, box_loss).items()}
    if pair.kind in ("delta", "distance"):
        return {name: LossPart(total, pair.normalizer, pair.floor) for name, total in rows.items()}
    numbers = 1 if pair.kind == "distribution" else 4  # that are compared of each row
    return {name: LossPart(total, numbers * confidence.sum(), floor=1e-7) for name, total in rows.items()}


def box_distances(pair: Comparison, temperature: float, box_loss: BoxLoss) -> dict[str, Tensor]:
    """(B, N) of each term of the boxes: "reg", for queries "iou" too (CrossKD, eq. 4, and the authors' code).

    - distributions of the distances to the sides: KL divergence, mean over sides;
    - deltas: 1 - GIoU of the decoded boxes; distances: -log IoU;
    - deltas of regions: L1;
    - queries: L1 in pixels, or L1 of relative boxes and 1 - GIoU.
    """
    own, target = pair.prediction.regression, pair.target.regression
    if pair.kind != "queries":  # their view says what of a target is constant
        target = target.detach()
    if pair.kind == "distribution":
        return {"reg": distribution_kl(own.unflatten(-1, (4, -1)), target.unflatten(-1, (4, -1)), temperature).mean(-1)}
    if pair.kind == "regions":
        return {"reg": (own - target).abs().sum(-1)}
    boxes, wanted = pair.decode(own.float()), pair.decode(target.float())
    if pair.kind == "delta":
        return {"reg": 1 - aligned_iou(boxes, wanted, generalized=True)}
    if pair.kind == "distance":
        return {"reg": -aligned_iou(boxes, wanted).clamp(min=1e-6).log()}
    rows: dict[str, Tensor] = {}
    if box_loss != "giou":
        pixels = box_loss == "l1_pixel"
        rows["reg"] = ((boxes - wanted) if pixels else (own.float() - target.float())).abs().sum(-1)
    if box_loss != "l1_pixel":
        rows["iou"] = 1 - aligned_iou(boxes, wanted, generalized=True)
    return rows
