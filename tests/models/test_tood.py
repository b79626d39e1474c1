"""TOOD's own parts: the shared stack, joint scores, sides that are sampled, and labels that depend on predictions."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crosskd_hf.models.assigners import Assignment, Priors, Targets
from crosskd_hf.models.boxes import image_sizes, pairwise_iou
from crosskd_hf.models.losses import divide, logit_of
from crosskd_hf.models.tood import TaskDecomposition, TOODHead, assign_by_alignment
from tests.tiny_dense import make_batch, make_config, make_detector

SHAPES = [(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)]


def make_head(**changes: Any) -> TOODHead:
    return make_detector("tood", **changes).head


def make_maps(channels: int = 16) -> list[Tensor]:
    return [torch.randn(2, channels, *shape) for shape in SHAPES]


# ---- The path ----


@pytest.mark.parametrize("cut", range(7))
def test_a_head_is_its_two_halves_at_every_cut(cut: int) -> None:
    head, maps = make_head(), make_maps()
    taps = head.tap(maps, cut)
    assert [tap.shape[1] for tap in taps.cls] == [head.tap_width(cut)] * 5
    for whole, halves in zip(head(maps)[:2], head.finish(taps, cut)[:2], strict=True):
        assert torch.equal(whole, halves)


def test_both_tasks_finish_alone() -> None:
    """Features of one task that differ change its own predictions and no others."""
    head, maps = make_head(), make_maps()
    taps = head.tap(maps, 2)
    whole = head.finish(taps, 2)
    other = [tap + 1 for tap in taps.cls]
    classes, boxes = head.finish(taps._replace(cls=other), 2), head.finish(taps._replace(reg=other), 2)
    assert torch.equal(classes.regression, whole.regression)
    assert torch.equal(boxes.logits, whole.logits)
    assert not torch.equal(classes.logits, whole.logits)
    assert not torch.equal(boxes.regression, whole.regression)


def test_taps_before_the_activation() -> None:
    head, maps = make_head(), make_maps()
    before, behind = (head.tap(maps, 3, activated=activated).cls[0] for activated in (False, True))
    assert (before < 0).any()
    assert torch.equal(before.relu(), behind)


def test_a_task_reads_the_layers_by_its_attention() -> None:
    task, stack = TaskDecomposition(4, 3, None), torch.randn(2, 12, 5, 6)
    for conv in (task.squeeze, task.excite):
        nn.init.normal_(conv.weight)
    attention = task.excite(task.squeeze(stack.mean((2, 3), keepdim=True)).relu()).sigmoid()
    assert attention.shape == (2, 3, 1, 1)
    expected = task.reduce(stack * attention.repeat_interleave(4, 1)).relu()
    torch.testing.assert_close(task(stack), expected)


def test_scores_are_geometric_means() -> None:
    head, stack = make_head(), torch.randn(2, 96, 4, 5)
    scores, alignment = head.classifier(head.cls_task(stack)).sigmoid(), head.alignment(stack).sigmoid()
    torch.testing.assert_close(head._logits(stack).sigmoid(), (scores * alignment).sqrt())


def test_logits_of_scores_near_their_ends() -> None:
    raw = torch.tensor([-200.0, -20.0, 0.0, 20.0, 200.0], requires_grad=True)
    logits = logit_of(nn.functional.logsigmoid(raw))
    torch.testing.assert_close(logits[:3], raw[:3], rtol=1e-5, atol=1e-6)
    nn.functional.binary_cross_entropy_with_logits(logits, torch.zeros(5), reduction="sum").backward()
    assert raw.grad.isfinite().all()
    torch.testing.assert_close(raw.grad[:3], raw[:3].detach().sigmoid())


class TestSides:
    """Sides are those of the location that the offsets point to."""

    @staticmethod
    def head_and_stack(offsets: list[float]) -> tuple[TOODHead, Tensor]:
        """A head whose offsets are the same everywhere: down and right of left, top, right, bottom."""
        head = make_head()
        nn.init.zeros_(head.offsets[2].weight)
        with torch.no_grad():
            head.offsets[2].bias.copy_(torch.tensor(offsets))
            head.regressor.weight.mul_(0.2)
        return head, torch.randn(2, 96, 6, 7)

    @staticmethod
    def corners(head: TOODHead, stack: Tensor) -> Tensor:
        """(B, 4, H, W) boxes in strides."""
        distances = head._distances(stack, head.scales[0])
        y, x = torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")
        return torch.stack([x, y, x, y]) + torch.tensor([-1.0, -1, 1, 1])[:, None, None] * distances

    def test_without_offsets_they_are_the_locations_own(self) -> None:
        head, stack = self.head_and_stack([0.0] * 8)
        expected = head.regressor(head.reg_task(stack)).exp()
        torch.testing.assert_close(head._distances(stack, head.scales[0]), expected)

    @pytest.mark.parametrize(("side", "down", "right"), [(0, 0, -1), (1, -1, 0), (2, 0, 1), (3, 2, 1)])
    def test_a_whole_step(self, side: int, down: int, right: int) -> None:
        head, stack = self.head_and_stack([0.0] * 8)
        own = self.corners(head, stack)
        with torch.no_grad():
            head.offsets[2].bias[2 * side : 2 * side + 2] = torch.tensor([float(down), right])
        moved = self.corners(head, stack)
        expected = own.clone()
        for y in range(6):
            for x in range(7):
                inside = 0 <= y + down < 6 and 0 <= x + right < 7
                expected[:, side, y, x] = own[:, side, y + down, x + right] if inside else 0
        solid = (expected[:, 2:] > expected[:, :2]).all(1, keepdim=True)
        torch.testing.assert_close(moved, torch.where(solid, expected, own), rtol=1e-4, atol=1e-5)
        assert solid.float().mean() > 0.5

    def test_half_a_step_is_the_mean_of_two(self) -> None:
        head, stack = self.head_and_stack([0.0, 0.5] + [0.0] * 6)
        moved = self.corners(head, stack)
        with torch.no_grad():
            head.offsets[2].bias.zero_()
        own = self.corners(head, stack)
        expected = (own[:, 0, :, :-1] + own[:, 0, :, 1:]) / 2
        solid = expected < own[:, 2, :, :-1]
        torch.testing.assert_close(moved[:, 0, :, :-1][solid], expected[solid], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("far", [1e4, -1e4])
    def test_a_box_without_area_stays_where_it_was(self, far: float) -> None:
        head, stack = self.head_and_stack([far] * 8)
        expected = head.regressor(head.reg_task(stack)).exp()
        torch.testing.assert_close(head._distances(stack, head.scales[0]), expected, rtol=1e-4, atol=1e-5)


# ---- Labels ----


def by_loops(
    priors: Priors, valid: Tensor, boxes: Tensor, labels: Tensor, scores: Tensor, found: Tensor, count: int
) -> tuple[list[int], list[float]]:
    """One image, plainly: the object of each prior (-1 without), and the score that it has to reach."""
    owner, claims = [-1] * len(valid), [0.0] * len(valid)
    iou = pairwise_iou(boxes[None], found[None])[0]
    alignment = scores[:, labels].T * iou**6 * valid
    for box in range(len(boxes)):
        for prior in alignment[box].argsort(descending=True, stable=True)[:count].tolist():
            x, y = priors.centers[prior].tolist()
            x1, y1, x2, y2 = boxes[box].tolist()
            inside = min(x - x1, y - y1, x2 - x, y2 - y) > 0.01
            if alignment[box, prior] > 0 and inside and iou[box, prior] > claims[prior]:
                owner[prior], claims[prior] = box, iou[box, prior].item()
    reach = [0.0] * len(valid)
    for box in range(len(boxes)):
        mine = [prior for prior in range(len(valid)) if owner[prior] == box]
        if mine:
            most, widest = max(alignment[box, mine]), max(iou[box, mine])
            for prior in mine:
                reach[prior] = (alignment[box, prior] / most * widest).item()
    return owner, reach


def make_predictions(targets: Targets, priors: Priors, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores, and boxes that are ground truth of the image with noise, or noise alone."""
    generator = torch.Generator().manual_seed(seed)
    batch, count = len(targets.boxes), len(priors.boxes)
    scores = torch.rand(batch, count, 3, generator=generator)
    near = torch.randint(targets.boxes.shape[1], (batch, count), generator=generator)
    boxes = targets.boxes.gather(1, near[..., None].expand(-1, -1, 4))
    return scores, boxes + torch.randn(boxes.shape, generator=generator) * 6


def assign(counts: tuple[int, ...] = (4, 1, 0), seed: int = 0) -> tuple[Priors, Tensor, Targets, Any, Assignment]:
    batch = make_batch(((64, 64), (48, 56), (64, 33)), counts, seed=seed)
    sizes = image_sizes(batch["pixel_values"], batch["pixel_mask"])
    targets = Targets.from_labels(batch["labels"], sizes)
    priors = make_head().priors(SHAPES, torch.device("cpu"))
    valid = priors.inside(sizes)
    predicted = make_predictions(targets, priors, seed)
    return priors, valid, targets, predicted, assign_by_alignment(priors, valid, targets, *predicted)


@pytest.mark.parametrize("seed", range(4))
def test_labels_equal_the_loops(seed: int) -> None:
    priors, valid, targets, (scores, boxes), got = assign(seed=seed)
    for image in range(3):
        mask = targets.mask[image]
        truth, labels = targets.boxes[image][mask], targets.labels[image][mask]
        owner, reach = by_loops(priors, valid[image], truth, labels, scores[image], boxes[image], 13)
        index = torch.tensor(owner)
        assert torch.equal(got.positive[image], index >= 0)
        torch.testing.assert_close(got.scores[image], torch.tensor(reach))
        assert torch.equal(got.boxes[image][index >= 0], truth[index[index >= 0]])
        assert torch.equal(got.labels[image][index >= 0], labels[index[index >= 0]])
        assert torch.equal(got.weight[image], valid[image].float())
    assert got.positive[:2].any(1).all()
    assert not got.positive[2].any()


def test_an_objects_best_prediction_has_to_reach_its_largest_overlap() -> None:
    _, _, targets, (_, boxes), got = assign()
    iou = pairwise_iou(targets.boxes, boxes)
    objects = [got.positive[0] & (got.boxes[0] == box).all(-1) for box in targets.boxes[0]]
    assert sum(own.any() for own in objects) >= 2
    for box, own in enumerate(objects):
        assert own.sum() <= 13
        if own.any():
            torch.testing.assert_close(got.scores[0][own].max(), iou[0, box][own].max())
    assert (got.scores[~got.positive] == 0).all()
    assert (got.scores <= 1).all()


def test_no_image_has_a_box() -> None:
    _, valid, _, _, got = assign((0, 0, 0))
    assert not got.positive.any()
    assert (got.scores == 0).all()
    assert torch.equal(got.weight.bool(), valid)


def test_a_prior_in_the_padding_is_never_positive() -> None:
    _, valid, _, _, got = assign((5, 5, 5))
    assert (~valid).any()
    assert got.positive.any(1).all()
    assert not (got.positive & ~valid).any()


def test_no_gradient_flows_through_labels() -> None:
    model = make_detector("tood").train()
    outputs = model(**make_batch(), cut=0)
    assert outputs.predictions.logits.requires_grad
    assert not outputs.assignment.scores.requires_grad


class TestLoss:
    def test_is_zero_for_what_has_to_be_reached(self) -> None:
        """Boxes that are the objects and scores that are the labels leave nothing to learn."""
        model = make_detector("tood").train()
        outputs = model(**make_batch(), cut=0)
        assignment, head = outputs.assignment, model.head
        boxes = torch.where(assignment.positive[..., None], assignment.boxes, outputs.boxes)
        scores = assignment.class_scores(assignment.scores, 3)
        logits = torch.logit(scores.clamp(1e-6, 1 - 1e-6))
        parts = head.loss(outputs.predictions._replace(logits=logits), boxes, outputs.priors, assignment)
        losses = divide(parts)
        assert losses["loss_cls"] < 1e-4
        assert losses["loss_bbox"].abs() < 1e-5
        assert divide(outputs.loss_parts)["loss_cls"] > 0.1

    def test_both_parts_are_divided_by_the_sum_of_the_labels(self) -> None:
        outputs = make_detector("tood").train()(**make_batch(), cut=0)
        total = outputs.assignment.scores.sum()
        assert total > 0
        assert all(part.normalizer == total for part in outputs.loss_parts.values())

    def test_first_epochs(self) -> None:
        """ATSS, focal loss and centerness at first; the alignment later, and where nobody tells the epoch."""
        model, atss, batch = make_detector("tood").train(), make_detector("atss").train(), make_batch()
        assert model(**batch, cut=0).assignment.scores is not None
        model.set_epoch(3.0)
        early = model(**batch, cut=0)
        expected = atss(**batch, cut=0).assignment
        assert early.assignment.scores is None
        assert torch.equal(early.assignment.positive, expected.positive)
        assert early.loss_parts["loss_cls"].normalizer == expected.positive.sum()
        assert model.head.assignment_rule == atss.head.assignment_rule
        assert early.loss.isfinite()
        model.set_epoch(4.0)
        assert model(**batch, cut=0).assignment.scores is not None
        assert model.head.assignment_rule != make_head().assignment_rule


def test_fits_a_batch() -> None:
    """Aligned labels alone, from untrained weights: the objects of one batch are found."""
    model, batch = make_detector("tood", spread=False, frozen_stages=0).train(), make_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        outputs = model(**batch, cut=0)
        outputs.loss.backward()
        optimizer.step()
    overlap = pairwise_iou(outputs.targets.boxes, outputs.boxes)[outputs.targets.mask]  # (objects, N)
    assert overlap.amax(-1).min() > 0.6
    assert outputs.logits.sigmoid()[outputs.assignment.positive].amax() > 0.4


def test_refusals() -> None:
    with pytest.raises(ValueError, match="TOOD moves box sides by whole strides"):
        make_config("tood", stretch_cells=True)
    with pytest.raises(ValueError, match="num_convs=0"):
        make_config("tood", num_convs=0)
