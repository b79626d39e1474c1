"""Data and a model for all commands, made once for each file of tests."""

import shutil
from pathlib import Path

import pytest
import torch

from crosskd_hf.create import DetectorSpec, build_detector
from crosskd_hf.data.categories import CategoryMap
from crosskd_hf.data.shapes import CLASSES, ShapesPaths, make_shapes
from crosskd_hf.models import DetectionImageProcessor


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> ShapesPaths:
    return make_shapes(tmp_path_factory.mktemp("shapes"), num_train=4, num_val=3, size=64)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved, untrained model of the classes of the synthetic data."""
    categories = CategoryMap(tuple(CLASSES), tuple(CLASSES.values()))
    torch.manual_seed(0)
    model = build_detector(DetectorSpec("gfl", "test_resnet", width=32), categories)
    torch.nn.init.zeros_(model.head.classifier.bias)  # so that something is found
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    DetectionImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder_of_data(shapes: ShapesPaths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shapes as a folder without splits, one json for all."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(shapes.train_images, folder / "pictures")
    (folder / "all.json").write_bytes(shapes.train_annotations.read_bytes())
    return folder
