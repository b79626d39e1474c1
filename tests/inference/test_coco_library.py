"""Both libraries that compute COCO AP."""

import logging

import datasets
import numpy as np
import pytest

from benchmarks.scenes import make_scene
from crosskd_hf.data.categories import CategoryMap
from crosskd_hf.inference import coco_library
from crosskd_hf.inference.coco_evaluator import CocoEvaluator

needs_fast = pytest.mark.skipif(coco_library.library().coco is coco_library.COCO, reason="needs faster-coco-eval")


def assert_same(seeds: range) -> None:
    """Twelve numbers, AP of every class and every precision of random scenes are the same."""
    for seed in seeds:
        rng = np.random.default_rng(seed)
        scene = make_scene(seed, int(rng.integers(1, 9)), int(rng.integers(1, 6)), rng.uniform(0, 12))
        evaluators = [scene.evaluator(fast) for fast in (True, False)]
        metrics = [list(evaluator.compute().values()) for evaluator in evaluators]
        np.testing.assert_allclose(*metrics, rtol=0, atol=1e-12)
        np.testing.assert_allclose(*[evaluator.stats for evaluator in evaluators], rtol=0, atol=1e-12)
        np.testing.assert_allclose(*[evaluator.precision() for evaluator in evaluators], rtol=0, atol=1e-12)


@needs_fast
def test_both_libraries_find_the_same_in_random_scenes() -> None:
    assert_same(range(40))


@needs_fast
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_both_libraries_find_the_same_in_500_random_scenes() -> None:
    assert_same(range(40, 540))


@pytest.mark.parametrize("fast", [False, pytest.param(True, marks=needs_fast)])
def test_without_any_detection_ap_is_0(fast: bool) -> None:
    scene = make_scene(1, 3, 2)
    evaluator = CocoEvaluator(scene.dataset, scene.categories, fast=fast)
    evaluator.merge({image_id: rows[:0] for image_id, rows in scene.rows.items()})
    assert evaluator.compute()["map"] == 0


@pytest.mark.parametrize("fast", [False, pytest.param(True, marks=needs_fast)])
def test_more_than_100_detections_count_if_so_many_are_asked_for(fast: bool) -> None:
    """150 objects of a class in an image, all found: recall, and AP with it, ends at two thirds; 101 recalls."""
    values = np.arange(150)
    boxes = np.column_stack([values % 15 * 20.0, values // 15 * 20.0, np.full((150, 2), 10.0)])
    objects = {"id": values + 1, "bbox": boxes, "category": [0] * 150, "area": [100.0] * 150, "iscrowd": [0] * 150}
    row = {"image_id": 1, "width": 300, "height": 200, "objects": {k: list(v) for k, v in objects.items()}}
    dataset = datasets.Dataset.from_list([row])
    found = np.column_stack([boxes, np.linspace(1, 0.5, 150), np.zeros(150)]).astype(np.float32)
    for most, expected in ((100, 67 / 101), (120, 81 / 101), (150, 1.0), (1000, 1.0), (10, 67 / 101)):
        evaluator = CocoEvaluator(dataset, CategoryMap((5,), ("cell",)), fast=fast, most=most)
        evaluator.merge({1: found})
        metrics = evaluator.compute()
        assert metrics["map"] == metrics["map_cell"] == metrics["map_50"] == pytest.approx(expected, abs=1e-9)
        assert evaluator.stats[0] == metrics["map"]
        assert evaluator.stats[8] == pytest.approx(min(max(most, 100), 150) / 150)  # average recall


@needs_fast
def test_the_fast_library_is_used_where_it_is_installed_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    coco_library.tell.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            make_scene(1, 3, 2).evaluator(fast=True).compute()
    assert CocoEvaluator(*make_scene(1, 3, 2)[:2]).library.name.startswith("faster-coco-eval 1.")
    assert [message for message in caplog.messages if "COCO AP is computed by faster-coco-eval" in message] == (
        caplog.messages
    )
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("found", [None, "1.7.9"])
def test_pycocotools_where_the_fast_one_is_absent_or_old(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    def version(name: str) -> str:
        if name == coco_library.FAST and found is None:
            raise coco_library.PackageNotFoundError(name)
        return found if name == coco_library.FAST else "2.0"

    monkeypatch.setattr(coco_library, "version", version)
    coco_library._fast.cache_clear()
    try:
        assert coco_library.library().coco is coco_library.COCO
        with pytest.raises(ImportError, match=r"fast=True needs faster-coco-eval 1\.8"):
            coco_library.library(fast=True)
    finally:
        coco_library._fast.cache_clear()
