"""One call from data to an answer: a teacher, the baseline, the distilled student, and what distillation gained.

result = distill("my_data", student="gfl:resnet18", teacher="gfl-r50-of-coco", out="run")
print(result.verdict)
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from scipy.stats import t as student_t
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel, set_seed

from ..create import Detector, ImageSize, chosen_weights, create_detector, is_new
from ..data.collators import DetectionCollator
from ..data.dataset import DetectionData
from ..inference.evaluation import HEAD, ap_row
from ..inference.loading import load_detector
from ..sources import near
from ..text import strict_json
from ..training.config import CrossKDConfig, option
from .augmentation import training_transform
from .command_line import Words, make_parser, parse
from .comparison import Comparison
from .recipe import Recipe, start_of
from .report import first_batch, write_report
from .run_file import NAME, write_run_file
from .train import RunArguments, opening

ONE_SEED = 2.0
"""Standard deviation, in AP points, of the difference of two runs that differ in their seed alone: the median over the
three-seed rows of docs/results.md is 1.4 for one run, and a difference of two has the square root of two times that."""

BASELINE, DISTILLED, TEACHER = "baseline", "distilled", "teacher"
_OF_THE_START = ("learning_rate", "backbone_lr", "num_train_epochs", "max_grad_norm")  # what they depend on
LARGER = "resnet50"  # backbone of a teacher that nobody named


@dataclass(frozen=True)
class Distillation:
    """What came out.

    Args:
        results: Name of a run ("teacher", "baseline", "distilled", or with "-SEED" for several seeds) -> COCO metrics.
        verdict: In one sentence.
        gains: AP points of each seed that the distilled student has above the baseline.
        folder: Where models and tables lie.
    """

    results: dict[str, dict[str, float]]
    verdict: str
    gains: tuple[float, ...]
    folder: Path

    @property
    def students(self) -> list[Path]:
        """Folders of the distilled students; `from_pretrained` loads them."""
        return [self.folder / name for name in self.results if name.startswith(DISTILLED)]

    def __str__(self) -> str:
        lines = [f"{name:14s}{ap_row(metrics)}" for name, metrics in self.results.items()]
        return "\n".join([f"{'':14s}{HEAD}", *lines, "", self.verdict, *self.advice])

    @property
    def advice(self) -> list[str]:
        """What the figures ask for, in sentences; empty if nothing."""
        teacher = self.results.get(TEACHER)
        alone = [metrics["map"] for name, metrics in self.results.items() if name.startswith(BASELINE)]
        if teacher is None or teacher["map"] > max(alone):
            return []
        return [
            f"The teacher's AP {100 * teacher['map']:.1f} is not above the baseline's {100 * max(alone):.1f}: a "
            "student learns little from it. Train it longer (teacher_settings, --teacher_settings "
            "num_train_epochs=...), or take a better one."
        ]


@dataclass(frozen=True)
class Plan:
    """What `distill` was asked for, apart from data and settings.

    Args:
        student, teacher: As of `create_detector`; teacher None is a larger one of the student's kind.
        seeds: So many pairs of runs.
        train_teacher: Train a given teacher on the data first: one of other classes gets a head for these.
        backbone_weights, width, image_size, pixel_range, multi_scale, augment: As of `create_detector`, the image
            processor and `training_transform`.
        teacher_settings: Settings of the teacher's own training that differ from the students'.
    """

    student: str = "gfl:resnet18"
    teacher: str | None = None
    seeds: int = 1
    train_teacher: bool = False
    backbone_weights: str = "auto"
    width: int = 256
    image_size: ImageSize | None = None
    pixel_range: Sequence[float] | None = None
    multi_scale: Sequence[int] = ()
    augment: Sequence[str] = ()
    teacher_settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = [name for name in self.teacher_settings if name not in CrossKDConfig.__dataclass_fields__]
        if unknown:
            hint = near(unknown[0], CrossKDConfig.__dataclass_fields__) or "."
            raise ValueError(f"teacher_settings has an unknown option {unknown[0]!r}{hint}")
        if self.teacher_settings and not self.trains_teacher:
            raise ValueError("teacher_settings has no effect: the teacher is trained already (train_teacher=True).")
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds}: at least one run with and without a teacher is needed.")
        if self.teacher is None and not is_new(self.student):
            raise ValueError(
                f"The student {self.student!r} is a trained detector: name its teacher (teacher=..., --teacher), a "
                "trained one or a new one such as gfl:resnet50, which is trained first."
            )

    @property
    def teacher_source(self) -> str:
        """The teacher in a word."""
        return self.teacher or f"{self.student.partition(':')[0]}:{LARGER}"

    @property
    def trains_teacher(self) -> bool:
        """Whether the teacher has to learn first."""
        return self.train_teacher or is_new(self.teacher_source)

    def settled(self) -> Plan:
        """With one choice of pretrained backbones for all runs, whatever a network does meanwhile."""
        sources = [self.student, *([self.teacher_source] if self.trains_teacher else [])]
        return replace(self, backbone_weights=chosen_weights(sources, self.backbone_weights))

    def new_teacher(self, data: DetectionData, seed: int) -> Detector | None:
        """The teacher as it is before it learns on `data`; None if it is trained already."""
        if not self.trains_teacher:
            return None
        set_seed(seed)
        return self.detector(self.teacher_source, data)

    def detector(self, source: str, data: DetectionData) -> Detector:
        """A model that is to be trained on `data`."""
        made = create_detector(
            source,
            data,
            backbone_weights=self.backbone_weights,
            width=self.width,
            image_size=self.image_size,
        )
        if self.pixel_range is not None:
            made.processor.pixel_range = list(self.pixel_range)
        return made


def distill(
    data: str | os.PathLike[str] | Sequence[DetectionData] | Any,
    student: str = "gfl:resnet18",
    teacher: str | None = None,
    out: str | os.PathLike[str] = "run",
    seeds: int = 1,
    *,
    train_teacher: bool = False,
    backbone_weights: str = "auto",
    width: int = 256,
    image_size: ImageSize | None = None,
    pixel_range: Sequence[float] | None = None,
    augment: Sequence[str] = (),
    teacher_settings: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Distillation:
    """Train a student with and without a teacher, alike in everything else, and say whether the teacher helped.

    The teacher is evaluated before anything is distilled; AP 0 stops with advice. Models lie in `out/teacher` (if it
    was trained here), `out/baseline` and `out/distilled`; `out/results.json` has the table and the verdict.

    Args:
        data: What `load_detection_dataset` reads, a path or several, or returns; or (training, validation) of
            `load_coco`.
        student, teacher: New ones as "gfl:resnet18", folders, or ids of the Hub. A new teacher is trained first;
            without one, that is the student's architecture on a ResNet-50.
        out: Folder to write.
        seeds: Pairs of runs; from two on the verdict has an interval.
        train_teacher: Train a given teacher on the data first; one of other classes gets a head for these.
        backbone_weights, width, image_size: Of new ones, as of `create_detector`.
        pixel_range: Lowest and highest value of 16-bit or float pixels, which `check-data` tells.
        augment: Of "colour", "scale" and "crop".
        teacher_settings: Of the teacher's own training, where they differ: `{"num_train_epochs": 50}`.
        settings: Of `CrossKDConfig`; what is not given fits the data (`docs/defaults.md`).

    Raises:
        DataError: The data is faulty. ValueError: The pair can't be distilled, or the teacher finds nothing.
    """
    train, val = _splits(data)
    plan = Plan(
        student, teacher, seeds, train_teacher, backbone_weights, width, image_size, pixel_range,
        augment=augment, teacher_settings=teacher_settings or {},
    )  # fmt: skip
    return run_plan(plan, train, val, {"output_dir": os.fspath(out)} | settings)


def distill_from_words(words: Sequence[str]) -> Distillation:
    """`crosskd-hf distill`: as of :func:`distill`."""
    parser = make_parser(DistillArguments, "crosskd-hf distill")
    given = Words.of(words, parser)
    options, config = parse(parser, given)
    train, val = options.read_files(config)
    if val is None:
        raise ValueError("distill compares on validation data: give --val_annotations and --val_images, or --data.")
    settings = {name: getattr(config, name) for name in given.names if hasattr(config, name)}
    settings = {"output_dir": "run", "report_to": "none"} | settings
    return run_plan(options.plan(), train, val, settings, options)


@dataclass
class DistillArguments(RunArguments):
    """As of `crosskd-hf train`, and how often."""

    teacher: str | None = option(
        None,
        "Folder or Hub id of a trained teacher, or a new one as ARCHITECTURE:BACKBONE, which is trained first. "
        "Default: the student's architecture on a ResNet-50.",
    )
    seeds: int = option(1, "Pairs of runs, with and without a teacher; from two on the verdict has an interval.")
    train_teacher: bool = option(
        False, "Train a given teacher on the data first; one of other classes gets a head for these."
    )
    teacher_settings: list[str] = option(
        [], "Settings of the teacher's own training that differ from the students', as NAME=VALUE."
    )

    def plan(self) -> Plan:
        """What is asked for, apart from data and settings."""
        return Plan(
            self.student,
            self.teacher,
            self.seeds,
            self.train_teacher,
            self.backbone_weights,
            self.width,
            self.image_size,
            self.pixel_range,
            self.multi_scale,
            self.augment,
            dict(map(_setting, self.teacher_settings)),
        )


def _splits(data: Any) -> tuple[DetectionData, DetectionData]:
    if isinstance(data, Mapping):  # what load_detection_dataset returned
        return data["train"], data["val"]
    if isinstance(data, str | os.PathLike) or all(isinstance(part, str | os.PathLike) for part in data):
        from ..data.loading import load_detection_dataset

        return _splits(load_detection_dataset(data))
    train, val = data
    return train, val


def run_plan(
    plan: Plan,
    train: DetectionData,
    val: DetectionData,
    given: Mapping[str, Any],
    options: DistillArguments | None = None,
) -> Distillation:
    """As of :func:`distill`, with settings in a dict; `options` go into `run.yaml`."""
    plan = plan.settled()
    set_seed(int(given.get("seed", 42)))
    student = plan.detector(plan.student, train)
    train, val = train.for_model(student.model.config), val.for_model(student.model.config)
    args = settings_for(plan.student, student.model, len(train.dataset), given)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    transform = training_transform(plan.multi_scale, plan.image_size, plan.augment)
    comparison = Comparison(train, val, student.processor, args, transform)
    if args.process_index == 0:
        first_batch(folder / "first_batch.png", DetectionCollator(student.processor, transform), train)
        for line in opening(train, val, args, student.processor.size, start_of(plan.student, student.model)):
            tqdm.write(line)
    new = plan.new_teacher(train, args.seed)
    changes = {} if new is None else _changes(plan, new.model, len(train.dataset), given)
    if options is not None and args.process_index == 0:
        own = [f"{name}={json.dumps(value)}" for name, value in changes.items()]
        told = replace(options, teacher_settings=own, backbone_weights=plan.backbone_weights)
        write_run_file(folder, told, args, "distill")
    teacher, processor = _teacher(plan, comparison, student, new, changes)
    gains, models = [], {TEACHER: Detector(teacher, processor)}
    for number in range(plan.seeds):
        suffix = f"-{args.seed + number}" if plan.seeds > 1 else ""
        for name in (BASELINE, DISTILLED):
            set_seed(args.seed + number)
            model, its_processor = plan.detector(plan.student, train)
            learns = {"teacher": teacher, "teacher_processor": processor} if name == DISTILLED else {}
            run, seed = f"{name}{suffix}", args.seed + number
            model = comparison.run(run, model, **learns, processor=its_processor, seed=seed)
            models |= {name: Detector(model, its_processor)} if number == 0 else {}
        gains.append(100 * (_ap(comparison, DISTILLED + suffix) - _ap(comparison, BASELINE + suffix)))
    return _finish(plan, comparison, tuple(gains), models)


def settings_for(source: str, model: PreTrainedModel, images: int, given: Mapping[str, Any]) -> CrossKDConfig:
    """What was given, and for the rest what fits a model of this source and a training set of so many images."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    recipe = Recipe(images, start_of(source, model), model.config, processes)
    return CrossKDConfig(**(recipe.settings(set(given), **given) | dict(given)))


def _teacher(
    plan: Plan, comparison: Comparison, student: Detector, new: Detector | None, changes: Mapping[str, Any]
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """The teacher, trained here if it has to be; its AP is in the results."""
    if new is not None:
        model, processor = new
        comparison.check(student.model, model, student.processor, processor)
        model = comparison.run(TEACHER, model, processor=processor, **changes)
    else:
        model, processor = load_detector(plan.teacher_source)
        comparison.check(student.model, model, student.processor, processor)
        comparison.evaluate(TEACHER, model, processor)
    average = _ap_of_teacher(comparison)
    if average is not None and not average > 0:
        raise ValueError(
            f"The teacher {plan.teacher_source} finds nothing on the validation data (AP 0): a student would learn "
            "that from it. Are its classes those of the data, by name? Train it longer, or a given one on your data "
            "first: train_teacher=True (--train_teacher)."
        )
    return model, processor


def _changes(plan: Plan, model: PreTrainedModel, images: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a teacher's run that differ from the student's: it may start from other weights."""
    recipe = Recipe(images, start_of(plan.teacher_source, model), model.config)
    chosen = {"backbone_lr": None} | recipe.settings(set(given), **given)
    own = {name: chosen[name] for name in _OF_THE_START if name in chosen and name not in given}
    return own | dict(plan.teacher_settings)


def _setting(text: str) -> tuple[str, Any]:
    """A setting from the command line, as of YAML, which takes 1e-4 for a text."""
    name, _, value = text.partition("=")
    read = yaml.safe_load(value)
    try:
        return name, float(read) if isinstance(read, str) else read
    except ValueError:
        return name, read


def _ap_of_teacher(comparison: Comparison) -> float | None:
    """In [0, 1]; None if it doesn't know all classes of the data, so that it wasn't evaluated."""
    return comparison.results.get(TEACHER, {}).get("map")


def _ap(comparison: Comparison, name: str) -> float:
    return comparison.results[name]["map"]


def _finish(
    plan: Plan, comparison: Comparison, gains: tuple[float, ...], models: Mapping[str, Detector]
) -> Distillation:
    folder = Path(comparison.args.output_dir)
    result = Distillation(comparison.results, verdict(gains), gains, folder)
    if comparison.args.process_index == 0:
        content = {
            "student": plan.student,
            "teacher": plan.teacher_source,
            "seeds": [comparison.args.seed + number for number in range(plan.seeds)],
            "images": {"train": len(comparison.train.dataset), "val": len(comparison.val.dataset)},
            "results": result.results,
            "gains": list(gains),
            "verdict": result.verdict,
            "advice": result.advice,
        }
        (folder / "results.json").write_text(strict_json(content, indent=2) + "\n", encoding="utf-8")
        comparison.save()
        write_report(folder, comparison.train, comparison.val, models)
    return result


def report(folder: str | os.PathLike[str]) -> list[Path]:
    """Make the pictures and `log.csv` of a run of `crosskd-hf train` or `distill` again, from its folder.

    Raises:
        FileNotFoundError: It has no `run.yaml`.
    """
    path = Path(folder)
    if not (path / NAME).is_file():
        raise FileNotFoundError(f"{folder} holds no {NAME}: it is no folder of crosskd-hf train or distill.")
    content = yaml.safe_load((path / NAME).read_text(encoding="utf-8"))
    known = {entry.name for entry in fields(DistillArguments)}
    options = DistillArguments(**{name: value for name, value in content.items() if name in known})
    quiet = CrossKDConfig(os.fspath(folder), report_to="none")
    data, val = options.read_files(quiet)
    if val is None:
        raise ValueError("report looks at validation images, but this run had none.")
    models: dict[str, Detector] = {}
    for name in (TEACHER, BASELINE, DISTILLED):
        found = sorted(path.glob(f"{name}*/config.json"))
        if found:
            models[name] = Detector(*load_detector(found[0].parent))
    if TEACHER not in models and options.teacher and not is_new(options.teacher):
        models = {TEACHER: Detector(*load_detector(options.teacher))} | models
    if (path / "config.json").is_file():
        models["student"] = Detector(*load_detector(path))
    return write_report(path, data, val, models)


def verdict(gains: Sequence[float]) -> str:
    """Whether distillation helped, in one sentence, with the noise beside it.

    Args:
        gains: AP points of each pair of runs.
    """
    mean = statistics.fmean(gains)
    if len(gains) == 1:
        noise = 2 * ONE_SEED
        if abs(mean) <= noise:
            return (
                f"Undecided: the distilled student is {mean:+.1f} AP from the baseline, and two runs that differ in "
                f"their seed alone differ by up to {noise:.0f} AP; three seeds tell more (seeds=3, --seeds 3)."
            )
        word = "helped" if mean > 0 else "harmed"
        return (
            f"Distillation {word}: {mean:+.1f} AP with one seed, more than the {noise:.0f} AP by which two runs that "
            "differ in their seed alone may differ."
        )
    half = half_width(gains)
    interval = f"{mean:+.1f} AP, 95 % interval {mean - half:+.1f} to {mean + half:+.1f} over {len(gains)} seeds"
    if abs(mean) <= half:
        return f"Undecided: {interval}, which holds 0."
    word = "helped" if mean > 0 else "harmed"
    return f"Distillation {word}: {interval}."


def half_width(values: Sequence[float]) -> float:
    """Half of the interval that holds the mean of all seeds with 95 %, by Student's t.

    Args:
        values: Of two seeds or more.
    """
    return float(student_t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
