"""Classes of data and model are matched by name."""

import pytest

from crosskd_hf.convert.class_names import COCO_NAMES
from crosskd_hf.data.categories import CategoryMap, match_categories
from crosskd_hf.models import GFLConfig


def test_by_name_in_the_models_order() -> None:
    config = GFLConfig(id2label=dict(enumerate(COCO_NAMES)))
    matched = match_categories(config, CategoryMap((5, 9), ("Dog ", "cat")))
    assert matched.names == COCO_NAMES
    assert matched.to_raw(COCO_NAMES.index("dog")) == 5
    assert matched.to_raw(COCO_NAMES.index("cat")) == 9
    assert len(set(matched.raw_ids)) == 80


def test_unknown_class() -> None:
    with pytest.raises(ValueError, match=r"classes that the model doesn't know: \['zeppelin'\]"):
        match_categories(GFLConfig(id2label={0: "cat"}), CategoryMap((1, 2), ("cat", "zeppelin")))


def test_a_class_that_nothing_uses_may_be_unknown() -> None:
    config = GFLConfig(id2label={0: "cat", 1: "dog"})
    listed = CategoryMap((1, 2, 7), ("cat", "zeppelin", "DOG"))
    assert match_categories(config, listed, used={1}) == CategoryMap((1, 7), ("cat", "dog"))


def test_names_of_several_classes() -> None:
    config = GFLConfig(id2label={0: "Helmet", 1: "helmet"})
    exact = match_categories(config, CategoryMap((1, 2), ("helmet", "Helmet")))
    assert exact == CategoryMap((2, 1), ("Helmet", "helmet"))
    with pytest.raises(ValueError, match=r"may be several of the model's: {'HELMET': \['Helmet', 'helmet'\]}"):
        match_categories(config, CategoryMap((1,), ("HELMET",)))


def test_of_a_checkpoint_of_coco_with_91_outputs() -> None:
    config = GFLConfig(id2label={0: "N/A", 1: "person", 2: "N/A", 3: "car"})
    assert match_categories(config, CategoryMap((3, 9), ("car", "person"))).raw_ids == (10, 9, 12, 3)
