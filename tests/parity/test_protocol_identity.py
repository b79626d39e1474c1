"""A configuration finds its own preset, and one that is edited is told by the name of the field."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crosskd_hf.experiments.presets import PRESETS, Preset
from tests.parity import protocol
from tests.parity.protocol_configs import compare
from tests.parity.protocol_fields import Field
from tests.parity.protocol_identity import find
from tests.parity.protocol_transforms import read_steps

GOLDEN = Path(__file__).parents[1] / "golden" / "protocol" / "configs"
Case = dict[str, Any]
BASES = {"gfl": "gfl_r50_1x", "atss": "atss_r50_1x", "retinanet": "retinanet_r50_1x", "fcos": "fcos_r50_caffe_ms_2x"}
BASES |= {"faster_rcnn": "faster_rcnn_r50_1x", "deformable_detr": "deformable_detr_r18_50e"}
KINDS = {"resnet": "ResNet", "resnext": "ResNeXt", "swin": "SwinTransformer", "mobilenetv2": "MobileNetV2"}
WORDS: dict[str, Case] = {
    "crosskd": {"loss_cls_kd": {"loss_weight": 1.0}, "loss_reg_kd": {"loss_weight": 1.0}},
    "pkd": {"loss_feat_kd": {"loss_weight": 6.0}},
}


def read(name: str) -> Case:
    content: Case = json.loads((GOLDEN / f"{name}.json").read_text())
    return content


def in_words(entry: Preset) -> Case:
    """A visible configuration with the identity of a preset, whose methods such files can tell."""
    case = read(BASES[entry.student.architecture])
    part, edges = case["protocol"], entry.training.shortest_edges
    part["weights"] = backbone(entry.student.backbone, bool(dict(entry.student.fields).get("deformable_strides")))
    part["epochs"] = entry.training.resolved_schedule.epochs
    part["train_transforms"] = [{"type": "RandomResize", "scale": [[1333, min(edges)], [1333, max(edges)]]}]
    if entry.training.data == "voc":
        part["head"]["num_classes"] = 20
    if entry.teacher is not None and entry.losses is not None:
        spec = entry.teacher.detector
        case["teacher"] = {"config": f"configs/{spec.architecture}/x.py", "weights": backbone(spec.backbone)}
        methods = [method.partition(":")[0] for method in entry.losses.methods]
        part["distillation"] = {key: value for name in methods for key, value in WORDS[name].items()}
    return case


def backbone(name: str, deformable: bool = False) -> Case:
    kind = next(kind for start, kind in KINDS.items() if name.startswith(start))
    depth = int("".join(filter(str.isdigit, name.split("_")[0]))) if kind.startswith("Res") else None
    return {"type": kind, "depth": depth, "dcn": deformable}


def can_be_told(entry: Preset) -> bool:
    """Whether the words of such files are enough: they know two methods, and heads of numbers or of GFL."""
    methods = set() if entry.losses is None else {method.partition(":")[0] for method in entry.losses.methods}
    specs = [entry.student, *([] if entry.teacher is None else [entry.teacher.detector])]
    return methods <= set(WORDS) and not (
        entry.student.architecture != "gfl" and any(dict(spec.fields).get("reg_max") for spec in specs)
    )


def alike(entry: Preset) -> tuple[object, ...]:
    """What a file tells of an experiment."""
    methods = () if entry.losses is None else tuple(method.partition(":")[0] for method in entry.losses.methods)
    teacher, training = entry.teacher and entry.teacher.detector, entry.training
    specs = [(spec.architecture, spec.backbone) if spec else None for spec in (entry.student, teacher)]
    edges = min(training.shortest_edges), max(training.shortest_edges)
    return (*specs, methods, training.resolved_schedule.epochs, edges, training.data)


@pytest.mark.parametrize("name", [name for name, entry in PRESETS.items() if can_be_told(entry)])
def test_every_experiment_finds_its_preset(name: str) -> None:
    case = in_words(PRESETS[name])
    found = find(case, read_steps("train", case["protocol"]["train_transforms"])[0].shortest)
    assert name in [entry.name for entry in found]
    assert {alike(entry) for entry in found} == {alike(PRESETS[name])}


def test_all_rows_but_those_of_other_methods_can_be_told() -> None:
    told = [row for entry in PRESETS.values() if can_be_told(entry) for row in entry.rows]
    untold = {
        method.partition(":")[0]
        for entry in PRESETS.values()
        if not can_be_told(entry) and entry.losses is not None
        for method in entry.losses.methods
    }
    assert len(told) >= 75
    features = {"fitnets", "inside_gt", "main_region", "defeat", "fine_grained", "gid", "fgd", "skd"}
    assert untold == features | {"kd", "ld", "crosskd"}  # CrossKD where it stands beside mimicking


def at(path: str, value: Any) -> Callable[[Case], None]:
    """An edit of the value at a path."""

    def edit(case: Case) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
        part: Any = case
        for parent in parents:
            part = part[parent]
        part[last] = value

    return edit


P, FCOS = "protocol", "crosskd_fcos_r50_from_r101_caffe_ms_2x"
EDITS = [
    ("gfl_r50_1x", f"{P}/test_cfg/nms/iou_threshold", 0.5, "test_cfg.nms.iou_threshold"),
    ("gfl_r50_1x", f"{P}/test_cfg/score_thr", 0.01, "test_cfg.score_thr"),
    ("gfl_r50_1x", f"{P}/optimizer/lr", 0.02, "optimizer.lr"),
    ("gfl_r50_1x", f"{P}/optimizer/nesterov", True, "optimizer.nesterov"),
    ("gfl_r50_1x", f"{P}/schedulers/0/end", 1000, "schedulers[0].end"),
    ("gfl_r50_1x", f"{P}/schedulers/1/milestones", [8, 10], "schedulers[1].milestones"),
    ("gfl_r50_1x", "schedule/lr/3/1", 0.5, "schedule.lr["),
    ("gfl_r50_1x", f"{P}/weights/weights", "torchvision://resnet50-v2", "weights.weights"),
    ("gfl_r50_1x", f"{P}/weights/weights", "timm://resnet50.a1_in1k", "weights.weights"),
    ("gfl_r50_1x", f"{P}/weights/frozen_stages", 2, "weights.frozen_stages"),
    ("gfl_r50_1x", f"{P}/neck/start_level", 0, "neck.levels"),
    ("gfl_r50_1x", f"{P}/neck/upsample", "bilinear", "neck.upsample"),
    ("gfl_r50_1x", f"{P}/head/loss_bbox/type", "CIoULoss", "head.loss_bbox.type"),
    ("gfl_r50_1x", f"{P}/head/anchor_generator/octave_base_scale", 4, "head.anchor_generator.octave_base_scale"),
    ("gfl_r50_1x", f"{P}/head/dcn_on_last_conv", True, "head.dcn_on_last_conv"),
    ("gfl_r50_1x", f"{P}/train_loader/images_per_gpu", 4, "train_loader.images_per_gpu"),
    ("gfl_r50_1x", f"{P}/train_transforms/3/prob", 0.0, "train_transforms.flip"),
    ("gfl_r50_1x", f"{P}/train_transforms/3", {"type": "Mosaic"}, "train_transforms[3].type"),
    ("gfl_r50_1x", f"{P}/train_transforms/2/interpolation", "bicubic", "train_transforms[2].interpolation"),
    ("gfl_r50_1x", f"{P}/test_transforms/1/scale", [1333, 640], "test_transforms.shortest"),
    ("gfl_r50_1x", f"{P}/evaluator/metric", "proposal", "evaluator.metric"),
    ("gfl_r50_1x", f"{P}/filter/min_size", 16, "filter.min_size"),
    ("gfl_r50_1x", f"{P}/ema", True, "ema"),
    ("gfl_r50_1x", f"{P}/mixup", {"alpha": 1}, "protocol.mixup"),
    ("gfl_r50_1x", "extra", 1, "extra"),
    ("gfl_r50_1x", f"{P}/clip", {"max_norm": 35, "norm_type": 2}, "clip"),
    ("gfl_r50_1x", "param_groups/frozen_names/0", "backbone.layer2.0.conv1.weight", "param_groups.frozen_names"),
    ("gfl_r50_1x", "param_groups/frozen_names/0", "backbone.stages.0.weight", "param_groups.frozen_names"),
    (FCOS, f"{P}/paramwise/bias_lr_mult", 1.0, "paramwise"),
    (FCOS, f"{P}/distillation/loss_cls_kd/loss_weight", 1.0, "distillation.loss_cls_kd.loss_weight"),
    (FCOS, f"{P}/distillation/align", False, "distillation.losses"),
    (FCOS, "teacher/test_cfg/max_per_img", 300, "teacher.test_cfg.max_per_img"),
    ("crosskd_retinanet_r18_from_r50_1x", f"{P}/neck/add_extra_convs", "on_input", "neck.add_extra_convs"),
    ("deformable_detr_r18_50e", f"{P}/paramwise/custom_keys/backbone/lr_mult", 0.2, "paramwise.custom_keys"),
    ("deformable_detr_r18_50e", f"{P}/head/loss_cls/loss_weight", 1.0, "head.loss_cls.loss_weight"),
    ("faster_rcnn_r50_1x", f"{P}/train_cfg/rcnn/sampler/num", 256, "train_cfg.rcnn.sampler.num"),
]


@pytest.fixture(scope="module")
def originals() -> dict[str, Case]:
    return {name: read(name) for name in {name for name, *_ in EDITS}}


@pytest.mark.parametrize(("name", "path", "value", "field"), EDITS, ids=[f"{e[0]}-{e[1]}" for e in EDITS])
def test_an_edited_file_is_told_by_its_field(
    originals: dict[str, Case], name: str, path: str, value: Any, field: str
) -> None:
    case = copy.deepcopy(originals[name])
    at(path, value)(case)
    wrong = [entry.name for entry in compare(case) if different(entry)]
    assert any(name.startswith(field) for name in wrong), wrong
    assert len(wrong) <= 3


def different(field: Field) -> bool:
    return not field.equal and field.remains not in protocol.REMAINING


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (f"{P}/epochs", 36, "epochs 12, not 36"),
        (f"{P}/head/type", "VFNetHead", "head 'gfl', not 'VFNetHead'"),
        (f"{P}/weights/depth", 152, "not 'resnet152'"),
        (f"{P}/head/num_classes", 365, "data 'coco', not '365 classes'"),
        (f"{P}/distillation", {"loss_other_kd": {"loss_weight": 1.0}}, "loss_other_kd"),
    ],
)
def test_another_experiment_has_no_preset(path: str, value: Any, words: str) -> None:
    case = read("gfl_r50_1x")
    at(path, value)(case)
    with pytest.raises(ValueError, match="no preset is this experiment; the nearest is [a-z0-9-]+, with ") as error:
        compare(case)
    assert words in str(error.value)


def test_a_student_beside_whose_losses_all_others_weigh_nothing_is_alone() -> None:
    case = read("crosskd_faster_rcnn_r18_from_r50_1x")
    for loss in case["protocol"]["distillation"].values():
        loss["loss_weight"] = 0.0
    found = list(compare(case))
    assert found[0].published == "faster-rcnn-r18"
    assert not [field.name for field in found if different(field)]
