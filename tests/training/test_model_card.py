"""The model card and its metadata."""

from __future__ import annotations

import ast
import re

import pytest
from huggingface_hub import ModelCard

from crosskd_hf.text import one_line
from crosskd_hf.training.model_card import CardContent, model_card

METRICS = {"eval_map": 0.4123, "eval_map_50": 0.6, "eval_map_large": float("nan"), "eval_loss": 1.0, "epoch": 12.0}
PROVENANCE = {
    "teacher": {"class": "GFLForObjectDetection", "name_or_path": "org/teacher", "revision": "abc", "sha256": "0123"},
    "distillation": {"methods": {"crosskd": {"cut": 3}}, "papers": {"crosskd": "CrossKD (CVPR 2024)"}},
}


def test_a_distilled_model() -> None:
    content = CardContent(
        "student", "GFLForObjectDetection", METRICS, "COCO 2017", "org/student", "mit", "org/teacher", PROVENANCE, ["x"]
    )
    card = ModelCard(str(model_card(content)))
    data = card.data
    assert (data.pipeline_tag, data.library_name, data.license) == ("object-detection", "transformers", "mit")
    assert data.base_model == "org/teacher"
    assert data.tags == ["object-detection", "crosskd", "x"]
    assert {result.metric_name: result.metric_value for result in data.eval_results} == {
        "box AP": 0.4123,
        "box AP50": 0.6,
    }
    assert data.eval_results[0].dataset_name == "COCO 2017"
    for text in ("| box AP | 41.2 |", '"cut": 3', "distilled from `org/teacher`", 'model="org/student"', "0123"):
        assert text in card.text


def test_a_data_set_of_the_hub_is_named_as_one() -> None:
    card = ModelCard(str(model_card(CardContent("student", "X", METRICS, "Owner/blood-cells"))))
    assert card.data.datasets == ["Owner/blood-cells"]
    assert card.data.eval_results[0].dataset_type == "Owner/blood-cells"
    card = ModelCard(str(model_card(CardContent("student", "X", METRICS, "blood cells"))))
    assert card.data.datasets is None
    assert card.data.eval_results[0].dataset_type == "blood-cells"


def test_classes_and_settings_are_listed() -> None:
    names = ["cat", "<b>dog</b>", *(f"class {number}" for number in range(200))]
    text = str(model_card(CardContent("student", "X", classes=names, training={"seed": "3", "image | size": "64"})))
    assert "202: cat, &#60;b&#62;dog&#60;/b&#62;, class 0, " in text
    assert "class 97 and 102 more, see `id2label`" in text
    assert "| seed | 3 |" in text
    assert "| image \\| size | 64 |" in text


@pytest.mark.parametrize(
    ("paper", "shown"),
    [
        (
            "Means (ICLR 2017), https://arxiv.org/abs/1612.03928",
            "- m: Means (ICLR 2017), <https://arxiv.org/abs/1612.03928>",
        ),
        ("Means, https://x.org/a>b", "- m: Means, https&#8203;://x.org/a&#62;b"),
        ("Means (nowhere)", "- m: Means (nowhere)"),
    ],
)
def test_only_a_plain_address_becomes_a_link(paper: str, shown: str) -> None:
    provenance = {**PROVENANCE, "distillation": {"methods": {}, "papers": {"m": paper}}}
    assert shown in str(model_card(CardContent("student", "X", provenance=provenance))).splitlines()


@pytest.mark.parametrize("own_code", [True, False])
def test_code_beside_the_weights_is_asked_for(own_code: bool) -> None:
    text = str(model_card(CardContent("student", "X", model_id="org/student", own_code=own_code)))
    assert ('model="org/student", trust_remote_code=True)' in text) == own_code
    assert ('model="org/student")' in text) != own_code


def test_a_model_trained_alone_and_never_evaluated() -> None:
    card = model_card(CardContent("student", "GFLForObjectDetection"))
    text = str(card)
    assert "base_model" not in text
    assert "license" not in text
    assert "model-index" not in text
    assert "istill" not in card.text
    assert "Results" not in card.text


@pytest.mark.parametrize("name", ["has: colon", "quote'd", "naïve"])
def test_any_name(name: str) -> None:
    card = ModelCard(str(model_card(CardContent(name, "X", METRICS))))
    assert card.data.model_name == name


EVIL = "<img src=x onerror=alert(1)>\n\n# heading\n```\n---\nlicense: evil\n| a | [b](c) \x1b[31m \u202e"


@pytest.mark.parametrize("own_code", [False, True])
def test_names_of_others_stay_text(own_code: bool) -> None:
    """No HTML, no heading, no metadata, no end of a code block comes out of a name."""
    classes = {"teacher": [0], "student": [1], "unknown": [EVIL]}
    distillation = {"methods": {"crosskd": {"cut": 3}}, "papers": {"crosskd": EVIL}, "classes": classes}
    provenance = {"teacher": {"class": EVIL, "sha256": "0123"}, "distillation": distillation}
    evil = CardContent(EVIL, EVIL, METRICS, EVIL, EVIL, "mit", None, provenance, own_code=own_code)
    plain = CardContent("name", "Net", METRICS, "data", "id", "mit", None, provenance, own_code=own_code)
    card, expected = (ModelCard(str(model_card(content))) for content in (evil, plain))
    assert card.data.license == "mit"
    assert (card.data.model_name, card.data.eval_results[0].dataset_name) == (one_line(EVIL),) * 2
    lines, shape = card.text.splitlines(), expected.text.splitlines()
    assert len(lines) == len(shape)
    starts = ("#", "```", "|", "---", "import", "from")
    assert [line.startswith(starts) for line in lines] == [line.startswith(starts) for line in shape]
    prose = re.sub(r"^```.*?^```$", "", card.text, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"`[^`]*`", "", prose.replace("\\`", ""))
    assert "<" not in prose
    assert not re.search(r"(?<!\\)[\[\]]", prose)
    assert not {"\x1b", "\u202e"} & set(card.text)
    block = re.search(r"^```python\n(.*?)^```$", card.text, re.DOTALL | re.MULTILINE)
    assert ast.literal_eval(re.search(r"model=(\".*?\")[,)]", block[1])[1]) == EVIL


@pytest.mark.parametrize(
    ("own_code", "opener"), [(True, "image_processor.open_image"), (False, "data.images.open_image")]
)
def test_how_images_of_more_than_8_bits_are_opened(own_code: bool, opener: str) -> None:
    assert f'{opener}("x-ray.tif")' in model_card(CardContent("student", "Net", own_code=own_code)).text
