"""Presets say what was published, and the documentation says what they say."""

from pathlib import Path
from typing import Any

import pytest
import torch

from crosskd_hf.create import ARCHITECTURES, DetectorSpec
from crosskd_hf.data.transforms import TrainTransform
from crosskd_hf.experiments.check_pair import check_pair
from crosskd_hf.experiments.presets import NOT_AVAILABLE, PRESETS, preset, reproduction_table
from crosskd_hf.models import DETECTORS
from crosskd_hf.training.config import CrossKDConfig

DOCS = Path(__file__).parents[2] / "docs" / "reproduce.md"
PUBLISHED = Path(__file__).parents[3] / "shared" / "spec" / "paper_results.yaml"


def build(spec: DetectorSpec) -> Any:
    """The architecture on the meta device: full size, no memory."""
    config_class = ARCHITECTURES[spec.architecture]
    with torch.device("meta"):
        return DETECTORS[config_class](config_class(backbone=spec.backbone, num_labels=80, **dict(spec.fields)))


def test_documentation_is_made_from_the_presets() -> None:
    assert reproduction_table() in DOCS.read_text()


@pytest.mark.parametrize("name", PRESETS)
def test_training_arguments_are_valid(name: str, tmp_path: Path) -> None:
    entry = preset(name)
    assert entry.name == name
    config = CrossKDConfig(output_dir=str(tmp_path), use_cpu=True, **entry.training_arguments())
    assert config.schedule_settings().epochs == {"1x": 12, "2x": 24}[entry.training.schedule]
    assert config.max_grad_norm == entry.training.max_grad_norm
    training = entry.training
    assert TrainTransform(shortest_edges=training.shortest_edges, longest_edge=training.longest_edge).resizes
    assert (entry.teacher is None) == (entry.losses is None)
    assert training.source
    assert 30 < entry.ap < 45
    if entry.losses is not None:
        assert tuple(map(str, config.methods)) == entry.losses.methods  # in the spelling that comes back
        assert all("statistics=batch" in method for method in entry.losses.methods if method[:2] in ("cr", "pk"))
        assert entry.losses.source
        assert name.startswith("-".join(method.partition(":")[0] for method in entry.losses.methods))


def test_names_tell_student_and_teacher() -> None:
    for name, entry in PRESETS.items():
        assert entry.student.architecture in name
        assert ("-from-" in name) == (entry.teacher is not None)
        if entry.teacher is not None and entry.teacher.detector.architecture != entry.student.architecture:
            assert f"from-{entry.teacher.detector.architecture}" in name


def test_every_architecture_is_the_published_one() -> None:
    """Trained parameters in millions, with 80 classes (Localization Distillation, supplement, Table 3)."""
    expected = {"gfl-r50": 32.22, "atss-r50": 32.07, "fcos-r50-ms-2x": 32.02, "retinanet-r50": 37.74}
    for name, millions in expected.items():
        count = sum(p.numel() for p in build(PRESETS[name].student).parameters() if p.requires_grad) / 1e6
        assert count == pytest.approx(millions, abs=0.006), name


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, entry in PRESETS.items() if entry.teacher is not None])
def test_every_pair_can_be_distilled(name: str) -> None:
    entry = preset(name)
    models = [build(spec) for spec in (entry.student, entry.teacher.detector)]
    report = check_pair(*models, entry.losses.methods, measure=False)
    assert report.ok, report
    found = report.distillation["methods"].get("crosskd")
    if found is not None and entry.teacher.detector.architecture == "gfl":
        whole = {"cls": 1.0, "reg": 4.0}
        cut = 3 if "-cut-" not in name else int(name[-1])
        assert (found["cut"], {**whole, **found["terms"]}) == (cut, whole)
    if "fcos" in name:
        assert (found["cut"], found["terms"]) == (2, {"cls": 0.4, "reg": 0.75})
    if "pkd" in report.distillation["methods"]:
        assert report.distillation["methods"]["pkd"]["weight"] == 6


def test_an_unknown_name_gets_suggestions() -> None:
    with pytest.raises(ValueError, match=r"crosskd-gfl-r50-from-r101.*docs/reproduce.md"):
        preset("crosskd-gfl-r50-r101")


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the transcribed tables are not here")
class TestAgainstTheTables:
    @staticmethod
    def rows() -> dict[str, dict[str, Any]]:
        yaml = pytest.importorskip("yaml")
        tables = yaml.safe_load(PUBLISHED.read_text())["tables"].values()
        return {row["id"]: row for table in tables for row in table["rows"]}

    def test_every_row_is_a_preset_or_has_a_reason(self) -> None:
        listed = [row for entry in PRESETS.values() for row in entry.rows]
        assert len(listed) == len(set(listed))
        assert not set(listed) & set(NOT_AVAILABLE)
        assert set(listed) | set(NOT_AVAILABLE) == set(self.rows())

    def test_published_ap(self) -> None:
        rows = self.rows()
        for entry in PRESETS.values():
            assert {rows[row]["metrics"]["AP"] for row in entry.rows} == {entry.ap}, entry.name
            if entry.teacher is not None:
                assert entry.teacher.ap in {
                    other.ap for other in PRESETS.values() if other.student == entry.teacher.detector
                }
