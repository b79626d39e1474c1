"""What is found in an image depends on the image alone, not on those beside it in a batch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from crosskd_hf.data import DetectionCollator, DetectionData, load_coco
from crosskd_hf.inference.evaluation import detect_dataset
from crosskd_hf.models import DetectionImageProcessor
from crosskd_hf.training.config import CrossKDConfig
from crosskd_hf.training.trainer import CrossKDTrainer
from tests.tiny_dense import make_detector

SIZES = [(64, 48), (48, 64), (64, 64), (30, 90), (48, 64), (90, 40), (64, 64), (64, 48)]  # width, height


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DetectionData:
    folder = tmp_path_factory.mktemp("mixed")
    images, objects = [], []
    for number, (width, height) in enumerate(SIZES, start=1):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
        box = {"bbox": [4, 4, 16, 20], "category_id": 1 + number % 3, "area": 320, "iscrowd": 0}
        objects.append({"id": number, "image_id": number, **box})
    categories = [{"id": number, "name": f"class {number}"} for number in (1, 2, 3)]
    content = {"images": images, "annotations": objects, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    return load_coco(folder / "annotations.json", folder)


@pytest.fixture
def processor() -> DetectionImageProcessor:
    return DetectionImageProcessor(
        size={"shortest_edge": 64, "longest_edge": 128}, score_threshold=0.0, nms_threshold=1.0
    )


def detector(data: DetectionData, kind: str = "gfl") -> Any:
    return make_detector(kind, id2label=data.categories.id2label, label2id=data.categories.label2id).eval()


def equal(first: dict[int, Any], second: dict[int, Any]) -> None:
    assert first.keys() == second.keys() == set(range(1, len(SIZES) + 1))
    for image_id, rows in first.items():
        assert len(rows) > 20
        np.testing.assert_allclose(rows, second[image_id], rtol=1e-4, atol=1e-4)


def test_padding_changes_what_a_head_with_group_norm_says(
    data: DetectionData, processor: DetectionImageProcessor
) -> None:
    """The reason for all of this: were it not so, the other tests would hold without any care."""
    model, collate = detector(data), DetectionCollator(processor)
    with torch.no_grad():
        beside = model(collate([data.dataset[0], data.dataset[1]])["pixel_values"]).logits[0]
        alone = model(collate([data.dataset[0]])["pixel_values"]).logits[0]
    top = min(len(alone), 8)
    assert (beside[:top] - alone[:top]).abs().max() > 0.01 * alone.std()


@pytest.mark.parametrize("batch_size", [3, 8])
def test_evaluation_of_files(data: DetectionData, processor: DetectionImageProcessor, batch_size: int) -> None:
    of = detector(data), processor, data.dataset, data.categories
    one, many = (detect_dataset(*of, batch_size=count).rows for count in (1, batch_size))
    equal(one, many)


@pytest.mark.parametrize("keeps", [False, True])
def test_evaluation_of_the_trainer(
    data: DetectionData, processor: DetectionImageProcessor, keeps: bool, tmp_path: Path
) -> None:
    """With `compute_metrics` images come in the order of the data."""
    seen: list[int] = []

    def collect(prediction: Any) -> dict[str, float]:
        seen.extend(int(label["image_id"][0]) for labels in prediction.label_ids for label in labels)
        return {"images": float(sum(len(outputs[0]) for outputs in prediction.predictions))}

    found, metrics = [], []
    for batch_size in (1, 3, 8):
        args = CrossKDConfig(str(tmp_path), per_device_eval_batch_size=batch_size, use_cpu=True, report_to="none")
        trainer = CrossKDTrainer(
            model=detector(data),
            args=args,
            eval_dataset=data.dataset,
            processing_class=processor,
            compute_metrics=collect if keeps else None,
        )
        output = trainer.predict(data.dataset)
        found.append(output.predictions)
        metrics.append({key: value for key, value in output.metrics.items() if key.startswith("test_map")})
    for other in found[1:]:
        equal(found[0], other)
    assert metrics[1] == pytest.approx(metrics[0], nan_ok=True, abs=1e-4)
    assert metrics[2] == pytest.approx(metrics[0], nan_ok=True, abs=1e-4)
    assert seen == ([*range(1, len(SIZES) + 1)] * 3 if keeps else [])
