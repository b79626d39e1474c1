"""Detections end where their image ends, whatever the image processor."""

import pytest
import torch
from transformers import BaseImageProcessor, DeformableDetrImageProcessor
from transformers.utils import ModelOutput

from crosskd_hf.inference.detection import detect, detections, handing_on
from crosskd_hf.inference.evaluation import _renamed
from crosskd_hf.models import DetectionImageProcessor
from crosskd_hf.models.processors import image_processor
from tests.pictures import noise
from tests.tiny_dense import make_detector


def test_boxes_of_a_transformers_processor_are_clipped() -> None:
    outputs = ModelOutput(
        logits=torch.full((1, 2, 3), -8.0).index_fill(2, torch.tensor([1]), 8.0),
        pred_boxes=torch.tensor([[[0.1, 0.5, 0.4, 0.2], [0.9, 0.5, 0.4, 1.4]]]),
    )
    (found,) = detections(DeformableDetrImageProcessor(), outputs, torch.tensor([[100, 200]]), threshold=0.5)
    torch.testing.assert_close(found["boxes"], torch.tensor([[0.0, 40, 60, 60], [140, 0, 200, 100]]))
    assert found["labels"].tolist() == [1, 1]


def test_boxes_are_in_the_pixels_of_the_photo() -> None:
    model = make_detector("gfl").eval()
    processor = DetectionImageProcessor(size={"shortest_edge": 48, "longest_edge": 96})
    photo = noise((192, 96), 50, seed=2)
    (found,) = detect(model, processor, [photo], 0.0)
    with torch.no_grad():
        outputs = model(**processor(images=[photo.convert("RGB")], return_tensors="pt"))
    (small,) = detections(processor, outputs, torch.tensor([[48, 96]]), 0.0)
    assert len(small["boxes"]) > 3
    torch.testing.assert_close(found["boxes"], 2 * small["boxes"])
    torch.testing.assert_close(found["scores"], small["scores"])


@pytest.mark.parametrize(
    "processor",
    [DetectionImageProcessor(), image_processor("deformable_detr"), DeformableDetrImageProcessor()],
    ids=["dense", "ours of Deformable DETR", "that of transformers"],
)
def test_as_many_detections_as_asked_for(processor: BaseImageProcessor) -> None:
    """300 objects side by side: all processors hand on 100, and as many as `handing_on` says; they stay as they are."""
    centres = torch.stack([torch.arange(300) % 20 * 0.05 + 0.02, torch.arange(300) // 20 * 0.05 + 0.02], 1)
    boxes = torch.cat([centres, torch.full((300, 2), 0.02)], 1)[None]
    outputs = ModelOutput(logits=torch.full((1, 300, 1), 3.0), pred_boxes=boxes, level_sizes=[300])
    counts = []
    for reader in (
        processor,
        handing_on(processor, 250),
        handing_on(processor, 1000),
        handing_on(processor, 7),
        processor,
    ):
        (found,) = detections(reader, outputs, torch.tensor([[1000, 1000]]), 0.0)
        counts.append(len(found["scores"]))
    assert counts == [100, 250, 300, 7, 100]


def test_labels_become_those_of_the_data_and_unknown_classes_are_left_out() -> None:
    """The model's classes 0, 1 and 2 are the data's class 2, none, and class 0."""
    boxes = torch.arange(12.0).reshape(3, 4)
    result = {"scores": torch.tensor([0.9, 0.8, 0.7]), "labels": torch.tensor([2, 1, 0]), "boxes": boxes}
    found = _renamed(result, torch.tensor([2, -1, 0]))
    assert found["labels"].tolist() == [0, 2]
    assert torch.equal(found["scores"], torch.tensor([0.9, 0.7]))
    assert torch.equal(found["boxes"], boxes[[0, 2]])
