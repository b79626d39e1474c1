"""Rules of the published data pipeline: what is trained on, sizes, batches of one orientation, DETR's crop."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from crosskd_hf.data import DetectionCollator, DetectionData, TrainTransform, load_coco
from crosskd_hf.data.collators import is_trained_on
from crosskd_hf.data.sampling import ByShape, batches_of_one_orientation
from crosskd_hf.data.transforms import RandomCrop, Record, crop, resize
from crosskd_hf.inference.coco_evaluator import CocoEvaluator
from crosskd_hf.models import DetectionImageProcessor
from crosskd_hf.models.image_processing import resized_size
from crosskd_hf.training.reproducible import ReproducibleCollator


@pytest.fixture
def data(tmp_path: Path) -> DetectionData:
    """An object, a narrow one, an ignored one and one without area; nothing; a narrow image; a crowd region."""
    sizes = [(64, 48), (64, 48), (20, 64), (64, 64)]
    images = [
        {"id": number, "file_name": f"{number}.png", "width": width, "height": height}
        for number, (width, height) in enumerate(sizes, start=1)
    ]
    for image in images:
        Image.new("RGB", (image["width"], image["height"])).save(tmp_path / image["file_name"])
    objects = [
        {"image_id": 1, "bbox": [1, 2, 30, 20], "area": 600},
        {"image_id": 1, "bbox": [1, 2, 0.5, 20], "area": 10},
        {"image_id": 1, "bbox": [1, 2, 20, 20], "area": 400, "ignore": 1},
        {"image_id": 1, "bbox": [1, 2, 20, 20], "area": 0},
        {"image_id": 1, "bbox": [1, 2, 0, 20], "area": 4},
        {"image_id": 3, "bbox": [1, 2, 10, 20], "area": 200},
        {"image_id": 4, "bbox": [1, 2, 10, 20], "area": 200, "iscrowd": 1},
    ]
    annotations = [{"id": number, "category_id": 1, **entry} for number, entry in enumerate(objects, start=1)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    return load_coco(tmp_path / "annotations.json", tmp_path)


def test_what_is_trained_on(data: DetectionData) -> None:
    assert is_trained_on(data.dataset[0]["objects"]).tolist() == [True, False, False, False, False]
    assert is_trained_on(data.dataset[3]["objects"]).tolist() == [False]
    batch = DetectionCollator(DetectionImageProcessor(do_resize=False))([data.dataset[row] for row in range(4)])
    assert [len(label["boxes"]) for label in batch["labels"]] == [1, 0, 1, 0]


def test_the_truth_is_the_file(data: DetectionData) -> None:
    truth = CocoEvaluator(data.dataset, data.categories).truth["annotations"]
    assert [entry["bbox"][2] for entry in truth] == [30, 0.5, 20, 20, 0, 10, 10]
    assert [entry["area"] for entry in truth] == [600, 10, 400, 0, 4, 200, 200]


@pytest.mark.parametrize(
    ("drop_empty", "min_size", "left"),
    [(False, 0, [1, 2, 3, 4]), (True, 0, [1, 3, 4]), (False, 32, [1, 2, 4]), (True, 32, [1, 4]), (True, 49, [4])],
)
def test_images_for_training(data: DetectionData, drop_empty: bool, min_size: int, left: list[int]) -> None:
    assert data.for_training(drop_empty, min_size).dataset["image_id"][:] == left


def test_every_image_several_times_in_an_epoch(data: DetectionData) -> None:
    assert data.repeated(3).dataset["image_id"][:] == [1, 2, 3, 4] * 3
    assert data.repeated(1) is data


def test_every_copy_of_an_image_has_an_augmentation_of_its_own(data: DetectionData) -> None:
    """Copies that are flipped alike are the same image again."""
    collator = ReproducibleCollator(DetectionImageProcessor(), TrainTransform(0.5), seed=0)
    repeated = data.repeated(12).dataset
    (first,) = {row for row in range(len(data.dataset)) if data.dataset["image_id"][row] == 1}
    rows = [repeated[first + copy * len(data.dataset)] for copy in range(12)]
    centres = [float(collator([row])["labels"][0]["boxes"][0, 0]) for row in rows]
    assert len({round(centre, 4) for centre in centres}) == 2
    assert centres[0] == float(collator([data.dataset[first]])["labels"][0]["boxes"][0, 0])
    assert centres == [float(collator([row])["labels"][0]["boxes"][0, 0]) for row in rows]


def test_marks_survive_another_order_of_the_classes(data: DetectionData) -> None:
    assert data.dataset.features["objects"]["ignore"] is not None
    assert data.with_classes(data.categories).dataset[0]["objects"]["ignore"] == [0, 0, 1, 0, 0]


def test_an_area_of_zero_throughout_is_none(tmp_path: Path) -> None:
    """A file that says 0 for every object doesn't know areas: else nothing would be learned."""
    Image.new("RGB", (64, 64)).save(tmp_path / "1.png")
    content = {
        "images": [{"id": 1, "file_name": "1.png", "width": 64, "height": 64}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 20], "area": 0}],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    objects = load_coco(tmp_path / "annotations.json", tmp_path).dataset[0]["objects"]
    assert objects["area"] == [200]
    assert is_trained_on(objects).tolist() == [True]


@pytest.mark.parametrize(
    ("size", "expected"),
    [((427, 640), (800, 1199)), ((360, 640), (750, 1333)), ((2000, 1), (1333, 1)), ((480, 640), (800, 1067))],
)
def test_sizes_are_rounded_half_up(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized_size(*size, 800, 1333) == expected


def test_batches_of_one_orientation() -> None:
    portrait = [True, False, False, True, True, False, True, False, False]
    batches = list(batches_of_one_orientation(range(9), portrait.__getitem__, 2))
    assert batches == [[1, 2], [0, 3], [4, 6], [5, 7], [8]]
    assert list(batches_of_one_orientation([0, 1, 3, 5, 8], portrait.__getitem__, 3)) == [[1, 5, 8], [0, 3]]


def test_images_by_shape() -> None:
    assert list(ByShape([64, 48, 64, 10], [48, 64, 48, 90])) == [0, 2, 1, 3]


def record() -> Record:
    return Record(
        image=tv_tensors.Image(torch.arange(3 * 40 * 80, dtype=torch.int64).reshape(3, 40, 80).to(torch.uint8)),
        boxes=tv_tensors.BoundingBoxes([[0.0, 0, 10, 10], [30, 10, 70, 40]], format="XYXY", canvas_size=(40, 80)),
        labels=torch.tensor([3, 4]),
        area=torch.tensor([100.0, 1200]),
        iscrowd=torch.zeros(2, dtype=torch.int64),
        id=torch.tensor([7, 8]),
    )


def test_crop_and_resize() -> None:
    part = crop(record(), 5, 20, 30, 40)
    assert part["boxes"].tolist() == [[10, 5, 40, 30]]
    assert part["id"].tolist() == [8]
    assert torch.equal(part["image"], record()["image"][:, 5:35, 20:60])
    twice = resize(part, 60, None, antialias=False)
    assert twice["boxes"].tolist() == [[20, 10, 80, 60]]
    assert twice["image"].shape == (3, 60, 80)


def test_half_of_the_images_are_cropped() -> None:
    torch.manual_seed(0)
    transform = TrainTransform(0.0, (50,), 1000, random_crop=RandomCrop((20, 30), 100, (16, 24)))
    shapes = [tuple(transform(record())["image"].shape[-2:]) for _ in range(60)]
    assert all(min(shape) == 50 for shape in shapes)
    assert 15 < sum(shape == (50, 100) for shape in shapes) < 45


def test_a_crop_needs_a_final_size() -> None:
    with pytest.raises(ValueError, match="random_crop needs shortest_edges"):
        TrainTransform(random_crop=RandomCrop())
