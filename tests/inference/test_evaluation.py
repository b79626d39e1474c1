"""COCO AP of files and of a split, which take the same options, and its table."""

import inspect
from pathlib import Path

import pytest
import torch

from crosskd_hf.data.loading import load_detection_dataset
from crosskd_hf.inference.evaluation import evaluate, evaluate_data, table
from tests.tiny_run import make_data, make_detector, processor


def test_files_and_splits_are_evaluated_alike(tmp_path: Path) -> None:
    make_data(tmp_path)
    model = make_detector(0)
    torch.nn.init.zeros_(model.head.classifier.bias)  # so that something is found
    val = load_detection_dataset(tmp_path)["val"]
    of_split = evaluate_data(model, processor(), val, batch_size=3, max_detections=50)
    files = tmp_path / "annotations/instances_val.json", tmp_path / "val"
    assert evaluate(model, processor(), *files, batch_size=3, max_detections=50) == pytest.approx(of_split, nan_ok=True)
    assert of_split["map"] >= 0
    with pytest.raises(ValueError, match="max_detections=0: give a positive number"):
        evaluate(model, processor(), *files, max_detections=0)


def test_both_take_the_same_options_by_name() -> None:
    options = [
        {name: each for name, each in inspect.signature(function).parameters.items() if each.kind is each.KEYWORD_ONLY}
        for function in (evaluate, evaluate_data)
    ]
    assert options[0] == options[1]
    assert list(options[0]) == ["batch_size", "workers", "bf16", "channels_last", "fast", "max_detections"]


def test_table() -> None:
    metrics = dict.fromkeys(("map", "map_50", "map_75", "map_small", "map_medium", "map_large"), 0.25)
    lines = table({**metrics, "map_cat": 0.5, "map_dog": float("nan")}).splitlines()
    assert lines[1].split() == ["25.0"] * 6
    assert lines[-1].split() == ["50.0", "cat"]
