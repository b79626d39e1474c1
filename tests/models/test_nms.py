"""NMS within classes: the definition, class by class, whatever the classes are called and however large the image."""

import pytest
import torch
from torch import Tensor
from torchvision.ops import batched_nms, nms

from crosskd_hf.models.nms import _one_by_one, _side_by_side, nms_by_class

WAYS = [_one_by_one, _side_by_side]


def make_boxes(count: int, classes: int, size: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Clusters of overlapping boxes in an image of `size` pixels."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(12, (count, 2), generator=generator) / 12 * size
    corner = corner + torch.rand(count, 2, generator=generator) * size / 60
    extent = (torch.rand(count, 2, generator=generator) * 0.5 + 0.5) * size / 12
    boxes = torch.cat([corner, corner + extent], 1)
    return boxes, torch.rand(count, generator=generator), torch.randint(classes, (count,), generator=generator)


def by_definition(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    rows = [
        (labels == label).nonzero()[:, 0][nms(boxes[labels == label], scores[labels == label], threshold)]
        for label in labels.unique()
    ]
    kept = torch.cat(rows).sort().values
    return kept[scores[kept].argsort(descending=True, stable=True)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("count", "classes"), [(1, 1), (400, 1), (400, 80), (3000, 80), (3000, 20_000)])
@pytest.mark.parametrize("size", [1.0, 640.0, 50_000.0])
def test_equals_the_definition(way, count: int, classes: int, size: float) -> None:
    given = make_boxes(count, classes, size)
    assert torch.equal(way(*given, 0.6), by_definition(*given, 0.6))


def test_many_classes_in_a_large_image() -> None:
    """Two boxes of class 5,000 with an IoU of .375; shifted in float32, where pixels are 4 apart, it is .5."""
    boxes = torch.tensor([[9.0, 9, 15, 15], [12, 9, 17, 15], [8000, 8000, 8192, 8192]])
    scores, labels = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([5000, 5000, 3])
    for way in WAYS:
        assert way(boxes, scores, labels, 0.4).tolist() == [0, 1, 2]
    assert batched_nms(boxes, scores, labels, 0.4).tolist() == [0, 2]


@pytest.mark.parametrize("seed", range(5))
def test_ordinary_input_is_as_with_torchvision(seed: int) -> None:
    given = make_boxes(900, 10, 640.0, seed)
    assert torch.equal(nms_by_class(*given, 0.6, 900), batched_nms(*given, 0.6))


@pytest.mark.parametrize("most", [1, 100, 700, 5000])
@pytest.mark.parametrize("classes", [1, 80])
def test_the_first_of_many_are_those_of_all(classes: int, most: int) -> None:
    given = make_boxes(4000, classes, 640.0)
    assert torch.equal(nms_by_class(*given, 0.6, most), by_definition(*given, 0.6)[:most])


def test_an_overlap_at_the_threshold_is_rounded_alike() -> None:
    """IoU 6 / 10: in float32 this is above 0.6, for every way."""
    boxes, labels = torch.tensor([[0.0, 0, 8, 1], [2, 0, 10, 1]]), torch.zeros(2, dtype=torch.long)
    scores = torch.tensor([0.9, 0.8])
    expected = nms(boxes, scores, 0.6).tolist()
    assert [way(boxes, scores, labels, 0.6).tolist() for way in WAYS] == [expected] * 2


@pytest.mark.parametrize("way", WAYS)
def test_of_equal_scores_the_first_stays(way) -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10]] * 4)
    kept = way(boxes, torch.full((4,), 0.5), torch.tensor([7, 2, 7, 2]), 0.5)
    assert kept.tolist() == [0, 1]


@pytest.mark.parametrize("way", WAYS)
def test_nothing_given(way) -> None:
    kept = way(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long), 0.5)
    assert (kept.shape, kept.dtype) == ((0,), torch.int64)
