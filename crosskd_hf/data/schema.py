"""The columns of a detection data set, and the names of its classes, which travel with them."""

from __future__ import annotations

from typing import Any

import datasets

from .categories import CategoryMap


def features_of(categories: CategoryMap) -> datasets.Features:
    """What examples hold beside their image; the classes are named."""
    integer, real = datasets.Value("int64"), datasets.Value("float64")
    objects = {
        "id": datasets.List(integer),
        "bbox": datasets.List(datasets.List(real, length=4)),
        "category": datasets.List(datasets.ClassLabel(names=list(categories.names))),
        "area": datasets.List(real),
        "iscrowd": datasets.List(integer),
    }
    return datasets.Features({"image_id": integer, "width": integer, "height": integer, "objects": objects})


def class_label(objects: Any) -> datasets.ClassLabel | None:
    """The `ClassLabel` of `category` in the feature of an `objects` column: a struct of lists or a list of structs."""
    inner = objects.feature if isinstance(objects, datasets.List | datasets.LargeList) else objects
    category = inner.get("category") if isinstance(inner, dict) else None
    label = category.feature if isinstance(category, datasets.List | datasets.LargeList) else category
    return label if isinstance(label, datasets.ClassLabel) else None
