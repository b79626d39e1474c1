"""The truth of a data set as columns, as COCO's evaluation wants it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc  # type: ignore[import-untyped]
from numpy.typing import NDArray

from ..data.categories import CategoryMap

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Truth:
    """I images and their G objects, in the order of the data set.

    Args:
        image_ids: (I,).
        sizes: (I, 2) width and height in px.
        rows: (G,) the row of each object's image.
        ids: (G,) the objects' own; 1, 2, 3, ... where those occur twice or are 0.
        labels: (G,) contiguous classes.
        boxes: (G, 4) xywh px.
        areas: (G,) px.
        crowds: (G,) 1 for crowd regions.
    """

    image_ids: Ints
    sizes: Ints
    rows: Ints
    ids: Ints
    labels: Ints
    boxes: Floats
    areas: Floats
    crowds: Ints

    @classmethod
    def of(cls, dataset: datasets.Dataset) -> Truth:
        """The truth of a data set in the schema of `load_coco`."""
        columns = dataset.with_format("arrow").select_columns(["image_id", "width", "height", "objects"])[:]
        objects = columns["objects"].combine_chunks()
        fields = {key: pc.struct_field(objects, key) for key in ("id", "bbox", "category", "area", "iscrowd")}
        flat = {key: pc.list_flatten(values) for key, values in fields.items()}
        ids = flat["id"].to_numpy(zero_copy_only=False)
        if len(np.unique(ids)) < len(ids) or (ids == 0).any():  # pycocotools takes id 0 for an object not found
            ids = np.arange(1, len(ids) + 1)
        return cls(
            image_ids=columns["image_id"].to_numpy(),
            sizes=np.stack([columns[key].to_numpy() for key in ("width", "height")], axis=1),
            rows=pc.list_parent_indices(fields["bbox"]).to_numpy(zero_copy_only=False),
            ids=ids,
            labels=flat["category"].to_numpy(zero_copy_only=False),
            boxes=pc.list_flatten(flat["bbox"]).to_numpy(zero_copy_only=False).reshape(-1, 4),
            areas=flat["area"].to_numpy(zero_copy_only=False),
            crowds=flat["iscrowd"].to_numpy(zero_copy_only=False),
        )

    def as_coco(self, categories: CategoryMap) -> dict[str, Any]:
        """The content of a COCO json, with the data set's own ids."""
        names = zip(categories.raw_ids, categories.names, strict=True)
        return self._content(
            self.image_ids,
            self.ids,
            np.array(categories.raw_ids)[self.labels],
            [{"id": i, "name": n} for i, n in names],
        )

    def ranked(self, ranks: Ints, classes: int) -> dict[str, Any]:
        """The same with small numbers for ids: images by `ranks` (I,), objects from 1, classes as they are labelled.

        pycocotools takes detections as an array of floats, which don't hold every id of 64 bits.
        """
        numbers = np.arange(1, len(self.rows) + 1)
        return self._content(ranks, numbers, self.labels, [{"id": k, "name": str(k)} for k in range(classes)])

    def _content(self, image_ids: Ints, ids: Ints, classes: Ints, categories: list[dict[str, Any]]) -> dict[str, Any]:
        images = zip(image_ids.tolist(), *self.sizes.T.tolist(), strict=True)
        columns = (ids, image_ids[self.rows], classes, self.boxes, self.areas, self.crowds)
        keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
        return {
            "info": {},
            "images": [{"id": number, "width": width, "height": height} for number, width, height in images],
            "annotations": [
                dict(zip(keys, row, strict=True)) for row in zip(*(column.tolist() for column in columns), strict=True)
            ],
            "categories": categories,
        }
