"""`crosskd-hf evaluate` and `predict`; `cost` is in tests/experiments/test_cost.py."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from crosskd_hf.create import DetectorSpec, build_detector
from crosskd_hf.data.categories import CategoryMap
from crosskd_hf.data.shapes import CLASSES, ShapesPaths
from crosskd_hf.inference.coco_evaluator import CocoEvaluator
from crosskd_hf.inference.predict import predict
from crosskd_hf.models import DetectionImageProcessor
from tests.cli.running import Output, run


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


def test_where_metrics_go_is_looked_at_before_anything_is_evaluated(
    tmp_path: Path, detector: Path, shapes: ShapesPaths, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    words = "evaluate", detector, shapes.val_annotations, shapes.val_images, "--json"
    assert run(*words, tmp_path / "new" / "folder" / "ap.json") == 0
    assert json.loads((tmp_path / "new" / "folder" / "ap.json").read_text())["map"] >= 0
    monkeypatch.setattr("crosskd_hf.inference.evaluation.detect_dataset", lambda *_, **__: pytest.fail("too late"))
    assert run(*words, tmp_path) == 1
    assert "Is a directory" in capsys.readouterr().err


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
