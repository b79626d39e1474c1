"""Teacher, baseline and distilled student, trained alike and compared: does distillation pay here?"""

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel, set_seed

from ..create import DetectorSpec, build_detector
from ..data.class_names import class_names
from ..data.dataset import DetectionData
from ..data.schema import names_of
from ..data.transforms import Record, TrainTransform
from ..distillation import Distiller
from ..inference.detection import detect
from ..inference.drawing import draw_objects
from ..inference.evaluation import HEAD, ap_metrics, ap_row
from ..inference.processors import check_processor
from ..models.pixels import to_rgb
from ..text import strict_json
from ..training import supervision
from ..training.checkpoints import last_checkpoint
from ..training.classes import check_classes
from ..training.config import CrossKDConfig
from ..training.progress import tell_readably
from ..training.trainer import CrossKDTrainer

logger = logging.getLogger(__name__)


@dataclass
class Comparison:
    """Runs of one data set which differ in nothing but the teacher.

    Args:
        train, val: The data; `val` read with the classes of `train`.
        processor: Image processor of every model that is built here.
        args: Settings of all runs; each run gets a folder of its name in `args.output_dir`.
        transform: Training augmentation.
        results: Metrics of each run that was made, by name.
    """

    train: DetectionData
    val: DetectionData
    processor: BaseImageProcessor
    args: CrossKDConfig
    transform: Callable[[Record], Record] = field(default_factory=TrainTransform)
    results: dict[str, dict[str, float]] = field(default_factory=dict)

    def check(
        self,
        student: DetectorSpec | PreTrainedModel,
        teacher: DetectorSpec | PreTrainedModel,
        processor: BaseImageProcessor | None = None,
        teacher_processor: BaseImageProcessor | None = None,
    ) -> None:
        """Find out before anything is trained whether this pair can be distilled on this data.

        Args:
            student, teacher: What shall be built, or models, which are not changed.
            processor, teacher_processor: Image processors of given models.

        Raises:
            ValueError: It can't; the message says why and what would work.
        """
        models = [
            build_detector(model, self.train.categories) if isinstance(model, DetectorSpec) else copy.deepcopy(model)
            for model in (student, teacher)
        ]
        processor = processor or self.processor
        check_processor(models[0], processor)
        check_classes(models[0], self.train.dataset, self.val.dataset)
        supervision.prepare(models[0], processor, self.transform)
        Distiller(models[0], models[1], self.args.methods, processor, teacher_processor).close()

    def run(
        self,
        name: str,
        model: DetectorSpec | PreTrainedModel,
        teacher: PreTrainedModel | None = None,
        teacher_processor: BaseImageProcessor | None = None,
        processor: BaseImageProcessor | None = None,
        **changes: Any,
    ) -> PreTrainedModel:
        """Train, evaluate and save one model.

        Args:
            name: Of the run and its folder.
            model: What to build, from the seed of `args`, or a model to go on with.
            teacher: The teacher; without one the model learns from its labels alone.
            teacher_processor: The teacher's image processor, if it normalises pixels differently.
            processor: The image processor of a model to go on with, if it has its own.
            changes: Settings of this run that differ, e.g. `num_train_epochs`.
        """
        args = copy.copy(self.args)
        changes |= {"output_dir": str(Path(self.args.output_dir) / name)}
        changes |= {"push_to_hub": self.args.push_to_hub and name == "distilled"}  # all runs share one repository
        for key, value in changes.items():
            setattr(args, key, value)
        set_seed(args.seed)
        if isinstance(model, DetectorSpec):
            model = build_detector(model, self.train.categories)
        model.config.category_ids = list(self.train.categories.raw_ids)
        trainer = CrossKDTrainer(
            model=model,
            args=args,
            train_dataset=self.train.dataset,
            eval_dataset=self.val.dataset,
            processing_class=processor or self.processor,
            teacher_model=teacher,
            teacher_processing_class=teacher_processor,
            train_transform=self.transform,
        )
        tell_readably(trainer)
        if args.process_index == 0:
            tqdm.write(f"{name}:")
        trainer.train(resume_from_checkpoint=resumed_from(args))
        self.results[name] = ap_metrics(trainer.evaluate())
        trainer.save_model()
        trainer.save_state()
        return model

    def evaluate(self, name: str, model: PreTrainedModel, processor: BaseImageProcessor) -> None:
        """Evaluate a given model, such as a loaded teacher, on the validation data; classes are found by name.

        A model that doesn't know all of them is left out, which is logged.
        """
        try:
            data = self.val.for_model(model.config, training=False)
        except ValueError as error:
            logger.warning("%s is not evaluated. %s", name, error)
            return
        args = copy.copy(self.args)
        args.output_dir, args.push_to_hub = str(Path(self.args.output_dir) / name), False
        trainer = CrossKDTrainer(model=model, args=args, eval_dataset=data.dataset, processing_class=processor)
        self.results[name] = ap_metrics(trainer.evaluate())

    def table(self) -> str:
        """AP of all runs in percent, one line each."""
        lines = [f"{name:12s}{ap_row(metrics)}" for name, metrics in self.results.items()]
        return "\n".join([f"{'':12s}{HEAD}", *lines])

    def save(self) -> Path:
        """Write the metrics of all runs as `comparison.json`."""
        path = Path(self.args.output_dir) / "comparison.json"
        path.write_text(strict_json(self.results, indent=2) + "\n")
        return path


def resumed_from(args: CrossKDConfig) -> str | bool | None:
    """What one of several runs goes on from. Each has checkpoints of its own; one that has none begins.

    Args:
        args: Of the run.
    """
    resume = args.resume_from_checkpoint
    begins = resume in (True, "True", "true") and last_checkpoint(args.output_dir) is None
    return False if begins else resume


def picture(
    path: Path,
    dataset: datasets.Dataset,
    models: Mapping[str, tuple[PreTrainedModel, BaseImageProcessor]],
    rows: int = 4,
    threshold: float = 0.4,
) -> None:
    """Write truth and every model's detections on the first images with objects, side by side, as a PNG."""
    import matplotlib.figure  # takes half a second, which nothing else in here needs

    examples = []
    for example in dataset:
        if example["objects"]["bbox"]:
            examples.append(example)
        if len(examples) == rows:
            break
    images = [example["image"] for example in examples]
    columns: dict[str, list[dict[str, Any]]] = {"truth": [_truth(example) for example in examples]}
    names = {"truth": dict(enumerate(names_of(dataset) or ()))}
    for name, (model, processor) in models.items():
        columns[name] = detect(model, processor, images, threshold)
        names[name] = dict(enumerate(class_names(model.config)))
    _, processor = next(iter(models.values()))
    images = [to_rgb(image, getattr(processor, "pixel_range", None)) for image in images]
    figure = matplotlib.figure.Figure(figsize=(3.2 * len(columns), 3.2 * len(examples)), layout="constrained")
    grid = figure.subplots(len(examples), len(columns), squeeze=False)
    for column, (title, results) in enumerate(columns.items()):
        for row, (image, result) in enumerate(zip(images, results, strict=True)):
            axes = grid[row][column]
            axes.imshow(draw_objects(image, result, names[title]))
            axes.set_axis_off()
            if row == 0:
                axes.set_title(title)
    figure.savefig(path, dpi=150)


def _truth(example: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    boxes = torch.tensor(example["objects"]["bbox"])
    boxes[:, 2:] += boxes[:, :2]
    return {"boxes": boxes, "labels": torch.tensor(example["objects"]["category"])}
