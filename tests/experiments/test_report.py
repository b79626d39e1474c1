"""What the pictures show: counts, pairs and sizes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from crosskd_hf.data import CategoryMap
from crosskd_hf.experiments.report import SIDE, confusion, curves, drawn, match, read_logs, worst_images
from crosskd_hf.inference.coco_evaluator import CocoEvaluator


class Found(CocoEvaluator):
    """Two images with hand-made objects and detections."""

    def __init__(self) -> None:
        self.categories = CategoryMap((1, 2), ("cat", "dog"))
        objects = [(1, 1, [0, 0, 10, 10]), (1, 2, [50, 50, 10, 10]), (2, 1, [0, 0, 10, 10])]
        self.truth = {
            "images": [{"id": 1}, {"id": 2}],
            "annotations": [
                {"image_id": image, "category_id": raw, "bbox": box, "iscrowd": 0} for image, raw, box in objects
            ],
        }
        self.rows = {  # x, y, width, height, score, class
            1: np.array([[0, 0, 10, 10, 0.9, 0], [50, 50, 10, 10, 0.8, 0], [90, 90, 5, 5, 0.4, 1]], np.float32),
            2: np.array([[0, 0, 10, 10, 0.2, 0]], np.float32),  # below the score that counts
        }


def test_confusion_counts_objects_and_finds() -> None:
    counts = confusion(Found(), 2)
    # a cat found as a cat and one missed; a dog called a cat; a dog that is nothing
    assert counts.tolist() == [[1, 0, 1], [1, 0, 0], [0, 1, 0]]


def test_the_worst_image_comes_first() -> None:
    assert worst_images(Found()) == [1, 2]


def test_each_object_has_one_partner() -> None:
    truth = {"boxes": torch.tensor([[0.0, 0, 10, 10]]), "labels": torch.tensor([0])}
    finds = {"boxes": torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9]]), "labels": torch.tensor([0, 0])}
    assert match(truth, finds) == [(0, 0), (None, 1)]


def test_large_photos_are_made_small_with_their_boxes() -> None:
    photo = PIL.Image.new("RGB", (4000, 3000))
    objects = {"boxes": torch.tensor([[0.0, 0, 4000, 3000]]), "labels": torch.tensor([0])}
    assert drawn(photo, objects, {0: "cat"}).size == (SIDE, SIDE * 3 // 4)


def test_curves_of_runs_in_their_order_and_one_point_for_an_update(tmp_path: Path) -> None:
    """The best model is evaluated again after the last update: no point of the curve."""
    history = [{"step": 5, "loss": 2.0}, {"step": 5, "eval_map": 0.3}, {"step": 9, "eval_map": 0.2},
               {"step": 9, "eval_map": 0.3}]  # fmt: skip
    for run in ("baseline-1", "distilled-1", "teacher"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    logs = read_logs(tmp_path)
    assert list(logs) == ["teacher", "baseline-1", "distilled-1"]
    lines = curves(logs).axes[0].lines
    assert [line.get_label() for line in lines] == list(logs)
    assert lines[0].get_xydata().tolist() == [[5, 30], [9, 20]]
