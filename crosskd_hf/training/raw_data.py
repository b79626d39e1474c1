"""Data sets as they come, such as those of the Hub, in the schema that the trainer reads."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sized
from typing import Any

import datasets
from transformers import PreTrainedConfig

from ..data.categories import CategoryMap
from ..data.class_names import are_placeholders, class_names
from ..data.dataset import DetectionData, load_objects
from ..data.framed_image import FramedImage
from ..data.objects_column import category_values, judge_boxes
from ..data.report import DataError
from ..data.schema import COLUMNS, FIELDS, class_label, demand_areas, demand_example
from ..data.splits import DetectionSplits
from ..data.streaming import stream_objects
from .arguments import same_chance

logger = logging.getLogger(__name__)


def in_schema(dataset: Any, config: PreTrainedConfig, what: str) -> Any:
    """A data set of the trainer: raw ones with `image` and `objects` are brought to the schema of `load_objects`.

    Args:
        dataset: Any data set, a dict of several, or None.
        config: Of the student, whose classes are found by name.
        what: The data in words.

    Returns:
        It, or what was made of it. What isn't known as raw detection data stays as it is.

    Raises:
        DataError: It is faulty.
        ValueError: It has other classes than the student, is no data set but where to find one, or has rows in another
            schema.
    """
    if isinstance(dataset, DetectionSplits):
        raise ValueError(
            f"The {what} are all splits of a data set; give one: {' or '.join(f'data.{n}' for n in dataset)}."
        )
    if isinstance(dataset, str | os.PathLike):
        raise ValueError(f"The {what} are a path, {os.fspath(dataset)!r}: read it by load_detection_dataset(path).")
    if isinstance(dataset, DetectionData):
        return dataset.dataset
    if isinstance(dataset, Mapping) and not isinstance(dataset, datasets.Dataset):
        return {name: in_schema(part, config, f"{what} {name!r}") for name, part in dataset.items()}
    if isinstance(dataset, datasets.IterableDataset) and _is_raw(dataset):
        return stream_objects(dataset, class_names(config))
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom" and _is_raw(dataset):
        data = _loaded(dataset, config, training=what.startswith("training"))
        logger.warning("The %s are raw; they were read by load_objects: %s", what, data.report)
        return data.dataset
    if isinstance(dataset, datasets.Dataset):
        _demand_boxes(dataset, what)
    elif what.startswith("training") and isinstance(dataset, Sized):
        _demand_rows(dataset)
    return dataset


def _demand_boxes(dataset: datasets.Dataset, what: str) -> None:
    """Judge the boxes of a data set in the schema that was made elsewhere: those of `load_coco` were judged there.

    Raises:
        DataError: Boxes are corners, fractions or unreadable, as of `check_data`; images have several ids.
    """
    features = dataset.features or {}
    if dataset.format["type"] == "custom" or not set(COLUMNS) <= set(features) or _is_raw(dataset):
        return
    if isinstance(features["image"], FramedImage):
        return
    errors = [finding for finding in judge_boxes(dataset) if finding.severity == "error"]
    if errors:
        logger.error("The %s are in the schema of load_coco, but not right.", what)
        raise DataError(errors)


def _demand_rows(dataset: Any) -> None:
    """Judge the first row of a list or a data set of torch, which tells nothing of its columns."""
    if len(dataset) > 0:
        with same_chance():
            example = dataset[0]
        demand_example(example)
        demand_areas(example["objects"])


def _is_raw(dataset: datasets.Dataset | datasets.IterableDataset) -> bool:
    """Whether there are images and objects in another form than that of `load_coco`."""
    features = dataset.features or {}
    if not {"image", "objects"} <= set(features):
        return False
    objects = features["objects"]
    return not (set(features) >= set(COLUMNS) and isinstance(objects, dict) and set(objects) >= set(FIELDS))


def _loaded(dataset: datasets.Dataset, config: PreTrainedConfig, training: bool) -> DetectionData:
    if class_label(dataset.features["objects"]) is None and not are_placeholders(class_names(config)):
        categories = CategoryMap.from_config(config)
        data = load_objects(dataset, categories)
        numbers = {value for value in category_values(dataset) if isinstance(value, int)}
        if numbers:
            known = [number for number in (min(numbers), max(numbers)) if number in categories.raw_ids]
            names = [f"{number} for {categories.names[categories.to_contiguous(number)]!r}" for number in known]
            logger.warning("Classes of raw data are numbers without names: %s.", " to ".join(dict.fromkeys(names)))
        return data
    data = load_objects(dataset)
    return data if are_placeholders(class_names(config)) else data.for_model(config, training)
