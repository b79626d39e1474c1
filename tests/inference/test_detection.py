"""Detections end where their image ends, whatever the image processor."""

import PIL.Image
import torch
from transformers import DeformableDetrImageProcessor
from transformers.utils import ModelOutput

from crosskd_hf.inference.detection import detect, detections
from crosskd_hf.models import DetectionImageProcessor
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
    photo = PIL.Image.effect_noise((192, 96), 50)
    (found,) = detect(model, processor, [photo], 0.0)
    with torch.no_grad():
        outputs = model(**processor(images=[photo.convert("RGB")], return_tensors="pt"))
    (small,) = detections(processor, outputs, torch.tensor([[48, 96]]), 0.0)
    assert len(small["boxes"]) > 3
    torch.testing.assert_close(found["boxes"], 2 * small["boxes"])
    torch.testing.assert_close(found["scores"], small["scores"])
