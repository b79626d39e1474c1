"""SKD: structural similarity of maps scaled to [0, 1]."""

import pytest
import torch
from torch import Tensor

from crosskd_hf.distillation import SKD
from crosskd_hf.distillation.methods.skd import dissimilarity, unit_range, window_size
from crosskd_hf.models.losses import divide
from tests.distillation.stubs import build_method, empty_batch, maps_pass


def maps(*shape: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.rand(shape), torch.rand(shape)


class TestDissimilarity:
    @pytest.mark.parametrize("shape", [(2, 3, 20, 16), (1, 2, 5, 4), (2, 2, 2, 2), (1, 2, 1, 1)])
    def test_equal_maps_have_none_and_others_at_most_one(self, shape: tuple[int, ...]) -> None:
        own, target = maps(*shape)
        assert dissimilarity(own, own).abs().max() < 1e-6
        found = dissimilarity(own, target)
        assert 0 < found.mean() <= found.max() <= 1
        torch.testing.assert_close(found, dissimilarity(target, own))

    def test_of_constant_maps_by_the_formula(self) -> None:
        own, target = torch.full((1, 1, 12, 12), 0.2), torch.full((1, 1, 12, 12), 0.6)
        expected = (1 - (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)) / 2
        torch.testing.assert_close(dissimilarity(own, target), torch.full_like(own, expected))

    def test_the_window_is_odd_and_fits(self) -> None:
        assert [window_size(height, 99) for height in (1, 2, 3, 4, 10, 11, 40)] == [1, 1, 3, 3, 9, 11, 11]


class TestRange:
    def test_zero_to_one(self) -> None:
        values = unit_range(10 * torch.randn(2, 3, 4, 5) - 7)
        torch.testing.assert_close(values.amin((2, 3)), torch.zeros(2, 3))
        torch.testing.assert_close(values.amax((2, 3)), torch.ones(2, 3))
        assert not unit_range(torch.full((1, 1, 3, 3), 5.0)).any()

    def test_without_gradient_of_the_extremes(self) -> None:
        values = torch.tensor([[[[0.0, 1.0], [0.25, 0.5]]]], requires_grad=True)
        unit_range(values, detach=True).sum().backward()
        torch.testing.assert_close(values.grad, torch.ones_like(values), rtol=1e-5, atol=1e-5)


def test_scale_and_offset_of_a_students_map_make_no_difference() -> None:
    own, target = maps(2, 3, 8, 8)
    losses = []
    for student in (own, 5 * own + 3):
        method = build_method(SKD(), 3, 3, 1)
        losses.append(divide(method(maps_pass([student], (8,)), maps_pass([target], (8,)), empty_batch(2)))["features"])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
