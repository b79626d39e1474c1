"""From the files of `coco_tiny` to a COCO json of detections, by the path of the evaluation and image by image."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel

from crosskd_hf.create import DetectorSpec
from crosskd_hf.inference.coco_evaluator import CocoEvaluator
from crosskd_hf.inference.detection import detect
from crosskd_hf.inference.evaluation import detect_dataset
from tests.parity.protocol import COCO
from tests.parity.protocol_evaluation import split_of
from tests.tiny_dense import make_detector

pytestmark = pytest.mark.skipif(not COCO.is_dir(), reason=f"no images of coco_tiny in {COCO}")
IMAGES = 8


@pytest.mark.parametrize("kind", ["gfl", "retinanet"])
def test_detections_of_files(kind: str, tmp_path: Path) -> None:
    data = split_of(COCO, "val2017")
    dataset = data.dataset.select(range(IMAGES))
    names = {"id2label": data.categories.id2label, "label2id": data.categories.label2id}
    model: PreTrainedModel = make_detector(kind, num_labels=80, **names).eval()
    size = {"shortest_edge": 96, "longest_edge": 160}
    processor = DetectorSpec(kind).image_processor(size=size, antialias=False)
    detect_dataset(model, processor, dataset, data.categories, batch_size=3).export(tmp_path)
    found = json.loads((tmp_path / "detections.json").read_text())
    assert {entry["image_id"] for entry in found} <= set(dataset["image_id"])
    for image_id, width, height in zip(dataset["image_id"], dataset["width"], dataset["height"], strict=True):
        rows = [entry for entry in found if entry["image_id"] == image_id]
        with Image.open(COCO / "val2017" / f"{image_id:012d}.jpg") as image:
            (expected,) = detect(model, processor, [image], 0.0)
        corners = expected["boxes"].numpy()
        boxes = np.array([entry["bbox"] for entry in rows])
        assert 10 < len(rows) == len(corners) <= 100
        np.testing.assert_allclose(boxes[:, :2], corners[:, :2], atol=0.05)
        np.testing.assert_allclose(boxes[:, :2] + boxes[:, 2:], corners[:, 2:], atol=0.05)
        np.testing.assert_allclose([entry["score"] for entry in rows], expected["scores"], atol=1e-4)
        assert [entry["category_id"] for entry in rows] == [
            data.categories.to_raw(i) for i in expected["labels"].tolist()
        ]
        assert (boxes >= 0).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= np.array([width, height]) + 0.01).all()


def test_truth_is_the_file_as_it_is(tmp_path: Path) -> None:
    data = split_of(COCO, "val2017")
    evaluator = CocoEvaluator(data.dataset, data.categories)
    nothing = {"scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)}
    evaluator.update(data.dataset["image_id"], [nothing] * len(data.dataset))
    path, _ = evaluator.export(tmp_path)
    ours, theirs = (
        {entry["id"]: entry for entry in json.loads(file.read_text())["annotations"]}
        for file in (path, COCO / "annotations" / "instances_val2017.json")
    )
    assert ours.keys() == theirs.keys()
    for number, entry in ours.items():
        assert {key: theirs[number][key] for key in entry} == entry
