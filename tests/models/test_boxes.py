"""Boxes against torchvision, and coders against their own inverses."""

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou, complete_box_iou_loss, generalized_box_iou

from crosskd_hf.models.boxes import (
    aligned_iou,
    complete_iou,
    decode_delta,
    decode_distance,
    encode_delta,
    encode_distance,
    pairwise_iou,
    to_absolute,
    to_relative,
)


def random_xyxy(*shape: int) -> Tensor:
    corner = torch.rand(*shape, 2) * 100
    return torch.cat([corner, corner + torch.rand(*shape, 2) * 60 + 1], -1)


@pytest.mark.parametrize(("generalized", "reference"), [(False, box_iou), (True, generalized_box_iou)])
def test_aligned_iou_is_the_diagonal_of_torchvision(generalized: bool, reference: object) -> None:
    boxes, targets = random_xyxy(50), random_xyxy(50)
    expected = reference(boxes, targets).diagonal()
    torch.testing.assert_close(aligned_iou(boxes, targets, generalized), expected, rtol=1e-5, atol=1e-6)


def test_complete_iou_is_that_of_torchvision_and_finite_without_area() -> None:
    boxes, targets = random_xyxy(50).requires_grad_(), random_xyxy(50)
    loss = 1 - complete_iou(boxes, targets)
    expected = complete_box_iou_loss(boxes, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    found, wanted = (torch.autograd.grad(value.sum(), boxes)[0] for value in (loss, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    for other in (boxes, torch.zeros_like(boxes)):  # no difference, and rows of an image without objects
        (gradient,) = torch.autograd.grad(complete_iou(boxes, other).sum(), boxes)
        assert gradient.isfinite().all()
    torch.testing.assert_close(complete_iou(targets, targets), torch.ones(50))


def test_pairwise_iou_is_torchvision_per_image() -> None:
    boxes, others = random_xyxy(3, 5), random_xyxy(3, 40)
    expected = torch.stack([box_iou(b, o) for b, o in zip(boxes, others, strict=True)])
    torch.testing.assert_close(pairwise_iou(boxes, others), expected, rtol=1e-5, atol=1e-6)


def test_boxes_without_area_overlap_nothing() -> None:
    nothing = torch.zeros(1, 4, 4)
    assert not pairwise_iou(nothing, random_xyxy(1, 6)).any()
    assert not pairwise_iou(nothing, nothing).any()
    assert aligned_iou(nothing, nothing, generalized=True).isfinite().all()


@pytest.mark.parametrize("generalized", [False, True])
def test_gradients_are_finite_for_equal_disjoint_and_inverted_boxes(generalized: bool) -> None:
    targets = torch.tensor([[10.0, 10, 20, 20]]).repeat(4, 1)
    boxes = torch.tensor([[10.0, 10, 20, 20], [50, 50, 60, 60], [20, 20, 10, 10], [15, 15, 15, 15]], requires_grad=True)
    iou = aligned_iou(boxes, targets, generalized)
    iou.sum().backward()
    assert iou.isfinite().all()
    assert boxes.grad.isfinite().all()
    assert iou[0] == 1


def test_generalized_iou_of_distant_boxes_approaches_minus_one() -> None:
    boxes, targets = torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[1e4, 1e4, 1e4 + 1, 1e4 + 1]])
    assert aligned_iou(boxes, targets, generalized=True).item() == pytest.approx(-1, abs=1e-6)


@pytest.mark.parametrize("std", [(1.0, 1.0, 1.0, 1.0), (0.1, 0.1, 0.2, 0.2)])
def test_deltas_round_trip(std: tuple[float, ...]) -> None:
    priors, boxes = random_xyxy(40), random_xyxy(2, 40)
    decoded = decode_delta(priors, encode_delta(priors, boxes, std), std)
    torch.testing.assert_close(decoded, boxes, rtol=1e-4, atol=1e-3)


def test_deltas_by_hand() -> None:
    prior, box = torch.tensor([0.0, 0, 10, 20]), torch.tensor([5.0, 0, 25, 10])
    expected = torch.tensor([1.0, -0.25, 2.0, 0.5])
    expected[2:] = expected[2:].log()
    torch.testing.assert_close(encode_delta(prior, box), expected)


def test_delta_growth_is_clipped() -> None:
    decoded = decode_delta(torch.tensor([0.0, 0, 10, 10]), torch.tensor([0.0, 0, 1e4, -1e4]))
    width, height = decoded[2] - decoded[0], decoded[3] - decoded[1]
    assert width.item() == pytest.approx(625, rel=1e-5)
    assert height.item() == pytest.approx(0.16, rel=1e-4)


def test_distances_round_trip() -> None:
    points, boxes = torch.rand(40, 2) * 100, random_xyxy(2, 40)
    torch.testing.assert_close(decode_distance(points, encode_distance(points, boxes)), boxes, rtol=1e-5, atol=1e-4)


def test_relative_boxes_refer_to_each_images_own_size() -> None:
    boxes, sizes = torch.tensor([[[0.0, 0, 50, 100]]]).repeat(2, 1, 1), torch.tensor([[100.0, 50], [200, 100]])
    expected = torch.tensor([[[0.5, 0.5, 1, 1]], [[0.25, 0.25, 0.5, 0.5]]])
    torch.testing.assert_close(to_relative(boxes, sizes), expected)
    torch.testing.assert_close(to_absolute(expected, sizes), boxes)
