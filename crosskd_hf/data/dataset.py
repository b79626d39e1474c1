"""Detection data sets: COCO-format folders and Hub data sets to one schema."""

from __future__ import annotations

import enum
import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from . import cache
from .categories import CategoryMap, match_categories
from .check_images import check_files
from .class_names import are_reordered, class_names, demand_same, match_names
from .framed_image import FramedImage
from .inspection import Inspection, inspect_coco, inspect_table
from .objects_column import demand_droppable, for_rows, table_of_objects
from .report import DataReport
from .schema import features_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DetectionData:
    """A data set in the schema of this package, its classes, and what was found while it was read.

    An example of `dataset` is `{"image": PIL image, "image_id": int, "width": int, "height": int, "objects": {"id":
    [int], "bbox": [[x, y, w, h] px], "category": [contiguous int], "area": [px], "iscrowd": [0 or 1]}}`. Images are
    decoded when an example is asked for, to upright RGB; those of more than 8 bits keep their values, which the image
    processor scales. Boxes are those of the file, which is the truth of the evaluation: training alone clips them and
    leaves out what `is_trained_on` says; degenerate ones are listed in `report.dropped`. `ignore` is there where the
    file has it. The names of the classes travel with `dataset`: its
    `category` is a `ClassLabel`.
    """

    dataset: datasets.Dataset
    categories: CategoryMap
    report: DataReport

    def for_training(self, drop_empty: bool = False, min_size: int = 0) -> DetectionData:
        """The same data without images that are of little use to training, in the same order.

        Args:
            drop_empty: Images without any annotation go. One whose only annotation is a crowd region or can't be
                trained on stays, with nothing in it.
            min_size: Images with a side below this go, in px.
        """
        columns = self.dataset.with_format("arrow").select_columns(["width", "height", "objects"])[:]
        counts = pc.list_value_length(pc.struct_field(columns["objects"].combine_chunks(), "bbox")).to_numpy()
        sides = np.minimum(columns["width"].to_numpy(), columns["height"].to_numpy())
        keep = (sides >= min_size) & ((counts > 0) | (not drop_empty))
        return self if keep.all() else replace(self, dataset=self.dataset.select(np.flatnonzero(keep)))

    def repeated(self, times: int) -> DetectionData:
        """The same data with every image so many times in an epoch: for small data sets whose epochs are few.

        The column `copy` counts from 0 which of them a row is: each has an augmentation of its own.
        """
        if times == 1:
            return self
        copies = [self.dataset.add_column("copy", np.full(len(self.dataset), copy)) for copy in range(times)]  # type: ignore[call-arg]
        return replace(self, dataset=datasets.concatenate_datasets(copies))

    def for_model(self, config: PreTrainedConfig, training: bool = True) -> DetectionData:
        """The same data, labelled in the order of a model's classes, which are found by name.

        Args:
            config: Of the model.
            training: The model has to have the same classes, in whatever order. False, to evaluate: it may have more,
                and may lack those that the data has no object of.

        Raises:
            ValueError: It has others.
        """
        own = class_names(config)
        if training and not are_reordered(self.categories.names, own):
            demand_same(self.categories.names, own, "data")
            return self
        used = None if training else {self.categories.to_raw(label) for label in self._labels().tolist()}
        return self.with_classes(match_categories(config, self.categories, used))

    def tell(self) -> None:
        """Put the warnings of the report into the log."""
        for finding in self.report.findings:
            if finding.severity == "warning":
                logger.warning("In the data set: %s", finding.describe(3))

    def _labels(self) -> NDArray[np.int64]:
        """The labels that occur."""
        objects = self.dataset.with_format("arrow").select_columns("objects")[:]["objects"]
        return np.unique(pc.list_flatten(pc.struct_field(objects, "category")).to_numpy())

    def with_classes(self, categories: CategoryMap) -> DetectionData:
        """The same images and objects, labelled by the classes of another map, which are found by name.

        Args:
            categories: The other map.

        Raises:
            ValueError: The data has objects of a class that `categories` doesn't hold.
        """
        if categories.names == self.categories.names:
            return replace(self, categories=categories)
        objects = self.dataset.with_format("arrow").select_columns("objects")[:]["objects"].combine_chunks()
        fields = dict(zip((field.name for field in objects.type), objects.flatten(), strict=True))
        labels = fields["category"].values.to_numpy()
        index_of = np.array(match_names(self.categories.names, categories.names).indices)
        missing = sorted({self.categories.names[label] for label in labels[index_of[labels] < 0]})
        if missing:
            raise ValueError(f"The data has objects of classes that the other map doesn't hold: {missing[:5]}.")
        fields["category"] = pa.ListArray.from_arrays(fields["category"].offsets, pa.array(index_of[labels]))
        column = {"objects": pa.StructArray.from_arrays(list(fields.values()), list(fields))}
        features = datasets.Features({"objects": features_of(categories, "ignore" in fields)["objects"]})
        relabelled = datasets.Dataset.from_dict(column, features=features)
        others = self.dataset.remove_columns("objects")
        return replace(self, dataset=datasets.concatenate_datasets([others, relabelled], axis=1), categories=categories)


def load_coco(
    annotations: str | os.PathLike[str],
    images: str | os.PathLike[str],
    categories: CategoryMap | None = None,
    decode: bool = True,
) -> DetectionData:
    """Read a COCO-format json and its image folder; images without objects are kept.

    Args:
        annotations: path of the json.
        images: folder that the json's file names are relative to.
        categories: the map of the training split, to read another split with; None: made from this json, which then
            has to have objects.
        decode: every image is decoded now, so that none is found broken in the middle of training (a JPEG of COCO's
            size takes 1.4 ms of a core); False, for data known to be good: only headers, ends of JPEGs and checksums
            of PNGs are looked at (`probe_image`, 0.1 ms).

    What was read and checked is kept below the cache of `datasets` until the json's content, or the size or time of
    change of an image, is another one. Of several processes one checks, and all map one Arrow file.

    Raises:
        DataError: everything that would make training stop or go wrong, all of it at once (see `check_data`).
    """
    named = categories and [categories.raw_ids, categories.names]
    name = cache.digest([os.path.abspath(annotations), os.path.abspath(images), named])
    with cache.alone(name):
        known = _known(name, annotations, decode)
        if known is None:
            inspection = inspect_coco(annotations, images, categories, decode)
            inspection.demand_ok()
            data = data_of_files([Path(images) / name for name in inspection.table.file_names], inspection)
            return _kept(name, annotations, decode, data)
    known.tell()
    return known


def _known(name: str, annotations: str | os.PathLike[str], decode: bool) -> DetectionData | None:
    """What the cache holds of a data set, if nothing has changed since; with `decode` what was decoded."""
    entry = cache.read_json(name)
    try:
        if entry is None or (decode and not entry["decoded"]) or entry["json"] != cache.content_hash(annotations):
            return None
        dataset = cache.read_table(entry["table"])
        if entry["stamps"] != cache.digest(cache.stamps(image_paths(dataset))):
            return None
        report, categories = cache.report_of(entry)
    except (OSError, KeyError, TypeError, ValueError):  # files are gone, or the entry is damaged
        return None
    return DetectionData(dataset, categories, report)


def _kept(name: str, annotations: str | os.PathLike[str], decode: bool, data: DetectionData) -> DetectionData:
    """The same data set, mapped from the cache, if it can be written there."""
    before = (cache.read_json(name) or {}).get("table")
    try:
        table = cache.write_table(name, data.dataset)
        stamps = cache.digest(cache.stamps(image_paths(data.dataset)))
        entry = {"json": cache.content_hash(annotations), "stamps": stamps, "table": table, "decoded": decode}
        cache.write_json(name, entry | cache.plain_report(data.report, data.categories))
        mapped = cache.read_table(table)
    except OSError as error:
        logger.warning("The checked data set can't be kept for the next start: %s", error)
        return data
    cache.forget(before)
    return replace(data, dataset=mapped)


def image_paths(dataset: datasets.Dataset) -> list[str]:
    """The image files of a data set that `data_of_files` made."""
    column = dataset.with_format("arrow").select_columns("image")[:]["image"]
    paths: list[str] = pc.struct_field(column, "path").to_pylist()
    return paths


def data_of_files(paths: Sequence[Path], inspection: Inspection) -> DetectionData:
    """The data set of image files, one for each image of a table that was found sound."""
    column = FramedImage.column([str(path.absolute()) for path in paths], *inspection.sizes.T)
    images_only = datasets.Dataset.from_dict({"image": column}, features=datasets.Features({"image": FramedImage()}))
    return _detection_data(images_only, inspection)


def load_objects(
    dataset: datasets.Dataset,
    categories: CategoryMap | None = None,
    bbox_format: str | enum.Enum = "xywh",
    drop: Collection[str] = (),
) -> DetectionData:
    """Bring a data set with an `image` and an `objects` column (as detection sets of the Hub have) to our schema.

    `objects` holds `bbox` and `category` (ClassLabel, int or str), maybe `area`, `iscrowd` and `id`, as a dict of lists
    or as a list of dicts. Without integer `image_id`s row numbers are taken, missing `width` and `height` are read from
    the images, and where `id`s are missing or occur twice, objects are numbered from 1.

    Args:
        dataset: a map-style data set, e.g. `load_dataset("cppe-5", split="train")`.
        categories: the classes; None: those of the ClassLabel, or all values that occur.
        bbox_format: what the four numbers of a box are, in px: "xywh" or "xyxy", or another name of these (`to_xywh`).
        drop: kinds of findings whose rows are left out, and counted in the report, instead of being refused: of
            "size-mismatch" (cppe-5 has such rows), "image-size", "broken-image", "elongated" and "exif-ignored".

    Raises:
        ValueError: no such columns, or a name that isn't known. DataError: as `load_coco`.
    """
    if not {"image", "objects"} <= set(dataset.column_names or ()):
        raise ValueError(f"the data set needs columns image and objects, it has {dataset.column_names}; rename them")
    demand_droppable(drop)
    stored, inspection = inspect_objects(dataset, categories, bbox_format, drop)
    inspection.demand_ok()
    return data_of_objects(stored, inspection)


def inspect_objects(
    dataset: datasets.Dataset,
    categories: CategoryMap | None = None,
    bbox_format: str | enum.Enum = "xywh",
    drop: Collection[str] = (),
    names: Sequence[str] | None = None,
    rows: Sequence[int] | None = None,
) -> tuple[datasets.Dataset, Inspection]:
    """Judge a data set with the columns `image` and `objects`.

    Args:
        dataset, categories, bbox_format, drop: as of `load_objects`.
        names: the classes, where a column of numbers or texts doesn't list them.
        rows: what each row is called; None: 0, 1, 2, ...

    Returns:
        The images of the rows that are kept, not decoded, and what was found.
    """
    dataset = dataset.with_format(None)
    table = table_of_objects(dataset, categories, bbox_format, rows, names)
    stored = _images_of(dataset)
    sources = ({"path": None, "bytes": b""} if image is None else image for image in stored["image"])
    sizes, findings = check_files(table.file_names, table.sizes, sources, True, _identity(stored))
    dropped = {place.file for finding in findings if finding.kind in drop for place in finding.places}
    if dropped:
        kept = [row for row, name in enumerate(table.file_names) if name not in dropped]
        stored, sizes = stored.select(kept), sizes[kept]
        called = kept if rows is None else [rows[row] for row in kept]
        table = table_of_objects(dataset.select(kept), categories, bbox_format, called, names)
    inspection = inspect_table(table, sizes, categories, findings)
    return stored, replace(inspection, findings=tuple(for_rows(finding, drop) for finding in inspection.findings))


def _images_of(dataset: datasets.Dataset) -> datasets.Dataset:
    """The column of images, not decoded."""
    images = dataset.select_columns("image")
    try:
        return images.cast_column("image", datasets.Image(decode=False))
    except (TypeError, ValueError) as error:  # what Arrow and `datasets` raise
        raise ValueError(
            f"the column image holds {images.features['image']}, which is not one image a row: {error}"
        ) from error


def _identity(stored: datasets.Dataset) -> str:
    """What is another text if one of the images is another one; empty where that can't be told.

    Files of the library are never changed; images of paths may be, and those in memory have no name.
    """
    files = [entry["filename"] for entry in stored.cache_files]
    images = stored.with_format("arrow")[:]["image"] if files else None
    if images is None or pc.struct_field(images, "bytes").null_count:
        return ""
    sizes = pc.binary_length(pc.struct_field(images, "bytes")).to_pylist()  # tells which rows, and in which order
    return cache.digest(files, sizes, cache.stamps(files))


def data_of_objects(stored: datasets.Dataset, inspection: Inspection) -> DetectionData:
    """The data set of what `inspect_objects` found sound."""
    return _detection_data(stored.cast_column("image", datasets.Image()), inspection)


def _detection_data(images: datasets.Dataset, inspection: Inspection) -> DetectionData:
    """Put the image column and the inspected columns together, with a row per image."""
    table, rows = inspection.table, np.flatnonzero(inspection.listed)
    rows = rows[np.argsort(inspection.image_rows[rows], kind="stable")]
    counts = np.bincount(inspection.image_rows[rows], minlength=len(table.image_ids))
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    boxes = table.boxes[rows]
    fields: dict[str, pa.Array] = {
        "id": pa.array(table.annotation_ids[rows]),
        "bbox": pa.FixedSizeListArray.from_arrays(pa.array(boxes.reshape(-1)), 4),
        "category": pa.array(inspection.labels[rows]),
        "area": pa.array(inspection.areas[rows]),
        "iscrowd": pa.array(table.crowds[rows].astype(np.int64)),
    }
    if table.ignored:
        fields["ignore"] = pa.array(np.isin(rows, list(table.ignored)).astype(np.int64))
    lists = [pa.ListArray.from_arrays(offsets, values) for values in fields.values()]
    columns = {
        "image_id": pa.array(table.image_ids),
        "width": pa.array(inspection.sizes[:, 0]),
        "height": pa.array(inspection.sizes[:, 1]),
        "objects": pa.StructArray.from_arrays(lists, list(fields)),
    }
    annotations = datasets.Dataset.from_dict(columns, features=features_of(inspection.categories, bool(table.ignored)))
    dataset = datasets.concatenate_datasets([images, annotations], axis=1)
    data = DetectionData(dataset, inspection.categories, inspection.report())
    data.tell()
    return data
