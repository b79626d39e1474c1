import contextlib
import io
import json
import math

import datasets
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from crosskd_hf.data import load_coco
from crosskd_hf.data.shapes import make_shapes
from crosskd_hf.inference.coco_evaluator import BY_IOU, SUMMARY, CocoEvaluator


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    paths = make_shapes(tmp_path_factory.mktemp("shapes"), num_train=1, num_val=12, size=96)
    return load_coco(paths.val_annotations, paths.val_images)


def as_result(objects, noise=0.0, seed=0):
    """An image's truth as detections, boxes shaken by `noise` px, and a false one."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.tensor(objects["bbox"]).reshape(-1, 4)
    boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
    boxes = torch.cat([boxes + noise * torch.randn(boxes.shape, generator=generator), torch.tensor([[1.0, 2, 9, 12]])])
    labels = torch.tensor([*objects["category"], 0])
    return {"boxes": boxes, "labels": labels, "scores": torch.rand(len(labels), generator=generator)}


def filled(data, noise=0.0):
    evaluator = CocoEvaluator(data.dataset, data.categories)
    for image_id, objects in zip(data.dataset["image_id"], data.dataset["objects"], strict=True):
        evaluator.update([image_id], [as_result(objects, noise, seed=image_id)])
    return evaluator


def by_hand(truth_path, detections_path):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(truth_path))
        evaluation = COCOeval(truth, truth.loadRes(str(detections_path)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def same(first, second):
    return first == pytest.approx(second, abs=1e-6, nan_ok=True)


@pytest.fixture
def coco(tmp_path):
    """Truth with an annotation of id 0, a crowd region, a class without objects, and odd raw ids."""
    content = {
        "images": [{"id": 7, "file_name": "a.png", "width": 100, "height": 80}],
        "annotations": [
            {"id": 0, "image_id": 7, "category_id": 0, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0},
            {"id": 5, "image_id": 7, "category_id": 90, "bbox": [50, 20, 40, 40], "area": 1600, "iscrowd": 1},
            {"id": 6, "image_id": 7, "category_id": 90, "bbox": [5, 50, 30, 20], "area": 600, "iscrowd": 0},
        ],
        "categories": [{"id": 0, "name": "cat"}, {"id": 90, "name": "small"}, {"id": 4, "name": "never"}],
    }
    import PIL.Image

    PIL.Image.new("RGB", (100, 80)).save(tmp_path / "a.png")
    (tmp_path / "truth.json").write_text(json.dumps(content))
    return load_coco(tmp_path / "truth.json", tmp_path)


class TestCompute:
    def test_perfect_detections_have_ap_1_in_spite_of_id_0_and_crowds(self, coco):
        evaluator = CocoEvaluator(coco.dataset, coco.categories)
        boxes = torch.tensor([[10.0, 10, 30, 30], [55, 25, 75, 45], [5, 50, 35, 70]])
        evaluator.update(
            [7], [{"boxes": boxes, "labels": torch.tensor([0, 2, 2]), "scores": torch.tensor([0.9, 0.99, 0.5])}]
        )
        metrics = evaluator.compute()
        assert metrics["map"] == pytest.approx(1)
        assert metrics["map_cat"] == pytest.approx(1)

    def test_undefined_is_nan_and_a_class_named_like_a_summary_keeps_apart(self, coco):
        evaluator = CocoEvaluator(coco.dataset, coco.categories)
        empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}
        evaluator.update(torch.tensor([7]), [empty])
        metrics = evaluator.compute()
        assert math.isnan(metrics["map_never"])
        assert math.isnan(metrics["map_large"])
        assert metrics["map"] == metrics["map_small"] == metrics["map_class_small"] == 0
        assert list(metrics) == [*SUMMARY, *BY_IOU, "map_cat", "map_never", "map_class_small"]

    def test_prints_nothing(self, shapes, capsys):
        assert filled(shapes, noise=2).compute()["map"] > 0
        assert capsys.readouterr().out == ""

    def test_is_the_mean_of_the_classes(self, shapes):
        metrics = filled(shapes, noise=2).compute()
        per_class = [metrics[f"map_{name}"] for name in shapes.categories.names]
        assert metrics["map"] == pytest.approx(np.nanmean(per_class))

    def test_at_single_ious(self, shapes):
        evaluator = filled(shapes, noise=2)
        metrics, precision = evaluator.compute(), evaluator.precision()
        for index, percent in enumerate(range(50, 100, 5)):
            if f"map_{percent}" in metrics:
                found = precision[index][precision[index] > -1].mean()
                assert metrics[f"map_{percent}"] == pytest.approx(found), percent
        single = [metrics[key] for key in ("map_50", *BY_IOU)]
        assert single == sorted(single, reverse=True)
        assert single[0] > single[-1]

    def test_says_what_is_missing(self, shapes):
        evaluator = CocoEvaluator(shapes.dataset, shapes.categories)
        with pytest.raises(ValueError, match="12 of 12 images were not evaluated"):
            evaluator.compute()

    def test_can_be_repeated_and_reset(self, shapes):
        evaluator = filled(shapes, noise=2)
        assert same(evaluator.compute(), evaluator.compute())
        evaluator.reset()
        assert not evaluator.rows


class TestExport:
    @pytest.mark.parametrize("noise", [0.0, 3.0])
    def test_pycocotools_by_hand_gives_the_same_numbers(self, shapes, tmp_path, noise):
        evaluator = filled(shapes, noise)
        evaluation = by_hand(*evaluator.export(tmp_path / "new"))
        metrics = evaluator.compute()
        expected = [value if value >= 0 else float("nan") for value in evaluation.stats[:6]]
        assert same([metrics[key] for key in SUMMARY], expected)

    def test_ids_are_raw(self, shapes, tmp_path):
        truth, detections = (json.loads(path.read_text()) for path in filled(shapes).export(tmp_path))
        assert {row["category_id"] for row in detections} <= {1, 3, 4, 7}
        assert [category["id"] for category in truth["categories"]] == [1, 3, 4, 7]
        assert {row["image_id"] for row in detections} <= {image["id"] for image in truth["images"]}

    def test_agrees_by_hand_with_id_0_in_the_source(self, coco, tmp_path):
        evaluator = CocoEvaluator(coco.dataset, coco.categories)
        result = {"boxes": torch.tensor([[10.0, 10, 30, 30]]), "labels": torch.tensor([0]), "scores": torch.ones(1)}
        evaluator.update([7], [result])
        assert same(evaluator.compute()["map"], by_hand(*evaluator.export(tmp_path)).stats[0])


class TestCollecting:
    def test_two_processes_with_padding_give_what_one_gives(self, shapes):
        one = filled(shapes, noise=2)
        first, second = (CocoEvaluator(shapes.dataset, shapes.categories) for _ in range(2))
        examples = list(zip(shapes.dataset["image_id"], shapes.dataset["objects"], strict=True))
        for evaluator, part in ((first, examples[::2]), (second, [*examples[1::2], examples[0]])):
            for image_id, objects in part:
                evaluator.update([image_id], [as_result(objects, 2, seed=image_id)])
        first.merge(second.rows)
        assert same(first.compute(), one.compute())

    def test_a_repeated_image_counts_once(self, shapes):
        evaluator = filled(shapes)
        before = evaluator.compute()
        image_id = shapes.dataset["image_id"][0]
        evaluator.update([image_id], [as_result(shapes.dataset["objects"][0], 50)])
        assert same(evaluator.compute(), before)

    def test_a_repeated_image_counts_once_within_an_update_too(self, coco):
        evaluator = CocoEvaluator(coco.dataset, coco.categories)
        first, second = as_result(coco.dataset[0]["objects"], seed=7), as_result({"bbox": [], "category": []})
        evaluator.update([7, 7], [first, second])
        assert same(evaluator.compute(), filled(coco).compute())
        assert len(evaluator.rows[7]) == 4

    def test_a_part_of_a_data_set_is_enough(self, shapes):
        part = shapes.dataset.select(range(3))
        evaluator = CocoEvaluator(part, shapes.categories)
        assert len(evaluator.image_ids) == 3

    @pytest.mark.parametrize(
        ("image_id", "change", "message"),
        [
            (999, {}, "not in the evaluated data set"),
            (1, {"scores": torch.tensor([float("nan")])}, "not finite"),
            (1, {"labels": torch.tensor([4])}, r"\[4, 4\], needed is \[0, 4\)"),
        ],
    )
    def test_bad_detections_are_refused(self, shapes, image_id, change, message):
        result = {"boxes": torch.ones(1, 4), "labels": torch.zeros(1, dtype=torch.long), "scores": torch.ones(1)}
        with pytest.raises(ValueError, match=message):
            CocoEvaluator(shapes.dataset, shapes.categories).update([image_id], [{**result, **change}])

    def test_counts_must_agree(self, shapes):
        with pytest.raises(ValueError, match="2 image ids and 0 results"):
            CocoEvaluator(shapes.dataset, shapes.categories).update([1, 11], [])


def test_images_of_one_id_are_refused(shapes):
    """As of two data sets that were concatenated: detections of one image would be held against both."""
    twice = datasets.concatenate_datasets([shapes.dataset, shapes.dataset.select([0, 3])])
    ids = [shapes.dataset["image_id"][row] for row in (0, 3)]
    with pytest.raises(ValueError, match=rf"2 image ids .* belong to several images \(such as \[{ids[0]}, {ids[1]}\]"):
        CocoEvaluator(twice, shapes.categories)
