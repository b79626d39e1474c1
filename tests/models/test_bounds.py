"""What a configuration file may ask for."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForObjectDetection

from crosskd_hf.experiments.presets import PRESETS
from crosskd_hf.inference.loading import load_detector
from crosskd_hf.models import DETECTORS, FasterRCNNConfig, GFLConfig, GFLForObjectDetection
from crosskd_hf.models.bounds import NET_ARGUMENTS
from crosskd_hf.training.loading import load_student
from tests.tiny_run import make_detector, processor


class Touch:
    """Pickles as a call that leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved detector, and a pickle beside it that makes the folder `mark`."""
    saved = tmp_path / "detector"
    make_detector(1).save_pretrained(saved)
    processor().save_pretrained(saved)
    torch.save({"x": Touch(tmp_path / "mark")}, saved / "evil.pth")
    return saved


def make_gfl(backbone: str) -> GFLForObjectDetection:
    torch.manual_seed(1)
    return GFLForObjectDetection(GFLConfig(backbone=backbone, fpn_channels=8, head_channels=8, norm_groups=4))


def change(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "argument",
    [
        {"checkpoint_path": "evil.pth"},
        {"pretrained": True},
        {"pretrained_cfg": {"file": "evil.pth"}},
        {"pretrained_cfg": "a1_in1k"},
        {"pretrained_cfg_overlay": {"url": "http://169.254.169.254/x"}},
        {"pretrained_model_args": {}},
        {"cache_dir": "/tmp"},
        {"features_only": False},
        {"feature_cfg": {}},
        {"num_classes": 10**9},
        {"in_chans": 10**9},
        {"device": "cuda"},
        {"dtype": "float16"},
        {"scriptable": True},
        {"block_args": {}},
        {"layers": [10**9, 1, 1, 1]},
        {"layers": [1] * 10**5},
        {"layers": [[1]]},
        {"drop_rate": float("nan")},
        {"norm_layer": "os.system"},
        {"norm_layer": {"_target_": "x"}},
        {"window_size": -7},
    ],
    ids=str,
)
def test_arguments_of_timm_that_a_file_may_not_set(folder: Path, argument: dict[str, Any]) -> None:
    (name,) = argument
    os.chdir(folder)
    change(folder, backbone_arguments=argument)
    for load in (load_detector, AutoConfig.from_pretrained, AutoModelForObjectDetection.from_pretrained):
        with pytest.raises(ValueError, match=f"backbone_arguments has '?{name}"):
            load(folder)
    assert not (folder.parent / "mark").exists()


@pytest.mark.parametrize(
    "name",
    [
        "hf-hub:attacker/beacon",
        "hf_hub:attacker/beacon",
        "HF-HUB:attacker/beacon",
        "local-dir:.",
        "https://attacker.example/net",
        "file:///etc/passwd",
        "attacker/beacon",
        "../detector",
        "C:\\net",
        "resnet18\nx",
        "",
    ],
)
def test_names_that_a_file_may_not_give(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("timm was asked"))
    change(folder, backbone=name)
    for load in (load_detector, AutoModelForObjectDetection.from_pretrained, GFLConfig.from_pretrained):
        with pytest.raises(ValueError, match="only timm's own names are read from files"):
            load(folder)
    with pytest.raises(ValueError, match="only timm's own names are read from files"):
        GFLConfig.from_json_file(folder / "config.json")
    with pytest.raises(ValueError, match="only timm's own names are read from files"):
        GFLConfig.from_dict(json.loads((folder / "config.json").read_text()))


def test_an_attribute_map_hides_no_name(folder: Path) -> None:
    change(folder, attribute_map={"backbone": "hidden"}, hidden="hf-hub:attacker/beacon")
    with pytest.raises(ValueError, match="only timm's own names are read from files"):
        AutoModelForObjectDetection.from_pretrained(folder)


def net_folder(path: Path, **content: Any) -> str:
    """A net in timm's format, and its name."""
    path.mkdir()
    net = timm.create_model("test_resnet", num_classes=2)
    torch.save(net.state_dict(), path / "pytorch_model.bin")
    config = {"architecture": "test_resnet", "num_classes": 2, "pretrained_cfg": {"num_classes": 2}}
    (path / "config.json").write_text(json.dumps(config | content))
    return f"local-dir:{path}"


def test_a_net_from_a_folder_in_python_and_the_saved_detector_loads_anywhere(tmp_path: Path) -> None:
    name = net_folder(tmp_path / "net", model_args={"drop_path_rate": 0.1})
    model = make_gfl(name)
    model.backbone.load_weights()
    weights = torch.load(tmp_path / "net/pytorch_model.bin", weights_only=True)
    assert torch.equal(model.backbone.net.state_dict()["conv1.0.weight"], weights["conv1.0.weight"])
    assert model.config.backbone == "test_resnet"
    assert model.config.backbone_arguments == {"drop_path_rate": 0.1}
    model.save_pretrained(tmp_path / "saved")
    assert str(tmp_path) not in (tmp_path / "saved/config.json").read_text()
    again = AutoModelForObjectDetection.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    load_student(model, tmp_path / "saved")


def test_a_net_from_the_hub_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net_folder(tmp_path / "net")
    asked = []

    def download(repository: str, name: str, revision: str | None) -> str:
        asked.append((repository, name, revision))
        return str(tmp_path / "net" / name)

    monkeypatch.setattr(sys.modules["crosskd_hf.models.nets"], "hf_hub_download", download)
    assert make_gfl("hf-hub:me/net@v1").config.backbone == "test_resnet"
    assert asked == [("me/net", "config.json", "v1")]


def test_a_named_net_may_not_bring_other_arguments_either(tmp_path: Path) -> None:
    name = net_folder(tmp_path / "net", model_args={"checkpoint_path": "evil.pth"})
    with pytest.raises(ValueError, match="backbone_arguments has 'checkpoint_path'"):
        make_gfl(name)


def test_a_user_may_override_what_the_file_says(folder: Path, tmp_path: Path) -> None:
    change(folder, backbone="hf-hub:attacker/beacon")
    model = AutoModelForObjectDetection.from_pretrained(folder, backbone=net_folder(tmp_path / "net"))
    assert model.config.backbone == "test_resnet"


ABSURD: list[dict[str, Any]] = [
    {"num_labels": 10**9, "id2label": None, "label2id": None},
    {"num_labels": 0, "id2label": None},
    {"num_labels": "many", "id2label": None},
    {"id2label": {}},
    {"id2label": {"0": "a", "7": "b"}},
    {"id2label": ["a", "b"]},
    {"fpn_channels": 10**9},
    {"fpn_channels": 0},
    {"fpn_channels": -8},
    {"fpn_channels": 8.5},
    {"fpn_channels": "8"},
    {"fpn_channels": True},
    {"fpn_channels": None},
    {"backbone": ["test_resnet"]},
    {"backbone_strides": [], "strides": []},
    {"strides": [8 * 2**level for level in range(100)]},
    {"strides": [8, 16, 32, 64, "x"]},
    {"backbone_strides": [0, 0, 0], "strides": [0] * 5},
    {"out_indices": [10**9] * 3},
    {"frozen_stages": 10**9},
    {"backbone_last_channels": 10**9},
    {"norm_eval": "yes"},
    {"fpn_extra": "elsewhere"},
    {"loss_weights": {"loss_cls": "x"}},
    {"loss_weights": {"loss_cls": float("inf")}},
    {"category_ids": "all"},
    {"category_ids": [1.5, 2, 3, 4]},
    {"head_channels": 10**9},
    {"num_convs": 10**9},
    {"norm_groups": 0},
    {"reg_max": 10**9},
    {"reg_max": float("nan")},
    {"prior_probability": 0},
    {"anchor_scale": 0},
    {"anchor_scale": 1e300},
    {"anchor_scale": float("nan")},
    {"quality_focal_beta": -1},
]


@pytest.mark.parametrize("absurd", ABSURD, ids=lambda absurd: str(absurd)[:60])
def test_an_absurd_value_is_an_error(folder: Path, absurd: dict[str, Any]) -> None:
    name = next(key for key in absurd if key != "label2id")
    change(folder, **absurd)
    with pytest.raises((ValueError, StrictDataclassError), match=name):  # the latter of transformers itself
        AutoModelForObjectDetection.from_pretrained(folder)


@pytest.mark.parametrize(
    "absurd", [{"fc_channels": 10**9}, {"num_fcs": 10**9}, {"roi_size": 10**6}, {"test_proposals": 10**12}], ids=str
)
def test_an_absurd_number_of_faster_rcnn(absurd: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(absurd))}=.* must lie in"):
        FasterRCNNConfig(**absurd)


def test_numbers_that_are_absurd_together_are_refused_before_they_are_allocated(folder: Path) -> None:
    change(folder, head_channels=8192, fpn_channels=8192, num_convs=64)
    with pytest.raises(ValueError, match=r"of 8.\d*e\+10 weights"):
        AutoModelForObjectDetection.from_pretrained(folder)


def test_every_preset_and_every_default_is_allowed() -> None:
    for preset in PRESETS.values():
        arguments = dict(preset.student.fields).get("backbone_arguments") or {}
        assert set(arguments) <= set(NET_ARGUMENTS)
    for config in DETECTORS:
        again = config.from_dict(config(num_labels=80).to_dict())
        assert again.to_dict() == config(num_labels=80).to_dict()
    assert GFLConfig(anchor_scale=8, loss_weights={"loss_cls": 1}).anchor_scale == 8
    assert isinstance(make_detector(1), GFLForObjectDetection)
