"""One call: teacher, baseline, distilled student, verdict; and a run's file that makes the same run again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForObjectDetection

import crosskd_hf
from crosskd_hf.cli import main
from crosskd_hf.create import ImageSize
from crosskd_hf.data.dataset import DetectionCollator
from crosskd_hf.experiments.augmentation import AUGMENTATIONS, training_transform
from tests.tiny_run import SIZE, load_data, make_data, make_detector, processor

QUICK = {"max_steps": 2, "use_cpu": True, "save_strategy": "no", "eval_strategy": "no", "disable_tqdm": True}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    make_data(folder)
    return folder


def files(folder: Path) -> list[str]:
    paths = {
        "train_annotations": "annotations/instances_train.json",
        "train_images": "train",
        "val_annotations": "annotations/instances_val.json",
        "val_images": "val",
    }
    return [word for name, path in paths.items() for word in (f"--{name}", str(folder / path))]


def test_a_teacher_is_trained_and_two_students_are_compared(shapes: Path, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("crosskd_hf.experiments.distill._ap_of_teacher", lambda comparison: 0.5)
    result = crosskd_hf.distill(
        load_data(shapes),
        "gfl:test_efficientnet_gn",
        "gfl:test_resnet",
        tmp_path,
        width=16,
        image_size=ImageSize(SIZE, SIZE),
        **QUICK,
    )
    assert list(result.results) == ["teacher", "baseline", "distilled"]
    assert result.verdict.startswith("Undecided")
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["verdict"] == result.verdict
    assert written["images"] == {"train": 7, "val": 5}
    distilled, baseline = (load_file(tmp_path / name / "model.safetensors") for name in ("distilled", "baseline"))
    assert any(not torch.equal(distilled[name], baseline[name]) for name in baseline)
    AutoModelForObjectDetection.from_pretrained(result.students[0])
    assert {"first_batch.png", "examples.png", "curves.png"} <= {path.name for path in tmp_path.glob("*.png")}


def test_a_teacher_that_finds_nothing_stops(shapes: Path, tmp_path: Path) -> None:
    images = processor()
    images.score_threshold = 0.99  # a new detector is never that sure
    for part in (make_detector(1, 12), images):
        part.save_pretrained(tmp_path / "teacher")
    options = {"width": 16, "image_size": ImageSize(SIZE, SIZE)} | QUICK
    with pytest.raises(ValueError, match=r"finds nothing on the validation data \(AP 0\)"):
        crosskd_hf.distill(load_data(shapes), "gfl:test_resnet", str(tmp_path / "teacher"), tmp_path / "run", **options)
    assert not (tmp_path / "run" / "baseline").exists()
    words = ["--student", "gfl:test_resnet", "--width", "16", "--shortest_edge", str(SIZE), "--use_cpu"]
    words += ["--output_dir", str(tmp_path / "train"), "--max_steps", "1", "--teacher", str(tmp_path / "teacher")]
    assert main(["train", *files(shapes), *words]) == 1
    assert not (tmp_path / "train" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_run_again_from_its_file(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--student", "gfl:test_resnet", "--width", "16", "--shortest_edge", str(SIZE), "--use_cpu"]
    assert main(["train", *files(shapes), *words, "--num_train_epochs", "1", "--output_dir", str(tmp_path / "1")]) == 0
    told = capsys.readouterr().out
    assert "7 images, batch 1, 7 updates (1 epochs), lr 0.00071" in told
    assert "epoch 1/1  AP " in told
    assert main(["train", str(tmp_path / "1" / "run.yaml"), "--output_dir", str(tmp_path / "2")]) == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in "12")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert main(["report", str(tmp_path / "2")]) == 0
    made = {path.name for path in (tmp_path / "2").glob("*.png")}
    assert made == {"pr.png", "confusion.png", "labels.png", "examples.png", "worst.png", "curves.png"}
    rows = (tmp_path / "2" / "log.csv").read_text().splitlines()
    assert "eval_map" in rows[0].split(",")
    assert len(rows) > 2


def test_slips_in_options_are_told_with_near_names(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *files(shapes), "--learning_rte", "1"]) == 1
    assert "Unknown option or value '--learning_rte'; did you mean '--learning_rate'" in capsys.readouterr().err
    (tmp_path / "run.yaml").write_text("learning_rte: 1\n")
    assert main(["train", str(tmp_path / "run.yaml")]) == 1
    assert "has an unknown option 'learning_rte'; did you mean 'learning_rate'" in capsys.readouterr().err


def test_augmentations_keep_the_fields_of_objects_together(shapes: Path) -> None:
    data, _ = load_data(shapes)
    collator = DetectionCollator(processor(), training_transform(augment=AUGMENTATIONS))
    for _ in range(3):
        batch = collator([data.dataset[row] for row in range(7)])
        for label in batch["labels"]:
            assert len(label["boxes"]) == len(label["class_labels"]) == len(label["area"])
            assert ((label["boxes"] >= 0) & (label["boxes"] <= 1)).all()
