"""Parameters and multiply-adds of detectors against published ones; the command."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForObjectDetection

from crosskd_hf.cli import main
from crosskd_hf.experiments.cost import _count, measure
from crosskd_hf.models import GFLConfig, GFLForObjectDetection
from crosskd_hf.models.backbone import weights_follow
from crosskd_hf.models.net_variants import DeformableConv

# Localization Distillation, supplement, Table 3: millions of trained parameters, 1e9 multiply-adds at 1280 x 800.
TABLE = {
    "retinanet-r50-ld-baseline": (37.74, 239.32),
    "ld-retinanet-r50-from-r101": (39.07, 267.64),
    "fcos-r50-ld-baseline": (32.02, 200.5),
    "ld-fcos-r50-from-r101": (32.17, 203.6),
    "atss-r50-ld-baseline": (32.07, 205.21),
    "ld-atss-r50-from-r101": (32.22, 208.36),
    "gfl-r50-ld-baseline": (32.22, 208.31),
    "ld-gfl-r50-from-r101": (32.22, 208.31),
}


@pytest.mark.parametrize("name", TABLE)
def test_four_heads_cost_what_was_published(name: str) -> None:
    cost = measure(name)
    millions, operations = TABLE[name]
    assert cost.trained / 1e6 == pytest.approx(millions, abs=0.01)
    assert cost.multiply_adds / 1e9 == pytest.approx(operations, rel=0.01)
    assert cost.parameters > cost.trained  # the frozen stem
    assert cost.speed is None


def test_a_convolution_counts_its_taps() -> None:
    class Net(nn.Module):
        def __init__(self, conv: nn.Module):
            super().__init__()
            self.conv = conv

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.conv(pixel_values)

    pixels = torch.zeros(1, 4, 8, 6)
    plain = nn.Conv2d(4, 10, 3, padding=1, groups=2, bias=False)
    assert _count(Net(plain), pixels) == 8 * 6 * 10 * 2 * 9
    offsets = 8 * 6 * 27 * 4 * 9
    assert _count(Net(DeformableConv(plain)), pixels) == 8 * 6 * 10 * 2 * 9 + offsets


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    config = GFLConfig(
        backbone="test_resnet", fpn_channels=8, head_channels=8, norm_groups=4, num_labels=2, frozen_stages=0
    )
    with weights_follow():
        GFLForObjectDetection(config).save_pretrained(path)
    return path


def test_a_saved_model_beside_a_new_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", str(folder), "gfl:resnet18", "--size", "64", "96", "--device", "cpu"]) == 0
    head, saved, new, where = capsys.readouterr().out.strip().splitlines()
    assert head.split() == ["model", "trained", "M", "all", "M", "G", "multiply-adds", "images/s"]
    count = sum(p.numel() for p in AutoModelForObjectDetection.from_pretrained(folder).parameters())
    assert saved.split()[2] == f"{count / 1e6:.2f}"
    assert new.split()[0] == "gfl:resnet18"
    assert float(saved.split()[4]) > float(new.split()[4]) > 0
    assert where.startswith("96 x 64 px; images one by one on ")


def test_regions_are_counted_on_real_pixels() -> None:
    cost = measure("faster_rcnn:resnet18", (64, 96))
    assert cost.multiply_adds > 0


def test_what_is_no_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", "nowhere/at-all", "--no-speed"]) == 1
    assert "is no model that can be measured" in capsys.readouterr().err
