"""The model card and its metadata."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from crosskd_hf.training.model_card import CardContent, model_card

METRICS = {"eval_map": 0.4123, "eval_map_50": 0.6, "eval_map_large": float("nan"), "eval_loss": 1.0, "epoch": 12.0}
PROVENANCE = {
    "teacher": {"class": "GFLForObjectDetection", "name_or_path": "org/teacher", "revision": "abc", "sha256": "0123"},
    "distillation": {"methods": ["crosskd"], "cut": 3},
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
