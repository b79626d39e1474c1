"""One matcher for the names of classes."""

import pytest
from transformers import PreTrainedConfig

from crosskd_hf.data.class_names import are_placeholders, class_names, listing, match_names, names_alike


@pytest.mark.parametrize(
    ("names", "known", "indices", "ambiguous"),
    [
        (["dog", "cat"], ["cat", "dog"], [1, 0], {}),
        (["Traffic  Light ", "STRASSE"], ["straße", "traffic light"], [1, 0], {}),
        (["e\u0301clair", "猫", "СОБАКА"], ["éclair", "собака", "猫"], [0, 2, 1], {}),
        (["zebra"], ["cat"], [-1], {}),
        (["helmet", "Helmet"], ["Helmet", "helmet"], [1, 0], {}),
        (["Helmet"], ["helmet", "Helmet"], [1], {}),
        (["Helmet", "helmet"], ["helmet"], [-1, 0], {}),
        (["HELMET"], ["helmet", "Helmet"], [-1], {"HELMET": ["helmet", "Helmet"]}),
        (["HELMET", "Helmet"], ["helmet"], [-1, -1], {"HELMET": ["helmet"], "Helmet": ["helmet"]}),
        (["HELMET", "Helmet"], ["helmet", "Helmet"], [-1, 1], {"HELMET": ["helmet"]}),
        ([], ["cat"], [], {}),
        (["cat"], [], [-1], {}),
    ],
)
def test_exact_names_first_then_case_and_spaces(names, known, indices, ambiguous) -> None:
    assert match_names(names, known) == (indices, ambiguous)


def test_names_alike() -> None:
    assert names_alike(["a", "B", "A ", "c", "b"]) == [["a", "A "], ["B", "b"]]


def test_of_a_model() -> None:
    coco = PreTrainedConfig(id2label={0: "N/A", 1: "person", 2: "N/A"})
    assert class_names(coco) == ("N/A [0]", "person", "N/A [2]")
    assert class_names(PreTrainedConfig(id2label={1: "a", 3: "b"})) == ("unnamed [0]", "a", "unnamed [2]", "b")
    assert class_names(PreTrainedConfig(num_labels=2)) == ("LABEL_0", "LABEL_1")
    late = PreTrainedConfig()
    late.id2label = {str(index): f"class {index}" for index in reversed(range(11))}
    assert class_names(late) == tuple(f"class {index}" for index in range(11))


def test_placeholders() -> None:
    assert are_placeholders(["LABEL_0", "LABEL_1"])
    assert are_placeholders(["0", "1"])
    assert not are_placeholders(["1", "2"])
    assert not are_placeholders(["LABEL_0", "cat"])
    assert not are_placeholders([])


def test_listing() -> None:
    assert listing(["a", "b", "c"], 2) == "3 classes, 'a', 'b', ..."
