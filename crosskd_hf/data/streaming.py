"""Streams of raw examples, brought to the schema of this package one by one: for data that no disk holds."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from .box_formats import to_xywh
from .categories import CategoryMap
from .class_names import is_background, listing, match_names
from .coco_json import box_array, flag, float_array
from .dataset import inspect_objects
from .images import probe_image
from .objects_column import fields_of_objects
from .schema import FIELDS, class_label

_CHECKED = 64  # examples at the beginning of a stream


def stream_objects(
    stream: datasets.IterableDataset, names: Sequence[str], bbox_format: str | enum.Enum = "xywh"
) -> datasets.IterableDataset:
    """Bring a stream with an `image` and an `objects` column to our schema, an example at a time.

    The first examples are checked as `load_objects` checks all. Of later ones nothing is known before their turn
    comes: boxes that are not four finite numbers are left out then.

    Args:
        stream: such as `load_dataset(..., streaming=True)["train"]`.
        names: the classes, in the order of labels. Numbers without a ClassLabel are labels already.
        bbox_format: as of `load_objects`.

    Raises:
        ValueError: no such columns, or a ClassLabel with other classes; while it is read: an object of another class.
        DataError: the first examples are faulty.
    """
    columns = set(stream.column_names or ())
    if columns and not {"image", "objects"} <= columns:
        raise ValueError(f"the stream needs columns image and objects, it has {sorted(columns)}; rename them")
    label = class_label((stream.features or {}).get("objects"))
    convert = _Example(names, None if label is None else label.names, bbox_format)
    if stream.features is not None:
        stream = stream.cast_column("image", datasets.Image(decode=False))
        first = datasets.Dataset.from_list(list(stream.take(_CHECKED)), features=stream.features)
        inspect_objects(first, CategoryMap(tuple(range(len(names))), tuple(names)), bbox_format)[1].demand_ok()
    return stream.map(convert, with_indices=True)


class _Example:
    """Makes an example of our schema of a raw one."""

    def __init__(self, names: Sequence[str], listed: Sequence[str] | None, bbox_format: str | enum.Enum):
        self.names = tuple(names)
        self.bbox_format = bbox_format
        self.labels: list[int] | None = None if listed is None else match_names(listed, names).indices
        pairs = zip(listed or (), self.labels or (), strict=True)
        unknown = [name for name, index in pairs if index < 0 and not is_background(name)]
        if unknown:
            raise ValueError(
                f"The stream has other classes than the student. Stream: {listing(listed or ())}. Student: "
                f"{listing(names)}. Unknown are {listing(unknown)}. Rename the classes of one of both, or give the "
                "student all of them."
            )

    def __call__(self, example: Mapping[str, Any], number: int) -> dict[str, Any]:
        """The fields that replace those of the example."""
        row, image = fields_of_objects(example["objects"]), example["image"]
        counts = {key: len(values) for key, values in row.items() if key in FIELDS and values}
        if len({*counts.values(), len(row["bbox"]), len(row["category"])}) > 1:
            raise ValueError(f"Example {number} of the stream has lists of different lengths in objects: {counts}.")
        boxes = to_xywh(box_array(row["bbox"]).reshape(-1, 4), self.bbox_format)
        keep = np.flatnonzero(np.isfinite(boxes).all(1)).tolist()
        labels = [self._label(row["category"][place], number) for place in keep]
        areas = float_array(row.get("area") or [None] * len(boxes))
        areas = np.where(np.isfinite(areas) & (areas > 0), areas, boxes[:, 2:].prod(1))
        crowds = row.get("iscrowd") or [0] * len(boxes)
        width, height = probe_image(image).upright_size
        given = example.get("width"), example.get("height")
        image_id = example.get("image_id")
        return {
            "image_id": image_id if isinstance(image_id, int) else number,
            "width": given[0] if all(given) else width,
            "height": given[1] if all(given) else height,
            "objects": {
                "id": list(range(len(keep))),
                "bbox": boxes[keep].tolist(),
                "category": labels,
                "area": areas[keep].tolist(),
                "iscrowd": [int(flag(crowds[place])) for place in keep],
            },
        }

    def _label(self, value: Any, number: int) -> int:
        if isinstance(value, str):
            index = match_names([value], self.names).indices[0]
        elif not isinstance(value, int):
            index = -1
        elif self.labels is not None:
            index = self.labels[value] if 0 <= value < len(self.labels) else -1
        else:
            index = value if 0 <= value < len(self.names) else -1
        if index < 0:
            raise ValueError(
                f"Example {number} of the stream has an object of class {value!r}; known: {listing(self.names)}."
            )
        return index
