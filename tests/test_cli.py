"""The command line: one small model from data over training and evaluation to pictures; messages and exit statuses."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForObjectDetection

from crosskd_hf.cli import main
from crosskd_hf.convert.class_names import COCO_NAMES
from crosskd_hf.create import DetectorSpec, build_detector
from crosskd_hf.data.categories import CategoryMap, match_categories
from crosskd_hf.data.shapes import CLASSES, ShapesPaths, make_shapes
from crosskd_hf.inference.coco_evaluator import CocoEvaluator
from crosskd_hf.inference.evaluation import table
from crosskd_hf.inference.predict import predict
from crosskd_hf.models import DetectionImageProcessor, GFLConfig

Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> ShapesPaths:
    return make_shapes(tmp_path_factory.mktemp("shapes"), num_train=4, num_val=3, size=64)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved, untrained model of the classes of the synthetic data."""
    categories = CategoryMap(tuple(CLASSES), tuple(CLASSES.values()))
    torch.manual_seed(0)
    model = build_detector(DetectorSpec("gfl", "test_resnet", width=32), categories)
    torch.nn.init.zeros_(model.head.classifier.bias)  # so that something is found
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    DetectionImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}).save_pretrained(folder)
    return folder


def run(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.mark.parametrize("command", ["methods", "env"])  # more and less than a buffer
def test_a_reader_that_has_seen_enough_gets_no_error(command: str) -> None:
    words = [sys.executable, "-m", "crosskd_hf", command]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()  # as head does
        assert process.stderr.read() == ""
    assert process.returncode == 1


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


def test_evaluate(tmp_path: Path, shapes: ShapesPaths, detector: Path, capsys: Output) -> None:
    words = "evaluate", detector, shapes.val_annotations, shapes.val_images, "--json", tmp_path / "ap.json"
    assert run(*words) == 0
    assert 0 <= json.loads((tmp_path / "ap.json").read_text())["map"] <= 1
    assert capsys.readouterr().out.split()[:3] == ["AP", "AP50", "AP75"]


def test_evaluate_as_many_detections_as_asked_for(
    shapes: ShapesPaths, detector: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    """So many of an image reach AP, and no more."""
    most, merge = [], CocoEvaluator.merge
    monkeypatch.setattr(
        CocoEvaluator, "merge", lambda self, rows: merge(self, most.append(max(map(len, rows.values()))) or rows)
    )
    words = "evaluate", detector, shapes.val_annotations, shapes.val_images
    assert run(*words, "--max-detections", 2) == 0
    assert max(most) == 2
    assert run(*words, "--max-detections", 0) == 1
    assert "max_detections=0: give a positive number" in capsys.readouterr().err


@pytest.mark.parametrize("spelling", [str.upper, lambda name: f" {name} ", lambda name: name])
def test_evaluate_finds_classes_by_name(
    tmp_path: Path, shapes: ShapesPaths, detector: Path, spelling: Callable[[str], str]
) -> None:
    """Other ids, another order, another spelling, and a class that nothing uses: the same AP."""
    content = json.loads(shapes.val_annotations.read_text())
    for category in content["categories"]:
        category["id"], category["name"] = 100 - category["id"], spelling(category["name"])
    for annotation in content["annotations"]:
        annotation["category_id"] = 100 - annotation["category_id"]
    content["categories"].append({"id": 5, "name": "zebra", "supercategory": "none"})
    (tmp_path / "val.json").write_text(json.dumps(content))
    metrics = []
    for number, annotations in enumerate((shapes.val_annotations, tmp_path / "val.json")):
        path = tmp_path / f"{number}.json"
        assert run("evaluate", detector, annotations, shapes.val_images, "--json", path) == 0
        metrics.append(json.loads(path.read_text()))
    assert metrics[0] == pytest.approx(metrics[1], nan_ok=True)


def test_predict(tmp_path: Path, shapes: ShapesPaths, detector: Path, capsys: Output) -> None:
    photos = tmp_path / "photos" / "deep"
    photos.mkdir(parents=True)
    first = next(shapes.val_images.glob("*.png"))
    (photos / "a.png").write_bytes(first.read_bytes())
    (photos.parent / "b.jpg").write_bytes(b"no image")
    assert run("predict", detector, photos.parent, "--out", tmp_path / "out", "--threshold", 0, "--device", "cpu") == 1
    captured = capsys.readouterr()
    assert "error: b.jpg" in captured.err
    assert "in 1 images" in captured.out
    records = {record["file"]: record for record in json.loads((tmp_path / "out" / "predictions.json").read_text())}
    record = records[os.path.join("deep", "a.png")]
    assert record["detections"]
    assert {found["label"] for found in record["detections"]} <= set(CLASSES.values())
    x1, y1, x2, y2 = record["detections"][0]["box"]
    assert 0 <= x1 < x2 <= record["width"]
    assert 0 <= y1 < y2 <= record["height"]
    with PIL.Image.open(tmp_path / "out" / "deep" / "a.png.png") as picture, PIL.Image.open(first) as image:
        assert picture.width * image.height == picture.height * image.width  # small ones are drawn larger
    assert run("predict", detector, first, "--out", tmp_path / "one", "--device", "cpu") == 0
    assert (tmp_path / "one" / f"{first.name}.png").is_file()


def test_predict_tells_the_highest_score_where_nothing_is_above_the_threshold(
    tmp_path: Path, shapes: ShapesPaths, detector: Path, capsys: Output
) -> None:
    photo = next(shapes.val_images.glob("*.png"))
    assert run("predict", detector, photo, "--out", tmp_path / "found", "--threshold", 0.999) == 0
    (record,) = json.loads((tmp_path / "found" / "predictions.json").read_text())
    assert record["detections"] == []
    expected = f"nothing above 0.999, the highest score was {record['highest_score']:.2f}"
    assert expected in capsys.readouterr().out


def test_predict_draws_names_of_any_script(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_detector(DetectorSpec("gfl", "test_resnet", width=32), CategoryMap((1, 2), ("猫", "собака")))
    torch.nn.init.zeros_(model.head.classifier.bias)
    model.save_pretrained(tmp_path / "model")
    DetectionImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "model")
    (tmp_path / "in" / "図").mkdir(parents=True)
    for name in ("ä ö.png", "図/图.png"):
        PIL.Image.new("RGB", (64, 48)).save(tmp_path / "in" / name)
    options = ("--out", tmp_path / "out", "--threshold", 0, "--device", "cpu")
    assert run("predict", tmp_path / "model", tmp_path / "in", *options) == 0
    assert all((tmp_path / "out" / f"{name}.png").is_file() for name in ("ä ö.png", "図/图.png"))
    records = json.loads((tmp_path / "out" / "predictions.json").read_text(encoding="utf-8"))
    assert {found["label"] for record in records for found in record["detections"]} == {"猫", "собака"}


def test_an_image_that_resizing_makes_vanish_stops_no_prediction(
    tmp_path: Path, detector: Path, shapes: ShapesPaths, capsys: Output
) -> None:
    (tmp_path / "photos").mkdir()
    PIL.Image.new("RGB", (5000, 1)).save(tmp_path / "photos/a.png")
    (tmp_path / "photos/b.png").write_bytes(next(shapes.val_images.glob("*.png")).read_bytes())
    assert run("predict", detector, tmp_path / "photos", "--out", tmp_path / "out", "--device", "cpu") == 0
    assert "in 2 images" in capsys.readouterr().out


def test_predict_skips_what_is_no_image_and_says_so(
    tmp_path: Path, shapes: ShapesPaths, detector: Path, capsys: Output
) -> None:
    photos, image = tmp_path / "photos", next(shapes.val_images.glob("*.png")).read_bytes()
    for name in (
        "a.PNG",
        "no_ending",
        ".hidden.png",
        "._a.png",
        ".cache/a.png",
        "__MACOSX/a.png",
        "a.psd",
        "notes.txt",
    ):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(image if name.lower().endswith(("png", "no_ending")) else b"other")
    (photos / "list").write_text("no image")
    (photos / "folder.png").mkdir()
    for _ in range(2):  # the second time its own pictures lie there
        assert run("predict", detector, photos, "--out", photos / "found", "--device", "cpu") == 0
        assert "in 2 images" in (told := capsys.readouterr().out)
        assert "4 hidden and 3 other files skipped" in told
    records = json.loads((photos / "found" / "predictions.json").read_text())
    assert [record["file"] for record in records] == ["a.PNG", "no_ending"]


def test_16_bit_images_are_seen_as_in_training(tmp_path: Path, detector: Path) -> None:
    values = np.random.default_rng(0).integers(28000, 31000, (64, 64)).astype(np.uint16)
    PIL.Image.fromarray(values).save(tmp_path / "a.png")
    copy = tmp_path / "copy"
    shutil.copytree(detector, copy)
    DetectionImageProcessor.from_pretrained(detector, pixel_range=(28000, 31000)).save_pretrained(copy)
    PIL.Image.fromarray(((values - 28000.0) * 256 / 3001).astype(np.uint8)).save(tmp_path / "b.png")
    found = []
    for number, (model, image) in enumerate(((copy, "a.png"), (detector, "b.png"), (detector, "a.png"))):
        out = tmp_path / str(number)
        assert run("predict", model, tmp_path / image, "--out", out, "--threshold", 0, "--device", "cpu") == 0
        (record,) = json.loads((out / "predictions.json").read_text())
        found.append([detection["score"] for detection in record["detections"]])
    assert found[0] == found[1]
    assert found[0] != found[2]


@pytest.mark.parametrize("name", ["\x1b[31mred", "two\nlines", "\u202egnp.exe", "<b>bold</b>"])
def test_names_of_others_stay_text(
    tmp_path: Path, shapes: ShapesPaths, detector: Path, capsys: Output, name: str
) -> None:
    """In the table of classes, the report on a pair, the findings of a data set and the errors of files."""
    model = AutoModelForObjectDetection.from_pretrained(detector)
    model.config.id2label = {**model.config.id2label, 0: name}
    content = json.loads(shapes.val_annotations.read_text())
    content["categories"][0]["name"] = name
    (tmp_path / "val.json").write_text(json.dumps(content))
    shutil.copytree(detector, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / f"{name}.png".replace("/", "")).write_bytes(b"no image")
    assert run("evaluate", tmp_path / "model", tmp_path / "val.json", shapes.val_images) == 0
    run("check-pair", tmp_path / "model", detector)
    run("check-data", tmp_path / "val.json", shapes.val_images, "--all")
    assert run("evaluate", detector, tmp_path / "val.json", shapes.val_images) == 1
    run("predict", tmp_path / "model", tmp_path / "photos", "--out", tmp_path / "out", "--device", "cpu")
    captured = capsys.readouterr()
    printed = captured.out + captured.err.replace("\r", "\n")  # progress bars
    assert not [line for line in printed.splitlines() if line.startswith("lines")]
    assert not {"\x1b", "\u202e"} & set(printed)
    assert (name if name.isprintable() else name.encode("unicode_escape").decode()) in captured.out


def test_a_terminal_of_ascii(tmp_path: Path, detector: Path, shapes: ShapesPaths) -> None:
    content = json.loads(shapes.val_annotations.read_text())
    content["images"][0]["file_name"] = "Käse 猫.png"
    (tmp_path / "val.json").write_text(json.dumps(content))
    words = [sys.executable, "-m", "crosskd_hf.cli", "check-data", tmp_path / "val.json", shapes.val_images]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    done = subprocess.run(words, capture_output=True, env=environment, timeout=100)
    assert done.returncode == 1
    assert b"K\\xe4se \\u732b.png" in done.stdout


def test_metrics_are_strict_json(tmp_path: Path, detector: Path, shapes: ShapesPaths) -> None:
    """A class without truth has no AP: null, not NaN, which is no JSON."""
    content = json.loads(shapes.val_annotations.read_text())
    content["annotations"] = [entry for entry in content["annotations"] if entry["category_id"] != 3]
    (tmp_path / "val.json").write_text(json.dumps(content))
    assert run("evaluate", detector, tmp_path / "val.json", shapes.val_images, "--json", tmp_path / "out.json") == 0

    def refuse(token: str) -> None:
        raise AssertionError(token)

    metrics = json.loads((tmp_path / "out.json").read_text(), parse_constant=refuse)
    assert metrics["map_square"] is None
    assert isinstance(metrics["map"], float)


def test_predict_without_images(tmp_path: Path, detector: Path, capsys: Output) -> None:
    assert run("predict", detector, tmp_path, "--out", tmp_path / "out") == 1
    told = capsys.readouterr().err
    assert f"error: {tmp_path} is no image and no folder with images. Opened are " in told
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_text("no image")
    assert run("predict", detector, tmp_path, "--out", tmp_path / "out") == 1
    assert "with images (1 hidden and 1 other files skipped)" in capsys.readouterr().err
    assert run("predict", detector, tmp_path, "--threshold", 2) == 1
    with pytest.raises(FileNotFoundError):
        list(predict(None, None, tmp_path / "nowhere"))


def test_check_data(tmp_path: Path, shapes: ShapesPaths, capsys: Output) -> None:
    assert run("check-data", shapes.val_annotations, shapes.val_images, "--train", shapes.train_annotations) == 0
    assert capsys.readouterr().out.startswith("3 images")
    content = json.loads(shapes.val_annotations.read_text())
    content["annotations"][0]["category_id"] = 99
    (tmp_path / "bad.json").write_text(json.dumps(content))
    assert run("check-data", tmp_path / "bad.json", shapes.val_images) == 1
    assert "error: unknown-category" in capsys.readouterr().out


@pytest.fixture(scope="module")
def folder_of_data(shapes: ShapesPaths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shapes as a folder without splits, one json for all."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(shapes.train_images, folder / "pictures")
    (folder / "all.json").write_bytes(shapes.train_annotations.read_bytes())
    return folder


def test_check_data_of_a_folder(tmp_path: Path, folder_of_data: Path, capsys: Output) -> None:
    assert run("check-data", folder_of_data) == run("check-data", "--data", folder_of_data) == 0
    text = capsys.readouterr().out
    assert "(coco)" in text
    assert "images were drawn for one (val_fraction=0.2, seed=0)" in text
    assert run("check-data", folder_of_data / "picturse") == 1
    assert "Did you mean" in capsys.readouterr().err
    assert run("check-data", tmp_path) == 1
    assert "the folder is empty" in capsys.readouterr().out
    for words in ((), (folder_of_data, "--data", tmp_path), (folder_of_data, "--train", tmp_path)):
        assert run("check-data", *words) == 1
    errors = capsys.readouterr().err
    assert all(text in errors for text in ("Give a data set", "not both", "--train has no effect"))


def test_train_evaluate_and_convert_a_folder(
    tmp_path: Path, folder_of_data: Path, detector: Path, capsys: Output
) -> None:
    options = "--max_steps", 1, "--use_cpu", "--per_device_train_batch_size", 2, "--save_strategy", "no"
    assert (
        run("train", "--data", folder_of_data, "--student", detector, "--output_dir", tmp_path / "out", *options) == 0
    )
    assert "AP50" in capsys.readouterr().out
    assert run("convert-data", folder_of_data, tmp_path / "coco", "--val-fraction", 0.4) == 0
    assert "instances_val.json" in capsys.readouterr().out
    printed = []
    for source in ((folder_of_data, "--val-fraction", 0.4), (tmp_path / "coco",)):
        assert run("evaluate", detector, *source) == 0
        printed.append(capsys.readouterr().out.split("AP50")[1])
    assert printed[0] == printed[1]
    assert run("convert-data", folder_of_data, tmp_path / "coco") == 1
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Give the training data: --data PATH"),
        (("--data", "a", "--train_images", "b"), "Give --data or --train_images, not both"),
        (("--data_format", "voc"), "--data_format has no effect without --data"),
    ],
)
def test_data_of_a_training_is_said_in_one_way(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: Output
) -> None:
    assert run("train", *words, "--output_dir", tmp_path, "--use_cpu") == 1
    assert message in capsys.readouterr().err


def test_check_pair(tmp_path: Path, detector: Path, folder_of_data: Path, capsys: Output) -> None:
    assert run("check-pair", detector, detector) == 0
    assert capsys.readouterr().out.startswith("ok: GFL")
    categories = CategoryMap((1,), ("zeppelin",))
    build_detector(DetectorSpec("gfl", "test_resnet", width=32), categories).save_pretrained(tmp_path)
    DetectionImageProcessor().save_pretrained(tmp_path)
    assert run("check-pair", detector, tmp_path) == 1
    assert "share no class name" in capsys.readouterr().out
    assert run("check-pair", "gfl:test_efficientnet_gn", detector, "--data", folder_of_data, "--number", 2) == 0
    assert "on 1 images" in capsys.readouterr().out
    assert run("check-pair", "gfl:test_efficientnet_gn", detector) == 0
    both = "--data", folder_of_data, "--annotations", tmp_path, "--images", tmp_path
    assert run("check-pair", detector, detector, *both) == 1
    assert "Give --data or --annotations, not both" in capsys.readouterr().err
    assert run("check-pair", detector, detector, "--images", tmp_path) == 1
    assert "both of --annotations and --images" in capsys.readouterr().err


class TestConvert:
    def test_messages(self, tmp_path: Path, capsys: Output) -> None:
        (tmp_path / "a.pth").write_bytes(b"broken")
        assert run("convert", "mmdet", tmp_path / "a.pth", tmp_path / "out") == 1
        assert "a.pth (6 bytes) is truncated or no PyTorch checkpoint" in capsys.readouterr().err
        assert run("convert", "mmdet", tmp_path / "b.pth", tmp_path / "out") == 1
        assert "There is no checkpoint" in capsys.readouterr().err
        assert run("convert", "torchvision", "ssd300_vgg16", tmp_path / "out", "--weights", "COCO_V1") == 1
        assert "'ssd300_vgg16' can't be converted" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_labels_in_a_file(self, tmp_path: Path, capsys: Output) -> None:
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


class TestMessages:
    def test_env(self, capsys: Output) -> None:
        assert run("env") == 0
        assert {"python", "torch", "crosskd_hf", "cuda"} <= {
            line.split()[0] for line in capsys.readouterr().out.splitlines()
        }

    @pytest.mark.parametrize(
        ("words", "hint"),
        [
            (["check-data", "photos", "--format", "voc"], "did you mean '--data-format'"),
            (["evaluate", "model", "photos", "--most-detections=300"], "did you mean '--max-detections'"),
            (["predict", "model", "photos", "--treshold", "0.3"], "did you mean '--threshold'"),
        ],
    )
    def test_near_names_of_options(self, words: list[str], hint: str, capsys: Output) -> None:
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
        assert hint in capsys.readouterr().err

    @pytest.mark.parametrize("words", [[], ["fly"], ["env", "--bogus"], ["convert"], ["predict", "a"]])
    def test_wrong_usage(self, words: list[str], capsys: Output) -> None:
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
        assert "usage: crosskd-hf" in capsys.readouterr().err

    @pytest.mark.parametrize("words", [["--help"], ["convert", "mmdet", "-h"], ["check-pair", "-h"], ["predict", "-h"]])
    def test_help(self, words: list[str], capsys: Output) -> None:
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 0
        assert "usage: crosskd-hf" in capsys.readouterr().out

    def test_help_of_train_lists_all_options(self, capsys: Output) -> None:
        assert run("train", "--help") == 0
        text = capsys.readouterr().out
        assert all(
            f"--{name}" in text for name in ("train_annotations", "teacher", "methods", "learning_rate", "ema_decay")
        )

    def test_debug_shows_the_traceback(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(FileNotFoundError):
            run("convert", "mmdet", tmp_path / "a.pth", tmp_path, "--debug")
        monkeypatch.setenv("CROSSKD_DEBUG", "1")
        with pytest.raises(FileNotFoundError):
            run("convert", "mmdet", tmp_path / "a.pth", tmp_path)

    def test_an_error_of_the_program_says_so(self, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
        monkeypatch.setattr("crosskd_hf.data.inspection.check_data", lambda *_: 1 / 0)
        assert run("check-data", "a", "b") == 1
        assert capsys.readouterr().err == (
            "error: ZeroDivisionError: division by zero (run again with --debug to see where)\n"
        )

    def test_interrupted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("crosskd_hf.data.inspection.check_data", interrupt)
        assert run("check-data", "a", "b") == 130

    def test_as_a_program(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "crosskd_hf.cli", "convert", "mmdet", "nowhere.pth", "out"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert done.stderr.endswith("error: There is no checkpoint nowhere.pth.\n")
        assert "Traceback" not in done.stderr


class TestMatchCategories:
    def test_by_name_in_the_models_order(self) -> None:
        config = GFLConfig(id2label=dict(enumerate(COCO_NAMES)))
        matched = match_categories(config, CategoryMap((5, 9), ("Dog ", "cat")))
        assert matched.names == COCO_NAMES
        assert matched.to_raw(COCO_NAMES.index("dog")) == 5
        assert matched.to_raw(COCO_NAMES.index("cat")) == 9
        assert len(set(matched.raw_ids)) == 80

    def test_unknown_class(self) -> None:
        with pytest.raises(ValueError, match=r"classes that the model doesn't know: \['zeppelin'\]"):
            match_categories(GFLConfig(id2label={0: "cat"}), CategoryMap((1, 2), ("cat", "zeppelin")))

    def test_a_class_that_nothing_uses_may_be_unknown(self) -> None:
        config = GFLConfig(id2label={0: "cat", 1: "dog"})
        listed = CategoryMap((1, 2, 7), ("cat", "zeppelin", "DOG"))
        assert match_categories(config, listed, used={1}) == CategoryMap((1, 7), ("cat", "dog"))

    def test_names_of_several_classes(self) -> None:
        config = GFLConfig(id2label={0: "Helmet", 1: "helmet"})
        exact = match_categories(config, CategoryMap((1, 2), ("helmet", "Helmet")))
        assert exact == CategoryMap((2, 1), ("Helmet", "helmet"))
        with pytest.raises(ValueError, match=r"may be several of the model's: {'HELMET': \['Helmet', 'helmet'\]}"):
            match_categories(config, CategoryMap((1,), ("HELMET",)))

    def test_of_a_checkpoint_of_coco_with_91_outputs(self) -> None:
        config = GFLConfig(id2label={0: "N/A", 1: "person", 2: "N/A", 3: "car"})
        assert match_categories(config, CategoryMap((3, 9), ("car", "person"))).raw_ids == (10, 9, 12, 3)

    def test_table(self) -> None:
        metrics = dict.fromkeys(("map", "map_50", "map_75", "map_small", "map_medium", "map_large"), 0.25)
        lines = table({**metrics, "map_cat": 0.5, "map_dog": float("nan")}).splitlines()
        assert lines[1].split() == ["25.0"] * 6
        assert lines[-1].split() == ["50.0", "cat"]
