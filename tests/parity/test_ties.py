"""Ties between anchors: only these may fall as in a file."""

import torch

from crosskd_hf.models.assigners import Assignment, Priors, Targets
from tests.parity.ties import adopted, adopted_assignment, listed_rows, tied

# The first two anchors are equal, and the best of the box; the third is farther off.
BOXES = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 8], [0, 0, 16, 16], [40, 40, 48, 48]])
PRIORS = Priors(BOXES, BOXES[:, :2], BOXES[:, :2], torch.full((4,), 8.0), (4,))
TARGETS = Targets(torch.tensor([[[0.0, 0, 10, 10]]]), torch.tensor([[2]]), torch.tensor([[True]]))


def rows(*indices: int) -> torch.Tensor:
    """(1, 4) bool."""
    return torch.zeros(1, 4, dtype=torch.bool).index_fill(1, torch.tensor(indices), True)


def test_best_anchors_are_tied() -> None:
    near, box = tied(PRIORS, TARGETS)
    assert near.tolist() == [[True, True, False, False]]
    assert box.tolist() == [[0, 0, 0, 0]]


def test_a_file_decides_about_ties_alone() -> None:
    ties = tied(PRIORS, TARGETS)[0]
    assert adopted(rows(0), rows(1), ties).equal(rows(1))
    assert adopted(rows(0), rows(0, 2), ties).equal(rows(0))
    assert adopted(rows(0), None, ties).equal(rows(0))


def test_an_adopted_positive_learns_its_box() -> None:
    given = Assignment(rows(0), torch.ones(1, 4), torch.zeros(1, 4, 4), torch.zeros(1, 4, dtype=torch.long))
    found = adopted_assignment(given, rows(1), PRIORS, TARGETS)
    assert found.positive.equal(rows(1))
    assert found.labels[0, 1] == 2
    assert found.boxes[0, 1].tolist() == [0, 0, 10, 10]
    assert found.weight.tolist() == [[0.0, 1.0, 1.0, 1.0]]  # of IoU 0.64 and no positive: ignored


def test_cut_lists_decide_nothing() -> None:
    assert listed_rows([{"indices": [1], "truncated": True}], 4) is None
    found = listed_rows([{"indices": [1]}], 4)
    assert found is not None
    assert found.equal(rows(1))
