"""Averaged weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from crosskd_hf.training.ema import WeightAverage


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def fill(model: nn.Module, value: float) -> None:
    for tensor in model.state_dict().values():
        tensor.fill_(value)


def test_the_average_moves_by_its_decay() -> None:
    model = net()
    fill(model, 0.0)
    average = WeightAverage(model, decay=0.75, updates=1000)
    fill(model, 1.0)
    average.update(model)
    average.update(model)
    average.copy_to(model)
    assert torch.allclose(model[0].weight, torch.full((2, 2), 1 - 0.75**2))
    assert torch.allclose(model[1].running_var, torch.full((2,), 1 - 0.75**2))
    assert model[1].num_batches_tracked == 1


def test_the_first_updates_forget_faster() -> None:
    model = net()
    fill(model, 0.0)
    average = WeightAverage(model, decay=0.999)
    fill(model, 1.0)
    average.update(model)
    average.copy_to(model)
    assert torch.allclose(model[0].bias, torch.full((2,), 0.9))


def test_swapped_gives_the_own_weights_back_bit_by_bit() -> None:
    model = net()
    average = WeightAverage(model, decay=0.9)
    nn.init.normal_(model[0].weight)
    own = model[0].weight.detach().clone()
    parameter = model[0].weight
    with average.swapped(model):
        assert not torch.equal(model[0].weight, own)
    assert model[0].weight is parameter
    assert torch.equal(model[0].weight, own)


@pytest.mark.parametrize("decay", [0.0, 1.0, 1.5])
def test_decay_out_of_range(decay: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        WeightAverage(net(), decay)
