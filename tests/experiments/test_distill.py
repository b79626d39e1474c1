"""One call: teacher, baseline, distilled student, verdict; and a run's file that makes the same run again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForObjectDetection

import crosskd_hf
from crosskd_hf.cli import main
from crosskd_hf.create import ImageSize
from crosskd_hf.data.collators import DetectionCollator
from crosskd_hf.data.loading import DetectionSplits, load_detection_dataset
from crosskd_hf.data.transforms import TrainTransform
from crosskd_hf.experiments.augmentation import AUGMENTATIONS, training_transform
from crosskd_hf.experiments.comparison import Comparison
from crosskd_hf.experiments.comparison_options import DenseOptions
from crosskd_hf.experiments.distill import _splits
from crosskd_hf.experiments.run_file import commit_of
from crosskd_hf.experiments.train import RunArguments
from crosskd_hf.inference.predict import predict_to_folder
from crosskd_hf.training.config import CrossKDConfig
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


@pytest.fixture(scope="module")
def taught(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random teacher, and shapes whose truth is what it finds: it knows nearly everything."""
    folder = tmp_path_factory.mktemp("taught")
    images = processor()
    images.nms_threshold, images.max_detections = 0.5, 4
    model = make_detector(1, 16)
    for part in (model, images):
        part.save_pretrained(folder / "teacher")
    for split in ("train", "val"):
        shutil.copytree(shapes / split, folder / "data" / split)
        predict_to_folder(model, images, folder / "data" / split, folder / split, 0.0, ["coco"])
        target = folder / "data" / "annotations" / f"instances_{split}.json"
        target.parent.mkdir(exist_ok=True)
        shutil.copy(folder / split / "coco.json", target)
    return folder / "teacher", folder / "data"


def test_data_in_every_form_that_distill_takes(shapes: Path) -> None:
    pair = load_data(shapes)
    loaded = load_detection_dataset(shapes)
    for given in (pair, list(pair), loaded, str(shapes), shapes, [shapes]):
        train, val = _splits(given)
        assert (len(train.dataset), len(val.dataset)) == (7, 5)
    with pytest.raises(KeyError, match="has no split 'val'"):
        _splits(DetectionSplits({"train": loaded.train}))


def test_students_of_two_seeds_and_their_teacher(taught: tuple[Path, Path], tmp_path: Path) -> None:
    teacher, data = taught
    size = ImageSize(SIZE, SIZE)
    result = crosskd_hf.distill(
        [data], "gfl:test_efficientnet_gn", str(teacher), tmp_path, 2, width=16, image_size=size, **QUICK
    )
    assert list(result.results) == ["teacher", "baseline-42", "distilled-42", "baseline-43", "distilled-43"]
    assert result.results["teacher"]["map"] > 0.9
    assert len(result.gains) == 2
    assert "over 2 seeds" in result.verdict
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["verdict"] == result.verdict
    assert written["images"] == {"train": 7, "val": 5}
    weights = {name: load_file(tmp_path / name / "model.safetensors") for name in list(result.results)[1:]}
    for one, other in (("baseline-42", "distilled-42"), ("baseline-42", "baseline-43")):
        assert any(not torch.equal(weights[one][name], weights[other][name]) for name in weights[one])
    AutoModelForObjectDetection.from_pretrained(result.students[1])
    assert {"first_batch.png", "examples.png", "curves.png"} <= {path.name for path in tmp_path.glob("*.png")}


def test_a_new_teacher_is_trained_with_settings_of_its_own(
    taught: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It learns in one update too little to find anything."""
    words = ["--data", str(taught[1]), "--student", "gfl:test_efficientnet_gn", "--teacher", "gfl:test_resnet"]
    words += ["--width", "16", "--longest_edge", str(SIZE), "--use_cpu", "--max_steps", "2", "--eval_strategy", "no"]
    words += ["--output_dir", str(tmp_path / "run")]
    assert main(["distill", *words, "--teacher_settings", "max_steps=1", "learning_rate=1e-9"]) == 1
    assert "The teacher gfl:test_resnet finds nothing" in capsys.readouterr().err
    state = json.loads((tmp_path / "run" / "teacher" / "trainer_state.json").read_text())
    assert state["global_step"] == 1
    kept = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert kept["max_steps"] == 2
    assert {"max_steps=1", "learning_rate=1e-09"} <= set(kept["teacher_settings"])
    assert main(["distill", *words, "--teacher_settings", "max_step=1"]) == 1
    assert "teacher_settings has an unknown option 'max_step'; did you mean 'max_steps'" in capsys.readouterr().err
    assert main(["distill", *words, "--teacher", str(taught[0]), "--teacher_settings", "max_steps=1"]) == 1
    assert "teacher_settings has no effect" in capsys.readouterr().err


def test_the_teacher_is_evaluated_before_a_student_learns(
    taught: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By `CrossKDTrainer` as well: one that finds the truth is told, one that finds nothing stops."""
    teacher, folder = taught
    data = crosskd_hf.load_detection_dataset(folder)
    student, images = make_detector(2, 16), processor()
    data = data.for_model(student.config)
    args = CrossKDConfig(str(tmp_path), teacher_eval=True, report_to="none", **QUICK)
    parts = {"train_dataset": data.train.dataset, "eval_dataset": data.val.dataset, "processing_class": images}
    with caplog.at_level("WARNING"):
        crosskd_hf.CrossKDTrainer(student, args, teacher_model=str(teacher), **parts).train()
    (told,) = [text for text in caplog.messages if "The teacher's AP on the evaluation data is" in text]
    assert float(told.split()[-2]) > 90
    blind, before = AutoModelForObjectDetection.from_pretrained(teacher), load_file(teacher / "model.safetensors")
    torch.nn.init.constant_(blind.head.classifier.bias, -100.0)
    trainer = crosskd_hf.CrossKDTrainer(make_detector(2, 16), args, teacher_model=blind, **parts)
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"finds nothing on the evaluation data \(AP 0\)"):
        trainer.train()
    assert all(torch.equal(weights[name], value) for name, value in trainer.model.state_dict().items())
    assert before.keys() == blind.state_dict().keys()


def test_a_comparison_again_from_its_file(
    taught: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From another folder, as JSON: the same AP, the same weights. Given defaults stay too."""
    teacher, data = taught
    monkeypatch.chdir(data.parent)
    words = ["--data", data.name, "--student", "gfl:test_efficientnet_gn", "--teacher", teacher.name, "--width", "16"]
    words += ["--longest_edge", str(SIZE), "--use_cpu", "--weight_decay", "0", "--num_train_epochs", "1"]
    assert main(["distill", *words, "--output_dir", str(tmp_path / "1")]) == 0
    content = yaml.safe_load((tmp_path / "1" / "run.yaml").read_text())
    assert content["data"] == [str(data)]
    assert content["teacher"] == str(teacher)
    assert content["weight_decay"] == 0
    assert content["backbone_weights"] == "none"  # what "auto" came to
    assert content["learning_rate"] == pytest.approx(7.1e-4)
    assert content["commit"] == commit_of(Path(__file__).parent)
    (tmp_path / "run.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    assert main(["distill", "run.json", "--output_dir", "2"]) == 0
    results = [json.loads((tmp_path / name / "results.json").read_text())["results"] for name in "12"]
    assert results[0] == results[1]
    assert results[0]["teacher"]["map"] > 0.9
    one, two = (load_file(tmp_path / name / "distilled" / "model.safetensors") for name in "12")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert main(["train", "run.json"]) == 1
    assert "run.json is of another command: crosskd-hf distill run.json" in capsys.readouterr().err


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


def test_everything_augments_alike(shapes: Path, tmp_path: Path) -> None:
    """Command line, `distill`, both examples and `CrossKDTrainer`: a flip of every second image, and no more."""
    _, val = load_data(shapes)
    args = CrossKDConfig(str(tmp_path), report_to="none", use_cpu=True)
    trainer = crosskd_hf.CrossKDTrainer(make_detector(1), args, train_dataset=val.dataset, processing_class=processor())
    comparison = Comparison(val, val, processor(), args)
    example, command = DenseOptions(num_synthetic_images=8), RunArguments()
    transforms = [
        trainer._train_transform,
        comparison.transform,
        example.transform,
        training_transform(command.multi_scale, command.image_size, command.augment),
    ]
    assert {(type(one), one.flip, one.shortest_edges, one.random_crop) for one in transforms} == {
        (TrainTransform, 0.5, (), None)
    }


def test_augmentations_keep_the_fields_of_objects_together(shapes: Path) -> None:
    data, _ = load_data(shapes)
    collator = DetectionCollator(processor(), training_transform(augment=AUGMENTATIONS))
    for _ in range(3):
        batch = collator([data.dataset[row] for row in range(7)])
        for label in batch["labels"]:
            assert len(label["boxes"]) == len(label["class_labels"]) == len(label["area"])
            assert ((label["boxes"] >= 0) & (label["boxes"] <= 1)).all()
