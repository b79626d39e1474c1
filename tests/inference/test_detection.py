"""Detections end where their image ends, whatever the image processor."""

import torch
from transformers import DeformableDetrImageProcessor
from transformers.utils import ModelOutput

from crosskd_hf.inference.detection import detections


def test_boxes_of_a_transformers_processor_are_clipped() -> None:
    outputs = ModelOutput(
        logits=torch.full((1, 2, 3), -8.0).index_fill(2, torch.tensor([1]), 8.0),
        pred_boxes=torch.tensor([[[0.1, 0.5, 0.4, 0.2], [0.9, 0.5, 0.4, 1.4]]]),
    )
    (found,) = detections(DeformableDetrImageProcessor(), outputs, torch.tensor([[100, 200]]), threshold=0.5)
    torch.testing.assert_close(found["boxes"], torch.tensor([[0.0, 40, 60, 60], [140, 0, 200, 100]]))
    assert found["labels"].tolist() == [1, 1]
