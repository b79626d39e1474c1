"""What the configuration files of a detector of transformers may ask for."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest
import timm
import torch
import transformers
from transformers import DeformableDetrImageProcessor

from crosskd_hf.experiments.cost import measure
from crosskd_hf.inference.downloads import check_content, check_download
from crosskd_hf.inference.loading import load_detector, load_teacher
from crosskd_hf.inference.processors import check_processor
from crosskd_hf.models import DetectionImageProcessor
from crosskd_hf.models.bounds import MAX_EDGE, check_edges, check_pixels
from tests.distillation import detr_zoo
from tests.tiny_run import make_deformable_detr, make_detector, processor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_deformable_detr(1).save_pretrained(tmp_path)
    DeformableDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        pytest.fail("somebody was contacted")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def change(folder: Path, name: str = "config.json", inside: str | None = None, **changes: Any) -> None:
    content = json.loads((folder / name).read_text())
    (content if inside is None else content[inside]).update(changes)
    (folder / name).write_text(json.dumps(content))


NAMES = ("hf-hub:attacker/beacon", "local-dir:.", "https://attacker.example/x", "attacker/beacon", "../x", "", {"a": 1})


@pytest.mark.parametrize("name", NAMES, ids=str)
@pytest.mark.parametrize("inside", ["backbone_config", None])
def test_names_of_nets(folder: Path, name: str, inside: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("timm was asked"))
    change(folder, inside=inside, backbone=name)
    with pytest.raises(ValueError, match=r"only timm's own names are read from files|config.json: backbone.* lie in"):
        load_detector(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"checkpoint_path": "evil.pth"}, "checkpoint_path in a configuration file would make timm"),
        ({"pretrained_cfg": {"file": "evil.pth"}}, "pretrained_cfg in a configuration file"),
        ({"pretrained_cfg_overlay": {"url": "http://169.254.169.254/x"}}, "pretrained_cfg_overlay in a"),
        ({"cache_dir": "/tmp/x"}, "cache_dir in a configuration file"),
    ],
)
def test_arguments_of_timms_factory(folder: Path, content: dict[str, Any], message: str) -> None:
    for inside in ("backbone_config", None):
        changed = {"backbone_kwargs": content} if inside is None else content
        before = (folder / "config.json").read_text()
        change(folder, inside=inside, **changed)
        with pytest.raises(ValueError, match=message):
            load_detector(folder)
        (folder / "config.json").write_text(before)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["attacker/kernels", "attacker/kernels@main:evil", {"": "attacker/kernels"}])
def test_attention_of_a_repository(folder: Path, key: str, value: Any) -> None:
    change(folder, **{key: value})
    with pytest.raises(ValueError, match="attacker/kernels.* in a configuration file would fetch code"):
        load_detector(folder)


def test_a_flag_that_transformers_ignores_loads_nothing(folder: Path) -> None:
    """The files of `facebook/detr-resnet-50` have it."""
    change(folder, use_pretrained_backbone=True, attn_implementation="sdpa")
    change(folder, inside="backbone_config", use_pretrained_backbone=True)
    assert load_detector(folder)[0].config.num_labels == 4


ABSURD: list[dict[str, Any]] = [
    {"num_labels": 10**9, "id2label": None},
    {"id2label": {str(index): str(index) for index in range(10**5)}},
    {"d_model": 10**9},
    {"num_queries": 10**6},
    {"encoder_layers": 10**5},
    {"decoder_ffn_dim": -(10**9)},
    {"num_feature_levels": 10**4},
    {"encoder_n_points": 10**4},
    {"anchor_image_size": [10**6, 10**6]},
    {"feat_strides": [8] * 10**4},
    {"dropout": float("nan")},
    {"positional_encoding_temperature": float("inf")},
    {"layer_norm_eps": 1e300},
]


@pytest.mark.parametrize("absurd", ABSURD, ids=lambda absurd: str(absurd)[:60])
def test_absurd_values(folder: Path, absurd: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("a net was built"))
    change(folder, **absurd)
    with pytest.raises(ValueError, match=rf"{next(iter(absurd))}.*( must lie in |is the limit)"):
        load_detector(folder)


def test_absurd_values_of_a_backbone(folder: Path) -> None:
    change(folder, inside="backbone_config", num_channels=10**9)
    with pytest.raises(ValueError, match="backbone_config: num_channels=1000000000 must lie in"):
        load_detector(folder)


def test_numbers_that_are_absurd_together_are_not_allocated(folder: Path) -> None:
    change(folder, d_model=8192, encoder_ffn_dim=8192, decoder_ffn_dim=8192, encoder_layers=100)
    with pytest.raises(ValueError, match=r"is that of [\d.]+e\+10 weights"):
        load_detector(folder)


def test_sizes_of_our_own_detectors_and_of_what_is_measured_alone(folder: Path, tmp_path: Path) -> None:
    change(folder, inside="backbone_config", backbone="hf-hub:attacker/beacon")
    with pytest.raises(ValueError, match="only timm's own names are read from files"):
        measure(str(folder))
    make_detector(1).save_pretrained(tmp_path / "own")
    check_download(tmp_path / "own")
    change(tmp_path / "own", head_channels=8192, fpn_channels=8192, num_convs=64)
    for judge in (check_download, measure):
        with pytest.raises(ValueError, match=r"of 8.\d*e\+10 weights"):
            judge(str(tmp_path / "own"))


def test_adapters_are_judged_by_what_they_belong_to(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("peft")
    adapters = tmp_path_factory.mktemp("adapters")
    (adapters / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    check_download(adapters)
    change(folder, inside="backbone_config", backbone="hf-hub:attacker/beacon")
    with pytest.raises(ValueError, match="only timm's own names are read from files"):
        check_download(adapters)


@pytest.mark.parametrize("family", [*(name for name in detr_zoo.MODELS if " " not in name), "yolos"])
def test_published_sizes_are_allowed(family: str) -> None:
    prefix = "Yolos" if family == "yolos" else detr_zoo.MODELS[family][0]
    config = getattr(transformers, f"{prefix}Config")()
    config.id2label = {index: str(index) for index in range(1000)}
    config.category_ids = [10**9 + index for index in range(1000)]
    check_content(config.to_dict())


# ---- Image processors ----


@pytest.mark.parametrize(
    "absurd",
    [
        {"size": {"height": 10**6, "width": 64}},
        {"size": {"shortest_edge": 64, "longest_edge": 10**9}},
        {"size": {"height": 64, "width": 0}},
        {"pad_size": {"height": 10**6, "width": 10**6}},
    ],
    ids=str,
)
def test_absurd_images(folder: Path, absurd: dict[str, Any]) -> None:
    change(folder, "preprocessor_config.json", **absurd)
    with pytest.raises(ValueError, match=r"\[.*\]=\d+ must lie in \[1, 8192\] px"):
        load_detector(folder)


def test_absurd_images_of_our_own_processor(tmp_path: Path) -> None:
    make_detector(1).save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    load_detector(tmp_path)
    for absurd in ({"size_divisor": 10**9}, {"size": {"shortest_edge": 10**6, "longest_edge": 10**6}}):
        change(tmp_path, "preprocessor_config.json", **absurd)
        with pytest.raises(ValueError, match=r"size.* must lie in \[1, 8192\] px"):
            load_detector(tmp_path)
        with pytest.raises(ValueError, match=r"size.* must lie in \[1, 8192\] px"):
            DetectionImageProcessor.from_pretrained(tmp_path)


def test_a_faulty_image_processor_is_not_a_missing_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_detector(1).save_pretrained(tmp_path)
    assert load_teacher(tmp_path)[1] is None
    assert "No image processor lies beside the teacher" in caplog.text
    processor().save_pretrained(tmp_path)
    change(tmp_path, "preprocessor_config.json", nms_threshold=5)
    with pytest.raises(ValueError, match="nms_threshold is 5"):
        load_teacher(tmp_path)


PIXELS: dict[str, dict[str, Any]] = {
    "a deviation of 0": {"image_std": [0, 1, 1]},
    "a negative deviation": {"image_std": [-1, 1, 1]},
    "no number": {"image_std": [math.nan] * 3},
    "two channels": {"image_mean": [0.5, 0.5]},
    "words": {"image_mean": "half"},
    "an absurd mean": {"image_mean": [1e30] * 3},
    "a scale of 0": {"rescale_factor": 0},
    "a scale in words": {"rescale_factor": "1/255"},
    "a scale that is no number": {"rescale_factor": math.nan},
    "no, in words": {"do_normalize": "no"},
    "an unknown filter": {"resample": 99},
    "half a pixel": {"size": {"height": 64.5, "width": 64}},
}


@pytest.mark.parametrize("name", PIXELS)
def test_pixels_that_no_model_reads(folder: Path, tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    """Some were errors of torch; with others nothing was found, or "no" was taken for yes, without a word."""
    own = tmp_path_factory.mktemp("own")
    make_detector(1).save_pretrained(own)
    processor().save_pretrained(own)
    for place in (folder, own):
        change(place, "preprocessor_config.json", **PIXELS[name])
        with pytest.raises(ValueError, match=rf"{next(iter(PIXELS[name]))}.*must (lie in|be true)"):
            load_detector(place)


def test_pixels_of_a_processor_that_was_made_in_python() -> None:
    detr = transformers.DeformableDetrImageProcessor(image_std=[0.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="image_std=.* of the image processor must lie in"):
        check_processor(make_deformable_detr(1), detr)
    with pytest.raises(ValueError, match="image_std=.* of the image processor must lie in"):
        DetectionImageProcessor(image_std=[0.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="score_threshold is x; give a number"):
        DetectionImageProcessor(score_threshold="x")


BROKEN = {
    "a list": b"[]",
    "nothing": b"null",
    "deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a number of 5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "another encoding": "{}".encode("utf-16"),
    "noise": bytes(range(128, 192)),
    "empty": b"",
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_files_of_settings_that_hold_something_else(folder: Path, file: str, name: str) -> None:
    (folder / file).write_bytes(BROKEN[name])
    with pytest.raises((OSError, ValueError), match=r"can't be read|is not a valid JSON") as raised:
        load_detector(folder)
    assert type(raised.value) in (OSError, ValueError)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model_type": ["crosskd_gfl"]}, "model_type=.* in a configuration file must be text"),
        ({"dtype": "float99"}, "dtype='float99' in a configuration file must be one of auto, float16, bfloat16"),
        ({"dtype": "int8"}, "dtype='int8' in a configuration file"),
        ({"attn_implementation": "attacker/kernels"}, "attacker/kernels.* in a configuration file would fetch code"),
    ],
)
def test_kinds_that_no_detector_is_of(tmp_path: Path, content: dict[str, Any], words: str) -> None:
    """Of our own detectors, also where transformers loads them by itself."""
    make_detector(1).save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    change(tmp_path, "config.json", **content)
    with pytest.raises(ValueError, match=words):
        load_detector(tmp_path)
    if "model_type" not in content:
        with pytest.raises(ValueError, match=words):
            transformers.AutoModelForObjectDetection.from_pretrained(tmp_path)


def test_weights_that_a_configuration_leaves_out(tmp_path: Path) -> None:
    """The detector of a changed `config.json` was another one than was trained, without a word."""
    make_detector(1).save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    change(tmp_path, "config.json", num_convs=2)
    with pytest.raises(ValueError, match=r"has \d+ weights that its config.json builds no layer for, such as \['head"):
        load_detector(tmp_path)


def test_usual_images_are_allowed() -> None:
    for kind in ("Detr", "DeformableDetr", "RTDetr", "Yolos"):
        check_edges(getattr(transformers, f"{kind}ImageProcessor")().to_dict())
        check_pixels(getattr(transformers, f"{kind}ImageProcessor")().to_dict())
    check_edges(DetectionImageProcessor(size={"height": MAX_EDGE, "width": MAX_EDGE}).to_dict())
    assert torch.get_default_device() == torch.device("cpu")
