"""GID: features, relations and responses of the instances that student and teacher disagree about (CVPR 2021)."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from ...models.assigners import Targets, assign_max_iou
from ...models.boxes import aligned_iou, area, row_of
from ...models.losses import LossPart
from ..adapters import adapter
from ..method import Method, MethodConfig, Paper, option
from ..passes import Batch, ComparableHead, DetectorView, Needs, Pair, Pass, same_size, shared_classes
from ..regions import anchors, in_images, positives
from ..statistics import Statistics
from .imitation import LD_CODE, Form

AUTHORS = "daixinghome/Distill_GID_detectron2"
OVERLAP = 0.3  # of two instances at most
CANDIDATES, LEAST_SIDE = 3000, 10.0  # of an image; pixels
ROI_SIZE, ROI_SAMPLES, ROI_SCALE, ROI_LEVEL = 10, 2, 224.0, 4  # a box of 224 pixels is read on the map of stride 2^4
POSITIVE_IOU, NEGATIVE_IOU = 0.5, 0.4

PUBLISHED: dict[str, dict[str, Any]] = {
    "original": {
        "weight": 1.0,
        "statistics": "image",
        "smooth_l1": 0.1,
        "low_quality": True,
        "terms": {"feature": 5e-4, "relation": 40.0, "cls": 0.1, "reg": 1.0},
    },
    "ld": {"weight": 2.0, "positive_levels": False, "mask_padding": True, "terms": {"feature": 1.0}},
}


class Instances(NamedTuple):
    """Boxes of an image, the one that student and teacher disagree most about first.

    Args:
        rows: (B, K) prior of each.
        mask: (B, K) bool, where there is one.
        boxes: (B, K, 4) xyxy pixels.
        scores: (B, K) difference of both models' scores.
    """

    rows: Tensor
    mask: Tensor
    boxes: Tensor
    scores: Tensor


@torch.no_grad()
def select(boxes: Tensor, scores: Tensor, count: int) -> Instances:
    """Non-maximum suppression until so many boxes stay, without waiting for the device.

    Args:
        boxes: (B, N, 4).
        scores: (B, N); rows below 0 are none.
        count: K.
    """
    left, found = scores.clone(), []
    for _ in range(min(count, scores.shape[1])):
        score, row = left.max(1, keepdim=True)  # (B, 1)
        box = boxes.gather(1, row[..., None].expand(-1, -1, 4))
        found.append((row, score >= 0, box, score))
        left = left.masked_fill(aligned_iou(boxes, box.expand_as(boxes)) > OVERLAP, -1.0).scatter(1, row, -1.0)
    return Instances(*(torch.cat(each, 1) for each in zip(*found, strict=True)))


class GIDMethod(Method):
    """See :class:`GID`."""

    name = "gid"
    terms = ("feature", "relation", "cls", "reg")
    paper = Paper("General Instance Distillation for Object Detection", "CVPR 2021", "https://arxiv.org/abs/2103.02340")
    families = "dense detectors whose rows mean the same boxes"

    def __init__(self, config: "GID", student: DetectorView, teacher: DetectorView):
        super().__init__(config, student, teacher)
        check_rows(Pair(student, teacher))
        self.classes, self.kind = shared_classes(student, teacher), student.kind
        reads = self.wants("feature") or self.wants("relation")
        pairs = zip(student.channels, teacher.channels, strict=True)
        self.adapters = nn.ModuleList(adapter(*pair) for pair in pairs if reads)
        self.whole = config.preset == "original"

    @property
    def student_needs(self) -> Needs:
        needs: Needs = frozenset({"features", "predictions", "priors"})
        return needs | {"assignment"} if self.config.positive_levels else needs

    @property
    def teacher_needs(self) -> Needs:
        return frozenset({"features", "predictions"})

    def forward(self, student: Pass, teacher: Pass, batch: Batch) -> dict[str, LossPart]:
        """The terms over the instances of each image."""
        if not self.whole:
            return {"feature": self._imitation(student, teacher, batch)}
        found, parts = self.instances(student, teacher, batch), {}
        if len(self.adapters):
            own, goal = self._regions(student, teacher, found)
            parts["feature"] = feature_loss(own, goal, found.mask)
            if self.wants("relation"):
                parts["relation"] = relation_loss(own, goal, found.mask, self.config.statistics == "batch")
        if self.wants("cls") or self.wants("reg"):
            parts |= self._response(student, teacher, self.matches(student, found))
        return parts

    # ---- Where student and teacher disagree ----

    @torch.no_grad()
    def _differences(self, student: Pass, teacher: Pass) -> tuple[Tensor, Tensor]:
        """(B, N) difference of scores, and the boxes (B, N, 4) of the model whose score is higher."""
        assert self.classes is not None
        assert student.decode is not None
        assert teacher.decode is not None
        own, goal = student.predictions[-1], teacher.predictions[-1]
        scores = own.of_classes(self.classes.student).logits.float().sigmoid()
        target = goal.of_classes(self.classes.teacher).logits.float().sigmoid()
        if self.whole:
            difference = target.amax(-1) - scores.amax(-1)
        else:  # of the class about which they disagree most
            difference = target - scores
            difference = difference.gather(2, difference.abs().argmax(-1, keepdim=True))[..., 0]
        boxes = student.decode(own.regression), teacher.decode(goal.regression)
        return difference.abs(), torch.where((difference > 0)[..., None], boxes[1], boxes[0])

    @torch.no_grad()
    def instances(self, student: Pass, teacher: Pass, batch: Batch) -> Instances:
        """The general instances of each image, over all levels, inside of the image."""
        scores, boxes = self._differences(student, teacher)
        limit = batch.sizes.flip(-1).repeat(1, 2)[:, None]  # (B, 1, 4): width, height, width, height
        boxes = boxes.clamp(min=0).minimum(limit)
        large = (boxes[..., 2:] - boxes[..., :2] > LEAST_SIDE).all(-1)
        scores, rows = torch.where(large, scores, -1.0).topk(min(CANDIDATES, scores.shape[1]), 1)
        found = select(boxes.gather(1, rows[..., None].expand(-1, -1, 4)), scores, self.config.count)
        return found._replace(rows=rows.gather(1, found.rows))

    # ---- The form of LD's comparison ----

    @torch.no_grad()
    def locations(self, student: Pass, teacher: Pass, batch: Batch) -> list[Instances]:
        """Instances of each level; rows are those of the level. Of "batch" statistics all images are one."""
        scores, boxes = self._differences(student, teacher)
        priors = student.priors
        assert priors is not None
        valid = in_images(priors, batch)
        if self.config.mask_padding:
            scores = torch.where(valid, scores, -1.0)
        else:  # the released code leaves the anchors of the padding at the origin
            boxes = torch.where(valid[..., None], boxes, boxes - priors.centers.repeat(1, 2))
        found = []
        for feature in student.features:
            level = student.rows[feature.stride]
            here = boxes[:, level], scores[:, level]
            if self.config.statistics == "batch":
                here = here[0].flatten(0, 1)[None], here[1].flatten()[None]
            found.append(select(*here, self.config.count))
        return found

    def _imitation(self, student: Pass, teacher: Pass, batch: Batch) -> LossPart:
        """Mean squared error at the instances' locations; one quotient for each level."""
        totals, counts = [], []
        for level, found in enumerate(self.locations(student, teacher, batch)):
            feature = student.features[level]
            goal = teacher.features[level].values.detach().float()
            own = self.adapters[level](same_size(feature.values, goal)).float()
            distance = (own - goal).square().mean(1).flatten(1)  # (B, H * W)
            priors = student.rows[feature.stride]
            per_location = (priors.stop - priors.start) // distance.shape[1]
            if len(found.rows) != len(distance):
                distance = distance.flatten()[None]
            counted = found.mask.float()
            if self.config.positive_levels:
                counted = counted * positives(feature, student).any()
            totals.append((distance.gather(1, found.rows // per_location) * counted).sum())
            counts.append(counted.sum())
        return LossPart(torch.stack(totals), torch.stack(counts))

    # ---- The terms of the paper ----

    def _regions(self, student: Pass, teacher: Pass, found: Instances) -> tuple[Tensor, Tensor]:
        """Features of each instance in both models, (B, K, C * S * S)."""
        maps = [layer(feature.values).float() for layer, feature in zip(self.adapters, student.features, strict=True)]
        strides = [feature.stride for feature in student.features]
        goals = [feature.values.detach().float() for feature in teacher.features]
        return pool(maps, strides, found.boxes), pool(goals, strides, found.boxes)

    @torch.no_grad()
    def matches(self, student: Pass, found: Instances) -> Tensor:
        """(B, N) bool: anchors of the student that are matched to an instance."""
        priors, _ = anchors(student)
        targets = Targets(found.boxes * found.mask[..., None], found.rows, found.mask)
        everywhere = found.mask.new_ones(len(found.mask), len(priors.boxes))
        forced = 0.0 if self.config.low_quality else None
        return assign_max_iou(priors, everywhere, targets, POSITIVE_IOU, NEGATIVE_IOU, forced).positive

    def _response(self, student: Pass, teacher: Pass, matched: Tensor) -> dict[str, LossPart]:
        assert self.classes is not None
        own, goal, count = student.predictions[-1], teacher.predictions[-1], matched.sum().float()
        parts: dict[str, LossPart] = {}
        if self.wants("cls"):
            target = goal.of_classes(self.classes.teacher).logits.detach().float().sigmoid()
            logits = own.of_classes(self.classes.student).logits.float()
            rows = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)
            parts["cls"] = LossPart((rows * matched).sum(), count)
        if self.wants("reg"):
            numbers = self._numbers(student), self._numbers(teacher).detach()
            rows = F.smooth_l1_loss(*numbers, reduction="none", beta=self.config.smooth_l1).sum(-1)
            parts["reg"] = LossPart((rows * matched).sum(), count)
        return parts

    def _numbers(self, own: Pass) -> Tensor:
        """(B, N, 4) what boxes are compared by: deltas as they are, sides in strides."""
        regression = own.predictions[-1].regression.float()
        if self.kind == "delta":
            return regression
        assert own.decode is not None
        assert own.priors is not None
        return own.decode(regression) / own.priors.strides[:, None]


def pool(maps: list[Tensor], strides: list[int], boxes: Tensor) -> Tensor:
    """RoIAlign of (B, K, 4) boxes, each on the level of its size: (B, K, C * S * S). Without waiting for the device."""
    level = (area(boxes).clamp(min=0).sqrt() / ROI_SCALE + 1e-8).log2().add(ROI_LEVEL).floor()
    wanted = 2 ** level.clamp(min(strides).bit_length() - 1, max(strides).bit_length() - 1)  # (B, K) stride
    order = row_of(strides, boxes).log2()
    nearest = (wanted.log2()[..., None] - order).abs().argmin(-1).flatten()
    pooled = torch.zeros((), device=boxes.device)
    for index, (values, stride) in enumerate(zip(maps, strides, strict=True)):
        found = roi_align(values, list(boxes), ROI_SIZE, 1 / stride, ROI_SAMPLES, aligned=True)
        pooled = pooled + torch.where((nearest == index)[:, None, None, None], found, 0)
    return pooled.flatten(1).unflatten(0, boxes.shape[:2])


def feature_loss(own: Tensor, goal: Tensor, mask: Tensor) -> LossPart:
    """Squared distance of the instances' features (CVPR 2021): a mean over instances and cells, a sum over channels.

    Args:
        own, goal: (B, K, D) features of instances, the student's and the teacher's.
        mask: (B, K), 0 for rows without an instance.
    """
    total = ((own - goal).square().sum(-1) * mask).sum()
    return LossPart(total, ROI_SIZE**2 * mask.sum().float())


def relation_loss(own: Tensor, goal: Tensor, mask: Tensor, pooled: bool) -> LossPart:
    """Smooth L1 of the distances between instances, each matrix in units of its mean; nothing of less than three.

    Source: GID (CVPR 2021).

    Args:
        own, goal: (B, K, D).
        mask: (B, K) bool.
        pooled: The instances of all images are related, not those of each image.
    """
    if pooled:
        own, goal, mask = (each.flatten(0, 1)[None] for each in (own, goal, mask))
    pairs = mask[:, :, None] & mask[:, None] & ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    pairs = pairs & (mask.sum(1) >= 3)[:, None, None]
    rows = F.smooth_l1_loss(_relative(own, pairs), _relative(goal, pairs), reduction="none", beta=1.0)
    return LossPart((rows * pairs).sum(), pairs.sum().float())


def _relative(features: Tensor, pairs: Tensor) -> Tensor:
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist") * pairs
    counted = (distances > 0).sum((1, 2), keepdim=True).clamp(min=1)
    mean = distances.sum((1, 2), keepdim=True) / counted
    return distances / mean.clamp(min=1e-6)


def check_rows(pair: Pair) -> None:
    """Raises ValueError if the rows of both heads are not priors that mean the same boxes."""
    student, teacher = pair
    dense = student.kind in ("distribution", "delta", "distance") and isinstance(teacher, ComparableHead)
    if not (dense and teacher.same_rows(student)):  # type: ignore[attr-defined]
        raise ValueError(
            f"gid can't do {pair}: it looks for the priors about which both models disagree. Choose two dense "
            "detectors with equal heads, or a method that compares features, such as pkd."
        )


@dataclass(frozen=True)
class GID(MethodConfig):
    """General instances are the boxes of an image about whose scores student and teacher disagree most.

    Terms: `feature` between the pooled features of an instance, `relation` between the distances of instances, `cls`
    and `reg` between the predictions of the anchors that match one.

    Args:
        preset: "original" is the authors' code. "ld", the form of LD's comparison ("GI imitation"), compares features
            at the instances of each level alone.
        weight: Factor on the whole method.
        count: Instances of an image, with "ld" of each level.
        statistics: Relations between the instances of each "image", or of the whole local "batch" as in the authors'
            code, where the loss depends on how a batch is split. With "ld": an image's instances suppress one another,
            or those of all images at once.
        smooth_l1: Below this difference the distance of boxes is quadratic; 0 is L1.
        low_quality: Every instance has its best anchor, however small their overlap is.
        mask_padding: Whether anchors in the padding stay out. In LD's code they don't, and their boxes lie around the
            image's corner.
        positive_levels: Whether levels without any positive of the student stay out, as in LD's code. Where a batch is
            split, such levels may differ from part to part.

    Raises:
        ValueError:
            "looks for the priors about which both models disagree": The rows of both heads mean different boxes.
    """

    method = GIDMethod
    published_numbers = PUBLISHED

    weight: float | None = option(None, "Factor on the whole method.", f"{AUTHORS}; {LD_CODE}", least=0)
    preset: Form = option("original", "Whose form of the method.")
    count: int = option(10, "Instances of an image.", AUTHORS, least=1)
    statistics: Statistics | None = option(None, "Instances of an image, or of the local batch.", AUTHORS)
    smooth_l1: float | None = option(None, "Where the distance of boxes becomes quadratic.", AUTHORS, least=0)
    low_quality: bool | None = option(None, "Every instance has its best anchor.", AUTHORS)
    mask_padding: bool | None = option(None, "Anchors in the padding stay out.", LD_CODE)
    positive_levels: bool | None = option(None, "Levels without any positive stay out.", LD_CODE)

    def defaults(self, pair: Pair) -> dict[str, Any]:
        """By the preset."""
        check_rows(pair)
        known = {"statistics": "image"} | PUBLISHED[self.preset]
        weights = known["terms"] | (self.terms or {})
        if self.preset == "original":
            concerned = {"statistics": ("relation",), "smooth_l1": ("reg",), "low_quality": ("cls", "reg")}
            idle = {name for name, terms in concerned.items() if not any(weights.get(term) for term in terms)}
            known = {name: value for name, value in known.items() if name not in idle}
        return known
