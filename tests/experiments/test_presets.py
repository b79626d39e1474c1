"""Presets say what was published, and the documentation says what they say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from crosskd_hf.create import ARCHITECTURES, DetectorSpec
from crosskd_hf.data.categories import CategoryMap
from crosskd_hf.data.transforms import TrainTransform
from crosskd_hf.distillation import METHODS
from crosskd_hf.experiments.check_pair import check_pair
from crosskd_hf.experiments.deformable_detr import freeze_stem, new_deformable_detr
from crosskd_hf.experiments.presets import IMAGENET, PRESETS, preset, reproduction_table, waiting_table
from crosskd_hf.models import DETECTORS, DetectionImageProcessor
from crosskd_hf.training.config import CrossKDConfig
from crosskd_hf.training.schedules import GroupRule, parameter_groups, step_factor

DOCS = Path(__file__).parents[2] / "docs" / "reproduce.md"
PUBLISHED = Path(__file__).parents[3] / "shared" / "spec" / "paper_results.yaml"
GOLDEN = Path(__file__).parents[1] / "golden" / "protocol" / "schedules.json"
CONFIGURATIONS = json.loads(GOLDEN.read_text())
NAMES = {
    "atss_r50_1x": "atss-r50",
    "crosskd_atss_r50_from_r101_1x": "crosskd-atss-r50-from-r101",
    "crosskd_deformable_detr_r18_from_r50_50e": "crosskd-deformable-detr-r18-from-r50",
    "crosskd_faster_rcnn_r18_from_r50_1x": "crosskd-faster-rcnn-r18-from-r50",
    "crosskd_fcos_r50_from_r101_caffe_ms_2x": "crosskd-fcos-r50-from-r101",
    "crosskd_gfl_r18_from_r50_1x": "crosskd-gfl-r18-from-r50",
    "crosskd_pkd_gfl_r50_from_r101_1x": "crosskd-pkd-gfl-r50-from-r101",
    "crosskd_retinanet_r18_from_r50_1x": "crosskd-retinanet-r18-from-r50",
    "crosskd_retinanet_r50_from_r101_2x": "crosskd-retinanet-r50-from-r101",
    "deformable_detr_r18_50e": "deformable-detr-r18",
    "deformable_detr_r50_50e": "deformable-detr-r50",
    "faster_rcnn_r50_1x": "faster-rcnn-r50",
    "fcos_r50_caffe_ms_2x": "fcos-r50-ms-2x",
    "gfl_r50_1x": "gfl-r50",
    "retinanet_r101_2x": "retinanet-r101-2x",
    "retinanet_r50_1x": "retinanet-r50",
    "retinanet_swin_t_1x": "retinanet-swin-t",
}
SPLIT_ATTENTION = 6 * 4  # tensors: transformers holds q, k and v of six decoder layers apart, MMDetection as one


def build(spec: DetectorSpec) -> Any:
    """The architecture on the meta device: full size, no memory."""
    with torch.device("meta"):
        if spec.architecture == "deformable_detr":
            classes = CategoryMap(tuple(range(80)), tuple(f"class {number}" for number in range(80)))
            model = new_deformable_detr(spec.backbone, classes)
            freeze_stem(model.model.backbone.model)  # as weights do
            return model
        config_class = ARCHITECTURES[spec.architecture]
        return DETECTORS[config_class](config_class(backbone=spec.backbone, num_labels=80, **dict(spec.fields)))


def test_documentation_is_made_from_the_presets() -> None:
    page = DOCS.read_text()
    assert reproduction_table() in page
    rows = [line for line in waiting_table().splitlines()[2:] if line not in page]  # those that still wait are named
    assert not rows


@pytest.mark.parametrize("name", PRESETS)
def test_training_arguments_are_valid(name: str, tmp_path: Path) -> None:
    entry = preset(name)
    training = entry.training
    assert (entry.teacher is None) == (entry.losses is None)
    assert training.source
    assert TrainTransform(shortest_edges=training.shortest_edges, longest_edge=training.longest_edge).resizes
    if entry.needs:
        with pytest.raises(ValueError, match=f"needs the methods {', '.join(entry.needs)}, which this version"):
            entry.training_arguments()
        return
    config = CrossKDConfig(output_dir=str(tmp_path), use_cpu=True, **entry.training_arguments())
    settings = config.schedule_settings()
    assert settings is not None
    assert config.num_train_epochs == settings.epochs == training.resolved_schedule.epochs
    assert config.learning_rate == (0.02 if "faster-rcnn" in name else settings.learning_rate)
    assert config.max_grad_norm == training.max_grad_norm
    if entry.losses is not None:
        assert tuple(map(str, config.methods)) == entry.losses.methods  # in the spelling that comes back
        assert entry.losses.source
        assert name.replace("-", "_").startswith("_".join(m.partition(":")[0] for m in entry.losses.methods))


def test_statistics_are_those_of_the_authors() -> None:
    """Over the local batch, wherever channels are compared on dense heads."""
    for entry in PRESETS.values():
        if entry.losses is not None and entry.student.architecture not in ("faster_rcnn", "deformable_detr"):
            for method in entry.losses.methods:
                assert method[:2] not in ("cr", "pk") or "statistics=batch" in method, entry.name


def test_ld_is_that_of_the_released_code() -> None:
    """Its peculiarities, where a row's terms have them; with 2 images of a process its sums are those of "images"."""
    for entry in PRESETS.values():
        for method in () if entry.losses is None else entry.losses.methods:
            if method.startswith("ld"):
                second = "terms.region=0" not in method and entry.student.architecture != "fcos"
                assert ("iou=released" in method) == second, entry.name
                assert ("joint_sides=True" in method) == (entry.student.architecture == "retinanet"), entry.name
                assert ("normalize=official" in method) == (entry.training.images_per_device != 2), entry.name


def test_needs_are_the_methods_that_do_not_exist() -> None:
    for entry in PRESETS.values():
        named = {method.partition(":")[0] for method in entry.losses.methods} if entry.losses else set()
        assert set(entry.needs) == named - set(METHODS)


def test_names_tell_student_and_teacher() -> None:
    for name, entry in PRESETS.items():
        assert entry.student.architecture.replace("_", "-") in name
        assert ("-from-" in name) == (entry.teacher is not None)
        if entry.teacher is not None and entry.teacher.detector.architecture != entry.student.architecture:
            assert f"from-{entry.teacher.detector.architecture}" in name or "swin" in name


def test_every_architecture_is_the_published_one() -> None:
    """Trained parameters in millions, with 80 classes (Localization Distillation, supplement, Table 3)."""
    expected = {
        "gfl-r50": 32.22,
        "atss-r50-ld-baseline": 32.07,
        "fcos-r50-ld-baseline": 32.02,
        "retinanet-r50-ld-baseline": 37.74,
        "ld-gfl-r50-from-r101": 32.22,
        "ld-atss-r50-from-r101": 32.22,
        "ld-fcos-r50-from-r101": 32.17,
        "ld-retinanet-r50-from-r101": 39.07,
    }
    for name, millions in expected.items():
        count = sum(p.numel() for p in build(PRESETS[name].student).parameters() if p.requires_grad) / 1e6
        assert count == pytest.approx(millions, abs=0.006), name


@pytest.mark.parametrize("configuration", NAMES)
class TestAgainstTheConfigurations:
    """What the authors' implementation resolved its configurations to."""

    def test_settings(self, configuration: str) -> None:
        golden, entry = CONFIGURATIONS[configuration], preset(NAMES[configuration])
        training, schedule = entry.training, entry.training.resolved_schedule
        for name, value in (
            ("epochs", schedule.epochs),
            ("images_per_device", training.images_per_device),
            ("images_per_update", schedule.images_per_update),
            ("clip", training.max_grad_norm),
            ("weight_decay", schedule.weight_decay),
            ("optimizer", schedule.optimizer),
            ("filter", {"filter_empty_gt": training.drop_empty, "min_size": training.min_side}),
        ):
            assert value == golden[name], name
        pixels = entry.model.pixels
        assert [list(pixels.mean), list(pixels.std), pixels.order.upper(), pixels.divisor] == list(
            golden["pixels"].values()
        )
        assert training.workers == golden["workers"]

    def test_learning_rate_of_every_update(self, configuration: str) -> None:
        golden, schedule = CONFIGURATIONS[configuration], preset(NAMES[configuration]).training.resolved_schedule
        decays = [epoch * golden["epoch_length"] for epoch in schedule.decay_epochs]
        factor = step_factor(decays, 0 if schedule.warmup_kind == "none" else 500, schedule.warmup_kind)
        for update, rate in golden["lr"]:
            assert schedule.learning_rate * factor(update) == pytest.approx(rate, rel=1e-9), update

    def test_parameter_groups(self, configuration: str) -> None:
        golden, entry = CONFIGURATIONS[configuration]["groups"], preset(NAMES[configuration])
        training, model = entry.training, build(entry.student)
        rule = GroupRule(1.0, 1.0, None, training.lr_factors, training.bias_lr_factor, training.bias_weight_decay)
        groups = [(g["lr"], g["weight_decay"], g["params"]) for g in parameter_groups(model, rule)]
        found = sorted([rate, decay, len(ps), sum(p.numel() for p in ps)] for rate, decay, ps in groups)
        if entry.student.architecture == "deformable_detr":
            found[-1][2] -= SPLIT_ATTENTION
        assert found == sorted(golden)


def test_caffe_weights_or_what_is_done_without_them() -> None:
    model = preset("fcos-r50-ms-2x").model
    given = model.starting_from("resnet50_caffe.pth")
    assert given.spec.backbone_weights == "resnet50_caffe.pth"
    assert (given.pixels, dict(given.spec.fields)["caffe_stride"]) == (model.pixels, True)
    without = model.starting_from()
    assert (without.spec.backbone_weights, without.pixels) == ("tv_in1k", IMAGENET)
    assert "caffe_stride" not in dict(without.spec.fields)
    gfl = preset("gfl-r50").model
    assert gfl.starting_from() == gfl
    for pixels in (model.pixels, without.pixels):
        processor = DetectionImageProcessor(**pixels.processor_arguments())
        assert processor.image_mean == pytest.approx([value / 255 for value in pixels.mean])
        assert (processor.channel_order, processor.size_divisor) == (pixels.order, pixels.divisor)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, entry in PRESETS.items() if entry.teacher is not None])
def test_every_pair_can_be_distilled(name: str) -> None:
    entry = preset(name)
    if entry.needs:
        pytest.skip(f"needs {', '.join(entry.needs)}")
    models = [build(spec) for spec in (entry.student, entry.teacher.detector)]
    report = check_pair(*models, entry.losses.methods, measure=False)
    assert report.ok, report
    found = report.distillation["methods"].get("crosskd")
    if found is not None and entry.teacher.detector.architecture == "gfl":
        whole = {"cls": 1.0, "reg": 4.0}
        cut = 3 if "-cut-" not in name else int(name[-1])
        assert (found["cut"], {**whole, **found["terms"]}) == (cut, whole)
    if found is not None and "fcos" in name:
        assert (found["cut"], found["terms"]) == (2, {"cls": 0.4, "reg": 0.75})
    if "pkd" in report.distillation["methods"]:
        published = {"gfl": 6, "retinanet": 2, "fcos": 2, "atss": 1}
        weight = published[entry.student.architecture] if "crosskd" in name else 6
        assert report.distillation["methods"]["pkd"]["weight"] == weight


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

    def test_every_row_has_a_preset(self) -> None:
        listed = [row for entry in PRESETS.values() for row in entry.rows]
        assert len(listed) == len(set(listed)) == 105
        assert set(listed) == set(self.rows())

    def test_published_ap(self) -> None:
        rows = self.rows()
        for entry in PRESETS.values():
            assert {rows[row]["metrics"]["AP"] for row in entry.rows} <= {entry.ap}, entry.name
            columns = [name for name in ("AP50", "AP60", "AP70", "AP80", "AP90") if "voc" in entry.name]
            assert [rows[entry.rows[0]]["metrics"][name] for name in columns] == list(entry.ap_by_iou), entry.name
            if entry.teacher is not None and entry.teacher.ap is not None:
                assert entry.teacher.ap in {
                    other.ap for other in PRESETS.values() if other.student == entry.teacher.detector
                }
