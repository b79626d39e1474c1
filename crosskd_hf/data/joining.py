"""Several data sets as one: classes are matched by name, ids of images and objects are given anew."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from .categories import CategoryMap
from .class_names import match_names
from .dataset import DetectionData
from .framed_image import FramedImage
from .report import DataReport, by_severity


def union(maps: Sequence[CategoryMap]) -> CategoryMap:
    """The classes of several maps: those of the first in its order, then what others add. Raw ids are 1 to K."""
    names = list(maps[0].names)
    for other in maps[1:]:
        matches = match_names(other.names, names)
        if matches.ambiguous:
            raise ValueError(f"Classes may be several of the other data set's: {matches.ambiguous}. Spell them alike.")
        names += [name for name, index in zip(other.names, matches.indices, strict=True) if index < 0]
    return CategoryMap(tuple(range(1, len(names) + 1)), tuple(names))


def join(parts: Sequence[DetectionData], categories: CategoryMap) -> DetectionData:
    """One data set of the images of several.

    Args:
        parts: The data sets.
        categories: Classes that hold all of theirs, such as their `union`.
    """
    rows = []
    first_image = first_object = 1
    for part in (part.with_classes(categories) for part in parts):
        table = part.dataset.with_format("arrow")[:]
        objects = table["objects"].combine_chunks()
        fields = dict(zip((field.name for field in objects.type), objects.flatten(), strict=True))
        count, total = len(table), len(fields["id"].values)
        ids = pa.array(np.arange(first_object, first_object + total))
        fields["id"] = pa.ListArray.from_arrays(fields["id"].offsets, ids)
        column = pa.array(np.arange(first_image, first_image + count, dtype=np.int64))
        features = datasets.Features({k: part.dataset.features[k] for k in ("image_id", "width", "height", "objects")})
        renumbered = {
            "image_id": column,
            "width": table["width"].combine_chunks(),
            "height": table["height"].combine_chunks(),
            "objects": pa.StructArray.from_arrays(list(fields.values()), list(fields)),
        }
        columns = datasets.Dataset.from_dict(renumbered, features=features)
        feature = datasets.Features({"image": part.dataset.features["image"]})
        images = datasets.Dataset(table.select(["image"]), datasets.DatasetInfo(features=feature))
        images = images.cast_column("image", FramedImage())
        rows.append(datasets.concatenate_datasets([images, columns], axis=1))
        first_image, first_object = first_image + count, first_object + total
    reports = [part.report for part in parts]
    report = DataReport(
        images=sum(report.images for report in reports),
        objects=sum(report.objects for report in reports),
        crowds=sum(report.crowds for report in reports),
        empty_images=sum(report.empty_images for report in reports),
        findings=by_severity([finding for report in reports for finding in report.findings]),
    )
    return DetectionData(datasets.concatenate_datasets(rows), categories, report)
