import hashlib
import json

import numpy as np
import PIL.Image
import pytest

from crosskd_hf.data import load_coco
from crosskd_hf.data.shapes import CLASSES, make_shapes


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    return folder, make_shapes(folder, num_train=40, num_val=5, size=64)


class TestMakeShapes:
    def test_the_same_seed_gives_the_same_bytes(self, made, tmp_path):
        make_shapes(tmp_path, num_train=40, num_val=5, size=64)
        assert digest(tmp_path) == digest(made[0])

    def test_another_seed_gives_other_images(self, made, tmp_path):
        make_shapes(tmp_path, num_train=2, num_val=1, size=64, seed=1)
        first, second = ((folder / "train" / "00000.png").read_bytes() for folder in (made[0], tmp_path))
        assert first != second

    def test_splits_differ_and_an_image_depends_on_its_number_only(self, made, tmp_path):
        make_shapes(tmp_path, num_train=2, num_val=1, size=64)
        assert (tmp_path / "train/00001.png").read_bytes() == (made[0] / "train/00001.png").read_bytes()
        assert (tmp_path / "train/00000.png").read_bytes() != (tmp_path / "val/00000.png").read_bytes()

    def test_loads_without_a_warning(self, made):
        data = load_coco(made[1].train_annotations, made[1].train_images)
        assert {finding.severity for finding in data.report.findings} <= {"note"}
        assert data.categories.raw_ids == tuple(CLASSES)
        assert data.categories.names == tuple(CLASSES.values())

    def test_has_every_class_small_and_large_objects_and_empty_images(self, made):
        content = json.loads(made[1].train_annotations.read_text())
        annotations = content["annotations"]
        assert {annotation["category_id"] for annotation in annotations} == set(CLASSES)
        sides = [max(annotation["bbox"][2:]) for annotation in annotations]
        assert min(sides) < 12
        assert max(sides) > 24
        assert {image["id"] for image in content["images"]} > {annotation["image_id"] for annotation in annotations}

    def test_boxes_lie_inside_and_areas_in_boxes(self, made):
        content = json.loads(made[1].train_annotations.read_text())
        sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
        for annotation in content["annotations"]:
            x, y, width, height = annotation["bbox"]
            assert min(x, y) >= 0
            assert x + width <= sizes[annotation["image_id"]][0]
            assert y + height <= sizes[annotation["image_id"]][1]
            assert 0 < annotation["area"] <= width * height

    def test_objects_stand_out_of_the_ground(self, made):
        image = np.asarray(PIL.Image.open(made[1].train_images / "00000.png"), dtype=float)
        assert image.std() > 10

    def test_refuses_images_too_small_to_see(self, tmp_path):
        with pytest.raises(ValueError, match="size >= 32"):
            make_shapes(tmp_path, size=8)
