"""One call from data to an answer: a teacher, the baseline, the distilled student, and what distillation gained.

result = distill("my_data", student="gfl:resnet18", teacher="gfl-r50-of-coco", out="run")
print(result.verdict)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel, set_seed

from ..create import Detector, ImageSize, is_new
from ..data.collators import DetectionCollator
from ..data.dataset import DetectionData
from ..inference.loading import load_detector
from ..text import strict_json
from ..training.config import CrossKDConfig
from .augmentation import training_transform
from .command_line import Words, make_parser, parse
from .comparison import Comparison
from .plan import DistillArguments, Plan
from .recipe import Recipe, start_of
from .report import first_batch, write_report
from .run_file import NAME, write_run_file
from .train import opening
from .verdict import BASELINE, DISTILLED, TEACHER, Distillation, verdict

_OF_THE_START = ("learning_rate", "backbone_lr", "num_train_epochs", "max_grad_norm")  # what they depend on


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
