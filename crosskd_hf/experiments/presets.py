"""Published experiments by name: models, losses, weights, schedule and augmentation of a row of a paper's table.

    preset("crosskd-gfl-r50-from-r101").training_arguments()

The experiments stand in `presets.yaml` beside this file. The tables of `docs/reproduce.md` are what
`reproduction_table` returns. None of these runs has been made with this library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from ..create import DetectorSpec
from ..data.transforms import RandomCrop, TrainTransform
from ..distillation import METHODS, MethodConfig
from ..models import DetectionImageProcessor
from ..training.schedules import SCHEDULES, Schedule

FILE = Path(__file__).with_name("presets.yaml")
CAFFE, TORCHVISION = "caffe", "tv_in1k"


@dataclass(frozen=True)
class Pixels:
    """How an image's pixels become a model's input.

    Args:
        mean, std: Per channel, of pixels in 0..255, in the order of the channels.
        order: Of the channels.
        divisor: Batches are padded to a multiple of so many px.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    order: Literal["rgb", "bgr"]
    divisor: int

    def processor_arguments(self) -> dict[str, Any]:
        """The same for an image processor of this library, whose pixels lie in [0, 1]."""
        return {
            "image_mean": [value / 255 for value in self.mean],
            "image_std": [value / 255 for value in self.std],
            "channel_order": self.order,
            "size_divisor": self.divisor,
        }


IMAGENET = Pixels((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), "rgb", 32)


@dataclass(frozen=True)
class Model:
    """A detector as published.

    Args:
        spec: Its architecture; `backbone_weights` is the tag of timm's weights, or "caffe".
        pixels: What its backbone's weights were trained on.
    """

    spec: DetectorSpec
    pixels: Pixels

    def image_processor(self, **settings: Any) -> DetectionImageProcessor:
        """Its image processor as published, without antialiasing; `settings` win."""
        return self.spec.image_processor(**{"antialias": False} | self.pixels.processor_arguments() | settings)

    def starting_from(self, checkpoint: str | None = None) -> Model:
        """The model that can be built.

        Args:
            checkpoint: A file of backbone weights. Without one timm's tag is kept, and a model that was published with
                Caffe's weights, which timm doesn't have, becomes one of torchvision's: another place of the stride,
                and RGB pixels.
        """
        if checkpoint is not None:
            return replace(self, spec=replace(self.spec, backbone_weights=checkpoint))
        if self.spec.backbone_weights != CAFFE:
            return self
        fields = tuple((name, value) for name, value in self.spec.fields if name != "caffe_stride")
        return Model(replace(self.spec, backbone_weights=TORCHVISION, fields=fields), IMAGENET)


@dataclass(frozen=True)
class Training:
    """How a student is trained, apart from distillation.

    Args:
        schedule: See `crosskd_hf.training.schedules`: optimizer, epochs, decays, warm-up, images of the learning rate.
        source: Where these numbers stand.
        images_per_device: Images of one micro-batch. Channel statistics are taken over them.
        workers: Processes that read images, for each device.
        learning_rate: Instead of the schedule's.
        warmup_kind: Instead of the schedule's.
        lr_factors: Factors on the learning rate of parameters below modules of these names.
        bias_lr_factor: Factor on the learning rate of biases outside of norms.
        bias_weight_decay: Of all biases; None is that of the weights.
        max_grad_norm: 0 does not clip.
        shortest_edges: Lengths in px, one of which is drawn for the shorter side of every image.
        longest_edge: Limit of the longer side in px.
        flip: Probability of the horizontal flip.
        crop: The other branch of the augmentation, which half of the images take.
        min_side: Training images with a shorter side are left out, in px.
        drop_empty: Training images without any annotation are left out.
        group_by_aspect_ratio: A batch is all landscape or all portrait.
        repeat: How often an image comes in an epoch.
        test_shortest_edge: Shorter side in px of evaluated images.
        eval_batch_size: Images that are evaluated together.
        data: "coco" or "voc" (2007 and 2012, tested on 2007).
    """

    schedule: str
    source: str
    images_per_device: int = 2
    workers: int = 4
    learning_rate: float | None = None
    warmup_kind: str | None = None
    lr_factors: Mapping[str, float] = field(default_factory=dict)
    bias_lr_factor: float = 1.0
    bias_weight_decay: float | None = None
    max_grad_norm: float = 0.0
    shortest_edges: tuple[int, ...] = (800,)
    longest_edge: int = 1333
    flip: float = 0.5
    crop: RandomCrop | None = None
    min_side: int = 32
    drop_empty: bool = True
    group_by_aspect_ratio: bool = True
    repeat: int = 1
    test_shortest_edge: int = 800
    eval_batch_size: int = 1
    data: Literal["coco", "voc"] = "coco"

    @property
    def resolved_schedule(self) -> Schedule:
        """The schedule with the changes of this training."""
        changes = {"learning_rate": self.learning_rate, "warmup_kind": self.warmup_kind}
        return SCHEDULES[self.schedule].changed(**changes)

    def transform(self, multi_scale: Sequence[int], longest_edge: int) -> TrainTransform:
        """The augmentation, with sizes that may have been changed; a single one is left to the image processor."""
        random_crop = self.crop if multi_scale else None
        return TrainTransform(self.flip, multi_scale, longest_edge, antialias=False, random_crop=random_crop)

    @property
    def multi_scale(self) -> tuple[int, ...]:
        """Shorter sides to draw from in training; empty if there is one alone."""
        return self.shortest_edges if len(self.shortest_edges) > 1 else ()

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `CrossKDConfig`, beside paths and hardware."""
        schedule = self.resolved_schedule
        return {
            "schedule": self.schedule,
            "learning_rate": schedule.learning_rate,
            "warmup_kind": schedule.warmup_kind,
            "decay_epochs": list(schedule.decay_epochs),
            "lr_factors": [f"{name}={factor:g}" for name, factor in self.lr_factors.items()],
            "bias_lr_factor": self.bias_lr_factor,
            "bias_weight_decay": self.bias_weight_decay,
            "max_grad_norm": self.max_grad_norm,
            "per_device_train_batch_size": self.images_per_device,
            "per_device_eval_batch_size": self.eval_batch_size,
            "dataloader_num_workers": self.workers,
            "group_by_aspect_ratio": self.group_by_aspect_ratio,
        }


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
        model: Its architecture and pixels.
        ap: AP on the validation data in percent, None if it was not published.
        origin: Which checkpoint it is.
    """

    model: Model
    ap: float | None
    origin: str

    @property
    def detector(self) -> DetectorSpec:
        """Its architecture."""
        return self.model.spec


@dataclass(frozen=True)
class Preset:
    """One published experiment.

    Args:
        name: What `--preset` takes.
        model: Architecture, starting weights and pixels of the student.
        training: Schedule and augmentation.
        ap: AP on the validation data that was published, in percent; None if it was not.
        rows: The table rows that show it, as "table_row".
        teacher: None for a student that is trained alone.
        losses: None for a student that is trained alone.
        note: How it differs from what was published.
        ap_by_iou: AP at IoU .50, .60, .70, .80 and .90 in percent, where that was published.
    """

    name: str
    model: Model
    training: Training
    ap: float | None
    rows: tuple[str, ...]
    teacher: Teacher | None = None
    losses: Losses | None = None
    note: str = ""
    ap_by_iou: tuple[float, ...] = ()

    @property
    def student(self) -> DetectorSpec:
        """Architecture of the student; its backbone starts from ImageNet weights."""
        return self.model.spec

    @property
    def needs(self) -> tuple[str, ...]:
        """Methods of this experiment that this version of the library doesn't have."""
        named = [] if self.losses is None else [method.partition(":")[0] for method in self.losses.methods]
        return tuple(name for name in named if name not in METHODS)

    def training_arguments(self) -> dict[str, Any]:
        """Keyword arguments for `CrossKDConfig`, beside paths and hardware.

        Raises:
            ValueError: A method of this experiment does not exist yet.
        """
        if self.needs:
            raise ValueError(
                f"preset={self.name!r} needs the methods {', '.join(self.needs)}, which this version of crosskd_hf "
                "doesn't have; `crosskd-hf methods` lists those that it has."
            )
        methods = {} if self.losses is None else {"methods": [*map(MethodConfig.parse, self.losses.methods)]}
        return self.training.arguments() | methods

    def example_arguments(self) -> dict[str, Any]:
        """Defaults of an example's command line, beside paths of data and teacher.

        Raises:
            ValueError: As :meth:`training_arguments`.
        """
        edges = self.training.shortest_edges
        return self.training_arguments() | {
            "steps": ["baseline"] if self.losses is None else ["distilled"],
            "output_dir": f"outputs/{self.name}",
            "shortest_edge": self.training.test_shortest_edge,
            "longest_edge": self.training.longest_edge,
            "multi_scale": list(edges) if len(edges) > 1 else [],
            "student_backbone": self.student.backbone,
        }

    def runs_in(self, script: str) -> None:
        """Raise ValueError if another example runs this preset."""
        if f"examples/{script}.py" not in self.command:
            raise ValueError(f"preset={self.name!r} is run by another example: {self.command}")

    @property
    def command(self) -> str:
        """What runs it, with `$COCO` or `$VOC` for the paths of the data."""
        script = "distill_deformable_detr" if self.student.architecture == "deformable_detr" else "distill_coco"
        teacher = "" if self.teacher is None else " --teacher DIR"
        return f"python examples/{script}.py --preset {self.name} ${self.training.data.upper()}{teacher}"


# ---- Reading ----


def _read() -> dict[str, Preset]:
    tables: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    pixels = {name: Pixels(**_tuples(row)) for name, row in tables["pixels"].items()}
    models = {name: _model(row, pixels) for name, row in tables["models"].items()}
    trainings = {name: _training(row) for name, row in tables["trainings"].items()}
    teachers = {name: Teacher(**row | {"model": models[row["model"]]}) for name, row in tables["teachers"].items()}

    def one(name: str, row: Mapping[str, Any]) -> Preset:
        methods, teacher = row.get("methods"), row.get("teacher")
        source, note = row.get("source", ""), row.get("note", "")
        return Preset(
            name,
            models[row["student"]],
            trainings[row["training"]],
            row["ap"],
            tuple(row["rows"]),
            None if teacher is None else teachers[teacher],
            None if methods is None else Losses(tuple(methods), tables["sources"].get(source, source)),
            tables["notes"].get(note, note),
            tuple(row.get("by_iou", ())),
        )

    return {name: one(name, row) for name, row in tables["presets"].items()}


def _model(row: Mapping[str, Any], pixels: Mapping[str, Pixels]) -> Model:
    fields = tuple(row.get("fields", {}).items())
    spec = DetectorSpec(row["architecture"], row["backbone"], row["weights"], fields=fields)
    return Model(spec, pixels[row.get("pixels", "imagenet")])


def _training(row: Mapping[str, Any]) -> Training:
    fields = _tuples(row)
    edges = fields.get("shortest_edges")
    if isinstance(edges, str):  # "480-800": every length from one to the other
        low, high = map(int, edges.split("-"))
        fields["shortest_edges"] = tuple(range(low, high + 1))
    if "crop" in fields:
        fields["crop"] = RandomCrop(**_tuples(fields["crop"]))
    return Training(**fields)


def _tuples(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}


PRESETS: dict[str, Preset] = _read()
"""Every preset by its name."""


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


# ---- The page of documentation ----


def reproduction_table() -> str:
    """The tables of `docs/reproduce.md`."""
    results = ["preset", "student", "teacher (AP)", "methods", "training", "published AP", "rows", "ours"]
    rows = sum(len(entry.rows) for entry in PRESETS.values())
    return "\n\n".join(
        [
            f"{rows} published rows in {len(PRESETS)} presets:",
            _table(results, [_result(entry) for entry in PRESETS.values()]),
            "Commands, and where the settings come from:",
            _table(["preset", "command", "sources and differences"], [_origin(entry) for entry in PRESETS.values()]),
        ]
    )


def waiting_table() -> str:
    """The presets whose methods do not exist yet; empty if there are none."""
    waiting = [entry for entry in PRESETS.values() if entry.needs]
    missing = [[f"`{entry.name}`", ", ".join(entry.rows), ", ".join(entry.needs)] for entry in waiting]
    return _table(["preset", "rows", "needs"], missing) if missing else ""


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _result(entry: Preset) -> list[str]:
    taught = "–"
    if entry.teacher is not None:
        taught = f"{_words(entry.teacher.detector)} ({_ap(entry.teacher.ap)})"
    methods = " ".join(f"`{method}`" for method in entry.losses.methods) if entry.losses else "–"
    models = [f"`{entry.name}`", _words(entry.student), taught, methods]
    return [*models, _shown(entry.training), _ap(entry.ap), ", ".join(entry.rows) or "–", "not run"]


def _ap(value: float | None) -> str:
    return "not published" if value is None else f"{value}"


def _origin(entry: Preset) -> list[str]:
    sources = [entry.training.source, entry.losses.source if entry.losses else "", entry.note]
    return [f"`{entry.name}`", f"`{entry.command}`", " · ".join(filter(None, sources))]


def _words(detector: DetectorSpec) -> str:
    return f"{detector.architecture} {detector.backbone}"


def _shown(training: Training) -> str:
    edges = training.shortest_edges
    shown = f"{edges[0]}" if len(edges) == 1 else f"{edges[0]}{' or ' if len(edges) == 2 else ' to '}{edges[-1]}"
    return f"{training.schedule}, {training.longest_edge} x {shown}"
