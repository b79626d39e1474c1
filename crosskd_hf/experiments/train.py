"""One training run from files: read the data, build or load the student, train, evaluate, save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel, set_seed

from ..create import Detector, ImageSize, chosen_weights, create_detector
from ..data.dataset import DetectionData
from ..inference.evaluation import ap_metrics
from ..models.pixels import check_pixel_range
from ..text import lines
from ..training.config import AUTHORS, CrossKDConfig, option
from ..training.progress import tell_readably
from ..training.trainer import CrossKDTrainer
from .augmentation import AUGMENTATIONS, training_transform
from .command_line import Words, make_parser, parse
from .data_options import DataOptions
from .recipe import Recipe, Start, in_words, start_of
from .report import write_report
from .run_file import write_run_file


@dataclass
class RunArguments(DataOptions):
    """What is trained on what; how is said by `CrossKDConfig`."""

    student: str = option(
        "gfl:resnet18",
        "Folder or Hub id of a detector, or a new one as ARCHITECTURE:BACKBONE (gfl:resnet18, "
        "faster_rcnn:resnet50, rt_detr_v2:resnet18, ...).",
    )
    teacher: str | None = option(None, "Folder or Hub id of the trained teacher; without one, no distillation.")
    backbone_weights: str = option(
        "auto",
        "For a new student: 'timm' (downloads), a tag or a file of timm, or 'none' for random weights. Default: timm's "
        "if they are in the cache or the Hub answers.",
    )
    width: int = option(256, "Channels of pyramid and towers of a new student.", AUTHORS)
    shortest_edge: int | None = option(
        None, "Shorter side of images in pixels, for a new student. Default: 800; RT-DETR and relatives 640.", AUTHORS
    )
    longest_edge: int | None = option(
        None, "Longest side of images in pixels; it wins over the shorter one. Default: 1333.", AUTHORS
    )
    pixel_range: list[float] | None = option(
        None,
        "Lowest and highest value of 16-bit or float pixels; check-data tells them. The student's image processor "
        "keeps them. Default: 0 65535, and of floats what each image has.",
    )
    multi_scale: list[int] = option([], "Shorter sides to draw from in training.")
    augment: list[str] = option([], f"Augmentation beside the flip, of {', '.join(AUGMENTATIONS)}.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pixel_range(self.pixel_range)

    @property
    def image_size(self) -> ImageSize | None:
        """What was said of the size of images."""
        return ImageSize.of(self.shortest_edge, self.longest_edge)


@dataclass
class Prepared:
    """What a run is made of, before its settings are known.

    Args:
        data, val: In the order of the model's classes.
        model, processor: The student.
        start: What its weights know.
    """

    data: DetectionData
    val: DetectionData | None
    model: PreTrainedModel
    processor: BaseImageProcessor
    start: Start


def prepare(run: RunArguments, args: CrossKDConfig) -> Prepared:
    """Read the data, and make or load the student, new weights from the seed of `args`.

    `run.backbone_weights` becomes what "auto" means here and now, so that `run.yaml` makes the same run.

    Raises:
        DataError: The data set is faulty. ValueError: There is no such student.
    """
    data, val = run.read_files(args)
    run.backbone_weights = chosen_weights([run.student], run.backbone_weights)
    set_seed(args.seed)
    model, processor = create_detector(
        run.student,
        data,
        backbone_weights=run.backbone_weights,
        width=run.width,
        image_size=run.image_size,
    )
    data, val = data.for_model(model.config), None if val is None else val.for_model(model.config)
    model.config.category_ids = list(data.categories.raw_ids)
    if run.pixel_range is not None:
        processor.pixel_range = run.pixel_range
    return Prepared(data, val, model, processor, start_of(run.student, model))


def train(run: RunArguments, args: CrossKDConfig, prepared: Prepared | None = None) -> dict[str, float]:
    """Train, and save the student into `args.output_dir`.

    Args:
        run: Data and models.
        args: Settings.
        prepared: Of the same `run`; made here if it is left out.

    Returns:
        Metrics of the last evaluation; empty without validation data.

    Raises:
        DataError: The data set is faulty. ValueError: Student, teacher and data don't go together.
    """
    prepared = prepared or prepare(run, args)
    val = None if prepared.val is None else prepared.val.dataset
    trainer = CrossKDTrainer(
        model=prepared.model,
        args=args,
        train_dataset=prepared.data.dataset,
        eval_dataset=val,
        processing_class=prepared.processor,
        teacher_model=run.teacher,
        train_transform=training_transform(run.multi_scale, run.image_size, run.augment),
    )
    tell_readably(trainer)
    if args.should_save:
        write_run_file(args.output_dir, run, args)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    metrics = {} if val is None else ap_metrics(trainer.evaluate())
    trainer.save_model()
    trainer.save_state()
    return metrics


def train_from_words(words: Sequence[str]) -> tuple[dict[str, float], CrossKDConfig]:
    """`crosskd-hf train`: what is not given gets a default that fits the data (see `Recipe`).

    Args:
        words: Of the command line; a YAML or JSON file of an earlier run may come first.

    Returns:
        Metrics, and the settings that were used.
    """
    parser = make_parser(RunArguments)
    given = Words.of(words, parser)
    run, config = parse(parser, given)
    prepared = prepare(run, config)
    recipe = Recipe(len(prepared.data.dataset), prepared.start, prepared.model.config, config.world_size)
    defaults: dict[str, Any] = recipe.settings(
        given.names,
        prepared.val is not None,
        **{name: getattr(config, name) for name in given.names if hasattr(config, name)},
    )
    defaults["teacher_eval"] = run.teacher is not None and prepared.val is not None
    parser.set_defaults(**{name: value for name, value in defaults.items() if name not in given.names})
    weights = run.backbone_weights
    run, config = parse(parser, given)
    run.backbone_weights = weights
    if config.process_index == 0:
        told = prepared.data, prepared.val, config, prepared.processor.size, prepared.start
        for line in opening(*told):
            tqdm.write(line)
    metrics = train(run, config, prepared)
    if prepared.val is not None and config.process_index == 0:
        student = Detector(prepared.model, prepared.processor)
        write_report(Path(config.output_dir), prepared.data, prepared.val, {"student": student})
    return metrics, config


def opening(
    data: DetectionData, val: DetectionData | None, config: CrossKDConfig, size: Any, start: Start
) -> list[str]:
    """What a run tells before its first update: what is wrong with the data, and the settings in one line.

    Args:
        data, val: What is trained on and evaluated.
        config, size, start: As of `in_words`.
    """
    reports = [data.report, *([] if val is None else [val.report])]
    found = [finding for report in reports for finding in report.findings if finding.severity == "warning"]
    told = [lines(finding.describe(1)) for finding in found]
    return [*told, in_words(config, len(data.dataset), size, start)]
