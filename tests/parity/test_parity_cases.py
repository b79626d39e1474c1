"""The comparison with the authors' figures itself: nothing is passed over, and cases of other sizes run through."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity import parity_detr, wording
from tests.parity import steps as parity
from tests.parity.figures import Pair, figure_error, in_order, side_by_side

GOLDEN = Path(__file__).parents[1] / "golden"
Case = dict[str, Any]


class TestFigures:
    def test_every_leaf_is_beside_ours_and_what_is_not_computed_is_named(self) -> None:
        expected = {
            "losses": {"a": 1.0, "b": [1.0, 2.0]},
            "note": "words",
            "rows": [{"x": 1}, {"x": 2}],
            "new": {"y": 1},
        }
        pairs = side_by_side(expected, {"losses": {"a": 1.0, "b": [1.0, 2.0]}, "rows": [{"x": 1}, {"x": 3}]})
        errors = {name: figure_error(name, pair) for name, pair in pairs.items()}
        infinite = float("inf")
        assert errors == {"losses.a": 0, "losses.b": 0, "rows.0.x": 0, "rows.1.x": infinite, "new": infinite}

    @pytest.mark.parametrize("got", [[{"x": 1}], [], None])
    def test_other_numbers_of_rows_differ(self, got: Any) -> None:
        pairs = side_by_side({"rows": [{"x": 1}, {"x": 2}]}, {"rows": got})
        assert all(figure_error(name, pair) == float("inf") for name, pair in pairs.items())

    def test_numbers_are_relative_to_the_largest_of_their_list(self) -> None:
        assert figure_error("a", Pair([10.0, 0.1], [10.0, 0.2])) == pytest.approx(0.01)
        assert figure_error("a", Pair(0.0, 0.0)) == 0

    def test_whole_numbers_and_words_must_be_equal(self) -> None:
        assert figure_error("a", Pair([4000, 4001], [4001, 4000])) == float("inf")
        assert figure_error("a", Pair(["encoder"], ["encoder"])) == 0
        assert figure_error("a", Pair(48, 48.0)) == 0

    def test_nan_is_no_agreement(self) -> None:
        assert not figure_error("a", Pair([1.0, 2.0], [float("nan"), 2.0])) <= 1

    def test_gradients_are_judged_beside_the_largest_of_all(self) -> None:
        pairs = side_by_side({"grad_norms": {"a": 1e4, "b": 0.0}}, {"grad_norms": {"a": 1e4, "b": 1e-6}})
        assert figure_error("grad_norms.b", pairs["grad_norms.b"]) == pytest.approx(1e-4)

    def test_boxes_are_judged_by_their_own_size(self) -> None:
        pair = Pair([[300.0, 300.0, 310.0, 304.0]], [[300.0, 300.0, 310.0, 304.1]])
        assert figure_error("detections.0.boxes", pair) == pytest.approx(0.01, rel=1e-3)

    def test_maps(self) -> None:
        image = torch.linspace(-1, 1, 12).reshape(3, 4)
        places = image.flatten()[torch.linspace(0, 11, 5).long()].tolist()
        listed = {"shape": [3, 4], "mean": 0.0, "std": float(image.std()), "samples": places}
        assert figure_error("m", Pair(listed, image)) < 1e-6
        assert figure_error("m", Pair(listed, image + 0.1)) > 0.1
        assert figure_error("m", Pair(listed, image.T)) == float("inf")

    def test_limits(self) -> None:
        assert figure_error("gradient_below", Pair(1e-6, 1e-7)) == 0
        assert figure_error("gradient_below", Pair(1e-6, 2e-6)) == float("inf")

    def test_a_loss_listed_by_level_is_added_up(self) -> None:
        expected = {"losses": {"loss_feat_kd_0": 1.5, "loss_feat_kd_1": 2.5, "total": 4.0}}
        errors = {}
        for value in (4.0, 5.0):
            pairs = side_by_side(expected, {"losses": {"loss_feat_kd": value, "total": 4.0}})
            errors[value] = {name: figure_error(name, pair) for name, pair in pairs.items()}
        assert errors[4.0] == {"losses.loss_feat_kd (sum of its levels)": 0, "losses.total": 0}
        assert errors[5.0]["losses.loss_feat_kd (sum of its levels)"] == pytest.approx(0.25)
        unknown = side_by_side({"losses": {"loss_new_0": 1.0}}, {"losses": {"loss_feat_kd": 1.0}})
        assert figure_error("losses.loss_new_0", unknown["losses.loss_new_0"]) == float("inf")

    def test_a_loss_listed_in_a_list_of_levels_is_added_up(self) -> None:
        pairs = side_by_side({"losses": {"a": 4.0, "a_per_level": [1.5, 2.0]}}, {"losses": {"a": 4.0}})
        assert figure_error("losses.a", pairs["losses.a"]) == 0
        assert pairs["losses.a (sum of its levels)"].expected == 3.5
        pairs = side_by_side({"losses": {"a_per_level": [1.0]}}, {"losses": {"a": 1.0, "a_per_level": [1.0]}})
        assert set(pairs) == {"losses.a_per_level"}

    def test_detections_are_taken_once_and_by_label(self) -> None:
        box = [0.0, 0.0, 4.0, 4.0]
        listed = {"boxes": [box, box], "scores": [0.5, 0.5], "labels": [1, 2]}
        found = {"boxes": torch.tensor([box, box]), "scores": torch.tensor([0.5, 0.5]), "labels": torch.tensor([2, 1])}
        assert in_order(listed, found) == {"num": 2, **listed}
        assert in_order(listed, found | {"labels": torch.tensor([2, 2])}) == {"num": 2}


class TestWording:
    def test_numbers_of_a_known_sentence(self) -> None:
        assert wording.read("distillation.cls", "QFL beta 1, weight 0.25") == {"beta": 1, "weight": 0.25}
        assert wording.read("side.channel_order", "BGR") == {"bgr": True}
        text = "SGD momentum 0.9 weight_decay 1e-4 clip_grad_norm 35"
        assert wording.read("trajectory.optimizer", text)["weight_decay"] == 1e-4

    @pytest.mark.parametrize(
        "text", ["QFL beta one, weight 1", "QFL beta 1, weight 1.0 per level", "weight 1.0", "KL beta 1, weight 1.0"]
    )
    def test_another_sentence_is_an_error_that_names_it(self, text: str) -> None:
        with pytest.raises(wording.UnknownWordingError, match=f"distillation.cls='{text}' is not known"):
            wording.read("distillation.cls", text)

    @pytest.mark.parametrize(
        ("section", "change", "message"),
        [
            ("distillation", {"masks": True}, "The field distillation.masks=True is not known"),
            ("distillation", {"method": "kd"}, "distillation.method='kd' is not known"),
            ("distillation", {"pkd": {"weight": 1.0, "where": "P3"}}, "distillation.pkd.where='P3' is not known"),
            ("student", {"fpn_extra_levels": "none"}, "side.fpn_extra_levels='none' is not known"),
            ("teacher", {"nms": {"sigma": 0.5}}, "The field side.nms.sigma=0.5 is not known"),
            ("batch", {"flipped": [True]}, r"The field batch.flipped=\[True\] is not known"),
        ],
    )
    def test_every_field_of_a_case_is_read(self, section: str, change: dict[str, Any], message: str) -> None:
        case = json.loads((GOLDEN / "gfl_r18_from_r50.json").read_text())
        case[section] |= change
        with pytest.raises(wording.UnknownWordingError, match=message):
            parity.compare(case)

    def test_a_sentence_at_odds_with_a_field(self) -> None:
        case = json.loads((GOLDEN / "deformable_detr_r18_from_r50.json").read_text())
        with pytest.raises(wording.UnknownWordingError, match="at odds with num_classes=4"):
            parity.compare(case | {"num_classes": 4})

    def test_the_distance_of_boxes_must_be_that_of_the_teachers_head(self) -> None:
        case = json.loads((GOLDEN / "gfl_r18_from_r50.json").read_text())
        case["distillation"]["reg"] = "GIoU of decoded boxes, weight 1.0"
        with pytest.raises(wording.UnknownWordingError, match="rows of kind 'delta'; the teacher has 'distribution'"):
            parity.compare(case)


class TestExitStatus:
    def status(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: dict[str, float], **case: Any) -> int:
        monkeypatch.setitem(parity.RUNS, "faster_rcnn", lambda case: {"losses": {"a": 1.0}, "extra": 2.0})
        content = {"student": {"architecture": "faster_rcnn"}, "teacher": {}, "expected": {"losses": losses}} | case
        (tmp_path / "case.json").write_text(json.dumps(content))
        monkeypatch.setattr("sys.argv", ["parity.py", str(tmp_path / "case.json")])
        return parity.main()

    def test_agreement(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        assert self.status(tmp_path, monkeypatch, {"a": 1.0}) == 0
        assert "not in the case: extra" in capsys.readouterr().out

    def test_another_figure(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        assert self.status(tmp_path, monkeypatch, {"a": 1.01}) == 1
        assert "losses.a: 1.01 in the case, 1.0 here" in capsys.readouterr().out

    def test_an_unknown_figure(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        assert self.status(tmp_path, monkeypatch, {"a": 1.0, "b": 1.0}) == 1
        assert "losses.b: 1.0 in the case, not computed" in capsys.readouterr().out

    def test_a_case_that_cannot_be_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        assert self.status(tmp_path, monkeypatch, {}, student={}) == 1
        assert "KeyError: 'architecture'" in capsys.readouterr().out


def _case(name: str, shapes: tuple[tuple[int, int], ...], boxes: tuple[int, ...]) -> Case:
    case: Case = json.loads((GOLDEN / f"{name}.json").read_text())
    case["seed"] |= {"student": 3, "teacher": 4, "inputs": 5}
    pad = [max(sizes) for sizes in zip(*shapes, strict=True)]
    case["batch"] = {"pad_shape": pad, "image_shapes": [list(s) for s in shapes], "boxes_per_image": list(boxes)}
    return case


def faster_rcnn(
    shapes: tuple[tuple[int, int], ...] = ((96, 128), (64, 80)),
    boxes: tuple[int, ...] = (3, 2),
    classes: int = 4,
    agnostic: bool = False,
) -> Case:
    """The case in the repository with small images, narrow layers and few proposals."""
    case = _case("faster_rcnn_r18_from_r50", shapes, boxes)
    case["num_classes"] = classes
    case["student"]["box_head"] = case["student"]["box_head"].replace("80 classes", f"{classes} classes")
    for role in ("student", "teacher"):
        listed = case[role]["checkpoint_shapes"]
        for name, shape in listed.items():
            if name.startswith("roi_head"):
                listed[name] = [64 if size == 1024 else size for size in shape]
            if "fc_cls" in name:
                listed[name][0] = classes + 1
            if "fc_reg" in name:
                listed[name][0] = 4 if agnostic else 4 * classes
    for limits in case["student"]["proposals"].values():
        limits |= {"before_nms_per_level": 60, "kept_per_image": 30}
    return case


def deformable_detr(
    shapes: tuple[tuple[int, int], ...] = ((96, 128), (64, 80)),
    boxes: tuple[int, ...] = (3, 2),
    layers: tuple[int, int] = (2, 2),
    queries: tuple[int, int] = (12, 12),
    feature_levels: int = 4,
    two_stage: bool = True,
    with_box_refine: bool = True,
) -> Case:
    """The case in the repository with small images, four classes, width 32 and few layers of encoder and decoder."""
    case = _case("deformable_detr_r18_from_r50", shapes, boxes)
    case["num_classes"] = 4
    case["student"]["classification"] = "sigmoid, 4 classes, no background channel"
    for role, count in zip(("student", "teacher"), queries, strict=True):
        listed = _detr_shapes(case[role]["checkpoint_shapes"], layers, feature_levels, two_stage)
        if not two_stage:
            listed |= {"query_embedding.weight": [count, 64], "reference_points_fc.weight": [2, 32]}
            listed["reference_points_fc.bias"] = [2]
        case[role] |= {"checkpoint_shapes": listed, "num_queries": count}
    case["student"] |= {"two_stage": two_stage, "with_box_refine": with_box_refine}
    return case


def _detr_shapes(
    shapes: dict[str, list[int]], layers: tuple[int, int], feature_levels: int, two_stage: bool
) -> dict[str, list[int]]:
    changed = {}
    for name, shape in shapes.items():
        layer = re.match(r"(encoder|decoder)\.layers\.(\d+)", name)
        branch = re.match(r"bbox_head\.\w+_branches\.(\d+)", name)
        if layer and int(layer[2]) >= layers[layer[1] == "decoder"]:
            continue
        if branch and int(branch[1]) >= layers[1] + two_stage:
            continue
        if (not two_stage and "_trans_" in name) or (feature_levels == 3 and "extra_convs" in name):
            continue
        changed[name] = shape if name.startswith("backbone") else _narrow(name, shape, feature_levels)
    return changed


def _narrow(name: str, shape: list[int], feature_levels: int) -> list[int]:
    if name == "level_embed":
        return [feature_levels, 32]
    if name.startswith("neck"):
        return [32, *shape[1:]]
    first = {"sampling_offsets": 64 * feature_levels, "attention_weights": 32 * feature_levels, "cls_branches": 4}
    widths = {256: 32, 512: 64, 768: 96, 1024: 64}
    rows = [size for part, size in first.items() if part in name]
    return [*(rows or [widths.get(shape[0], shape[0])]), *(widths.get(size, size) for size in shape[1:])]


def computed(case: Case) -> Case:
    """The case with our own figures as the expected ones, of every kind that it has."""
    images = len(case["batch"]["image_shapes"])
    nothing = [{"num": 0, "boxes": [], "scores": [], "labels": []} for _ in range(images)]
    sections: dict[str, Any] = {"student_detections": nothing, "teacher_detections": nothing}
    regions = [[[1.0, 2.0, 60.0, 50.0], [5.0, 5.0, 20.0, 30.0]] for _ in range(images)]
    if case["student"]["architecture"] == "faster_rcnn":
        sections |= {"proposals": nothing, "with_own_pad_shape": {}, "feature_imitation_extra": {}}
        sections |= {"fixed_rois": {"boxes": regions}, "fixed_rois_random": {"boxes": regions}}
    else:
        sections["variants"] = {name: {} for name in case["expected"]["variants"]}
    architecture = case["student"]["architecture"]
    torch.manual_seed(0)
    return case | {"expected": _listed(parity.RUNS[architecture](case | {"expected": sections}))}


def _listed(figure: Any) -> Any:
    if isinstance(figure, torch.Tensor):
        flat = figure.detach().flatten().float()
        samples = flat[torch.linspace(0, len(flat) - 1, 8).long()].tolist()
        return {"shape": list(figure.shape), "mean": float(flat.mean()), "std": float(flat.std()), "samples": samples}
    if isinstance(figure, dict):
        return {key: _listed(value) for key, value in figure.items()}
    return [_listed(value) for value in figure] if isinstance(figure, list | tuple) else figure


CASES = {
    "faster_rcnn one box and none": faster_rcnn(boxes=(1, 0)),
    "faster_rcnn one image without boxes": faster_rcnn(shapes=((96, 128),), boxes=(0,), classes=1),
    "faster_rcnn three odd images, class-agnostic": faster_rcnn(((100, 141), (64, 80), (96, 60)), agnostic=True),
    "deformable_detr one box and none": deformable_detr(boxes=(1, 0), queries=(9, 14)),
    "deformable_detr one image without boxes": deformable_detr(shapes=((96, 128),), boxes=(0,), layers=(1, 3)),
    "deformable_detr three images": deformable_detr(((96, 128), (64, 80), (96, 60)), feature_levels=3),
    "deformable_detr one stage": deformable_detr(two_stage=False),
    "deformable_detr plain": deformable_detr(two_stage=False, with_box_refine=False),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CASES)
def test_a_case_of_other_sizes_runs_through_and_every_change_of_a_figure_is_found(name: str) -> None:
    case = computed(copy.deepcopy(CASES[name]))
    case.pop("checks", None)
    torch.manual_seed(0)
    pairs, absent = parity.compare(case)
    assert not absent
    assert parity.report(name, pairs, absent)
    assert not [key for key, pair in pairs.items() if "nan" in str(pair.expected).lower() and key != "std"]
    for key, pair in pairs.items():
        tolerance = parity.TOLERANCES.get(parity.kind_of(key), parity.OTHERWISE)
        assert not figure_error(key, pair._replace(expected=_changed(pair.expected))) <= tolerance, key


def _changed(figure: Any) -> Any:
    if isinstance(figure, dict):
        return figure | {"samples": [figure["samples"][0] + 0.1 + abs(figure["mean"]), *figure["samples"][1:]]}
    if isinstance(figure, list):
        return [_changed(figure[0]), *figure[1:]] if figure else [1]
    return figure + "x" if isinstance(figure, str) else figure + 1 if isinstance(figure, int) else figure * 1.1 + 0.1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_other_distillations_of_deformable_detr() -> None:
    case = deformable_detr(boxes=(2,))
    words = {
        "variant": "student queries",
        "cls": case["distillation"]["cls"].replace("beta 0", "beta 1").replace("weight 1.0", "weight 2.0"),
        "reg": case["distillation"]["reg"].replace("weight 1.0", "weight 0.5"),
    }
    config = parity_detr.distillations(case | {"distillation": words, "expected": {}})[""]
    assert (config.queries, config.box_loss, config.beta) == ("student", "l1_pixel", 1.0)
    assert config.terms == {"cls": 2.0, "reg": 0.5}
    case["expected"] = {"variants": {"student_queries": {"losses": {"total": 1.0}}, "no_queries": {"losses": {}}}}
    case.pop("checks")
    pairs, _ = parity.compare(case)
    assert pairs["variants.student_queries.losses.total"].got > 0
    assert pairs["variants.no_queries"].got is None


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["faster_rcnn one box and none", "deformable_detr one box and none"])
def test_a_case_without_its_optional_figures_runs_through(name: str) -> None:
    case = copy.deepcopy(CASES[name])
    for key in ("checks", "distillation_variants", "sensitivity", "notes", "ground_truth_losses", "reference"):
        case.pop(key, None)
    case["expected"] = {"losses": case["expected"]["losses"]}
    pairs, absent = parity.compare(case)
    assert {key.split(".")[0] for key in pairs} == {"losses"}
    assert "student_outputs" in absent
