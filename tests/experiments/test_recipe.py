"""Defaults that fit the data: figures, and that what is given wins."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from crosskd_hf.data.report import Finding, Place
from crosskd_hf.experiments.augmentation import training_transform
from crosskd_hf.experiments.recipe import Recipe, Start, in_words
from crosskd_hf.experiments.train import opening
from crosskd_hf.models import GFLConfig
from crosskd_hf.training.config import CrossKDConfig

CONFIG = GFLConfig(backbone="test_resnet", frozen_stages=0, norm_eval=False)


def test_the_line_of_160_images() -> None:
    settings = Recipe(160, Start.RANDOM, CONFIG).settings()
    args = CrossKDConfig("out", use_cpu=True, **settings)
    line = in_words(args, 160, {"shortest_edge": 800, "longest_edge": 1333})
    assert line.startswith("160 images, batch 8, 600 updates (30 epochs), lr 0.002, weight average ")
    assert args.load_best_model_at_end
    assert args.metric_for_best_model == "eval_map"


def test_faults_of_the_data_are_told_before_the_settings() -> None:
    found = Finding("warning", "twice", "an image occurs twice", "remove one", (Place("a\x1b.jpg"),))
    note = Finding("note", "ids", "ids have gaps", "")
    data = SimpleNamespace(report=SimpleNamespace(findings=[found, note]), dataset=range(3))
    args = CrossKDConfig("out", use_cpu=True, report_to="none")
    size = {"shortest_edge": 800, "longest_edge": 1333}
    told = opening(data, None, args, size, Start.RANDOM)
    assert told[0] == "warning: twice: an image occurs twice\n    a\\x1b.jpg\n    fix: remove one"
    assert told[1].startswith("3 images, ")
    assert len(told) == 2


@pytest.mark.parametrize(
    ("images", "batch", "epochs"), [(7, 1, 60), (40, 4, 60), (160, 8, 30), (1000, 8, 12), (118_000, 8, 12)]
)
def test_batch_and_epochs_follow_the_number_of_images(images: int, batch: int, epochs: int) -> None:
    settings = Recipe(images, Start.RANDOM, CONFIG).settings()
    assert (settings["per_device_train_batch_size"], settings["num_train_epochs"]) == (batch, epochs)


def test_pretrained_weights_move_slower() -> None:
    rates = [Recipe(160, start, CONFIG).settings()["learning_rate"] for start in Start]
    assert rates == [2e-3, 5e-4, 2e-4]
    assert Recipe(160, Start.BACKBONE, CONFIG).settings()["backbone_lr"] == 1e-4


def test_the_learning_rate_follows_the_batch() -> None:
    given = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    assert Recipe(160, Start.RANDOM, CONFIG).settings(set(given), **given)["learning_rate"] == 1e-3
    assert Recipe(160, Start.RANDOM, CONFIG, processes=4).settings()["learning_rate"] == pytest.approx(2.8e-3)


@pytest.mark.parametrize(
    "given",
    [
        {"schedule": "1x"},
        {"max_steps": 3},
        {"learning_rate": 1e-3},
        {"eval_strategy": "no"},
        {"save_strategy": "no"},
        {"save_steps": 5},
        {"eval_steps": 5},
        {"num_train_epochs": 2.0},
    ],
)
def test_what_is_given_wins_and_is_not_contradicted(given: dict[str, object]) -> None:
    settings = Recipe(160, Start.BACKBONE, CONFIG).settings(set(given), **given)
    args = CrossKDConfig("out", use_cpu=True, **(settings | given))
    assert {name: getattr(args, name) for name in given if "strategy" not in name} == {
        name: value for name, value in given.items() if "strategy" not in name
    }


def test_an_unknown_augmentation_is_told() -> None:
    with pytest.raises(ValueError, match="augment: color is unknown"):
        training_transform(augment=["color"])
