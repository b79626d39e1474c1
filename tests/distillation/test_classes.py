"""Classes are matched by name."""

import pytest

from crosskd_hf.distillation.classes import match_classes
from crosskd_hf.models import GFLConfig


def config(*names: str) -> GFLConfig:
    return GFLConfig(id2label=dict(enumerate(names)), label2id={name: index for index, name in enumerate(names)})


def test_same_names_in_another_order() -> None:
    classes = match_classes(config("cat", "dog", "cow"), config("cow", "cat", "dog"))
    assert classes.student == [0, 1, 2]
    assert classes.teacher == [1, 2, 0]
    assert classes.unknown == []
    assert str(classes) == "3 classes shared by name"


def test_case_and_outer_spaces_do_not_matter() -> None:
    assert match_classes(config("Traffic Light ", "dog"), config("traffic light")).teacher == [0]


def test_exact_names_come_first() -> None:
    assert match_classes(config("Helmet", "helmet"), config("helmet", "Helmet")).teacher == [1, 0]
    classes = match_classes(config("Helmet", "helmet"), config("helmet"))
    assert (classes.student, classes.teacher, classes.unknown) == ([1], [0], ["Helmet"])


def test_a_class_that_may_be_several_is_refused() -> None:
    with pytest.raises(ValueError, match=r"may be several of the teacher's: {'HELMET': \['helmet', 'Helmet'\]}"):
        match_classes(config("HELMET", "dog"), config("helmet", "Helmet", "dog"))


def test_names_that_a_checkpoint_repeats_are_matched_by_their_index() -> None:
    coco = GFLConfig(id2label={0: "N/A", 1: "person", 2: "N/A", 3: "car"})
    assert match_classes(coco, coco).teacher == [0, 1, 2, 3]
    assert match_classes(config("car", "person"), coco).teacher == [3, 1]


def test_partly_shared() -> None:
    classes = match_classes(config("dog", "unicorn", "cow"), config("cow", "cat", "dog"))
    assert (classes.student, classes.teacher, classes.unknown) == ([0, 2], [2, 0], ["unicorn"])
    assert str(classes) == "2 classes shared by name; not distilled, unknown to the teacher: unicorn"


def test_more_than_ten_classes_keep_their_numeric_order() -> None:
    names = [f"class {index}" for index in range(12)]
    classes = match_classes(config(*names), config(*reversed(names)))
    assert classes.student == list(range(12))
    assert classes.teacher == list(reversed(range(12)))


def test_nothing_shared_is_an_error_that_shows_both_lists() -> None:
    with pytest.raises(ValueError, match=r"share no class name.*2 classes, 'cow', 'cat'.*1 classes, 'unicorn'"):
        match_classes(config("unicorn"), config("cow", "cat"))
