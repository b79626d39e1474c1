"""Published experiments by name: models, losses, weights, schedule and augmentation of a row of a paper's table.

    preset("crosskd-gfl-r50-from-r101").training_arguments()

The tables of `docs/reproduce.md` are what `reproduction_table` returns. Settings that the publications leave open are
marked as such in the `source` that stands beside them. None of these runs has been made with this library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..create import DetectorSpec

AUTHORS = "configs/crosskd of the authors' code (jbwang1997/CrossKD)"
MMDETECTION = "configs of MMDetection"


@dataclass(frozen=True)
class Training:
    """How a student is trained, apart from distillation.

    Args:
        schedule: "1x" (12 epochs) or "2x" (24), see `crosskd_hf.training.schedules`: SGD, learning rate 0.01
            for 16 images.
        shortest_edges: Lengths in px, one of which is drawn for the shorter side of every image.
        longest_edge: Limit of the longer side in px.
        bias_lr_factor, bias_weight_decay: Of biases; None is that of the weights.
        max_grad_norm: 0 does not clip.
        source: Where these numbers stand.
    """

    schedule: str
    source: str
    shortest_edges: tuple[int, ...] = (800,)
    longest_edge: int = 1333
    bias_lr_factor: float = 1.0
    bias_weight_decay: float | None = None
    max_grad_norm: float = 0.0


@dataclass(frozen=True)
class Losses:
    """What is distilled.

    Args:
        methods: What `CrossKDConfig.methods` takes. What they leave open is filled in as published.
        source: Where these numbers stand.
    """

    methods: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Teacher:
    """A teacher as published.

    Args:
        detector: Its architecture.
        ap: COCO AP on val2017 in percent.
        origin: Which checkpoint it is.
    """

    detector: DetectorSpec
    ap: float
    origin: str


@dataclass(frozen=True)
class Preset:
    """One published experiment.

    Args:
        name: What `--preset` takes.
        student: Architecture of the student; its backbone starts from ImageNet weights.
        training: Schedule and augmentation.
        ap: COCO AP on val2017 that was published, in percent.
        rows: The table rows that show it, as "table:row".
        teacher: None for a student that is trained alone.
        losses: None for a student that is trained alone.
        note: How it differs from what was published.
    """

    name: str
    student: DetectorSpec
    training: Training
    ap: float
    rows: tuple[str, ...]
    teacher: Teacher | None = None
    losses: Losses | None = None
    note: str = ""

    def training_arguments(self) -> dict[str, Any]:
        """Keyword arguments for `CrossKDConfig`, beside paths, batch size and hardware."""
        training = self.training
        return {
            "schedule": training.schedule,
            "bias_lr_factor": training.bias_lr_factor,
            "bias_weight_decay": training.bias_weight_decay,
            "max_grad_norm": training.max_grad_norm,
            **({} if self.losses is None else {"methods": list(self.losses.methods)}),
        }


# Schedules and augmentations --------------------------------------------------------------------------------------

ONE = Training("1x", source=f"paper, section 4.1 (12 epochs); {AUTHORS}: 1333 x 800")
TWO = Training("2x", source=f"{AUTHORS}: 24 epochs, 1333 x 800; the paper does not say")
FCOS_MS_2X = Training(
    "2x",
    shortest_edges=(640, 800),
    bias_lr_factor=2.0,
    bias_weight_decay=0.0,
    max_grad_norm=35.0,
    source=f"{AUTHORS}: 24 epochs, shorter side 640 or 800, biases, clipping; the paper does not say",
)
GFL_MS_2X = Training(
    "2x",
    shortest_edges=tuple(range(480, 801)),
    source=f"{MMDETECTION}, gfl_r50_fpn_ms-2x_coco.py: 24 epochs, shorter side from 480 to 800",
)

# Models -----------------------------------------------------------------------------------------------------------

GFL_R18, GFL_R34, GFL_R50, GFL_R101 = (DetectorSpec("gfl", f"resnet{depth}", "timm") for depth in (18, 34, 50, 101))
RETINA_R50, RETINA_R101 = (DetectorSpec("retinanet", f"resnet{depth}", "timm") for depth in (50, 101))
# CrossKD's RetinaNet students take the extra levels from the last output, teachers and baselines from the backbone.
ON_OUTPUT = (("fpn_extra", "on_output"),)
RETINA_R50_ON_OUTPUT = DetectorSpec("retinanet", "resnet50", "timm", fields=ON_OUTPUT)
SWIN = (
    ("output_norm", True),
    ("pad_windows", True),
    ("frozen_stages", 0),
    ("backbone_arguments", {"drop_path_rate": 0.2}),
)
RETINA_SWIN_T = DetectorSpec("retinanet", "swin_tiny_patch4_window7_224", "timm", fields=SWIN)
MOBILENET = (("backbone_last_channels", 1280), ("frozen_stages", 0))
RETINA_MNV2 = DetectorSpec("retinanet", "mobilenetv2_100", "timm", fields=MOBILENET)
RETINA_MNV2_ON_OUTPUT = DetectorSpec("retinanet", "mobilenetv2_100", "timm", fields=MOBILENET + ON_OUTPUT)
CAFFE = (("caffe_stride", True), ("freeze_norm", True), ("fpn_extra_relu", True), ("conv_bias", True))
FCOS_R50, FCOS_R101 = (DetectorSpec("fcos", f"resnet{depth}", "timm", fields=CAFFE) for depth in (50, 101))
ATSS_R50, ATSS_R101 = (DetectorSpec("atss", f"resnet{depth}", "timm") for depth in (50, 101))

BY_GFL_R50 = Teacher(GFL_R50, 40.2, "gfl_r50_fpn_1x_coco")
BY_GFL_R101 = Teacher(GFL_R101, 44.9, "gfl_r101_fpn_ms-2x_coco")
BY_RETINA_R50 = Teacher(RETINA_R50, 36.5, "retinanet_r50_fpn_1x_coco")
BY_RETINA_R101 = Teacher(RETINA_R101, 38.9, "retinanet_r101_fpn_2x_coco")
BY_SWIN_T = Teacher(RETINA_SWIN_T, 37.3, "retinanet_swin-t-p4-w7_fpn_1x_coco")
BY_FCOS_R101 = Teacher(FCOS_R101, 40.8, "fcos_r101-caffe_fpn_gn-head_ms-640-800-2x_coco")
BY_ATSS_R101 = Teacher(ATSS_R101, 41.5, "atss_r101_fpn_1x_coco")

# Losses -----------------------------------------------------------------------------------------------------------

MNV2 = f"not published: as the other RetinaNet pairs ({AUTHORS})"
NO_CONFIGURATION = "No configuration was published."
ACROSS = "not published: the weights of the teacher's own kind of head"


def _crosskd(*options: str, source: str = AUTHORS, beside: tuple[str, ...] = ()) -> Losses:
    """CrossKD with statistics over the local batch, as the authors' code takes them."""
    return Losses((f"crosskd:{','.join([*options, 'statistics=batch'])}", *beside), source)


def _kd(*options: str, source: str = f"not published: CrossKD's weights ({AUTHORS})") -> Losses:
    return Losses((f"kd:{','.join(options)}" if options else "kd",), source)


def _pkd(*options: str, source: str) -> Losses:
    return Losses((f"pkd:{','.join([*options, 'statistics=batch'])}",), source)


PKD_ALONE = f"weight not published for PKD alone: that beside CrossKD ({AUTHORS})"
PKD_HEAD = (
    f"main paper, Table 2 (third layer); the weight is not published: that of the neck beside CrossKD ({AUTHORS})"
)
REGIONS = f"supplement, Table 1 (beta 0 is BCE); the region is that of the classes; weights: {AUTHORS}"
STRATEGIES = f"supplement, Fig. 1; which operand is constant and the weights are not published: those of {AUTHORS}"
PKD_SWIN = "weight of MMRazor's PKD from a Swin teacher to RetinaNet; not published for this pair"
BRANCH = "main paper, Table 3; weights of the branch: " + AUTHORS
CUT = "main paper, Table 1; weights: " + AUTHORS

CAFFE_NOTE = "The published student starts from Caffe's ResNet-50 on BGR pixels, for which timm has no weights."
WARMUP_NOTE = "Published warm-up: a constant third of the learning rate."
DESIGN_NOTE = "Losses across heads are this project's: no code was published."


def _alone(
    name: str, student: DetectorSpec, training: Training, ap: float, rows: tuple[str, ...], note: str = ""
) -> Preset:
    return Preset(name, student, training, ap, rows, note=note)


_ALL = (
    # Students and teachers alone
    _alone("gfl-r18", GFL_R18, ONE, 35.8,
           ("t1_base", "t2_base", "t4_base", "s1_base", "s2_r18", "s4_base", "l1_base", "l2_r18")),
    _alone("gfl-r34", GFL_R34, ONE, 38.9, ("s2_r34",)),
    _alone("gfl-r50", GFL_R50, ONE, 40.2, ("t5_base", "t7_base", "s2_r50")),
    _alone("gfl-r101-ms-2x", GFL_R101, GFL_MS_2X, 44.9, ("t5_teacher",)),
    _alone("retinanet-r50", RETINA_R50, ONE, 36.5, ("t8_r50_s", "t8_r50_t")),
    _alone("retinanet-r50-2x", RETINA_R50, TWO, 37.4, ("t6_retina_s",)),
    _alone("retinanet-r101-2x", RETINA_R101, TWO, 38.9, ("t6_retina_t", "t7_retina_t")),
    _alone("retinanet-swin-t", RETINA_SWIN_T, ONE, 37.3, ("t8_swin_t",)),
    _alone("retinanet-mobilenetv2", RETINA_MNV2, ONE, 30.9, ("t8_mnv2_s",), NO_CONFIGURATION),
    _alone("fcos-r50-ms-2x", FCOS_R50, FCOS_MS_2X, 38.5, ("t6_fcos_s",), f"{CAFFE_NOTE} {WARMUP_NOTE}"),
    _alone("fcos-r101-ms-2x", FCOS_R101, FCOS_MS_2X, 40.8, ("t6_fcos_t",), f"{CAFFE_NOTE} {WARMUP_NOTE}"),
    _alone("atss-r50", ATSS_R50, ONE, 39.4, ("t6_atss_s",)),
    _alone("atss-r101", ATSS_R101, ONE, 41.5, ("t6_atss_t", "t7_atss_t")),
    # Ablations: GFL R50 -> R18 (main paper, Tables 1 to 4; supplement, Table 1)
    Preset("crosskd-gfl-r18-from-r50", GFL_R18, ONE, 38.7,
           ("t1_i3", "t2_crosskd", "t3_ck_both", "t4_ck", "s1_qfl_pn", "s4_a"), BY_GFL_R50, _crosskd()),
    Preset("crosskd-gfl-r18-from-r50-cut-0", GFL_R18, ONE, 38.2, ("t1_i0",), BY_GFL_R50, _crosskd("cut=0", source=CUT)),
    Preset("crosskd-gfl-r18-from-r50-cut-1", GFL_R18, ONE, 38.3, ("t1_i1",), BY_GFL_R50, _crosskd("cut=1", source=CUT)),
    Preset("crosskd-gfl-r18-from-r50-cut-2", GFL_R18, ONE, 38.6, ("t1_i2",), BY_GFL_R50, _crosskd("cut=2", source=CUT)),
    Preset("crosskd-gfl-r18-from-r50-cut-4", GFL_R18, ONE, 38.2, ("t1_i4",), BY_GFL_R50, _crosskd("cut=4", source=CUT)),
    Preset("crosskd-gfl-r18-from-r50-cls", GFL_R18, ONE, 37.7, ("t3_ck_cls",), BY_GFL_R50,
           _crosskd("terms.reg=0", source=BRANCH)),
    Preset("crosskd-gfl-r18-from-r50-reg", GFL_R18, ONE, 37.2, ("t3_ck_reg",), BY_GFL_R50,
           _crosskd("terms.cls=0", source=BRANCH)),
    Preset("crosskd-gfl-r18-from-r50-bce", GFL_R18, ONE, 36.9, ("s1_bce_pn",), BY_GFL_R50,
           _crosskd("beta=0", source=f"supplement, Table 1 (beta 0 is BCE); weights: {AUTHORS}")),
    Preset("crosskd-gfl-r18-from-r50-bce-positives", GFL_R18, ONE, 36.3, ("s1_bce_p",), BY_GFL_R50,
           _crosskd("region=P", "beta=0", source=REGIONS)),
    Preset("crosskd-gfl-r18-from-r50-bce-negatives", GFL_R18, ONE, 36.2, ("s1_bce_n",), BY_GFL_R50,
           _crosskd("region=N", "beta=0", source=REGIONS)),
    Preset("crosskd-gfl-r18-from-r50-strategy-b", GFL_R18, ONE, 35.4, ("s4_b",), BY_GFL_R50,
           _crosskd("strategy=b", source=STRATEGIES)),
    Preset("crosskd-gfl-r18-from-r50-strategy-c", GFL_R18, ONE, 34.5, ("s4_c",), BY_GFL_R50,
           _crosskd("strategy=c", source=STRATEGIES)),
    Preset("crosskd-gfl-r18-from-r50-strategy-d", GFL_R18, ONE, 32.5, ("s4_d",), BY_GFL_R50,
           _crosskd("strategy=d", source=STRATEGIES)),
    Preset("kd-gfl-r18-from-r50", GFL_R18, ONE, 37.8, ("t1_ld", "t3_ld_both", "t4_ld"), BY_GFL_R50, _kd()),
    Preset("kd-gfl-r18-from-r50-cls", GFL_R18, ONE, 37.3, ("t3_ld_cls",), BY_GFL_R50,
           _kd("terms.reg=0")),
    Preset("kd-gfl-r18-from-r50-reg", GFL_R18, ONE, 36.8, ("t3_ld_reg",), BY_GFL_R50,
           _kd("terms.cls=0")),
    Preset("pkd-gfl-r18-from-r50", GFL_R18, ONE, 38.0, ("t2_pkd_neck",), BY_GFL_R50, _pkd(source=PKD_ALONE)),
    Preset("pkd-gfl-r18-from-r50-cls", GFL_R18, ONE, 37.5, ("t2_pkd_cls",), BY_GFL_R50,
           _pkd("location=cls", source=PKD_HEAD)),
    Preset("pkd-gfl-r18-from-r50-reg", GFL_R18, ONE, 37.2, ("t2_pkd_reg",), BY_GFL_R50,
           _pkd("location=reg", source=PKD_HEAD)),
    Preset("pkd-gfl-r18-from-r50-cls-reg", GFL_R18, ONE, 37.3, ("t2_pkd_clsreg",), BY_GFL_R50,
           _pkd("location=cls+reg", source=PKD_HEAD)),
    Preset("crosskd-kd-gfl-r18-from-r50", GFL_R18, ONE, 38.1, ("t4_ck_ld",), BY_GFL_R50,
           _crosskd(source="not published: each with CrossKD's weights", beside=("kd",))),
    # Comparison with other methods: GFL R101 -> R50 (main paper, Table 5), smaller students (supplement, Table 2)
    Preset("crosskd-gfl-r50-from-r101", GFL_R50, ONE, 43.7, ("t5_crosskd", "s2_r50_ck"), BY_GFL_R101, _crosskd()),
    Preset("kd-gfl-r50-from-r101", GFL_R50, ONE, 43.0, ("t5_ld",), BY_GFL_R101, _kd(),
           "Run by the authors in an undocumented setting; LD's own figure is 42.1."),
    Preset("fitnets-gfl-r50-from-r101", GFL_R50, ONE, 40.7, ("t5_fitnets",), BY_GFL_R101,
           Losses(("fitnets:weight=2,adapter=False",), "HikariTJU/LD: whole map, weight 2, no adapter")),
    Preset("pkd-gfl-r50-from-r101", GFL_R50, ONE, 43.3, ("t5_pkd",), BY_GFL_R101, _pkd(source=PKD_ALONE)),
    Preset("crosskd-pkd-gfl-r50-from-r101", GFL_R50, ONE, 43.9, ("t5_crosskd_pkd",), BY_GFL_R101,
           _crosskd(beside=("pkd:statistics=batch",))),
    Preset("crosskd-gfl-r18-from-r101", GFL_R18, ONE, 39.2, ("s2_r18_ck",), BY_GFL_R101, _crosskd()),
    Preset("crosskd-gfl-r34-from-r101", GFL_R34, ONE, 42.4, ("s2_r34_ck",), BY_GFL_R101, _crosskd()),
    # Other detectors (main paper, Table 6)
    Preset("crosskd-retinanet-r50-from-r101", RETINA_R50_ON_OUTPUT, TWO, 39.7, ("t6_retina_ck",), BY_RETINA_R101,
           _crosskd()),
    Preset("crosskd-fcos-r50-from-r101", FCOS_R50, FCOS_MS_2X, 41.3, ("t6_fcos_ck",), BY_FCOS_R101,
           _crosskd(), f"The authors' README has 41.1. {CAFFE_NOTE} {WARMUP_NOTE}"),
    Preset("crosskd-atss-r50-from-r101", ATSS_R50, ONE, 41.8, ("t6_atss_ck",), BY_ATSS_R101, _crosskd()),
    # Teachers with other heads (main paper, Table 7)
    Preset("crosskd-gfl-r50-from-atss-r101", GFL_R50, ONE, 42.1, ("t7_atss_ck",), BY_ATSS_R101,
           _crosskd(source=ACROSS), DESIGN_NOTE),
    Preset("kd-gfl-r50-from-atss-r101", GFL_R50, ONE, 39.7, ("t7_atss_kd",), BY_ATSS_R101,
           _kd(source=ACROSS), DESIGN_NOTE),
    Preset("crosskd-gfl-r50-from-retinanet-r101", GFL_R50, ONE, 41.2, ("t7_retina_ck",), BY_RETINA_R101,
           _crosskd(source=ACROSS), DESIGN_NOTE),
    Preset("kd-gfl-r50-from-retinanet-r101", GFL_R50, ONE, 30.3, ("t7_retina_kd",), BY_RETINA_R101,
           _kd(source=ACROSS), DESIGN_NOTE),
    # Other backbones (main paper, Table 8)
    Preset("crosskd-retinanet-r50-from-swin-t", RETINA_R50_ON_OUTPUT, ONE, 38.0, ("t8_swin_ck",), BY_SWIN_T,
           _crosskd()),
    Preset("pkd-retinanet-r50-from-swin-t", RETINA_R50, ONE, 37.2, ("t8_swin_pkd",), BY_SWIN_T,
           _pkd("weight=6", source=PKD_SWIN)),
    Preset("crosskd-retinanet-mobilenetv2-from-r50", RETINA_MNV2_ON_OUTPUT, ONE, 34.1, ("t8_mnv2_ck",), BY_RETINA_R50,
           _crosskd(source=MNV2), NO_CONFIGURATION),
    Preset("pkd-retinanet-mobilenetv2-from-r50", RETINA_MNV2, ONE, 33.2, ("t8_mnv2_pkd",), BY_RETINA_R50,
           _pkd("weight=6", source=PKD_SWIN), NO_CONFIGURATION),
)  # fmt: skip

PRESETS: dict[str, Preset] = {entry.name: entry for entry in _ALL}
"""Every preset by its name."""

_FEATURES = "this method is not built"
_LD = "LD on its main region is not built"
_COST = "LD's figures for the same models; its schedule is not restated"
_FRCNN = "two-stage: Faster R-CNN, not a dense head"
_DETR = "DETR family, not a dense head: see `docs/detr.md`"

NOT_AVAILABLE: dict[str, str] = {
    **dict.fromkeys(
        ("t5_inside_gt", "t5_defeat", "t5_main_region", "t5_fine_grained", "t5_fgd", "t5_gid", "t5_skd"),
        _FEATURES,
    ),
    **dict.fromkeys(("s3_frcnn_s", "s3_frcnn_t", "s3_frcnn_ck"), _FRCNN),
    **dict.fromkeys(("s3_ddetr_s", "s3_ddetr_t", "s3_ddetr_ck"), _DETR),
    **dict.fromkeys(("l1_only_ld", "l1_both", "l2_r18_self", "l2_r50_self"), _LD),
    **dict.fromkeys(("l2_x101", "l2_x101_self"), "deformable convolutions are not built"),
    **dict.fromkeys(("l2_r50", "l3_retina", "l3_fcos", "l3_atss", "l3_gfl"), _COST),
    **dict.fromkeys(("l3_retina_ld", "l3_fcos_ld", "l3_atss_ld", "l3_gfl_ld"), _LD),
    **dict.fromkeys(("l4_base", "l4_r34", "l4_r50", "l4_r101", "l4_r101dcn"), "PASCAL VOC in 4 epochs has no preset"),
}
"""Published rows without a preset, and why."""


def preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        ValueError: There is none; the message lists those of similar names.
    """
    if name not in PRESETS:
        words = set(name.split("-"))
        near = sorted(PRESETS, key=lambda known: len(words ^ set(known.split("-"))))[:5]
        raise ValueError(
            f"preset={name!r} is not known. The closest are {', '.join(near)}; all are in docs/reproduce.md."
        )
    return PRESETS[name]


def reproduction_table() -> str:
    """The tables of `docs/reproduce.md`."""
    results = ["preset", "student", "teacher (AP)", "methods", "schedule", "published AP", "rows", "ours"]
    reasons = dict.fromkeys(NOT_AVAILABLE.values())
    missing = [(", ".join(row for row, why in NOT_AVAILABLE.items() if why == reason), reason) for reason in reasons]
    return "\n\n".join(
        [
            _table(results, [_result(entry) for entry in PRESETS.values()]),
            "Commands, and where the settings come from:",
            _table(["preset", "command", "sources and differences"], [_origin(entry) for entry in PRESETS.values()]),
            "Published rows without a preset:",
            _table(["rows", "why"], missing),
        ]
    )


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _result(entry: Preset) -> list[str]:
    taught = f"{_words(entry.teacher.detector)} ({entry.teacher.ap})" if entry.teacher else "–"
    methods = " ".join(f"`{method}`" for method in entry.losses.methods) if entry.losses else "–"
    models = [f"`{entry.name}`", _words(entry.student), taught, methods]
    return [*models, _schedule(entry.training), f"{entry.ap}", ", ".join(entry.rows), "not run"]


def _origin(entry: Preset) -> list[str]:
    teacher = " --teacher DIR" if entry.teacher else " --steps alone"
    command = f"`python examples/distill_coco.py --preset {entry.name} $COCO{teacher}`"
    sources = [entry.training.source, entry.losses.source if entry.losses else "", entry.note]
    return [f"`{entry.name}`", command, " · ".join(filter(None, sources))]


def _words(detector: DetectorSpec) -> str:
    return f"{detector.architecture} {detector.backbone}"


def _schedule(training: Training) -> str:
    edges = training.shortest_edges
    shown = f"{edges[0]}" if len(edges) == 1 else f"{edges[0]}{' or ' if len(edges) == 2 else ' to '}{edges[-1]}"
    return f"{training.schedule}, {training.longest_edge} x {shown}"
