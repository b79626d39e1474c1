"""`crosskd-hf convert`: messages, and names of classes."""

import json
from pathlib import Path

import torch

from tests.cli.running import Output, run


def test_messages(tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "a.pth").write_bytes(b"broken")
    assert run("convert", "mmdet", tmp_path / "a.pth", tmp_path / "out") == 1
    assert "a.pth (6 bytes) is truncated or no PyTorch checkpoint" in capsys.readouterr().err
    assert run("convert", "mmdet", tmp_path / "b.pth", tmp_path / "out") == 1
    assert "There is no checkpoint" in capsys.readouterr().err
    assert run("convert", "torchvision", "ssd300_vgg16", tmp_path / "out", "--weights", "COCO_V1") == 1
    assert "'ssd300_vgg16' can't be converted" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_labels_in_a_file(tmp_path: Path, capsys: Output) -> None:
    from torchvision.models import get_model

    model = get_model("fcos_resnet50_fpn", weights=None, weights_backbone=None, num_classes=3)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    (tmp_path / "names.txt").write_text("cat\ndog\n\n")
    words = "convert", "torchvision", "fcos_resnet50_fpn", tmp_path / "out", "--checkpoint", tmp_path / "a.pth"
    assert run(*words, "--labels", tmp_path / "names.txt") == 0
    assert f"written to {tmp_path / 'out'}" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == {"0": "cat", "1": "dog"}
    assert run(*words, "--labels", "cat,dog") == 1
    assert "not empty" in capsys.readouterr().err
    assert run(*words, "--labels", "cat, dog", "--overwrite") == 0
