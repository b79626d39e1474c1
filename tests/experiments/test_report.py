"""What the pictures show: counts, pairs and sizes."""

from __future__ import annotations

import numpy as np
import PIL.Image
import torch

from crosskd_hf.data import CategoryMap
from crosskd_hf.experiments.report import SIDE, confusion, drawn, match, worst_images
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
