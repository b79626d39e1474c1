"""Which preset a published configuration is: by what defines an experiment, not by how much else agrees."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from crosskd_hf.experiments.presets import PRESETS, Preset
from tests.parity.protocol_words import BACKBONES, HEADS

Case = dict[str, Any]
CROSSKD = {"loss_cls_kd", "loss_reg_kd", "loss_center_kd", "loss_iou_kd"}
FOLDERS = {"gfl", "atss", "fcos", "retinanet", "faster_rcnn", "deformable_detr"}
DATA = {80: "coco", 20: "voc"}
NAMES = {"SwinTransformer": "swin_tiny_patch4_window7_224", "MobileNetV2": "mobilenetv2_100"}


@dataclass(frozen=True)
class Identity:
    """What tells an experiment from others.

    Args:
        head, backbone: Of the student: its architecture, and timm's name.
        teacher: Both of the teacher.
        methods: Names.
        epochs: Length.
        edges: Shorter sides that are drawn in training, the least and the largest.
        data: "coco" or "voc".
    """

    head: str
    backbone: str
    teacher: str | None
    methods: frozenset[str]
    epochs: int
    edges: tuple[int, int]
    data: str

    def differences(self, other: Identity) -> list[str]:
        """In words, of those facts that differ."""
        ours = asdict(other)
        return [f"{name} {ours[name]!r}, not {value!r}" for name, value in asdict(self).items() if value != ours[name]]


def find(case: Case, edges: list[int]) -> list[Preset]:
    """The presets of a configuration: several only where options of their methods are all that differs.

    Raises:
        ValueError: There is none; the message says what the nearest one has.
    """
    wanted = identity_of(case, edges)
    known = {entry.name: identity_of_preset(entry) for entry in PRESETS.values()}
    found = [PRESETS[name] for name, identity in known.items() if identity == wanted]
    if not found:
        facts = {name: wanted.differences(identity) for name, identity in known.items()}
        nearest = min(known, key=lambda name: (len(facts[name]), known[name].backbone != wanted.backbone))
        raise ValueError(f"no preset is this experiment; the nearest is {nearest}, with {', '.join(facts[nearest])}")
    return found


def identity_of(case: Case, edges: list[int]) -> Identity:
    """Of a configuration. A student beside whose losses all others weigh 0 is trained alone."""
    protocol, head = case["protocol"], case["protocol"]["head"]
    methods = methods_of(protocol.get("distillation") or {})
    teacher = case.get("teacher") if methods else None
    architecture = "faster_rcnn" if "rpn" in head else HEADS.get(head["type"], head["type"])
    classes = head["roi"]["bbox_head"]["num_classes"] if "roi" in head else head["num_classes"]
    return Identity(
        architecture,
        backbone_of(protocol["weights"]),
        f"{architecture_of(teacher['config'])}:{backbone_of(teacher['weights'])}" if teacher else None,
        frozenset(methods),
        protocol["epochs"],
        (min(edges), max(edges)),
        DATA.get(classes, f"{classes} classes"),
    )


def identity_of_preset(entry: Preset) -> Identity:
    """The same of a preset."""
    teacher, edges = entry.teacher, entry.training.shortest_edges
    return Identity(
        entry.student.architecture,
        _words(entry.student),
        None if teacher is None else f"{teacher.detector.architecture}:{_words(teacher.detector)}",
        frozenset(() if entry.losses is None else [name.partition(":")[0] for name in entry.losses.methods]),
        entry.training.resolved_schedule.epochs,
        (min(edges), max(edges)),
        entry.training.data,
    )


def _words(spec: Any) -> str:
    """A backbone with what makes another one of it."""
    fields = dict(spec.fields)
    kinds = [name for name in ("deformable_strides", "reg_max") if fields.get(name)]
    return "+".join([spec.backbone, *kinds])


def methods_of(distillation: Case) -> set[str]:
    """Names of the methods that count; those of an unknown loss by its key."""
    weights = {key: value.get("loss_weight", 1.0) for key, value in distillation.items() if isinstance(value, dict)}
    counted = {key for key, weight in weights.items() if weight}
    methods = {"crosskd"} if counted & CROSSKD else set()
    methods |= {"pkd"} if "loss_feat_kd" in counted else set()
    return methods | (counted - CROSSKD - {"loss_feat_kd"})


def backbone_of(weights: Case) -> str:
    """timm's name of a backbone, with what makes another one of it."""
    kind, depth = weights["type"], weights.get("depth")
    if kind not in BACKBONES.values():
        return f"{kind}-{depth}"
    name = NAMES.get(kind) or f"{kind.lower()}{depth}" + ("_32x4d" if kind == "ResNeXt" else "")
    return f"{name}+deformable_strides" if weights.get("dcn") else name


def architecture_of(path: str) -> str:
    """The detector of a configuration file."""
    return next((part for part in path.split("/") if part in FOLDERS), path)
