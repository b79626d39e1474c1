"""Data sets as they come, given to the trainer: read, or refused with the way out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import IterableDataset

from crosskd_hf.data import DataError, load_detection_dataset
from crosskd_hf.data.streaming import stream_objects
from crosskd_hf.training.trainer import CrossKDTrainer
from tests.tiny_run import load_data, losses, make_detector, processor, settings

NAMES = ["circle", "square", "triangle", "star"]


def raw(part: datasets.Dataset, label: Any, as_list: bool = False) -> datasets.Dataset:
    """A part of the shapes as the Hub may have it: a list of structs or a struct of lists, classes of some kind."""
    rows: dict[str, list[Any]] = {"image": [], "objects": []}
    for row in part:
        names = [NAMES[number] for number in row["objects"]["category"]]
        classes = names if isinstance(label, datasets.Value) and label.dtype == "string" else row["objects"]["category"]
        if isinstance(label, datasets.ClassLabel):
            classes = [label.str2int(name) for name in names]
        objects = {"bbox": row["objects"]["bbox"], "categories": classes}
        entries = [{"bbox": box, "categories": number} for box, number in zip(*objects.values(), strict=True)]
        rows["objects"].append(entries if as_list else objects)
        rows["image"].append(row["image"])
    box = datasets.List(datasets.Value("float64"))
    one = {"bbox": box, "categories": label}
    inner = datasets.List(one) if as_list else {name: datasets.List(feature) for name, feature in one.items()}
    return datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image(), "objects": inner}))


KINDS = {
    "names of its own order": datasets.ClassLabel(names=NAMES[::-1]),
    "texts": datasets.Value("string"),
    "numbers": datasets.Value("int64"),
}


def trainer(out: Path, train: Any, evaluation: Any = None) -> CrossKDTrainer:
    """Without augmentation, whose seed is an image's id."""
    student = make_detector(2)
    student.config.category_ids = None  # numbers are labels
    args = settings(out, max_steps=2, methods=["crosskd"])
    return CrossKDTrainer(student, args, train, evaluation, processor(), train_transform=None)


@pytest.mark.parametrize("kind", KINDS)
def test_raw_data_are_read(kind: str, folder: Path, tmp_path: Path) -> None:
    train, val = load_data(folder)
    made = trainer(tmp_path, raw(train.dataset, KINDS[kind]), {"a": raw(val.dataset, KINDS[kind], True)})
    for got, wanted in ((made.train_dataset, train.dataset), (made.eval_dataset["a"], val.dataset)):
        assert got["width"][:] == wanted["width"][:]
        for key in ("bbox", "category"):
            assert [row[key] for row in got["objects"]] == [row[key] for row in wanted["objects"]]


def test_numbers_of_classes_are_told(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Numbers that begin at 1, of which the last one doesn't occur, would be other classes without a word."""
    data = raw(load_data(folder)[0].dataset, KINDS["numbers"])
    trainer(tmp_path, data)
    assert "Classes of raw data are numbers without names: 0 for 'circle' to 2 for 'triangle'." in caplog.text
    caplog.clear()
    trainer(tmp_path, raw(load_data(folder)[0].dataset, KINDS["texts"]))
    assert "numbers without names" not in caplog.text


def test_data_that_were_loaded_are_taken(folder: Path, tmp_path: Path) -> None:
    train, val = load_data(folder)
    made = trainer(tmp_path, train, val)
    assert made.train_dataset is train.dataset
    assert made.eval_dataset is val.dataset


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (load_detection_dataset, "are all splits of a data set; give one: data.train or data.val"),
        (str, "are a path, .* read it by load_detection_dataset"),
    ],
)
def test_what_is_no_data_set_is_refused(change: Any, words: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path, change(folder))


def test_a_raw_stream_trains_as_the_data_set_does(folder: Path, tmp_path: Path) -> None:
    train, val = load_data(folder)
    forms = zip(KINDS.values(), (False, True, False), strict=True)
    streams = [train.dataset, *(raw(train.dataset, label, as_list) for label, as_list in forms)]
    logged = []
    for number, stream in enumerate(streams):
        made = trainer(tmp_path / str(number), stream.to_iterable_dataset(), raw(val.dataset, KINDS["texts"]))
        made.train()
        logged.append(losses(made))
        assert made.evaluate()["eval_map"] >= 0
    assert len(logged[0]) == 2
    assert logged[1:] == logged[:1] * 3


def test_a_stream_is_checked_at_its_beginning_and_where_it_is_read(folder: Path) -> None:
    data = load_data(folder)[0].dataset
    known = raw(data, KINDS["texts"])
    with pytest.raises(DataError, match="unknown-category"):
        stream_objects(known.to_iterable_dataset(), NAMES[:1])
    with pytest.raises(ValueError, match="The stream has other classes than the student"):
        stream_objects(raw(data, KINDS["names of its own order"]).to_iterable_dataset(), ["ring", "cube"])
    with pytest.raises(ValueError, match="the stream needs columns"):
        stream_objects(known.rename_column("objects", "things").to_iterable_dataset(), NAMES)
    late = datasets.concatenate_datasets([known.select([0] * 64), known.map(_renamed)]).to_iterable_dataset()
    with pytest.raises(ValueError, match="Example 64 of the stream has an object of class 'ring'"):
        list(stream_objects(late, NAMES))


def test_a_stream_with_a_class_that_the_student_lacks_is_refused_at_once(folder: Path) -> None:
    data = load_data(folder)[0].dataset
    stream = raw(data, datasets.ClassLabel(names=["background", *NAMES])).to_iterable_dataset()
    with pytest.raises(ValueError, match="The stream has other classes.*Unknown are 1 classes, 'star'"):
        stream_objects(stream, NAMES[:3])
    rows = list(stream_objects(stream, NAMES))
    assert [row["objects"]["category"] for row in rows] == [row["objects"]["category"] for row in data]


def test_fields_that_only_some_objects_of_a_stream_have() -> None:
    """A stream of a generator has no features: its dicts may differ, and crowd marks of later ones were lost."""
    objects = [{"bbox": [1.0, 1, 5, 5], "category": "ring"}, {"bbox": [2.0, 1, 5, 5], "category": "ring", "iscrowd": 1}]
    rows = [{"image": PIL.Image.new("RGB", (40, 20)), "objects": given} for given in (objects, [], objects[::-1])]
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    assert [row["objects"]["iscrowd"] for row in stream_objects(stream, ["ring"])] == [[0, 1], [], [1, 0]]


@pytest.mark.parametrize("field", ["categories", "bbox"])
def test_objects_of_a_stream_that_lack_a_field_are_named(folder: Path, field: str) -> None:
    data = raw(load_data(folder)[0].dataset, KINDS["numbers"])
    faulty = data.map(lambda row: {"objects": {**row["objects"], field: row["objects"][field][:-1]}})
    late = datasets.concatenate_datasets([data.select([0] * 64), faulty]).to_iterable_dataset()
    with pytest.raises(ValueError, match="Example 64 of the stream has lists of different lengths in objects: {'bbox'"):
        list(stream_objects(late, NAMES))


def _renamed(row: dict[str, Any]) -> dict[str, Any]:
    return {"objects": {**row["objects"], "categories": ["ring"] * len(row["objects"]["categories"])}}


class Rows(IterableDataset[Any]):
    """A stream of torch."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


ROWS: dict[str, tuple[Any, str]] = {
    "pairs of torchvision": (lambda row: (row["image"], row["objects"]), "is a tuple"),
    "nothing": (lambda row: None, "is a NoneType"),
    "schema of the Hub": (
        lambda row: {"image": row["image"], "objects": {key: row["objects"][key] for key in ("bbox", "category")}},
        "lacks image_id, width, height, objects.id, objects.area, objects.iscrowd",
    ),
    "annotations": (lambda row: row | {"objects": None}, "lacks objects.id, objects.bbox, "),
    "arrays": (lambda row: row | {"image": np.array(row["image"])}, "has a ndarray for its image"),
    "tensors": (lambda row: row | {"image": torch.zeros(3, 8, 8)}, "has a Tensor for its image"),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_in_another_schema_are_refused(name: str, folder: Path, tmp_path: Path) -> None:
    """Those of a list or a data set of torch in the constructor, those of a stream of torch at their batch."""
    change, words = ROWS[name]
    rows = [change(row) for row in load_data(folder)[0].dataset]
    with pytest.raises(ValueError, match=f"A row of the data {words}.*make a datasets.Dataset of your own rows"):
        trainer(tmp_path, rows)
    made = trainer(tmp_path, Rows(rows))
    with pytest.raises(ValueError, match=f"A row of the data {words}"):
        made.train()


def test_rows_in_the_schema_train_wherever_they_are(folder: Path, tmp_path: Path) -> None:
    data = load_data(folder)[0].dataset
    logged = []
    for number, given in enumerate((data, list(data), Rows(list(data)))):
        made = trainer(tmp_path / str(number), given)
        made.train()
        logged.append(losses(made))
    assert len(logged[0]) == 2
    assert logged[1:] == logged[:1] * 2


def written(data: datasets.Dataset, change: Any) -> datasets.Dataset:
    """The data set in the schema as others may have written it, objects of each row changed."""
    rows = [{**row, "objects": change(row["objects"])} for row in data]
    return datasets.Dataset.from_list(rows, features=data.cast_column("image", datasets.Image()).features)


def as_corners(objects: dict[str, Any]) -> dict[str, Any]:
    return {**objects, "bbox": [[x, y, x + w, y + h] for x, y, w, h in objects["bbox"]]}


WRITTEN: dict[str, tuple[Any, str]] = {
    "corners": (as_corners, "corner-boxes"),
    "fractions": (lambda o: {**o, "bbox": [[value / 200 for value in box] for box in o["bbox"]]}, "relative-boxes"),
    "no numbers": (lambda o: {**o, "bbox": [[float("nan")] * 4 for _ in o["bbox"]]}, "degenerate-box"),
    "a label less": (lambda o: {**o, "category": o["category"][1:]}, "objects-length"),
}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("role", ["training", "evaluation"])
def test_boxes_in_the_schema_that_others_wrote_are_judged(name: str, role: str, folder: Path, tmp_path: Path) -> None:
    """Such a data set is taken as it is: nobody had looked at its boxes."""
    change, kind = WRITTEN[name]
    data = load_data(folder)[0].dataset
    data = data.select(list(range(len(data))) * 8)
    right = written(data, lambda objects: objects)
    assert trainer(tmp_path, right, right).train_dataset is right
    wrong = written(data, change)
    with pytest.raises(DataError) as error:
        trainer(tmp_path, *((wrong, None) if role == "training" else (right, wrong)))
    assert kind in {finding.kind for finding in error.value.findings}


def test_areas_of_0_that_stand_for_none(folder: Path, tmp_path: Path) -> None:
    rows = [
        {**row, "objects": {**row["objects"], "area": [0] * len(row["objects"]["area"])}}
        for row in load_data(folder)[0].dataset
    ]
    with pytest.raises(ValueError, match="objects of a row of the data have area 0, and would be left out of training"):
        trainer(tmp_path, rows)
    for row in rows:
        row["objects"]["area"] = [None] * len(row["objects"]["area"])
    trainer(tmp_path, rows).train()
