"""The vectorised assigners against references of plain loops that are slow and obviously right."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from crosskd_hf.models import DETECTORS
from crosskd_hf.models.assigners import Assignment, Priors, Targets, assign_max_iou
from crosskd_hf.models.boxes import pairwise_iou
from crosskd_hf.models.dense import DenseHead
from tests.tiny_dense import CONFIGS, make_batch, make_config

SHAPES = [(16, 20), (8, 10), (4, 5), (2, 3), (1, 2)]  # of a 128 x 160 batch
SIZES = ((128, 160), (96, 130), (40, 64), (128, 128))


class Expected(NamedTuple):
    """What a reference assigns to one image: the box of each prior or -1, and whether it is ignored."""

    owner: list[int]
    ignored: list[bool]


def make_head(kind: str, **changes: object) -> DenseHead:
    return DETECTORS[CONFIGS[kind]].head_class(make_config(kind, **changes))


def make_targets(seed: int, counts: tuple[int, ...] = (6, 3, 0, 9)) -> tuple[Targets, Tensor]:
    batch = make_batch(SIZES, counts, num_labels=7, seed=seed)
    sizes = torch.tensor(SIZES, dtype=torch.float32)
    return Targets.from_labels(batch["labels"], sizes), sizes


def max_iou(priors: Priors, valid: list[bool], boxes: Tensor, head: DenseHead) -> Expected:
    owner, ignored = [-1] * len(valid), [False] * len(valid)
    if not len(boxes):
        return Expected(owner, ignored)
    iou = pairwise_iou(boxes[None], priors.boxes[None])[0].tolist()  # checked against torchvision elsewhere
    for n, is_valid in enumerate(valid):
        column = [iou[g][n] for g in range(len(boxes))]
        if is_valid and max(column) >= 0.5:
            owner[n] = column.index(max(column))
        ignored[n] = is_valid and 0.4 <= max(column) < 0.5
    for g in range(len(boxes)):
        best = max(iou[g][n] for n in range(len(valid)) if valid[n])
        for n, is_valid in enumerate(valid):
            if is_valid and best > 0 and iou[g][n] == best:
                owner[n], ignored[n] = g, False
    return Expected(owner, ignored)


def atss(priors: Priors, valid: list[bool], boxes: Tensor, head: DenseHead) -> Expected:
    owner, claim = [-1] * len(valid), [-1.0] * len(valid)
    iou = pairwise_iou(boxes[None], priors.boxes[None])[0] if len(boxes) else None
    for g, box in enumerate(boxes):
        center, chosen, start = (box[:2] + box[2:]) / 2, [], 0
        for length in priors.level_lengths:
            level = [n for n in range(start, start + length) if valid[n]]
            level.sort(key=lambda n: (priors.centers[n] - center).square().sum().item())
            chosen += level[:9]
            start += length
        overlaps = iou[g][chosen]
        threshold = overlaps.mean() + overlaps.std()
        for n in chosen:
            x, y = priors.centers[n].tolist()
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if inside and iou[g][n] >= threshold and iou[g][n] > claim[n]:
                owner[n], claim[n] = g, iou[g][n].item()
    return Expected(owner, [False] * len(valid))


def points(priors: Priors, valid: list[bool], boxes: Tensor, head: DenseHead) -> Expected:
    limits = [-1, 64, 128, 256, 512, float("inf")]
    level_of = [level for level, length in enumerate(priors.level_lengths) for _ in range(length)]
    owner = [-1] * len(valid)
    for n, is_valid in enumerate(valid):
        x, y = priors.centers[n].tolist()
        smallest = float("inf")
        for g, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
            sides = (x - x1, y - y1, x2 - x, y2 - y)
            inside = min(sides) > 0
            if head.config.center_radius is not None:
                reach = head.config.center_radius * head.config.strides[level_of[n]]
                inside &= abs(x - (x1 + x2) / 2) < reach and abs(y - (y1 + y2) / 2) < reach
            fits = limits[level_of[n]] <= max(sides) <= limits[level_of[n] + 1]
            size = (x2 - x1) * (y2 - y1)
            if is_valid and inside and fits and size < smallest:
                owner[n], smallest = g, size
    return Expected(owner, [False] * len(valid))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("kind", "reference", "changes"),
    [
        ("retinanet", max_iou, {}),
        ("atss", atss, {}),
        ("gfl", atss, {}),
        ("fcos", points, {}),
        ("fcos", points, {"center_radius": 1.5}),
    ],
    ids=["max-iou", "atss", "gfl", "points", "center-sampling"],
)
def test_equals_the_loops(kind: str, reference: object, changes: dict, seed: int) -> None:
    head = make_head(kind, **changes)
    priors = head.priors(SHAPES, torch.device("cpu"))
    targets, sizes = make_targets(seed)
    valid = priors.inside(sizes)
    got: Assignment = head.assign(priors, valid, targets)
    for image in range(len(SIZES)):
        boxes = targets.boxes[image][targets.mask[image]]
        expected = reference(priors, valid[image].tolist(), boxes, head)
        owner = torch.tensor(expected.owner)
        positive = owner >= 0
        assert torch.equal(got.positive[image], positive)
        assert torch.equal(got.weight[image].bool(), valid[image] & ~torch.tensor(expected.ignored))
        assert torch.equal(got.boxes[image][positive], boxes[owner[positive]])
        assert torch.equal(got.labels[image][positive], targets.labels[image][owner[positive]])
    assert got.positive.any()
    assert not got.positive[2].any()


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "tood"])  # its own are in test_tood.py
def test_no_image_has_a_box(kind: str) -> None:
    head = make_head(kind)
    priors = head.priors(SHAPES, torch.device("cpu"))
    targets, sizes = make_targets(0, (0, 0, 0, 0))
    got = head.assign(priors, priors.inside(sizes), targets)
    assert not got.positive.any()
    assert torch.equal(got.weight.bool(), priors.inside(sizes))
    assert got.count_positives() == 4


def test_forced_match_of_a_box_too_small_for_any_anchor() -> None:
    head = make_head("retinanet")
    priors = head.priors(SHAPES, torch.device("cpu"))
    boxes = torch.tensor([[[50.0, 50, 54, 54]]])
    targets = Targets(boxes, torch.tensor([[2]]), torch.tensor([[True]]))
    got = head.assign(priors, priors.inside(torch.tensor([[128.0, 160]])), targets)
    best = pairwise_iou(boxes, priors.boxes[None])[0, 0]
    assert best.max() < 0.4
    assert torch.equal(got.positive[0], best == best.max())


@pytest.mark.parametrize(("least", "forces"), [(0.0, True), (0.1, True), (0.2, False), (None, False)])
def test_a_box_forces_a_match_from_the_least_overlap_on(least: float | None, forces: bool) -> None:
    """The box of 4 x 4 px lies in the prior of 10 x 10 px: their IoU is 0.16."""
    priors = Priors.on_grid([(1, 1)], [8], [(8, 8)], [torch.tensor([[-5.0, -5, 5, 5]])])
    targets = Targets(torch.tensor([[[-2.0, -2, 2, 2]]]), torch.tensor([[2]]), torch.tensor([[True]]))
    got = assign_max_iou(priors, torch.tensor([[True]]), targets, forced_iou=least)
    assert got.positive.tolist() == [[forces]]


def test_an_image_without_positives_counts_as_one() -> None:
    targets, sizes = make_targets(0, (2, 0, 0, 3))
    head = make_head("gfl")
    priors = head.priors(SHAPES, torch.device("cpu"))
    got = head.assign(priors, priors.inside(sizes), targets)
    positives = got.positive.sum(1)
    assert positives.tolist()[1:3] == [0, 0]
    assert got.count_positives() == positives.sum() + 2


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "tood"])  # its own are in test_tood.py
def test_padding_changes_no_assignment(kind: str) -> None:
    """The locations of an image get the same boxes in a padded batch, and those of the padding count for nothing."""
    head, size = make_head(kind), torch.tensor([[64.0, 64.0]])
    targets = Targets.from_labels(make_batch(((64, 64),), (4,))["labels"], size)
    small, large = [(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)], [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)]
    results = []
    for shapes in (small, large):
        priors = head.priors(shapes, torch.device("cpu"))
        got = head.assign(priors, priors.inside(size), targets)
        levels = zip(shapes, *(rows[0].split(priors.level_lengths) for rows in got[:2]), strict=True)
        results.append([tuple(rows.unflatten(0, (*shape, -1)) for rows in level) for shape, *level in levels])
    for (height, width), alone, padded in zip(small, *results, strict=True):
        for unpadded, whole in zip(alone, padded, strict=True):
            assert torch.equal(unpadded, whole[:height, :width])
            assert unpadded.sum() == whole.sum()


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "tood"])
def test_no_prior_of_the_padding_gets_a_box_that_reaches_into_it(kind: str) -> None:
    head = make_head(kind)
    priors = head.priors(SHAPES, torch.device("cpu"))
    valid = priors.inside(torch.tensor([[64.0, 64.0]]))
    boxes = torch.tensor([[[8.0, 8, 120, 120], [56, 56, 80, 80]]])
    targets = Targets(boxes, torch.tensor([[2, 1]]), torch.tensor([[True, True]]))
    got = head.assign(priors, valid, targets)
    assert got.positive.any()
    assert not got.positive[~valid].any()


def test_targets_keep_each_images_boxes() -> None:
    targets, sizes = make_targets(3)
    assert targets.mask.sum(1).tolist() == [6, 3, 0, 9]
    assert targets.boxes.shape == (4, 9, 4)
    assert not targets.boxes[~targets.mask].any()
    assert (targets.boxes[..., 2:] <= sizes.flip(-1)[:, None] + 1e-3).all()
