"""Every format of data sets, and broken forms of each."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, constants
from PIL import Image

import crosskd_hf
from crosskd_hf.data import DataError, DetectionSplits, check_detection_dataset, load_detection_dataset
from crosskd_hf.data.formats import FORMATS, Folder
from crosskd_hf.data.formats.folder import split_of
from crosskd_hf.data.writing import write_coco
from crosskd_hf.inference.evaluation import detect_dataset
from crosskd_hf.models import DetectionImageProcessor, GFLConfig
from crosskd_hf.models.gfl import GFLForObjectDetection
from tests.tiny_formats import (
    MAKERS,
    OBJECTS,
    SIZE,
    TRAIN,
    VAL,
    coco,
    make_coco,
    make_csv,
    make_imagefolder,
    make_saved,
    make_voc,
    make_yolo,
    picture,
    write,
    xml,
    yolo_line,
)

BCCD = Path(__file__).parents[3] / "shared/data/bccd"


def contents(data: DetectionSplits) -> dict[str, list[tuple[tuple[int, int], list[Any]]]]:
    """Of each split the images' sizes and objects, (class name, box) each, in px to a thousandth."""
    return {
        split: [
            (
                (row["width"], row["height"]),
                [
                    (data.categories.names[label], *np.round(box, 3).tolist())
                    for label, box in zip(row["objects"]["category"], row["objects"]["bbox"], strict=True)
                ],
            )
            for row in part.dataset.remove_columns("image")
        ]
        for split, part in data.items()
    }


EXPECTED = {
    split: [(SIZE, [(k, *map(float, box)) for k, *box in OBJECTS[name]]) for name in names]
    for split, names in (("train", TRAIN), ("val", VAL))
}


def faults(path: Path, **options: Any) -> dict[str, list[str]]:
    """Kind -> places of the errors that loading raises."""
    with pytest.raises(DataError) as caught:
        load_detection_dataset(path, **options)
    found: dict[str, list[str]] = {}
    for finding in caught.value.findings:
        found.setdefault(finding.kind, []).extend(map(str, finding.places))
    return found


def kinds(data: DetectionSplits, split: str = "train") -> dict[str, list[str]]:
    return {finding.kind: [str(place) for place in finding.places] for finding in data[split].report.findings}


@pytest.mark.parametrize("name", MAKERS)
class TestEveryFormat:
    def test_gives_the_same_data(self, name, tmp_path):
        data = crosskd_hf.load_detection_dataset(MAKERS[name](tmp_path / "data"))
        assert contents(data) == EXPECTED
        assert data.categories.names == ("cat", "dog")
        assert data.train.dataset[0]["image"].size == SIZE
        assert list(data) == ["train", "val"]
        assert data["validation"] is data.val

    def test_is_recognised_one_folder_deeper_and_by_its_name(self, name, tmp_path):
        MAKERS[name](tmp_path / "outer/my data äß")
        assert contents(load_detection_dataset(tmp_path / "outer")) == EXPECTED
        assert contents(load_detection_dataset(tmp_path / "outer/my data äß", format=name)) == EXPECTED

    def test_an_image_that_is_broken_is_named(self, name, tmp_path):
        root = MAKERS[name](tmp_path / "data")
        if name == "datasets":
            pytest.skip("its images lie in the tables")
        next(root.rglob("b.jpg")).write_bytes(b"no image")
        report = check_detection_dataset(root)
        assert not report.ok
        assert any(f.kind == "broken-image" and "b.jpg" in str(f.places[0]) for f in report.reports["train"].findings)

    def test_an_image_that_is_missing_is_named(self, name, tmp_path):
        root = MAKERS[name](tmp_path / "data")
        if name in ("datasets", "yolo"):
            pytest.skip("the images name the labels, not the other way round")
        next(root.rglob("b.jpg")).unlink()
        assert any("b" in place for place in faults(root)["missing-image"])


class TestRecognising:
    def test_two_formats_are_an_error_that_names_both(self, tmp_path):
        make_voc(make_coco(tmp_path))
        with pytest.raises(DataError, match=r"several-formats.*coco \(.*voc \("):
            load_detection_dataset(tmp_path)
        assert contents(load_detection_dataset(tmp_path, "voc")) == EXPECTED

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({}, "the folder is empty"),
            ({"a.jpg": None, "b/c.JPG": None}, "2 images.*images but no annotations"),
            ({"cat/a.jpg": None, "dog/b.jpg": None}, "classification, not detection"),
            ({"a.xml": "<annotation/>", "b.json": "[]"}, None),
            ({"a.json": "[1, 2]"}, "a.json is a list"),
            ({"a.json": '{"images": [}'}, "a.json is not json"),
            ({"a.jpg": None, "a.json": '{"shapes": [], "imagePath": "a.jpg"}'}, "of LabelMe"),
            ({"via.json": '{"a.jpg1": {"regions": []}}'}, "of VGG Image Annotator"),
            ({"a.json": '{"images": [], "info": 1}'}, "lacks annotations, categories"),
            ({"a.json": '[{"image": "a.jpg", "annotations": []}]'}, "of CreateML"),
            ({"a.json": '[{"image_id": 1, "score": 0.5}]'}, "list of detections"),
            ({"a.jpg": None, "labels.csv": "picture;kind\na;b"}, "begins with 'picture;kind'"),
            ({"a.jpg": None, "note.txt": "hello"}, "the .txt files neither"),
            ({"a.jpg": None, "a.xml": "<html/>"}, "no <annotation>"),
            ({"data.zip": "PK"}, "data.zip is an archive: unpack it"),
            ({"README.md": "hi"}, "neither images nor annotations"),
        ],
    )
    def test_a_folder_of_no_format_is_described(self, tmp_path, files, message):
        for name, text in files.items():
            picture(tmp_path / name) if text is None else write(tmp_path / name, text)
        if message is None:
            assert "missing-image" in faults(tmp_path)
            return
        with pytest.raises(DataError, match=f"(?s)layout.*{message}.*expected one of") as caught:
            load_detection_dataset(tmp_path)
        assert all(known.layout in str(caught.value) for known in FORMATS.values())

    def test_the_description_has_several_lines(self, tmp_path):
        """And a name of a file none of its own."""
        picture(tmp_path / "two\nlines" / "a.jpg")
        with pytest.raises(DataError) as caught:
            load_detection_dataset(tmp_path / "two\nlines")
        text = str(caught.value).splitlines()
        assert "two\\nlines is no detection data set of a known format." in text[0]
        assert text[1] == "  seen: 1 images"

    def test_annotations_without_images(self, tmp_path):
        write(tmp_path / "labels/a.xml", "<nothing/>")
        with pytest.raises(DataError, match="annotations but no images"):
            load_detection_dataset(tmp_path)

    @pytest.mark.parametrize("given", [None, 3, {"train": "a"}, ["a", None]])
    def test_what_is_no_path(self, given):
        with pytest.raises(ValueError, match="A (NoneType|int|dict) is given as the path of a data set"):
            load_detection_dataset(given)

    def test_a_mistyped_path_is_told_at_once(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the Hub was asked"))
        make_voc(tmp_path / "blood_cells")
        monkeypatch.chdir(tmp_path)
        for given in (tmp_path / "blood_cell", "./blood_cells2", "blood_cel", "blood_cells/JPEGImagse"):
            with pytest.raises(FileNotFoundError, match="no data set at .* Did you mean .*(blood_cells|JPEGImages)"):
                load_detection_dataset(given)
        with pytest.raises(FileNotFoundError, match=r"no data set at a/b/c.* is there and holds blood_cells"):
            load_detection_dataset("a/b/c")

    def test_the_hub_is_asked_for_what_may_be_an_id(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        saved = datasets.load_from_disk(str(make_saved(tmp_path / "elsewhere")))
        asked = []
        monkeypatch.setattr(HfApi, "dataset_info", lambda _, name, timeout: asked.append((name, timeout)))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets, "load_dataset", lambda name: {"owner/set": saved}[name])
        assert contents(load_detection_dataset("owner/set")) == EXPECTED
        assert contents(load_detection_dataset("hf://datasets/owner/set")) == EXPECTED
        with pytest.raises(FileNotFoundError, match="no folder owner/other here, and the Hub has no data set"):
            load_detection_dataset("owner/other")
        assert {name for name, _ in asked} == {"owner/set", "owner/other"}
        assert all(timeout <= 10 for _, timeout in asked)
        with pytest.raises(FileNotFoundError, match="There is no data set at owner/set"):
            load_detection_dataset(Path("owner/set"))  # a path is none of the Hub's names

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"format": "yollo"}, "is not known. Did you mean 'yolo'"),
            ({"format": "coco"}, "holds nothing of the format coco"),
            ({"bbox_format": "xyxy"}, "bbox_format has no effect on data of the format voc"),
            ({"drop": ["size-mismatch"]}, "drop has no effect"),
            ({"val_fraction": 1}, "must lie between"),
            ({"difficult": "maybe"}, "give 'ignore' or 'keep'"),
        ],
    )
    def test_options_without_effect(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            load_detection_dataset(make_voc(tmp_path), **options)

    def test_of_voc_alone(self, tmp_path):
        with pytest.raises(ValueError, match="one_based has no effect on data of the format yolo"):
            load_detection_dataset(make_yolo(tmp_path), one_based=True)

    @pytest.mark.parametrize(
        ("path", "split"),
        [("annotations/instances_train2017.json", "train"), ("valid/_annotations.csv", "val"), ("Validation", "val"),
         ("test-dev2017.json", "test"), ("training/x", "train"), ("trainer/x", None), ("testify.json", None),
         ("train/val", "val")],
    )  # fmt: skip
    def test_splits_are_words_of_a_path(self, path, split):
        assert split_of(path) == split


class TestSplits:
    def test_a_validation_split_is_drawn_by_name_and_seed(self, tmp_path):
        names = [f"img{number}" for number in range(20)]
        for name in names:
            picture(tmp_path / f"{name}.jpg")
            write(tmp_path / f"{name}.xml", xml(f"{name}.jpg", [("cat", 1, 1, 5, 5)]))
        first = load_detection_dataset(tmp_path)
        assert [len(part.dataset) for part in first.values()] == [16, 4]
        assert "4 of 20 images were drawn for one (val_fraction=0.2, seed=0)" in str(first)
        ids = set(first.val.dataset["image_id"])
        assert ids == set(load_detection_dataset(tmp_path).val.dataset["image_id"])
        assert ids != set(load_detection_dataset(tmp_path, seed=1).val.dataset["image_id"])
        picture(tmp_path / "img20.jpg")
        write(tmp_path / "img20.xml", xml("img20.jpg", [("cat", 1, 1, 5, 5)]))
        later = load_detection_dataset(tmp_path, val_fraction=4 / 21)
        assert len(ids & set(later.val.dataset["image_id"])) >= 3  # who was trained on is not tested on

    def test_the_same_images_in_every_format(self, tmp_path):
        voc, flat = make_voc(tmp_path / "voc"), make_coco(tmp_path / "coco")
        for name in ("train", "val", "trainval"):
            (voc / f"ImageSets/Main/{name}.txt").unlink()
        write(flat / "all.json", json.dumps(coco(TRAIN + VAL)))
        both = [load_detection_dataset(voc), load_detection_dataset(flat / "all.json")]
        assert contents(both[0]) == contents(both[1])

    def test_copies_of_one_photograph_stay_together(self, tmp_path):
        for number in range(12):
            name = f"p{number // 3}_jpg.rf.{number:032x}"
            picture(tmp_path / f"{name}.jpg")
            write(tmp_path / f"{name}.xml", xml(f"{name}.jpg", [("cat", 1, 1, 5, 5)]))
        data = load_detection_dataset(tmp_path, val_fraction=0.25)
        plain = [part.dataset.cast_column("image", datasets.Image(decode=False)) for part in data.values()]
        stems = [{Path(image["path"]).name.split("_")[0] for image in part["image"]} for part in plain]
        assert not stems[0] & stems[1]
        assert len(data.val.dataset) == 3

    def test_one_image(self, tmp_path):
        picture(tmp_path / "a.jpg")
        write(tmp_path / "a.xml", xml("a.jpg", OBJECTS["a"]))
        assert "too-few-images" in faults(tmp_path)

    def test_a_class_of_the_validation_split_alone(self, tmp_path):
        root = make_voc(tmp_path)
        write(root / "Annotations/d.xml", xml("d.jpg", [("emu", 1, 1, 5, 5)]))
        data = load_detection_dataset(root)
        assert data.categories.names == ("cat", "dog", "emu")
        assert kinds(data, "val")["category-untrained"] == ["emu"]

    def test_an_image_in_two_splits(self, tmp_path):
        root = make_yolo(tmp_path, "train: images/train\nval: [images/train, images/val]\nnames: [cat, dog]\n")
        data = load_detection_dataset(root)
        assert len(kinds(data, "val")["split-overlap"]) == 3

    @pytest.mark.parametrize("format", ["yolo", "csv"])
    def test_images_of_no_split_take_no_splits_place(self, tmp_path, format):
        """Neither that of a validation split that is there, nor that of one that is drawn."""
        if format == "yolo":
            root = make_yolo(tmp_path, "names: [cat, dog]\n")
            write(picture(root / "images/more/e.jpg").with_suffix(".txt"), yolo_line("cat", 1, 1, 5, 5))
        else:
            root = tmp_path
            rows = [(n, "train" if n in TRAIN else "val", *o) for n, objects in OBJECTS.items() for o in objects]
            rows += [("c", "train", *[""] * 5), ("e", "", "cat", 1, 1, 5, 5)]
            lines = [",".join(map(str, (f"{n}.jpg", *rest))) for n, *rest in rows]
            write(root / "boxes.csv", "\n".join(["filename,split,class,x,y,w,h", *lines]))
            for name in {row[0] for row in rows}:
                picture(root / f"{name}.jpg")
        data = load_detection_dataset(root)
        assert contents(data) == EXPECTED
        (place,) = kinds(data)["no-split"]
        assert place.endswith("e.jpg")
        for text in (root / "labels/val", root / "images/val"):
            for file in text.glob("*") if format == "yolo" else ():
                file.unlink()
        if format == "csv":
            write(root / "boxes.csv", (root / "boxes.csv").read_text().replace(",val,", ",train,"))
        drawn = load_detection_dataset(root)
        assert sum(len(part.dataset) for part in drawn.values()) == (3 if format == "yolo" else 4)
        assert "no-split" in kinds(drawn)

    def test_validation_data_alone(self, tmp_path):
        root = make_coco(tmp_path)
        data = load_detection_dataset(root / "annotations/instances_val2017.json")
        assert list(data) == ["val"]
        with pytest.raises(KeyError, match="has no split 'train', only val"):
            data.train  # noqa: B018

    def test_several_roots_are_joined_by_class_name(self, tmp_path):
        first, second = make_voc(tmp_path / "one"), make_saved(tmp_path / "two/saved")
        third = make_yolo(tmp_path / "three", "train: images/train\nval: images/val\nnames: [Cat, horse]\n")
        data = load_detection_dataset([first, second, third])
        assert data.categories.names == ("cat", "dog", "horse")
        parts = contents(data)
        assert parts["train"][:6] == EXPECTED["train"] * 2
        assert [entry[0] for entry in parts["train"][6][1]] == ["cat", "horse"]
        assert [len(part.dataset) for part in data.values()] == [9, 3]
        for part in data.values():
            assert len(set(part.dataset["image_id"])) == len(part.dataset)
            ids = [number for row in part.dataset["objects"] for number in row["id"]]
            assert len(set(ids)) == len(ids) == part.report.objects
            assert all(row["image"].size == SIZE for row in part.dataset)


class TestCoco:
    def test_annotations_without_ids_get_ids(self, tmp_path):
        data = load_detection_dataset(make_coco(tmp_path, ids=False))
        assert contents(data) == EXPECTED
        given = kinds(data)["annotation-id"]
        assert given[2] == "annotations/instances_train2017.json annotations[2] annotation 3"

    def test_faults_name_the_json(self, tmp_path):
        root = make_coco(tmp_path)
        content = coco(TRAIN)
        content["annotations"][1]["image_id"] = "one"
        content["annotations"][2]["bbox"] = [0, 0, -1, 5]
        content["images"].append({"id": 9, "file_name": "nowhere.jpg"})
        write(root / "annotations/instances_train2017.json", json.dumps(content))
        found = faults(root)
        assert found["json"] == ["annotations/instances_train2017.json annotations[1]: 'one'"]
        assert found["missing-image"] == ["annotations/instances_train2017.json: nowhere.jpg: no such image"]

    @pytest.mark.parametrize("prefix", ["images/train/", "C:\\data\\", "../../"])
    def test_folders_of_other_machines_are_left_off(self, tmp_path, prefix):
        root = make_coco(tmp_path)
        write(root / "annotations/instances_train2017.json", json.dumps(coco(TRAIN, prefix)))
        assert contents(load_detection_dataset(root)) == EXPECTED

    def test_an_image_of_another_split_is_not_taken(self, tmp_path):
        root = make_coco(tmp_path)
        (root / "train2017/b.jpg").rename(root / "val2017/b.jpg")
        assert faults(root)["missing-image"] == ["annotations/instances_train2017.json: b.jpg: no such image"]

    def test_a_json_of_no_split_is_told(self, tmp_path):
        root = make_coco(tmp_path)
        write(root / "annotations/more.json", json.dumps(coco(TRAIN)))
        data = load_detection_dataset(root)
        assert contents(data) == EXPECTED
        assert "left out beside these: annotations/more.json" in data.notes

    def test_two_jsons_of_one_split(self, tmp_path):
        root = make_coco(tmp_path)
        write(root / "annotations/instances_train_old.json", json.dumps(coco(TRAIN)))
        assert len(faults(root)["several-files"]) == 2

    def test_a_json_that_is_cut_short(self, tmp_path):
        root = make_coco(tmp_path)
        path = root / "annotations/instances_train2017.json"
        write(path, path.read_text()[:-40])
        assert faults(root)["json"] == ["annotations/instances_train2017.json"]


class TestWriting:
    def test_marks_and_images_that_come_twice(self, tmp_path):
        """What was ignored stays so, and a list that has an image twice can be written, with links and copies."""
        root = make_coco(tmp_path / "given")
        path = root / "annotations/instances_train2017.json"
        content = json.loads(path.read_text())
        content["annotations"][1]["ignore"] = 1
        content["images"].append({**content["images"][0], "id": 77})
        path.write_text(json.dumps(content))
        data = load_detection_dataset(root)
        for how in ("link", "copy"):
            write_coco(data, tmp_path / how, how)
            again = load_detection_dataset(tmp_path / how)
            assert contents(again) == contents(data)
            assert [row["ignore"] for row in again.train.dataset["objects"]] == [[0, 1], [0], [], []]


class TestVoc:
    def test_one_is_subtracted_for_pascal_voc_alone(self, tmp_path):
        own = load_detection_dataset(make_voc(tmp_path / "own", database="The VOC2007 Database"))
        box = own.train.dataset[0]["objects"]["bbox"][0]
        assert box == [3, 1, 8, 6]
        assert "1 is subtracted from the pixel numbers of 4 of 4 xml files" in str(own)
        other = load_detection_dataset(make_voc(tmp_path / "other"))
        assert other.train.dataset[0]["objects"]["bbox"][0] == [4, 2, 8, 6]
        assert "pixel numbers are taken as they are" in str(other)
        told = load_detection_dataset(tmp_path / "other", one_based=True)
        assert told.train.dataset[0]["objects"]["bbox"][0] == [3, 1, 8, 6]
        kept = load_detection_dataset(tmp_path / "own", one_based=False)
        assert kept.train.dataset[0]["objects"]["bbox"][0] == [4, 2, 8, 6]

    def test_difficult_objects(self, tmp_path):
        root = make_voc(tmp_path, difficult="1")
        write(root / "Annotations/b.xml", xml("b.jpg", OBJECTS["b"]))
        data = load_detection_dataset(root)
        assert [row["iscrowd"] for row in data.train.dataset["objects"]] == [[1, 1], [0], []]
        assert kinds(data)["difficult"] == ["Annotations/a.xml:5: cat", "Annotations/a.xml:15: dog"]
        kept = load_detection_dataset(root, difficult="keep")
        assert [row["iscrowd"] for row in kept.train.dataset["objects"]] == [[0, 0], [0], []]

    def test_missing_lists_size_and_endings(self, tmp_path):
        root = make_voc(tmp_path)
        for path in (root / "ImageSets/Main").iterdir():
            path.unlink()
        write(root / "Annotations/a.xml", xml("a", OBJECTS["a"], size=""))
        write(
            root / "Annotations/b.xml",
            xml("B.JPEG", OBJECTS["b"], size="<size><width>0</width><height>0</height></size>"),
        )
        (root / "JPEGImages/b.jpg").rename(root / "JPEGImages/b.JPG")
        data = load_detection_dataset(root)
        assert sorted(str(row) for part in contents(data).values() for row in part) == sorted(
            str(row) for part in EXPECTED.values() for row in part
        )

    @pytest.mark.parametrize(
        ("encoding", "name"),
        [("utf-16", "Käse"), ("gb2312", "猫"), ("shift_jis", "犬"), ("iso-8859-1", "Käse"), ("utf-8-sig", "猫")],
    )
    def test_encodings(self, tmp_path, encoding, name):
        for number in range(2):
            picture(tmp_path / f"{number}.jpg")
            head = f'<?xml version="1.0" encoding="{encoding.removesuffix("-sig")}"?>\n'
            text = head + xml(f"{number}.jpg", [(name, 4, 2, 8, 6)])
            (tmp_path / f"{number}.xml").write_bytes(text.encode(encoding))
        assert load_detection_dataset(tmp_path).categories.names == (name,)

    def test_an_encoding_that_the_text_is_not_in(self, tmp_path):
        make_voc(tmp_path)
        (tmp_path / "Annotations/a.xml").write_bytes(b'<?xml version="1.0" encoding="big5"?><annotation>\xff\xff')
        with pytest.raises(DataError, match=r"a\.xml: 'big5' codec can't decode"):
            load_detection_dataset(tmp_path)

    def test_floats_parts_and_order_of_tags(self, tmp_path):
        root = make_voc(tmp_path)
        part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
        box = "<bndbox><xmax>12.5</xmax><xmin>4.5</xmin><ymax>8</ymax><ymin>2.25</ymin></bndbox>"
        text = f"<annotation><object>{part}<name> cat </name>{box}</object></annotation>"
        write(root / "Annotations/a.xml", text)
        assert contents(load_detection_dataset(root))["train"][0][1] == [("cat", 4.5, 2.25, 8, 5.75)]

    def test_faults_are_named_with_file_and_line(self, tmp_path):
        root = make_voc(tmp_path)
        write(root / "Annotations/a.xml", xml("a.jpg", OBJECTS["a"]).replace("<name>dog</name>", ""))
        write(root / "Annotations/b.xml", "<annotation>\n<object>\n</annotation>")
        write(root / "Annotations/d.xml", '<!DOCTYPE x [<!ENTITY y "z">]>\n<annotation/>')
        write(root / "ImageSets/Main/train.txt", "a\nb\nc\nzebra\n")
        (root / "JPEGImages/c.jpg").unlink()
        found = faults(root)
        assert found["voc-object"] == ["Annotations/a.xml:15: it has difficult, bndbox"]
        assert found["annotation-file"][0].startswith("Annotations/b.xml:3: mismatched tag")
        assert found["annotation-file"][1] == "Annotations/d.xml: it declares entities of its own"
        assert found["missing-annotation"] == ["ImageSets/Main/train.txt:4: zebra"]
        assert found["missing-image"] == ["Annotations/c.xml: no such image: c.jpg"]

    def test_boxes_that_cannot_be_read(self, tmp_path):
        root = make_voc(tmp_path)
        write(root / "Annotations/a.xml", xml("a.jpg", OBJECTS["a"]).replace("<xmin>4</xmin>", "<xmin>left</xmin>"))
        data = load_detection_dataset(root)
        assert kinds(data)["degenerate-box"][0].startswith("Annotations/a.xml:8: {'xmin': 'left', 'ymin': '2'")

    def test_two_boxes_of_one_object(self, tmp_path):
        root = make_voc(tmp_path)
        text = xml("d.jpg", [("cat", 10, 5, 4, 4)])
        box = text[text.index("<bndbox>") : text.index("</object>")]
        write(root / "Annotations/d.xml", text.replace(box, box + box.replace(">10<", ">12<")))
        assert contents(load_detection_dataset(root))["val"][0][1] == [("cat", 10, 5, 4, 4), ("cat", 12, 5, 2, 4)]

    def test_filename_of_another_image(self, tmp_path):
        root = make_voc(tmp_path)
        write(root / "Annotations/a.xml", xml("b.jpg", OBJECTS["a"]))
        data = load_detection_dataset(root)
        assert contents(data) == EXPECTED
        assert kinds(data)["voc-filename"] == ["Annotations/a.xml: <filename> b.jpg, image JPEGImages/a.jpg"]

    def test_names_of_folders_and_paths_as_filename(self, tmp_path):
        for name, objects in OBJECTS.items():
            split = "train" if name in TRAIN else "test"
            picture(tmp_path / f"{split}/images/photo {name}.png")
            write(tmp_path / f"{split}/labels/x{name}.xml", xml(f"C:\\me\\photo {name}.png", objects))
        data = load_detection_dataset(tmp_path)
        assert list(data) == ["train", "val", "test"]
        assert contents(data)["test"] == EXPECTED["val"]

    def test_unlisted_files_are_counted(self, tmp_path):
        root = make_voc(tmp_path)
        write(root / "ImageSets/Main/train.txt", "a\nb\n")
        found = kinds(load_detection_dataset(root))
        assert found["unlisted"] == ["Annotations/c.xml"]
        assert found["unannotated"] == ["JPEGImages/c.jpg"]


class TestYolo:
    @pytest.mark.parametrize(
        "yaml",
        [
            "train: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n",
            "train: ../images/train\nval: ../images/val\nnc: 2\nnames: ['cat', 'dog']\n",
            "path: ../datasets/pets  # as Ultralytics' own\ntrain: images/train\nval: images/val\ntest:\n"
            "names: {0: cat, 1: dog}",
            "train: [images/train]\nval: ./val.txt\nnames: [cat, dog]\n",
            "names: [cat, dog]\n",
            "train: images/train\nval: images/val\nnc: 2\nnames: 'cat, dog'\n",
            "train: /content/pets/images/train\nval: C:\\me\\pets\\images\\val\nnames: [cat, dog]\n",
        ],
    )
    def test_forms_of_the_yaml(self, tmp_path, yaml):
        root = make_yolo(tmp_path / "data", yaml)
        write(root / "val.txt", "./images/val/d.jpg\n")
        assert contents(load_detection_dataset(root)) == EXPECTED
        assert contents(load_detection_dataset(root / "data.yaml")) == EXPECTED

    def test_a_path_of_another_machine_is_noted(self, tmp_path):
        root = make_yolo(tmp_path, "train: /content/pets/images/train\nval: images/val\nnames: [cat, dog]\n")
        found = kinds(load_detection_dataset(root))["yolo-elsewhere"]
        assert found == ["data.yaml:1: train: /content/pets/images/train, read images/train"]

    def test_an_absolute_path(self, tmp_path):
        root = make_yolo(tmp_path / "data", None)
        text = f"path: {root}\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n"
        assert contents(load_detection_dataset(write(tmp_path / "elsewhere/pets.yaml", text))) == EXPECTED

    @pytest.mark.parametrize("names", ["coco.names", "sub/coco.txt"])
    def test_a_file_of_names_in_the_yaml(self, tmp_path, names):
        root = make_yolo(tmp_path, f"train: images/train\nval: images/val\nnames: {names}\n")
        assert faults(root)["yolo-yaml"] == [f"data.yaml:3: names: {names!r}"]
        write(root / names, "cat\ndog\n")
        assert contents(load_detection_dataset(root)) == EXPECTED

    def test_several_yamls(self, tmp_path):
        yaml = (make_yolo(tmp_path / "one") / "data.yaml").read_text()
        write(tmp_path / "one/dataset.yaml", yaml)  # beside data.yaml
        write(tmp_path / "one/more/data.yaml", yaml)  # deeper
        assert contents(load_detection_dataset(tmp_path / "one")) == EXPECTED
        (tmp_path / "one/data.yaml").rename(tmp_path / "one/pets.yaml")
        assert faults(tmp_path / "one")["several-files"] == ["dataset.yaml", "pets.yaml"]
        assert contents(load_detection_dataset(tmp_path / "one/pets.yaml")) == EXPECTED
        make_yolo(tmp_path / "sets/a")
        make_yolo(tmp_path / "sets/b")
        assert faults(tmp_path / "sets")["several-files"] == ["a/data.yaml", "b/data.yaml"]

    @pytest.mark.parametrize(("images", "without", "severity"), [(20, 9, "note"), (20, 11, "warning"), (6, 5, "note")])
    def test_images_without_a_label_file_by_share(self, tmp_path, images, without, severity):
        for number in range(images):
            path = picture(tmp_path / f"train/images/{number}.jpg")
            if number >= without:
                write(tmp_path / f"train/labels/{number}.txt", yolo_line("cat", 1, 1, 5, 5))
            picture(tmp_path / f"val/images/v{path.name}")
            write(tmp_path / f"val/labels/v{number}.txt", yolo_line("cat", 1, 1, 5, 5))
        report = load_detection_dataset(tmp_path).train.report
        (found,) = [finding for finding in report.findings if finding.kind == "no-label-file"]
        assert (found.severity, len(found.places)) == (severity, without)

    def test_an_unused_background_is_no_class(self, tmp_path):
        yaml = "train: images/train\nval: images/val\nnames: [cat, dog, __background__]\n"
        data = load_detection_dataset(make_yolo(tmp_path, yaml))
        assert data.categories.names == ("cat", "dog")
        assert kinds(data)["category-left-out"] == ["__background__"]
        write(tmp_path / "labels/train/a.txt", "2 0.5 0.5 0.5 0.5\n")
        assert load_detection_dataset(tmp_path).categories.names == ("cat", "dog", "__background__")

    def test_a_class_called_no(self, tmp_path):
        root = make_yolo(tmp_path, "train: images/train\nval: images/val\nnames: [no, on]\n")
        assert load_detection_dataset(root).categories.names == ("no", "on")

    def test_names_of_a_text_file(self, tmp_path):
        root = make_yolo(tmp_path, None)
        assert kinds(load_detection_dataset(root))["no-class-names"] == ["data.yaml"]
        write(root / "labels/classes.txt", "cat\ndog\n")
        assert contents(load_detection_dataset(root)) == EXPECTED

    def test_labels_beside_the_images_and_upper_case(self, tmp_path):
        for name, objects in OBJECTS.items():
            picture(tmp_path / f"my photo {name}.JPG", format="JPEG")
            write(tmp_path / f"my photo {name}.txt", "\n".join(yolo_line(*entry) for entry in objects))
        write(tmp_path / "classes.txt", "cat\ndog")
        data = load_detection_dataset(tmp_path)
        assert sum(part.report.objects for part in data.values()) == 4
        assert data.categories.names == ("cat", "dog")

    def test_darknet(self, tmp_path):
        for name, objects in OBJECTS.items():
            picture(tmp_path / f"obj_train_data/{name}.jpg")
            write(tmp_path / f"obj_train_data/{name}.txt", "\n".join(yolo_line(*entry) for entry in objects))
        for split, names in (("train", TRAIN), ("valid", VAL)):
            write(tmp_path / f"{split}.txt", "\n".join(f"data/obj_train_data/{name}.jpg" for name in names))
        write(tmp_path / "obj.names", "cat\ndog\n")
        assert contents(load_detection_dataset(tmp_path)) == EXPECTED

    def test_polygons_and_a_sixth_number(self, tmp_path):
        root = make_yolo(tmp_path)
        first = "0 0.1 0.1 0.3 0.1 0.3 0.4 0.2 0.4"
        write(root / "labels/train/a.txt", f"{first}\n{yolo_line(*OBJECTS['a'][1])} 0.93\n\n")
        data = load_detection_dataset(root)
        assert contents(data) == EXPECTED
        found = kinds(data)
        assert found["polygon"] == ["labels/train/a.txt:1"]
        assert found["extra-column"] == ["labels/train/a.txt:2"]
        assert found["no-label-file"] == ["images/train/c.jpg"]

    def test_roboflow_darknet(self, tmp_path):
        """Labels beside the images, and the same list of classes in the folder of each split."""
        for split, names in (("train", TRAIN), ("valid", VAL)):
            write(tmp_path / f"{split}/_darknet.labels", "cat\ndog\n")
            for name in names:
                picture(tmp_path / f"{split}/{name}.jpg")
                write(tmp_path / f"{split}/{name}.txt", "\n".join(yolo_line(*entry) for entry in OBJECTS[name]))
        assert contents(load_detection_dataset(tmp_path)) == EXPECTED

    def test_key_points(self, tmp_path):
        root = make_yolo(tmp_path, "train: images/train\nval: images/val\nkpt_shape: [2, 3]\nnames: [cat, dog]\n")
        write(root / "labels/train/b.txt", yolo_line(*OBJECTS["b"][0]) + " 0.1 0.1 2 0.2 0.2 1")
        assert contents(load_detection_dataset(root)) == EXPECTED

    @pytest.mark.parametrize(
        ("line", "kind"),
        [
            ("0 0.5 0.5 0.5", "yolo-line"),
            ("cat 0.5 0.5 0.5 0.5", "yolo-line"),
            ("0,0.5,0.5,0.5,0.5", "yolo-line"),
            ("0.5 0.5 0.5 0.5 0.5", "yolo-line"),
            ("0 0.5 0.5 nan 0.5", "yolo-line"),
            ("-1 0.5 0.5 0.5 0.5", "yolo-line"),
            (f"{10**40} 0.5 0.5 0.5 0.5", "yolo-line"),
            ("0 0.5 0.5 0.5 0.5 0.5 0.5 0.5", "yolo-line"),
            ("0 120 80 30 20", "yolo-pixels"),
            ("7 0.5 0.5 0.5 0.5", "unknown-category"),
        ],
    )
    def test_faulty_lines_are_named(self, tmp_path, line, kind):
        root = make_yolo(tmp_path)
        write(root / "labels/train/a.txt", f"{yolo_line(*OBJECTS['a'][0])}\n{line}\n")
        assert faults(root)[kind][0].startswith("labels/train/a.txt:2")

    @pytest.mark.parametrize(
        ("yaml", "kind", "place"),
        [
            ("train: imgs\nval: images/val\nnames: [cat, dog]\n", "yolo-path", "data.yaml:1: train: imgs, looked"),
            ("train: images/train\nval: images/val\nnc: 3\nnames: [cat, dog]\n", "class-count", "data.yaml:3: nc 3"),
            ("train: images/train\nval: a: b\nnames: [cat, dog]\n", "yolo-yaml", "data.yaml:2"),
            ("train: images/train\nval: images/val\nnames: {cat: 0}\n", "yolo-yaml", "data.yaml:3"),
            ("train: list.txt\nval: images/val\nnames: [cat, dog]\n", "missing-image", "list.txt:2: gone.jpg"),
        ],
    )
    def test_faulty_yaml(self, tmp_path, yaml, kind, place):
        root = make_yolo(tmp_path, yaml)
        write(root / "list.txt", "images/train/a.jpg\ngone.jpg\n")
        assert faults(root)[kind][0].startswith(place)

    def test_a_test_split_that_is_not_there_is_warned_of(self, tmp_path):
        root = make_yolo(tmp_path, "train: images/train\nval: images/val\ntest: images/test\nnames: [cat, dog]\n")
        assert kinds(load_detection_dataset(root))["yolo-split"][0].startswith("data.yaml:3")

    def test_an_image_that_a_list_has_twice(self, tmp_path):
        root = make_yolo(tmp_path, "train: train.txt\nval: images/val\nnames: [cat, dog]\n")
        write(root / "train.txt", "\n".join(f"./images/train/{name}.jpg" for name in "abca"))
        (place,) = kinds(load_detection_dataset(root))["duplicate-file"]
        assert place == "images/train/a.jpg: 2 times"

    def test_labels_that_are_not_found(self, tmp_path):
        root = make_yolo(tmp_path)
        (root / "labels").rename(root / "txt")
        assert contents(load_detection_dataset(root)) == EXPECTED  # in an odd place, but without a choice
        for path in root.rglob("*.txt"):
            path.unlink()
        assert faults(root)["no-labels"][0] == "train: 3 images, such as images/train/a.jpg"

    def test_labels_of_no_image(self, tmp_path):
        root = make_yolo(tmp_path)
        write(root / "labels/train/z.txt", "0 0.5 0.5 0.1 0.1\n")
        assert kinds(load_detection_dataset(root))["label-without-image"] == ["labels/train/z.txt"]


class TestCsv:
    @pytest.mark.parametrize(
        ("header", "row"),
        [
            ("image_path;x1;y1;x2;y2;label", "images/a.jpg;4;2;12;8;cat"),
            ("ImageID,LabelName,XMin,XMax,YMin,YMax", "a,cat,0.1,0.3,0.1,0.4"),
            ("file_name\tclass\tx\ty\tw\th", "a.jpg\tcat\t4\t2\t8\t6"),
            ("\ufeffimage_id,width,height,bbox,source,category", 'a,40,20,"[4, 2, 8, 6]",x,cat'),
            ("filename,left,top,right,bottom,Class Name", "a.jpg,4.0,2.0,12.0,8.0,cat"),
            ("image,label,xmin,ymin,width,height", "a.jpg,cat,4,2,8,6"),
            ("filename,x_center,y_center,width,height,label", "a.jpg,8,5,8,6,cat"),
            ("path,label,cx,cy,w,h", "images/a.jpg,cat,0.2,0.25,0.2,0.3"),
            ("", "images/a.jpg,4,2,12,8,cat"),
        ],
    )
    def test_headers(self, tmp_path, header, row):
        for name in ("a", "b"):
            picture(tmp_path / f"images/{name}.jpg")
        lines = [header] if header else []
        write(
            tmp_path / "boxes.csv",
            "\n".join([*lines, row, row.replace("a", "b", 1) if row[0] == "a" else row.replace("/a", "/b")]),
        )
        data = load_detection_dataset(tmp_path)
        assert [part[0] for part in contents(data).values()] == [(SIZE, [("cat", 4, 2, 8, 6)])] * 2

    def test_a_column_for_the_split(self, tmp_path):
        rows = ["filename,split,class,xmin,ymin,xmax,ymax"]
        for name, objects in OBJECTS.items():
            picture(tmp_path / f"{name}.jpg")
            split = "TRAIN" if name in TRAIN else "Validation"
            rows += [f"{name}.jpg,{split},{k},{x},{y},{x + w},{y + h}" for k, x, y, w, h in objects] or [
                f"{name}.jpg,{split},,,,,"
            ]
        write(tmp_path / "boxes.csv", "\n".join(rows))
        assert contents(load_detection_dataset(tmp_path)) == EXPECTED

    def test_vgg_image_annotator(self, tmp_path):
        with (tmp_path / "via.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            numbers = ["file_size", "file_attributes", "region_count", "region_id"]
            writer.writerow(["filename", *numbers, "region_shape_attributes", "region_attributes"])
            shapes = [
                ({"name": "rect", "x": 4, "y": 2, "width": 8, "height": 6}, {"type": "cat"}),
                ({"name": "polygon", "all_points_x": [20, 30, 25], "all_points_y": [10, 12, 15]}, {"kind": "dog"}),
                ({"name": "circle", "cx": 10, "cy": 10, "r": 5}, {"class": {"dog": True}}),
            ]
            for shape, attributes in shapes:
                writer.writerow(["a.jpg", 1, "{}", 3, 0, json.dumps(shape), json.dumps(attributes)])
            writer.writerow(["b.jpg", 1, "{}", 0, 0, json.dumps(shapes[0][0]), '{"class": "cat"}'])
            writer.writerow(["c.jpg", 1, "{}", 0, 0, "{}", "{}"])
        for name in ("a", "b", "c"):
            picture(tmp_path / f"{name}.jpg")
        rows = [row for part in contents(load_detection_dataset(tmp_path)).values() for row in part]
        objects = [("cat", 4, 2, 8, 6), ("dog", 20, 10, 10, 5), ("dog", 5, 5, 10, 10)]
        assert sorted(rows) == [(SIZE, []), (SIZE, objects[:1]), (SIZE, objects)]

    def test_faults_are_named_with_file_and_line(self, tmp_path):
        root = make_csv(tmp_path)
        with (root / "train.csv").open("a") as file:
            file.write(
                "\nzebra.jpg,40,20,cat,1,1,2,2\na.jpg,40,20,,1,1,2,2\nb.jpg,40,20,cat,,,,\nb.jpg,40,20,cat,x,1,2,2\n"
            )
        found = faults(root)
        assert found["missing-image"] == ["train.csv:6: zebra.jpg: no such image"]
        assert found["csv-row"] == ["train.csv:7: box 1, 1, 2, 2, no class", "train.csv:8: class cat, no box"]
        report = check_detection_dataset(root).reports["train"]
        assert str(report.dropped[0]) == "train.csv:9: 'x, 1, 2, 2' not four finite numbers"

    @pytest.mark.parametrize(
        ("header", "row"),
        [
            ("filename,class,x,y,w,h,width,height", "cat,4,2,8,6,40,20"),
            ("filename,class,width,height,xmin,ymin,w,h", "cat,40,20,4,2,8,6"),
            ("filename,class,x_center,y_center,w,h,width,height", "cat,8,5,8,6,40,20"),
            ("filename,class,left,top,w,h,width,height", "cat,4,2,8,6,40,20"),
        ],
    )
    def test_sides_of_boxes_beside_those_of_images(self, tmp_path, header, row):
        for name in "ab":
            picture(tmp_path / f"{name}.jpg")
        write(tmp_path / "boxes.csv", f"{header}\na.jpg,{row}\nb.jpg,{row}\n")
        for part in contents(load_detection_dataset(tmp_path)).values():
            assert part == [(SIZE, [("cat", 4, 2, 8, 6)])]

    @pytest.mark.parametrize("column", ["iscrowd", "IsGroupOf"])
    def test_crowd_regions(self, tmp_path, column):
        flags = ["0", "1", "", "true", "False", "-1"]
        picture(tmp_path / "a.jpg")
        picture(tmp_path / "b.jpg")
        rows = [f"{name}.jpg,cat,{x},1,5,5,{flag}" for name in "ab" for x, flag in enumerate(flags)]
        write(tmp_path / "boxes.csv", "\n".join([f"filename,class,x,y,w,h,{column}", *rows]))
        data = load_detection_dataset(tmp_path)
        assert data.train.dataset[0]["objects"]["iscrowd"] == [0, 1, 0, 1, 0, 0]
        write(
            tmp_path / "boxes.csv", f"filename,class,x,y,w,h,{column}\na.jpg,cat,1,1,5,5,maybe\nb.jpg,cat,1,1,5,5,0\n"
        )
        assert faults(tmp_path)["csv-row"] == ["boxes.csv:2: crowd maybe; needed is 0 or 1"]

    def test_a_comma_in_a_number(self, tmp_path):
        for name in "ab":
            picture(tmp_path / f"{name}.jpg")
        write(tmp_path / "boxes.csv", "filename;class;x;y;w;h\na.jpg;cat;0,5;1;9,25;5\nb.jpg;cat;1;1;5;5,0\n")
        data = load_detection_dataset(tmp_path)
        assert sorted(box for part in contents(data).values() for _, boxes in part for box in boxes) == [
            ("cat", 0.5, 1, 9.25, 5), ("cat", 1, 1, 5, 5)]  # fmt: skip

    def test_a_cell_that_is_too_long(self, tmp_path):
        root = make_csv(tmp_path)
        with (root / "train.csv").open("a") as file:
            file.write(f"\na.jpg,40,20,{'x' * 140_000},1,1,2,2\n")
        assert faults(root)["annotation-file"] == ["train.csv: field larger than field limit (131072)"]

    def test_two_files_of_one_split(self, tmp_path):
        root = make_csv(tmp_path)
        (root / "train2.csv").write_text((root / "train.csv").read_text())
        assert len(faults(root)["several-files"]) == 3


class TestImageFolder:
    def test_lists_of_objects_numbers_corners_and_csv(self, tmp_path):
        for name in ("a", "b"):
            picture(tmp_path / f"{name}.jpg")
        objects = [{"bbox": [4, 2, 12, 8], "label": 3}, {"bbox": [0, 0, 40, 20], "label": 12}]
        with (tmp_path / "metadata.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([["file_name", "objects"], ["a.jpg", json.dumps(objects)], ["b.jpg", str(objects)]])
        data = load_detection_dataset(tmp_path, bbox_format="xyxy")
        assert data.categories.names == ("3", "12")
        assert [part[0] for part in contents(data).values()] == [(SIZE, [("3", 4, 2, 8, 6), ("12", 0, 0, 40, 20)])] * 2

    @pytest.mark.parametrize(("flag", "crowd"), [(True, 1), (False, 0), (None, 0), (1.0, 1), (0, 0)])
    def test_crowd_regions(self, tmp_path, flag, crowd):
        root = make_imagefolder(tmp_path)
        objects = {"bbox": [[4, 2, 8, 6]] * 2, "category": ["cat", "dog"], "iscrowd": [flag, 0]}
        write(root / "train/metadata.jsonl", json.dumps({"file_name": "a.jpg", "objects": objects}))
        assert load_detection_dataset(root).train.dataset[0]["objects"]["iscrowd"] == [crowd, 0]
        objects["iscrowd"] = ["yes", 0]
        write(root / "train/metadata.jsonl", json.dumps({"file_name": "a.jpg", "objects": objects}))
        assert "iscrowd of an object is 'yes'" in faults(root)["metadata-row"][0]

    def test_numbers_of_classes(self, tmp_path):
        root = make_imagefolder(tmp_path)
        for split, name, number in (("train", "a", 2.0), ("validation", "d", 2)):
            row = {"file_name": f"{name}.jpg", "objects": {"bbox": [[4, 2, 8, 6]], "category": [number]}}
            write(root / f"{split}/metadata.jsonl", json.dumps(row))
        assert load_detection_dataset(root).categories.names == ("2",)
        for number in (2.5, True):
            row["objects"]["category"] = [number]
            write(root / "validation/metadata.jsonl", json.dumps(row))
            assert faults(root)["metadata-row"] == [f"validation/metadata.jsonl:1: category {number}"]

    def test_faults_are_named_with_file_and_line(self, tmp_path):
        root = make_imagefolder(tmp_path)
        with (root / "train/metadata.jsonl").open("a") as file:
            file.write('\n{"file_name": "z.jpg", "objects": {}}\n{"objects": []}\nno json\n')
            file.write('{"file_name": "a.jpg", "objects": {"bbox": [[1, 1, 2, 2]], "category": []}}\n')
            file.write('{"file_name": "a.jpg", "objects": [{"bbox": [1, 1, 2, 2]}]}\n')
        found = faults(root)
        assert found["missing-image"] == ["train/metadata.jsonl:4: z.jpg: no such image"]
        assert [place.split(": ")[0] for place in found["metadata-row"]] == [
            f"train/metadata.jsonl:{n}" for n in (5, 6, 7, 8)
        ]


class TestDatasets:
    def test_class_label_one_split_and_parquet(self, tmp_path):
        saved = datasets.load_from_disk(str(make_saved(tmp_path / "saved")))["train"]
        (tmp_path / "data").mkdir()
        saved.to_parquet(str(tmp_path / "data/train-00000-of-00001.parquet"))
        data = load_detection_dataset(tmp_path / "data")
        assert [len(part.dataset) for part in data.values()] == [2, 1]
        assert "no validation split: 1 of 3 images were drawn" in str(data)

    def test_other_columns_are_named(self, tmp_path):
        datasets.Dataset.from_dict({"image": ["a"], "boxes": [[]]}).save_to_disk(str(tmp_path / "saved"))
        with pytest.raises(ValueError, match=r"needs columns image and objects, it has \['image', 'boxes'\]"):
            load_detection_dataset(tmp_path / "saved")


class TestWaysToWriteBoxes:
    """The same names everywhere, of `load_objects` and of every format: the others stood for xywh without a word."""

    def make(self, root: Path, format: str) -> Path:
        if format == "datasets":
            return make_saved(root)
        for name in OBJECTS:
            picture(root / f"{name}.jpg")
        if format == "csv":
            rows = [f'{n}.jpg,{k},"[{x}, {y}, {w}, {h}]"' for n, all_ in OBJECTS.items() for k, x, y, w, h in all_]
            write(root / "boxes.csv", "\n".join(["filename,class,bbox", *rows]))
        else:
            rows = [
                json.dumps({"file_name": f"{name}.jpg", "objects": [{"bbox": o[1:], "label": o[0]} for o in objects]})
                for name, objects in OBJECTS.items()
            ]
            write(root / "metadata.jsonl", "\n".join(rows))
        return root

    @pytest.mark.parametrize("format", ["csv", "imagefolder", "datasets"])
    def test_have_several_names(self, tmp_path, format):
        root = self.make(tmp_path / "data", format)

        def boxes(name: str) -> dict[str, Any]:
            rows = [row for part in load_detection_dataset(root, bbox_format=name).values() for row in part.dataset]
            return {str(box): None for row in rows for box in row["objects"]["bbox"]}

        assert str([4.0, 2.0, 8.0, 6.0]) in boxes("COCO")
        for name in ("xyxy", "XYXY", "pascal_voc"):
            assert str([4.0, 2.0, 4.0, 4.0]) in boxes(name)
        for name in ("yolo", "cxcywh", "xyxyn"):
            with pytest.raises(ValueError, match=f"bbox_format='{name}' is not read"):
                boxes(name)

    @pytest.mark.parametrize("drop", [["corner-boxes"], "size-mismatch", 3])
    def test_rows_to_drop_are_of_known_kinds(self, tmp_path, drop):
        with pytest.raises(ValueError, match="drop=.*; give a list of kinds of findings"):
            load_detection_dataset(make_saved(tmp_path / "saved"), drop=drop)

    def test_corners_are_told_with_the_way_out(self, tmp_path):
        for number in range(40):
            picture(tmp_path / f"{number}.jpg", (90, 60))
        boxes = [[n, n / 2, n + 30 + n % 7, n / 2 + 25] for n in range(40)]
        objects = [{"bbox": [box], "category": ["cat"]} for box in boxes]
        rows = [{"file_name": f"{n}.jpg", "objects": given} for n, given in enumerate(objects)]
        write(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
        with pytest.raises(DataError, match=r"corner-boxes[^$]*--bbox_format xyxy"):
            load_detection_dataset(tmp_path)
        data = load_detection_dataset(tmp_path, bbox_format="xyxy")
        assert all(box[3] == 25 for part in data.values() for row in part.dataset for box in row["objects"]["bbox"])


class TestEncodings:
    """Names are read as they were written, or not at all."""

    FILES = ("boxes.csv", "metadata.jsonl", "classes.txt", "data.yaml")

    def make(self, root: Path, file: str, encoding: str) -> Path:
        names = ("Käse", "Köse")
        objects = json.dumps({"bbox": [[1, 1, 5, 5]] * 2, "label": names}, ensure_ascii=False)
        rows = [f"{image}.jpg,{name},1,1,5,5" for image in "ab" for name in names]
        texts = {
            "boxes.csv": "\n".join(["filename,class,x,y,w,h", *rows]),
            "metadata.jsonl": "\n".join(f'{{"file_name": "{image}.jpg", "objects": {objects}}}' for image in "ab"),
            "classes.txt": "\r\n".join(names),
            "data.yaml": f"names: [{', '.join(names)}]\n",
        }
        for name in "ab":
            picture(root / f"{name}.jpg")
            if file in ("classes.txt", "data.yaml"):
                write(root / f"{name}.txt", "0 0.5 0.5 0.5 0.5\n1 0.5 0.5 0.5 0.5\n")
        (root / file).write_bytes(texts[file].encode(encoding))
        return root

    @pytest.mark.parametrize("file", FILES)
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
    def test_that_are_marked(self, tmp_path, file, encoding):
        data = load_detection_dataset(self.make(tmp_path, file, encoding))
        assert data.categories.names == ("Käse", "Köse")

    def test_of_a_coco_json(self, tmp_path):
        """A training json in UTF-16 wasn't seen beside one in UTF-8: validation data was all there was."""
        root = make_coco(tmp_path)
        path = root / "annotations/instances_train2017.json"
        path.write_text(path.read_text(), encoding="utf-16")
        assert contents(load_detection_dataset(root)) == EXPECTED

    @pytest.mark.parametrize("maker", [make_yolo, make_voc])
    def test_of_the_names_of_files(self, tmp_path, maker):
        """As unzip leaves those of an archive from Windows: the check passed, and reading ended with a traceback."""
        root, name = maker(tmp_path), os.fsdecode(b"caf\xe9")
        for path in [path for path in root.rglob("a.*") if path.is_file()]:
            path.rename(path.with_name(name + path.suffix))
        for path in (root / "ImageSets/Main").glob("*.txt"):
            path.unlink()
        assert not check_detection_dataset(root).ok
        assert [place.rsplit("/", 1)[1] for place in faults(root)["name-encoding"]] == ["caf\\udce9.jpg"]

    @pytest.mark.parametrize("file", FILES)
    def test_that_would_lose_names(self, tmp_path, file):
        found = faults(self.make(tmp_path, file, "cp1252"))
        (places,) = found.values()
        assert set(found) == {"yolo-yaml" if file == "data.yaml" else "annotation-file"}
        line = {"boxes.csv": ":2", "data.yaml": ""}.get(file, ":1")
        assert places[0].startswith(f"{file}{line}: 'utf-8' codec can't decode byte 0xe4")


class TestFolder:
    def test_links_and_hidden_files(self, tmp_path):
        picture(tmp_path / "data/a.jpg")
        picture(tmp_path / "data/.hidden/b.jpg")
        picture(tmp_path / "data/__MACOSX/._a.jpg")
        (tmp_path / "data/again").symlink_to(tmp_path / "data")
        assert Folder(tmp_path / "data").images == ["a.jpg"]

    def test_names_in_other_cases_and_encodings(self, tmp_path):
        picture(tmp_path / "Bäume.JPG", format="JPEG")
        folder = Folder(tmp_path)
        for name in ("bäume.jpg", "Ba\u0308ume", "x/Bäume.png"):
            assert folder.locate(name)[0] == "Bäume.JPG"

    @pytest.mark.parametrize("format", ["coco", "csv", "imagefolder"])
    @pytest.mark.parametrize(
        ("first", "second", "one"),
        [("x/a.jpg", "y/a.jpg", False), ("a.jpg", "a.png", False),
         ("C:\\x\\a.jpg", "x/A", True), ("y/a.jpg", "a.jpg", True)],
    )  # fmt: skip
    def test_two_images_are_not_read_from_one_file(self, tmp_path, format, first, second, one):
        for name in "abc":
            picture(tmp_path / f"images/{name}.jpg")
        names = (first, second, "b", "c")
        if format == "coco":
            content = coco(TRAIN + VAL)
            for image, name in zip(content["images"], names, strict=True):
                image["file_name"] = name
            write(tmp_path / "all.json", json.dumps(content))
        elif format == "csv":
            write(tmp_path / "all.csv", "\n".join(["filename,class,x,y,w,h", *(f"{n},cat,1,1,5,5" for n in names)]))
        else:
            objects = {"bbox": [[1, 1, 5, 5]], "category": ["cat"]}
            rows = [json.dumps({"file_name": name, "objects": objects}) for name in names]
            write(tmp_path / "metadata.jsonl", "\n".join(rows))
        if one:  # spelt in two ways
            data = load_detection_dataset(tmp_path)
            assert sum(len(part.dataset) for part in data.values()) == (3 if format == "csv" else 4)
            assert ("duplicate-file" in {**kinds(data), **kinds(data, "val")}) == (format != "csv")
        else:
            assert f"{first} and {second}: images/a.jpg" in faults(tmp_path)["shared-image"][0]

    def test_images_that_may_be_meant(self, tmp_path):
        for split in ("train", "val", "other"):
            picture(tmp_path / f"{split}/1.jpg")
        folder = Folder(tmp_path)
        assert folder.locate("1.jpg", "labels/train")[0] == "train/1.jpg"
        assert folder.locate("1.jpg", "val")[0] == "val/1.jpg"
        assert folder.locate("far/other/1.jpg")[0] == "other/1.jpg"
        assert folder.locate("1.jpg") == (None, "may be other/1.jpg or train/1.jpg")


def test_exif_rotation_is_that_of_the_picture_as_seen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    root = make_yolo(tmp_path)
    picture(root / "images/train/b.jpg", exif=exif)  # stored 40 x 20, seen 20 x 40
    data = load_detection_dataset(root)
    row = data.train.dataset[1]
    assert row["image"].size == (row["width"], row["height"]) == (20, 40)
    assert row["objects"]["bbox"] == [[0, 0, 20, 40]]
    assert kinds(data)["exif-unsure"] == ["images/train/b.jpg"]


@pytest.mark.skipif(not BCCD.is_dir(), reason="needs the blood cells beside the checkout")
def test_blood_cells_from_voc_and_from_coco():
    voc, coco_form = (load_detection_dataset(BCCD, format=name) for name in ("voc", "coco"))
    assert [len(part.dataset) for part in voc.values()] == [205, 87, 72]
    assert voc.categories.names == coco_form.categories.names
    torch.manual_seed(0)
    names = {"id2label": voc.categories.id2label, "label2id": voc.categories.label2id}
    head = {"fpn_channels": 8, "head_channels": 8, "num_convs": 1, "norm_groups": 4}
    model = GFLForObjectDetection(GFLConfig(backbone="test_resnet", frozen_stages=0, norm_eval=False, **head, **names))
    images = DetectionImageProcessor(size={"height": 64, "width": 64}, score_threshold=0.0)
    few = [data["val"].dataset.select(range(6)) for data in (voc, coco_form)]
    metrics = [detect_dataset(model, images, part, voc.categories, batch_size=6).compute() for part in few]
    assert metrics[0] == pytest.approx(metrics[1], abs=0, nan_ok=True)
    assert metrics[0]["map"] >= 0
    for split in voc:
        parts = [data[split].dataset.remove_columns("image")[:] for data in (voc, coco_form)]
        assert parts[0] == parts[1]
