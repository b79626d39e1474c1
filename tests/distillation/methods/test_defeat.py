"""DeFeat: cells of objects and of the background."""

import torch

from crosskd_hf.distillation import DeFeat
from crosskd_hf.distillation.passes import Batch, FeatureMap
from crosskd_hf.distillation.regions import cells_of_boxes, levels_of_boxes
from crosskd_hf.models.assigners import Targets
from crosskd_hf.models.losses import divide
from tests.distillation.stubs import build_method, maps_pass

FEATURE = FeatureMap(8, torch.zeros(1, 1, 4, 6))


def targets(*boxes: list[float]) -> Targets:
    rows = torch.tensor([[*boxes, [0.0, 0, 0, 0]]])
    return Targets(rows, torch.zeros(rows.shape[:2]).long(), torch.arange(len(boxes) + 1)[None] < len(boxes))


def cells(box: list[float], single: bool = False) -> list[list[int]]:
    rows, columns = cells_of_boxes(FEATURE, targets(box), single)
    return (rows[0, 0, :, None] & columns[0, 0]).nonzero().tolist()


class TestCells:
    def test_the_last_cell_is_not_a_boxs_own(self) -> None:
        assert cells([8.0, 0, 24, 16]) == [[0, 1], [0, 2], [1, 1], [1, 2]]
        assert cells([8.0, 0, 23, 16]) == [[0, 1], [1, 1]]

    def test_a_box_within_a_cell_has_this_cell(self) -> None:
        assert cells([9.0, 9, 12, 12]) == cells([9.0, 9, 12, 12], True) == [[1, 1]]

    def test_a_thin_box_is_a_row_of_cells_or_in_the_released_code_a_single_one(self) -> None:
        assert cells([8.0, 9, 32, 12]) == [[1, 1], [1, 2], [1, 3]]
        assert cells([8.0, 9, 32, 12], True) == [[1, 1]]

    def test_levels_double_above_56_pixels(self) -> None:
        squares = targets(*([0.0, 0, edge - 1, edge - 1] for edge in (8.0, 56, 111, 112, 224, 4000)))
        assert levels_of_boxes(squares, 4)[0, :6].tolist() == [0, 0, 0, 1, 2, 3]


class TestTerms:
    def losses(self, *boxes: list[float], **options: object) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        student, teacher = ([torch.randn(1, 3, 4, 6)] for _ in range(2))
        method = build_method(DeFeat(adapter=False, **options), 3, 3, 1)  # type: ignore[arg-type]
        batch = Batch(torch.zeros(1, 3, 32, 48), None, [])
        batch.__dict__["targets"] = targets(*boxes)
        self.distance = (student[0] - teacher[0]).square()
        return divide(method(maps_pass(student, (8,)), maps_pass(teacher, (8,)), batch))

    def test_means_of_half_squares_apart_from_each_other(self) -> None:
        found = self.losses([0.0, 0, 24, 32])
        torch.testing.assert_close(found["foreground"], self.distance[..., :3].mean() / 2)
        torch.testing.assert_close(found["background"], self.distance[..., 3:].mean() / 2)

    def test_an_object_on_the_whole_map_leaves_no_background(self) -> None:
        found = self.losses([0.0, 0, 48, 32])
        assert found["background"] == 0
        torch.testing.assert_close(found["foreground"], self.distance.mean() / 2)

    def test_no_object_no_foreground(self) -> None:
        assert self.losses()["foreground"] == 0

    def test_weights_of_the_two_forms(self) -> None:
        assert build_method(DeFeat(), 3, 3).config.terms == {"foreground": 3, "background": 12}
        ld = build_method(DeFeat(preset="ld"), 3, 3)
        assert (ld.config.weight, ld.config.terms) == (2, {"foreground": 1, "background": 2})
        assert not list(ld.parameters())
