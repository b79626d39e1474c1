"""COCO average precision of streamed detections, in original pixels and raw category ids, by pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from ..data.categories import CategoryMap
from ..data.class_names import are_same, listing
from ..data.schema import names_of

Rows: TypeAlias = dict[int, NDArray[np.float32]]
"""image id -> (n, 6) detections: x, y, width, height px, score, contiguous class."""

SUMMARY = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
"""The first numbers of COCO's summary: AP at IoU .50:.95, at .50, at .75, and of small, medium and large objects."""


class CocoEvaluator:
    """Collects the detections of a data set image by image and computes COCO AP when every image is there.

    It knows nothing of processes: each collects its own `rows`, and one of them takes in the others' by `merge`.
    Of an image that comes more than once (samplers pad the last batch) the first detections count.

    Args:
        dataset: as made by `load_coco` or `load_objects`; its boxes are the truth, crowd regions included.
        categories: the map of the same data.

    Attributes:
        stats: pycocotools' twelve numbers, in [0, 1] or -1, once `compute` was called.

    Raises:
        ValueError: the data set names other classes, or in another order.
    """

    def __init__(self, dataset: datasets.Dataset, categories: CategoryMap):
        names = names_of(dataset)
        if names is not None and not are_same(names, categories.names):
            raise ValueError(
                f"the data set has other classes than the map: {listing(names)}, against {listing(categories.names)}; "
                f"bring it to the map's order by DetectionData.with_classes"
            )
        self.categories = categories
        self.truth = _truth(dataset, categories)
        self.image_ids = frozenset(image["id"] for image in self.truth["images"])
        self.rows: Rows = {}
        self.stats: tuple[float, ...] = ()

    def reset(self) -> None:
        """Forget all detections."""
        self.rows = {}

    def update(self, image_ids: Sequence[int] | Tensor, results: Sequence[Mapping[str, Tensor]]) -> None:
        """Take in the detections of some images.

        Args:
            image_ids: B ids.
            results: B dicts as of `post_process_object_detection` with the original sizes as `target_sizes`: `scores`
                (n,), `labels` (n,) contiguous, `boxes` (n, 4) xyxy in px of the original image.

        Raises:
            ValueError: counts differ, an image isn't of this data set, a number isn't finite, a label isn't in [0, K).
        """
        ids = [int(image_id) for image_id in image_ids]
        if len(ids) != len(results):
            raise ValueError(f"got {len(ids)} image ids and {len(results)} results; give one result per image")
        rows: Rows = {}
        for image_id, result in zip(ids, results, strict=True):
            rows.setdefault(image_id, self._row(image_id, result))
        self.merge(rows)

    def merge(self, rows: Rows) -> None:
        """Take in the `rows` of another evaluator; images that are here already are left as they are."""
        unknown = sorted(set(rows) - self.image_ids)
        if unknown:
            raise ValueError(f"detections for images that are not in the evaluated data set: ids {unknown[:5]}")
        self.rows = {**rows, **self.rows}

    def compute(self) -> dict[str, float]:
        """COCO AP in [0, 1]: `map`, `map_50`, `map_75`, `map_small`, `map_medium`, `map_large`, `map_<class name>`.

        `stats` holds pycocotools' twelve numbers afterwards, six of average recall among them.
        nan where there is no truth to find (COCO's own -1). A class whose name is "50", "75", "small", "medium" or
        "large" is reported as `map_class_<name>`.

        Raises:
            ValueError: detections of some images are missing.
        """
        evaluation = self._evaluation()
        metrics = dict(zip(SUMMARY, map(_defined, evaluation.stats), strict=False))
        precision = evaluation.eval["precision"][..., 0, -1]  # (IoUs, recalls, K): all areas, 100 detections
        for raw, values in zip(evaluation.params.catIds, np.moveaxis(precision, -1, 0), strict=True):
            name = self.categories.names[self.categories.to_contiguous(raw)]
            key = f"map_class_{name}" if f"map_{name}" in SUMMARY else f"map_{name}"
            metrics[key] = float(values[values > -1].mean()) if (values > -1).any() else float("nan")
        return metrics

    def precision(self) -> NDArray[np.float64]:
        """(10, 101, K): precision at each IoU of .50:.95 and each recall of 0:1; -1 for classes without a truth.

        Raises:
            ValueError: detections of some images are missing.
        """
        found: NDArray[np.float64] = self._evaluation().eval["precision"][..., 0, -1]
        return found

    def _evaluation(self) -> COCOeval:
        detections = self._detections()
        with contextlib.redirect_stdout(io.StringIO()):
            truth = _indexed(self.truth)
            if detections:
                found = truth.loadRes(detections)
            else:  # loadRes fails on an empty list
                found = _indexed({**self.truth, "annotations": []})
            evaluation = COCOeval(truth, found, "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        self.stats = tuple(map(float, evaluation.stats))
        return evaluation

    def export(self, folder: str | os.PathLike[str]) -> tuple[Path, Path]:
        """Write `ground_truth.json` and `detections.json` for pycocotools, raw ids in both; return their paths.

        Raises:
            ValueError: detections of some images are missing.
        """
        contents = {"ground_truth.json": self.truth, "detections.json": self._detections()}
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (Path(folder) / name).write_text(json.dumps(content))
        return Path(folder) / "ground_truth.json", Path(folder) / "detections.json"

    def _row(self, image_id: int, result: Mapping[str, Tensor]) -> NDArray[np.float32]:
        scores, labels, boxes = (result[key].detach().float().cpu().numpy() for key in ("scores", "labels", "boxes"))
        boxes = boxes.reshape(-1, 4)
        row = np.column_stack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2], scores, labels]).astype(np.float32)
        if not np.isfinite(row).all():
            raise ValueError(f"detections of image {image_id} are not finite; has the training diverged?")
        if len(row) and not (labels.min() >= 0 and labels.max() < len(self.categories)):
            classes = f"[{int(labels.min())}, {int(labels.max())}]"
            raise ValueError(
                f"labels of image {image_id} are in {classes}, needed is [0, {len(self.categories)}); "
                "does the image processor belong to the model, or to a family with 'no object' as the last class?"
            )
        return row

    def _detections(self) -> list[dict[str, Any]]:
        """All detections as COCO results, images in the order of their ids, not of their arrival."""
        missing = sorted(self.image_ids - set(self.rows))
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(self.image_ids)} images were not evaluated (ids {missing[:5]} ...); "
                "run every image through update, on some process, and merge"
            )
        return [
            {
                "image_id": image_id,
                "category_id": self.categories.to_raw(int(row[5])),
                "bbox": row[:4].tolist(),
                "score": float(row[4]),
            }
            for image_id in sorted(self.rows)
            for row in self.rows[image_id].astype(np.float64)
        ]


def _truth(dataset: datasets.Dataset, categories: CategoryMap) -> dict[str, Any]:
    """The data set as the content of a COCO json. Annotation ids are kept, unless they are no good to pycocotools."""
    plain = dataset.with_format(None).select_columns(["image_id", "width", "height", "objects"])
    images, annotations = [], []
    for example in plain:
        images.append({"id": example["image_id"], "width": example["width"], "height": example["height"]})
        objects = example["objects"]
        for fields in zip(*(objects[key] for key in ("id", "bbox", "category", "area", "iscrowd")), strict=True):
            number, box, label, area, crowd = fields
            annotations.append(
                {
                    "id": number,
                    "image_id": example["image_id"],
                    "category_id": categories.to_raw(label),
                    "bbox": box,
                    "area": area,
                    "iscrowd": crowd,
                }
            )
    ids = {annotation["id"] for annotation in annotations}
    if len(ids) < len(annotations) or 0 in ids:  # pycocotools takes an object of id 0 for one that wasn't found
        for number, annotation in enumerate(annotations, start=1):
            annotation["id"] = number
    listed = [{"id": raw, "name": name} for raw, name in zip(categories.raw_ids, categories.names, strict=True)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": listed}


def _indexed(content: dict[str, Any]) -> COCO:
    coco = COCO()
    # pycocotools writes into the annotations that it is given
    coco.dataset = {**content, "annotations": [dict(annotation) for annotation in content["annotations"]]}
    coco.createIndex()
    return coco


def _defined(value: float) -> float:
    return float("nan") if value < 0 else float(value)
