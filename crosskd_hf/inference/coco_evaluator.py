"""COCO average precision of streamed detections, in original pixels and raw category ids."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..data.categories import CategoryMap
from ..data.class_names import are_same, listing
from ..data.schema import names_of
from .coco_library import COUNTED, Figures, figures, library, tell
from .coco_truth import Truth

Rows: TypeAlias = dict[int, NDArray[np.float32]]
"""image id -> (n, 6) detections: x, y, width, height px, score, contiguous class."""

SUMMARY = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
"""The first numbers of COCO's summary: AP at IoU .50:.95, at .50, at .75, and of small, medium and large objects."""
BY_IOU = ("map_60", "map_70", "map_80", "map_90")
"""AP at further IoUs, which papers print for PASCAL VOC beside those at .50 and .50:.95."""


def metric_names(classes: Sequence[str]) -> list[str]:
    """The keys of what :meth:`CocoEvaluator.compute` returns, those of the classes last and in their order."""
    known = SUMMARY + BY_IOU
    return [*known, *(f"map_class_{name}" if f"map_{name}" in known else f"map_{name}" for name in classes)]


class CocoEvaluator:
    """Collects the detections of a data set image by image and computes COCO AP when every image is there.

    It knows nothing of processes: each collects its own `rows`, and one of them takes in the others' by `merge`.
    Of an image that comes more than once (samplers pad the last batch) the first detections count.

    Args:
        dataset: as made by `load_coco` or `load_objects`; its boxes are the truth, crowd regions included.
        categories: the map of the same data.
        fast: compute by faster-coco-eval, an eighth of pycocotools' time with the same figures: None: where it is
            installed (`pip install crosskd_hf[fast]`). False: by pycocotools.
        most: so many detections of an image and class count; COCO's AP counts 100, fewer are not possible.

    Attributes:
        library: what computes the figures.
        stats: COCO's twelve numbers, in [0, 1] or -1, once `compute` was called.

    Raises:
        ValueError: the data set names other classes, or in another order, or several of its images have one id.
    """

    def __init__(
        self, dataset: datasets.Dataset, categories: CategoryMap, fast: bool | None = None, most: int = COUNTED
    ):
        names = names_of(dataset)
        if names is not None and not are_same(names, categories.names):
            raise ValueError(
                f"the data set has other classes than the map: {listing(names)}, against {listing(categories.names)}; "
                f"bring it to the map's order by DetectionData.with_classes"
            )
        self.categories = categories
        self.library = library(fast)
        self._most = max(most, COUNTED)
        self._columns = Truth.of(dataset)
        self.image_ids = frozenset(self._columns.image_ids.tolist())
        _demand_own_ids(self._columns.image_ids)
        self.rows: Rows = {}
        self.stats: tuple[float, ...] = ()

    @cached_property
    def truth(self) -> dict[str, Any]:
        """The data set as the content of a COCO json, in raw ids."""
        return self._columns.as_coco(self.categories)

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

    def demand_sizes(self, image_ids: Sequence[int], sizes: Tensor) -> None:
        """Compare the sizes that boxes are scaled to with those of the data set.

        Args:
            image_ids: B ids.
            sizes: (B, 2) height and width of the original images in px.

        Raises:
            ValueError: an image has another size in the data set, such as width and height the other way round.
        """
        for image_id, (height, width) in zip(image_ids, sizes.tolist(), strict=True):
            known = self._sizes.get(image_id)
            if known is not None and known != (width, height):
                raise ValueError(
                    f"orig_size of image {image_id} is ({height}, {width}), which would be its height and width; in "
                    f"the data set it is {known[0]} px wide and {known[1]} px high. Detections would lie elsewhere."
                )

    @cached_property
    def _sizes(self) -> dict[int, tuple[int, int]]:
        """Image id -> width and height in px."""
        widths, heights = self._columns.sizes.T.tolist()
        sides = zip(widths, heights, strict=True)
        return dict(zip(self._columns.image_ids.tolist(), sides, strict=True))

    def merge(self, rows: Rows) -> None:
        """Take in the `rows` of another evaluator; images that are here already are left as they are."""
        unknown = sorted(set(rows) - self.image_ids)
        if unknown:
            raise ValueError(f"detections for images that are not in the evaluated data set: ids {unknown[:5]}")
        self.rows = {**rows, **self.rows}

    def compute(self) -> dict[str, float]:
        """COCO AP in [0, 1]: `map`, `map_50`, `map_75`, `map_small`, `map_medium`, `map_large`, `map_<class name>`.

        `map_60` to `map_90` are AP at these IoUs. `stats` holds COCO's twelve numbers afterwards, six of average recall
        among them. nan where there is no truth to find (COCO's own -1). A class whose name is "50", "75", "small",
        "medium" or "large", or one of the other IoUs, is reported as `map_class_<name>`.

        Raises:
            ValueError: detections of some images are missing.
        """
        tell(self.library.name)
        figures = self._figures()
        metrics = dict(zip(SUMMARY, map(_defined, figures.stats), strict=False))
        metrics |= {key: _mean(figures.precision[2 * index]) for index, key in enumerate(BY_IOU, start=1)}
        of_classes = metric_names(self.categories.names)[len(metrics) :]
        for key, values in zip(of_classes, np.moveaxis(figures.precision, -1, 0), strict=True):
            metrics[key] = _mean(values)
        return metrics

    def precision(self) -> NDArray[np.float64]:
        """(10, 101, K): precision at each IoU of .50:.95 and each recall of 0:1; -1 for classes without a truth.

        Raises:
            ValueError: detections of some images are missing.
        """
        return self._figures().precision

    def _figures(self) -> Figures:
        rows = self._ordered_rows()
        ranks = np.unique(self._columns.image_ids, return_inverse=True)[1]
        truth = self._columns.ranked(ranks, len(self.categories))
        images = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        detections = np.column_stack([images, np.concatenate([*rows, np.empty((0, 6))])])
        found = figures(truth, detections, self.library, self._most)
        self.stats = found.stats
        return found

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

    def _ordered_rows(self) -> list[NDArray[np.float32]]:
        """The detections of every image in the order of the images' ids, not of their arrival."""
        missing = sorted(self.image_ids - set(self.rows))
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(self.image_ids)} images were not evaluated (ids {missing[:5]} ...); "
                "run every image through update, on some process, and merge"
            )
        return [self.rows[image_id] for image_id in sorted(self.rows)]

    def _detections(self) -> list[dict[str, Any]]:
        """All detections as COCO results."""
        return [
            {
                "image_id": image_id,
                "category_id": self.categories.to_raw(int(row[5])),
                "bbox": row[:4].tolist(),
                "score": float(row[4]),
            }
            for image_id, rows in zip(sorted(self.rows), self._ordered_rows(), strict=True)
            for row in rows.astype(np.float64)
        ]


def _demand_own_ids(image_ids: NDArray[np.int64]) -> None:
    """Refuse two images of one id: detections of the one would be held against the objects of both."""
    ids, counts = np.unique(image_ids, return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"{int((counts > 1).sum())} image ids of the evaluated data set belong to several images (such as "
            f"{ids[counts > 1][:3].tolist()}): AP would mix up their objects. Join data sets by "
            "load_detection_dataset([first, second]), which numbers images anew; leave out images that come twice."
        )


def _mean(precision: NDArray[np.float64]) -> float:
    """The mean where there is a truth; nan if there is none."""
    return float(precision[precision > -1].mean()) if (precision > -1).any() else float("nan")


def _defined(value: float) -> float:
    return float("nan") if value < 0 else float(value)
