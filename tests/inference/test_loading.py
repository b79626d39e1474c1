"""Saved detectors that are broken: refused when they are loaded, and the message says what is wrong and where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeformableDetrImageProcessor, PreTrainedModel

from crosskd_hf.inference.loading import _has_no_processor, _load_whole, load_detector, load_teacher
from crosskd_hf.sources import asking_the_hub
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


def test_an_image_processor_that_cannot_be_read(tmp_path: Path) -> None:
    """A teacher went on with the student's pixels, as if it had none."""
    file = saved(make_detector(1), tmp_path) / "preprocessor_config.json"
    file.write_text('{"image_processor_type": "Detection')
    with pytest.raises(OSError, match=r"image processor of .* can't be read .*give the image processor itself"):
        load_teacher(tmp_path)
    assert load_teacher(tmp_path, with_processor=False)[1] is None
    file.unlink()
    assert load_teacher(tmp_path)[1] is None


def test_what_is_not_in_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: a model, its weights, or its image processor alone."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="'owner/name' is no .*not in the cache .*HF_HUB_OFFLINE=1"):
        load_teacher("owner/name")
    with pytest.raises(OSError, match="The model 'owner/name' can't be fetched from the Hub .*hf download owner/name"):
        _load_whole("owner/name", {})
    assert not _has_no_processor("owner/name", "main")


def test_a_hub_that_does_not_answer_is_told_in_one_sentence() -> None:
    with (
        pytest.raises(OSError, match=r"^No 'x' here; the Hub's client says KeyError: 'no'\. Log in\.$"),
        asking_the_hub("No 'x' here", "Log in."),
    ):
        raise KeyError("no")
