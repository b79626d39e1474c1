"""Published weights and cuts are those of the authors' cases."""

import json
from pathlib import Path

import pytest

from crosskd_hf.distillation.methods.crosskd import PUBLISHED
from tests.parity import wording

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = [path.stem for path in sorted(GOLDEN.glob("*.json")) if not path.stem.startswith("deformable_detr")]


@pytest.mark.parametrize("name", CASES)
def test_weights_and_cut_are_those_of_the_case(name: str) -> None:
    settings = json.loads((GOLDEN / f"{name}.json").read_text())["distillation"]
    terms = ("cls", "reg", "centerness")
    said = {term: wording.read(f"distillation.{term}", settings[term]) for term in terms if term in settings}
    published = PUBLISHED[said["reg"]["kind"]]
    assert {term: published["terms"][term] for term in said} == {term: said[term]["weight"] for term in said}
    assert published.get("cut") == settings.get("cross_head_index")
    for option in ("beta", "temperature"):
        values = {meaning[option] for meaning in said.values() if option in meaning}
        assert values <= {published.get(option)}
