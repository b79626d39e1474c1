"""A detector from one word: new, from a folder, and what is said of a slip."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from transformers import ConditionalDetrImageProcessor, DetrImageProcessor, RTDetrImageProcessor

from crosskd_hf.create import ARCHITECTURES, TRANSFORMERS, ImageSize, chosen_weights, create_detector
from crosskd_hf.inference.processors import check_processor

NAMES = ("circle", "square", "triangle", "star")
OF_TIMM = [name for name in (*ARCHITECTURES, *TRANSFORMERS) if name not in ("lw_detr", "rf_detr")]


@pytest.mark.parametrize("architecture", OF_TIMM)
def test_a_new_detector_of_every_architecture_finds_the_classes_of_the_data(architecture: str) -> None:
    model, processor = create_detector(
        f"{architecture}:test_resnet", NAMES, width=64, image_size=ImageSize(128, 128), backbone_weights=None
    )
    check_processor(model, processor)
    processor.score_threshold = 0.0  # of dense detectors: a new one's scores are 0.01
    assert model.config.id2label == dict(enumerate(NAMES))
    inputs = processor(images=[torch.zeros(3, 96, 128, dtype=torch.uint8)], return_tensors="pt")
    with torch.no_grad():
        outputs = model.eval()(**inputs)
    (result,) = processor.post_process_object_detection(outputs, 0.0, torch.tensor([[96, 128]]))
    assert len(result["boxes"]) > 0
    assert int(result["labels"].max()) < len(NAMES)


def test_image_processors_are_those_of_the_family() -> None:
    kinds = {
        "conditional_detr": ConditionalDetrImageProcessor,
        "rt_detr": RTDetrImageProcessor,
        "detr": DetrImageProcessor,
    }
    for name, kind in kinds.items():
        made = create_detector(f"{name}:test_resnet", ["a"], width=32, backbone_weights=None)
        assert type(made.processor) is kind


def test_weights_that_are_not_at_hand_are_told_and_random(caplog: pytest.LogCaptureFixture) -> None:
    create_detector("gfl:test_resnet", NAMES, width=16)
    assert "No pretrained weights of the backbone test_resnet are at hand" in caplog.text


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("gfl:resnet1", "timm has no backbone 'resnet1'; did you mean 'resnet18'"),
        ("glf:resnet18", "Unknown architecture 'glf' in 'glf:resnet18'; did you mean 'gfl'?"),
        ("rt_detr_v3:resnet18", "did you mean 'rt_detr_v2'"),
        ("gfl-studnet", "There is no folder 'gfl-studnet'; did you mean 'gfl-student'"),
        ("runs/distilld", "There is no folder 'runs/distilld'; did you mean 'runs/distilled'?"),
        ("./run", "There is no folder './run'"),
        ("runs", "The folder runs holds no model, it has no config.json; models lie in its folders distilled"),
        ("gfl-student/config.json", "is a file. Give the folder of the model"),
        ("lw_detr:resnet18", "lw_detr has a backbone of its own"),
    ],
)
def test_a_slip_is_told_at_once(word: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("gfl-student", "runs/distilled"):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "config.json").write_text("{}")
    start = time.monotonic()
    with pytest.raises((ValueError, OSError)) as caught:
        create_detector(word, NAMES, backbone_weights=None)
    assert message in str(caught.value)
    assert time.monotonic() - start < 5  # retries at a Hub that doesn't answer take 23 s and more


def test_a_hub_that_does_not_answer_is_told_without_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> bool:
        raise ConnectionError("no network")

    monkeypatch.setattr("crosskd_hf.sources.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("crosskd_hf.sources.huggingface_hub.file_exists", refuse)
    with pytest.raises(OSError, match="'owner/name' is no folder here, and the Hub doesn't answer"):
        create_detector("owner/name", NAMES)


def test_what_the_hub_does_not_have_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crosskd_hf.sources.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("crosskd_hf.sources.huggingface_hub.file_exists", lambda *args, **kwargs: False)
    with pytest.raises(FileNotFoundError, match="no such model on the Hub, or it has no config.json"):
        create_detector("owner/name", NAMES)


def test_a_new_detector_needs_classes() -> None:
    with pytest.raises(ValueError, match="needs data, or a list of class names"):
        create_detector("gfl:test_resnet")
    with pytest.raises(ValueError, match="doesn't say which classes there are"):
        create_detector("gfl:test_resnet", "circle")


def test_what_auto_means_is_settled_for_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crosskd_hf.create.weights.are_at_hand", lambda name: name == "resnet18")
    assert chosen_weights(["gfl:resnet18"], "auto") == "timm"
    assert chosen_weights(["gfl:resnet50"], "auto") == "none"
    assert chosen_weights(["gfl:resnet18", "atss:resnet18", "a/folder"], "auto") == "timm"
    assert chosen_weights(["gfl:resnet18", "gfl:resnet50"], "auto") == "auto"
    assert chosen_weights(["gfl:resnet50"], "timm") == "timm"
    assert chosen_weights(["a/folder"], "auto") == "auto"
