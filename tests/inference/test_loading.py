"""Saved detectors that are broken: refused when they are loaded, and the message says what is wrong and where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeformableDetrImageProcessor, PreTrainedModel

from crosskd_hf.inference.loading import load_detector
from tests.tiny_run import SIZE, make_deformable_detr, make_detector, processor

Weights = dict[str, Tensor]


def saved(model: PreTrainedModel, folder: Path, change: Callable[[Weights], Weights] = dict) -> Path:
    """The folder of a model with its image processor, its weights changed."""
    model.save_pretrained(folder)
    dense = model.config.model_type == "crosskd_gfl"
    (processor() if dense else DeformableDetrImageProcessor(size={"height": SIZE, "width": SIZE})).save_pretrained(
        folder
    )
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def of_classifier(change: Callable[[Tensor], Tensor]) -> Callable[[Weights], Weights]:
    """A change of the weights of the last layer of classes."""
    return lambda weights: {
        name: change(value) if name.endswith(("classifier.weight", "class_embed.0.weight")) else value
        for name, value in weights.items()
    }


@pytest.mark.parametrize("make", [make_detector, make_deformable_detr])
def test_weights_that_are_not_those_of_the_model(tmp_path: Path, make: Callable[[int], PreTrainedModel]) -> None:
    """One with NaN was evaluated before, and found nothing: AP 0 without a word."""
    model = make(1)
    for number, (change, words) in enumerate(
        (
            (lambda value: torch.full_like(value, torch.nan), "weights of the model .* have NaN or infinity in them"),
            (lambda value: value[:2].clone(), "The model .* has . mismatched keys, such as .*would be random"),
        )
    ):
        folder = saved(model, tmp_path / str(number), of_classifier(change))
        with pytest.raises(ValueError, match=words):
            load_detector(folder)
    load_detector(saved(model, tmp_path / "whole"))


def test_a_file_of_weights_that_is_cut_short(tmp_path: Path) -> None:
    file = saved(make_detector(1), tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(OSError, match=f"The weights in {tmp_path} can't be read .*cut short or damaged"):
        load_detector(tmp_path)


def test_classes_that_are_not_those_of_the_outputs(tmp_path: Path) -> None:
    """A star would be found by an output that is not there; it was evaluated without a word."""
    folder = saved(make_deformable_detr(1), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "circle", "1": "square", "2": "triangle", "4": "star"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"The model's head has 4 outputs, .*It leaves out 3: .*numbers of outputs, 0 to 3"
    ):
        load_detector(folder)
