"""`crosskd-hf check-data` and `convert-data`, and a data set on its way through training and evaluation."""

import json
from pathlib import Path

import datasets
from PIL import Image

from crosskd_hf.data.shapes import ShapesPaths
from tests.cli.running import Output, run


def test_check_data(tmp_path: Path, shapes: ShapesPaths, capsys: Output) -> None:
    assert run("check-data", shapes.val_annotations, shapes.val_images, "--train", shapes.train_annotations) == 0
    assert capsys.readouterr().out.startswith("3 images")
    content = json.loads(shapes.val_annotations.read_text())
    content["annotations"][0]["category_id"] = 99
    (tmp_path / "bad.json").write_text(json.dumps(content))
    assert run("check-data", tmp_path / "bad.json", shapes.val_images) == 1
    assert "error: unknown-category" in capsys.readouterr().out


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


def test_boxes_and_faulty_rows_of_data_sets_on_the_command_line(tmp_path: Path, capsys: Output) -> None:
    """What only Python could read: corners, and rows whose width is wrong."""
    corners = [[5.0 + n, 4.0, 30.0 + n, 30.0] for n in range(30)]
    rows = {
        "image": [Image.new("RGB", (80, 60))] * 30,
        "width": [80] * 29 + [90],
        "height": [60] * 30,
        "objects": [{"bbox": [box], "category": ["cat"]} for box in corners],
    }
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "saved"))
    assert run("check-data", tmp_path / "saved") == 1
    told = capsys.readouterr().out
    assert "--bbox_format xyxy" in told
    assert "--drop size-mismatch" in told
    words = "--bbox_format", "pascal_voc", "--drop", "size-mismatch"
    assert run("check-data", tmp_path / "saved", *words) == 0
    assert run("convert-data", tmp_path / "saved", tmp_path / "coco", *words) == 0
    contents = [json.loads(path.read_text()) for path in (tmp_path / "coco" / "annotations").glob("*.json")]
    assert {entry["bbox"][2] for content in contents for entry in content["annotations"]} == {25}
    assert sum(len(content["images"]) for content in contents) == 29
    assert run("check-data", tmp_path / "saved", "--bbox_format", "yolo") == 1
    assert run("check-data", tmp_path / "a.json", tmp_path, "--bbox_format", "xyxy") == 1
    assert "have no effect beside a COCO json" in capsys.readouterr().err


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
