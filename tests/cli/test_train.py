"""`crosskd-hf train` on synthetic data."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from crosskd_hf.data.shapes import CLASSES, ShapesPaths
from tests.cli.running import Output, run


def test_train_with_a_teacher(tmp_path: Path, shapes: ShapesPaths, detector: Path, capsys: Output) -> None:
    status = run(
        *("train", "--train_annotations", shapes.train_annotations, "--train_images", shapes.train_images),
        *("--val_annotations", shapes.val_annotations, "--val_images", shapes.val_images),
        *("--student", "gfl:test_resnet", "--width", 32, "--shortest_edge", 64, "--longest_edge", 64),
        *("--teacher", detector, "--output_dir", tmp_path / "out", "--max_steps", 1, "--use_cpu"),
        *("--teacher_eval", False),  # it has learnt nothing
        *("--per_device_train_batch_size", 2, "--save_strategy", "no"),
    )
    assert status == 0
    assert "AP50" in capsys.readouterr().out
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["category_ids"] == list(CLASSES)
    assert json.loads((tmp_path / "out" / "distillation.json").read_text())["distillation"]["methods"].keys() == {
        "crosskd"
    }


def test_train_gives_a_student_a_head_for_the_classes_of_the_data(
    tmp_path: Path, shapes: ShapesPaths, detector: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = json.loads(shapes.train_annotations.read_text())
    content["categories"][0]["name"] = "ring"
    (tmp_path / "train.json").write_text(json.dumps(content))
    files = "--train_annotations", tmp_path / "train.json", "--train_images", shapes.train_images
    options = "--output_dir", tmp_path / "out", "--use_cpu", "--max_steps", 1
    assert run("train", *files, "--student", detector, *options) == 0
    assert "keeps the weights of 3 classes, 'square', 'triangle', 'star'; new are 1 classes, 'ring'" in caplog.text
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(saved["id2label"].values()) == ["ring", "square", "triangle", "star"]


@pytest.mark.slow
def test_train_goes_on_with_a_student_whatever_the_order_of_the_data(
    tmp_path: Path, shapes: ShapesPaths, detector: Path, capsys: Output
) -> None:
    """A json with its classes in another order, and ids of its own: the same training to the bit."""
    content = json.loads(shapes.train_annotations.read_text())
    for category in content["categories"]:
        category["id"] = 100 - category["id"]
    for annotation in content["annotations"]:
        annotation["category_id"] = 100 - annotation["category_id"]
    (tmp_path / "train.json").write_text(json.dumps(content))
    for name, annotations in (("one", shapes.train_annotations), ("two", tmp_path / "train.json")):
        options = "--max_steps", 1, "--use_cpu", "--per_device_train_batch_size", 2, "--save_strategy", "no"
        files = "--train_annotations", annotations, "--train_images", shapes.train_images
        val = "--val_annotations", shapes.val_annotations, "--val_images", shapes.val_images
        assert run("train", *files, *val, "--student", detector, "--output_dir", tmp_path / name, *options) == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two")]
    assert configs[0]["id2label"] == configs[1]["id2label"]
    assert configs[1]["category_ids"] == [100 - raw for raw in configs[0]["category_ids"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Give the training data: --data PATH"),
        (("--data", "a", "--train_images", "b"), "Give --data or --train_images, not both"),
        (("--data_format", "voc"), "--data_format has no effect without --data"),
        (("--drop", "size-mismatch", "--bbox_format", "xyxy"), "--bbox_format, --drop has no effect without --data"),
    ],
)
def test_data_of_a_training_is_said_in_one_way(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: Output
) -> None:
    assert run("train", *words, "--output_dir", tmp_path, "--use_cpu") == 1
    assert message in capsys.readouterr().err


def test_help_of_train_lists_all_options(capsys: Output) -> None:
    assert run("train", "--help") == 0
    text = capsys.readouterr().out
    assert all(
        f"--{name}" in text for name in ("train_annotations", "teacher", "methods", "learning_rate", "ema_decay")
    )
