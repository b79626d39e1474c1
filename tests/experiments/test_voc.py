"""PASCAL VOC's experiments: the files that the page makes, and a run of the protocol in small."""

import importlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from crosskd_hf.data import load_coco
from crosskd_hf.experiments.presets import PRESETS, Model
from tests.tiny_dense import make_batch, make_detector

PAGE = Path(__file__).parents[2] / "docs" / "reproduce.md"
OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>
<xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"""
XML = "<annotation><source><database>The VOC2007 Database</database></source><size><width>64</width><height>48</height>\
<depth>3</depth></size>{objects}</annotation>"


def devkit(folder: Path) -> None:
    """Two images in each split, each with an easy and a difficult object."""
    for year, splits in ((2007, ("train", "val", "test")), (2012, ("train", "val"))):
        root = folder / "VOCdevkit" / f"VOC{year}"
        for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (root / name).mkdir(parents=True)
        for number, split in enumerate(splits):
            names = [f"{year}_{number}{index}" for index in range(2)]
            (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))
            for index, name in enumerate(names):
                Image.new("RGB", (64, 48), (number * 40, index * 90, year % 251)).save(
                    root / "JPEGImages" / f"{name}.jpg"
                )
                easy = OBJECT.format(name="cat", difficult=0, box=(1, 1, 32, 40))
                hard = OBJECT.format(name="dog", difficult=index, box=(33, 9, 60, 48))
                (root / "Annotations" / f"{name}.xml").write_text(XML.format(objects=easy + hard))


def test_the_files_that_the_page_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devkit(tmp_path)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    exec(compile(code, "the block of the page", "exec"), {})
    train = json.loads((tmp_path / "voc" / "annotations" / "instances_train.json").read_text())
    assert len(train["images"]) == 8
    assert sum(entry["iscrowd"] for entry in train["annotations"]) == 4
    data = load_coco(tmp_path / "voc" / "annotations" / "instances_val.json", tmp_path / "voc")
    assert [row["bbox"] for row in data.dataset["objects"]] == [[[0, 0, 31, 39], [32, 8, 27, 39]]] * 2
    assert data.categories.names == ("cat", "dog")


def test_students_learn_boxes_by_ciou() -> None:
    entries = [entry for entry in PRESETS.values() if entry.training.data == "voc"]
    assert len(entries) == 5
    for entry in entries:
        assert dict(entry.student.fields) == {"box_loss": "ciou"}
        assert (entry.training.repeat, len(entry.ap_by_iou)) == (3, 5)
    batch = make_batch()
    losses = [make_detector("gfl", box_loss=kind)(**batch).loss_parts for kind in ("giou", "ciou")]
    assert {name for name, part in losses[0].items() if part.total != losses[1][name].total} == {"loss_bbox"}


def without_downloads(model: Model, checkpoint: str | None = None) -> Model:
    """A tiny student from random weights in the place of the published one."""
    return replace(model, spec=replace(model.spec, backbone="test_resnet", backbone_weights=None))


@pytest.mark.slow
def test_a_run_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    test_the_files_that_the_page_makes(tmp_path, monkeypatch)
    monkeypatch.syspath_prepend(str(PAGE.parents[1] / "examples"))
    monkeypatch.setattr(Model, "starting_from", without_downloads)
    (paths,) = re.findall(r'^VOC="(.*?)"$', PAGE.read_text(), re.MULTILINE | re.DOTALL)
    small = "--max_steps 2 --shortest_edge 64 --longest_edge 96 --dataloader_num_workers 0 --use_cpu --disable_tqdm 1"
    words = f"distill_coco.py --preset gfl-r18-voc {paths} {small}".replace("\\\n", " ")
    monkeypatch.setattr(sys, "argv", words.split())
    importlib.import_module("distill_coco").main()
    printed = capsys.readouterr().out
    assert "gfl-r18-voc aims at AP 51.8 (l4_base)" in printed
    assert re.search(r"AP90 +[\d.]+, published 20.6, difference", printed)
