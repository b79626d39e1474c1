"""Schedules and parameter groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from crosskd_hf.training.schedules import (
    SCHEDULES,
    GroupRule,
    decay_updates,
    default_warmup,
    parameter_groups,
    parse_factors,
    step_factor,
    step_schedule,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.head = nn.Conv2d(4, 2, 1)
        self.frozen = nn.Linear(1, 1).requires_grad_(False)


def test_steps_of_the_1x_schedule() -> None:
    factor = step_factor(decay_updates(SCHEDULES["1x"], 12 * 1000), warmup=500)
    assert factor(0) == pytest.approx(1e-3)
    assert factor(250) == pytest.approx(0.001 + 0.999 * 250 / 499)
    assert [factor(n) for n in (499, 500, 7999)] == [1, 1, 1]
    assert [factor(n) for n in (8000, 10_999)] == pytest.approx([0.1, 0.1])
    assert [factor(n) for n in (11_000, 11_999)] == pytest.approx([0.01, 0.01])


def test_steps_of_the_2x_schedule() -> None:
    factor = step_factor(decay_updates(SCHEDULES["2x"], 24), warmup=0)
    assert [n for n in range(1, 24) if factor(n) < factor(n - 1)] == [16, 22]


def test_kinds_of_warm_up() -> None:
    assert [step_factor([], 5, "constant")(n) for n in range(6)] == [1 / 3] * 4 + [1, 1]
    assert [step_factor([], 0, "none")(n) for n in range(3)] == [1, 1, 1]
    for kind in ("linear", "constant"):
        assert step_factor([], 1, kind)(0) == 1


def test_words_of_factors() -> None:
    assert parse_factors(["backbone=0.1", "sampling_offsets=.5"]) == {"backbone": 0.1, "sampling_offsets": 0.5}
    for words in (["backbone"], ["=1"], ["a=0"], ["a=x"], ["a=1", "a=2"]):
        with pytest.raises(ValueError, match="give NAME=FACTOR"):
            parse_factors(words)


def test_short_runs_warm_up_shortly() -> None:
    assert [default_warmup(n) for n in (90_000, 2000, 300, 3)] == [500, 200, 30, 1]


def test_groups() -> None:
    rule = GroupRule(0.1, 1e-4, backbone_learning_rate=0.01, bias_factor=2.0, bias_weight_decay=0.0)
    net = Net()
    groups = {(g["lr"], g["weight_decay"]): g["params"] for g in parameter_groups(net, rule)}
    norm = net.backbone[1]
    assert set(groups) == {(0.01, 1e-4), (0.01, 0.0), (0.02, 0.0), (0.1, 1e-4), (0.2, 0.0)}
    assert [id(p) for p in groups[0.01, 1e-4]] == [id(p) for p in (net.backbone[0].weight, norm.weight)]
    assert [id(p) for p in groups[0.01, 0.0]] == [id(norm.bias)]  # the factor is for biases outside of norms
    assert [id(p) for p in groups[0.2, 0.0]] == [id(net.head.bias)]


def test_factors_by_the_name_of_a_module() -> None:
    groups = parameter_groups(Net(), GroupRule(0.1, 1e-4, factors={"backbone": 0.1, "head": 0.5}))
    assert [(g["lr"], len(g["params"])) for g in groups] == [(pytest.approx(0.01), 4), (0.05, 2)]
    for name in ("neck", "frozen", "back"):
        with pytest.raises(ValueError, match=f"lr_factors names {name}, but no trainable parameter of Net"):
            parameter_groups(Net(), GroupRule(0.1, 1e-4, factors={name: 0.1}))


def test_undecayed_parameters() -> None:
    groups = parameter_groups(Net(), GroupRule(0.1, 1e-4, undecayed={"head.bias"}))
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(5, 1e-4), (1, 0.0)]


def test_every_group_keeps_its_own_rate() -> None:
    optimizer = torch.optim.SGD(parameter_groups(Net(), GroupRule(0.1, 0.0, backbone_learning_rate=0.01)), lr=0.1)
    scheduler = step_schedule(optimizer, [8, 11], warmup=0)
    for _ in range(8):
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.001, 0.01])
