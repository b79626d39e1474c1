"""Box coders: numbers that a head regresses, boxes in pixels, and back."""

import itertools

import pytest
import torch
from torch import Tensor

from crosskd_hf.models.assigners import Priors
from crosskd_hf.models.box_coders import BoxCoder, DeltaCoder, DistanceCoder, DistributionCoder

CODERS: list[BoxCoder] = [
    DeltaCoder(),
    DeltaCoder((0.1, 0.1, 0.2, 0.2)),
    DistanceCoder("stride"),
    DistanceCoder("positive_stride"),
    DistanceCoder("log_pixel"),
    DistributionCoder(16),
    DistributionCoder(7),
]
each_coder = pytest.mark.parametrize("coder", CODERS, ids=str)


@pytest.fixture
def priors() -> Priors:
    """Squares of 64 and 128 pixels on two levels, (4 + 1) of them."""
    anchors = [torch.tensor([[-side, -side, side, side]]) for side in (32.0, 64.0)]
    return Priors.on_grid([(2, 2), (1, 1)], [8, 16], [(8, 8), (16, 16)], anchors)


@pytest.fixture
def boxes(priors: Priors) -> Tensor:
    """(2, 5, 4) boxes around their priors' centres, sides at 1 to 6 strides."""
    sides = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(1)) * 5 + 1
    sides = sides * priors.strides[:, None]
    return torch.cat([priors.centers - sides[..., :2], priors.centers + sides[..., 2:]], -1)


@pytest.mark.parametrize("coder", CODERS[:2], ids=str)
def test_deltas_there_and_back(coder: DeltaCoder, priors: Priors, boxes: Tensor) -> None:
    torch.testing.assert_close(coder.decode(coder.encode(boxes, priors), priors), boxes)


def test_delta_by_hand(priors: Priors) -> None:
    """A box of twice the width whose centre lies a quarter of the prior to the right."""
    prior = priors.boxes[0]
    box = torch.stack([prior[0] - 16, prior[1], prior[2] + 48, prior[3]])
    rows = DeltaCoder((0.1, 0.1, 0.2, 0.2)).encode(box.expand(1, 5, 4), priors)[0, 0]
    torch.testing.assert_close(rows, torch.tensor([2.5, 0.0, torch.tensor(2.0).log() / 0.2, 0.0]))


def test_distances_by_unit(priors: Priors) -> None:
    rows = torch.tensor([-1.0, 0.0, 1.0, 2.0]).expand(1, 5, 4)
    strides = priors.strides[:, None]
    for unit, expected in (
        ("stride", rows * strides),
        ("positive_stride", torch.tensor([0.0, 0, 1, 2]) * strides),
        ("log_pixel", rows.exp()),
    ):
        decoded = DistanceCoder(unit).decode(rows, priors)
        sides = torch.cat([priors.centers - decoded[..., :2], decoded[..., 2:] - priors.centers], -1)
        torch.testing.assert_close(sides, expected.expand_as(sides), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("coder", CODERS[5:], ids=str)
def test_a_distribution_on_two_bins_is_its_distance(coder: DistributionCoder, priors: Priors, boxes: Tensor) -> None:
    distances = coder.encode(boxes, priors)  # (2, 5, 4), in strides
    left = distances.floor().long()[..., None]
    share = (distances - distances.floor())[..., None]
    logits = torch.full((2, 5, 4, coder.reg_max + 1), -1e4).scatter(-1, left, (1 - share).log())
    logits = logits.scatter(-1, left + 1, share.log())
    torch.testing.assert_close(coder.decode(logits.flatten(-2), priors), boxes, rtol=1e-4, atol=1e-3)
    assert torch.equal(coder.sides(logits.flatten(-2)), logits)


def test_distances_stay_below_the_last_bin(priors: Priors) -> None:
    far = torch.tensor([-1e4, -1e4, 1e4, 1e4]).expand(1, 5, 4)
    assert (DistributionCoder(7).encode(far, priors) == torch.tensor(6.9)).all()
    inverted = torch.tensor([1e4, 1e4, -1e4, -1e4]).expand(1, 5, 4)
    assert (DistributionCoder(7).encode(inverted, priors) == 0).all()


@each_coder
@pytest.mark.parametrize("value", [-1e3, 0.0, 1e3])
def test_boxes_and_gradients_are_finite(coder: BoxCoder, priors: Priors, value: float) -> None:
    rows = torch.full((2, 5, coder.width), value, requires_grad=True)
    decoded = coder.decode(rows, priors)
    assert decoded.shape == (2, 5, 4)
    assert decoded.dtype == torch.float32
    decoded.sum().backward()
    assert decoded.isfinite().all()
    assert rows.grad.isfinite().all()


def test_coders_are_equal_if_they_mean_the_same() -> None:
    assert DistributionCoder(16) == DistributionCoder(16)
    assert DeltaCoder((1.0, 1.0, 1.0, 1.0)) == DeltaCoder()
    assert not any(one == other for one, other in itertools.combinations(CODERS, 2))
