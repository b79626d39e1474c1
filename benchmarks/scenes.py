"""Random truths and detections with what makes an evaluation hard: crowds, ties, misses, more than 100 boxes."""

from typing import Any, NamedTuple

import datasets
import numpy as np
from numpy.typing import NDArray

from crosskd_hf.data.categories import CategoryMap
from crosskd_hf.data.schema import features_of
from crosskd_hf.inference.coco_evaluator import CocoEvaluator, Rows

Floats = NDArray[np.float64]


class Scene(NamedTuple):
    """A data set without its pictures, and a model's detections of each image."""

    dataset: datasets.Dataset
    categories: CategoryMap
    rows: Rows

    def evaluator(self, fast: bool | None) -> CocoEvaluator:
        """An evaluator that has got all detections."""
        evaluator = CocoEvaluator(self.dataset, self.categories, fast=fast)
        evaluator.merge(self.rows)
        return evaluator


def make_scene(seed: int, images: int, classes: int, objects: float = 7.3, detections: int = 100) -> Scene:
    """Draw a scene.

    Args:
        seed: Of everything.
        images, classes: So many; the last class may have no object.
        objects: Of an image, on average; COCO has 7.3.
        detections: Of an image; one of twenty images has none, one three times as many.
    """
    rng = np.random.default_rng(seed)
    categories = CategoryMap(tuple(range(3, 3 + 2 * classes, 2)), tuple(f"class {k}" for k in range(classes)))
    start = int(rng.integers(1, 2**60))
    ids = (start + rng.permutation(images)).tolist()
    examples: list[dict[str, Any]] = []
    rows: Rows = {}
    for image_id in ids:
        boxes = _boxes(rng, rng.poisson(objects))
        labels = rng.integers(max(classes - 1, 1), size=len(boxes))
        examples.append(_example(rng, image_id, boxes, labels, len(examples)))
        rows[image_id] = _found(rng, boxes, labels, classes, detections)
    dataset = datasets.Dataset.from_list(examples, features=features_of(categories))
    return Scene(dataset, categories, rows)


def _boxes(rng: np.random.Generator, count: int) -> Floats:
    sides = rng.lognormal(4, 1, (count, 2)).clip(1, 400)
    return np.column_stack([rng.uniform(0, 1, (count, 2)) * ((640, 480) - sides).clip(0), sides])


def _example(
    rng: np.random.Generator, image_id: int, boxes: Floats, labels: NDArray[np.int64], number: int
) -> dict[str, Any]:
    count = len(boxes)
    objects = {
        "id": (1000 * number + np.arange(count)).tolist(),
        "bbox": boxes.tolist(),
        "category": labels.tolist(),
        "area": (boxes[:, 2:].prod(1) * rng.uniform(0.4, 1, count)).tolist(),
        "iscrowd": (rng.random(count) < 0.05).astype(int).tolist(),
    }
    return {"image_id": image_id, "width": 640, "height": 480, "objects": objects}


def _found(
    rng: np.random.Generator, boxes: Floats, labels: NDArray[np.int64], classes: int, most: int
) -> NDArray[np.float32]:
    """(n, 6) as of `CocoEvaluator.rows`: a third are shaken truths, scores are coarse, so that some are equal."""
    count = int(most * rng.choice([0, 1, 3], p=[0.05, 0.9, 0.05]))
    near = rng.integers(len(boxes), size=count // 3) if len(boxes) else np.empty(0, dtype=np.int64)
    shaken = boxes[near] + rng.normal(0, 0.1, (len(near), 4)) * boxes[near][:, [2, 3, 2, 3]]
    shaken[:, 2:] = np.abs(shaken[:, 2:])
    false = _boxes(rng, count - len(near))
    classes_found = np.concatenate([labels[near], rng.integers(classes, size=len(false))])
    scores = np.round(rng.random(count), rng.choice([1, 3, 9]))
    return np.column_stack([np.concatenate([shaken, false]), scores, classes_found]).astype(np.float32)
