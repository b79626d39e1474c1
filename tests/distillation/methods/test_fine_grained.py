"""Fine-grained imitation: which locations count, when it begins, and what sums are divided by."""

import pytest
import torch
from torch import Tensor

from crosskd_hf.distillation import FineGrained
from crosskd_hf.distillation.passes import Batch, Pass
from crosskd_hf.models.assigners import Targets
from crosskd_hf.models.losses import divide
from tests.distillation.stubs import MapsView, build_method, maps_pass
from tests.parity.drawn import DrawnView, build, drawn_pass

ANCHORS = torch.tensor([[-4.0, -4, 4, 4], [-16, -16, 16, 16]])
ONE = MapsView(2, strides=(8,)), MapsView(2, "teacher", strides=(8,))


def batch_of(*boxes: list[float], update: int = 0) -> Batch:
    """One image of 64 pixels with these boxes, xyxy pixels."""
    batch = Batch(torch.zeros(1, 3, 64, 64), None, [], update)
    rows = torch.tensor([[*boxes, [0.0, 0, 0, 0]]])
    batch.__dict__["targets"] = Targets(
        rows, torch.zeros(rows.shape[:2]).long(), torch.arange(len(boxes) + 1)[None] < len(boxes)
    )
    return batch


def two_anchors() -> Pass:
    """An 8x8 map whose cells have a small and a large anchor."""
    return drawn_pass(batch_of(), [torch.zeros(1, 2, 8, 8)], strides=(8,), anchors=[ANCHORS])


def mask(boxes: list[list[float]], **options: float) -> Tensor:
    method = build(
        FineGrained(preset="ld", **options), DrawnView(2, strides=(8,)), DrawnView(2, "teacher", strides=(8,))
    )
    return method.regions(two_anchors(), two_anchors(), batch_of(*boxes))[0][0]  # type: ignore[operator]


class TestRegion:
    def test_any_anchor_near_the_best_marks_its_location(self) -> None:
        """A box that is an anchor of cell (2, 3): the cells beside it have an IoU of .6, those across of .39."""
        found = mask([[8.0, 0, 40, 32]])
        assert found.nonzero().tolist() == [[1, 3], [2, 2], [2, 3], [2, 4], [3, 3]]

    def test_the_share_of_the_best_decides(self) -> None:
        assert mask([[8.0, 0, 40, 32]], threshold=0.9).nonzero().tolist() == [[2, 3]]
        assert mask([[8.0, 0, 40, 32]], threshold=0.3).sum() > 5

    def test_an_image_ends_at_its_size_rounded_up(self) -> None:
        """40 px count as 64, as in MMDetection: its own padding is searched, that of other images is not."""
        method = build(FineGrained(preset="ld"), DrawnView(2, strides=(8,)), DrawnView(2, "teacher", strides=(8,)))
        columns = []
        for width in (40, 64, 128):
            batch = batch_of([44.0, 20, 76, 52])
            batch.pixel_values, batch.pixel_mask = torch.zeros(1, 3, 64, 128), torch.zeros(1, 64, 128)
            batch.pixel_mask[:, :, :width] = 1
            wide = drawn_pass(batch, [torch.zeros(1, 2, 8, 16)], strides=(8,), anchors=[ANCHORS])
            found = method.regions(wide, wide, batch)[0][0]  # type: ignore[operator]
            columns.append(found.any(0).nonzero()[:, 0].tolist())
        assert columns == [[6, 7], [6, 7], [6, 7, 8, 9]]  # the box lies in the middle between cells 7 and 8

    def test_padded_rows_are_no_objects(self) -> None:
        assert not mask([]).any()

    def test_detectors_without_anchors_have_squares(self) -> None:
        method = build_method(FineGrained(preset="ld"), 2, 2, 1)
        student = maps_pass([torch.zeros(1, 2, 8, 8)], (8,))
        found = method.regions(student, student, batch_of([4.0, 4, 68, 68]))[0][0]  # type: ignore[operator]
        assert found[4, 4] == 1  # the square of this cell


class TestLoss:
    def loss(self, update: int = 400, **options: str) -> Tensor:
        torch.manual_seed(0)
        student, teacher = ([torch.randn(1, 2, 8, 8)] for _ in range(2))
        method = build(FineGrained(adapter=False, **options), *ONE)  # type: ignore[arg-type]
        batch = batch_of([4.0, 4, 40, 40], update=update)
        return divide(method(maps_pass(student, (8,)), maps_pass(teacher, (8,)), batch))["features"]

    def test_nothing_before_the_first_updates_are_done(self) -> None:
        assert self.loss(399) == 0
        assert self.loss(400) > 0

    def test_a_start_behind_the_end_of_the_run_is_an_error(self) -> None:
        method = build(FineGrained(adapter=False, start=3), *ONE)
        method.check_length(4)
        with pytest.raises(ValueError, match="start=3, but the run has 3 updates: the loss would be zero throughout"):
            method.check_length(3)

    def test_channels_count_or_not(self) -> None:
        torch.testing.assert_close(self.loss(), 2 * self.loss(normalizer="elements"))

    def test_the_best_anchor_needs_a_threshold_below_1(self) -> None:
        with pytest.raises(ValueError, match=r"threshold=1 must be in \[0, 0.999\]"):
            FineGrained(threshold=1)
