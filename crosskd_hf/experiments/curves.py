"""The same student trained by several methods, and how near it comes to teacher and labels: CrossKD's Fig. 6."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import set_seed

from ..analysis.curves import DistanceCurves, draw
from ..analysis.pictures import save, write_csv
from ..analysis.probe import batches
from ..create import Detector, ImageSize, create_detector
from ..data.dataset import DetectionData
from ..distillation import MethodConfig
from ..training.config import CrossKDConfig
from ..training.progress import tell_readably
from ..training.trainer import CrossKDTrainer
from .augmentation import training_transform
from .distill import settings_for

BASELINE = "baseline"


def curves(
    student: str,
    teacher: Detector,
    train: DetectionData,
    val: DetectionData,
    out: Path,
    methods: Sequence[str] = ("kd", "crosskd"),
    number: int = 16,
    width: int = 256,
    image_size: ImageSize | None = None,
    **settings: Any,
) -> list[Path]:
    """Write `curves.png` and `curves.csv`: L1(student, teacher), L1(student, labels) and AP after every epoch.

    Args:
        student: As of `create_detector`; all runs start alike.
        teacher: A trained dense detector.
        train, val: The data; distances are taken on the first `number` validation images with objects.
        out: Folder; each run has one below it.
        methods: A run for each; "baseline" is a run without teacher.
        width, image_size: Of a new student.
        settings: Of `CrossKDConfig`; what is not given fits the data.
    """
    for method in methods:
        MethodConfig.parse_all([] if method == BASELINE else method)
    runs = {}
    for method in methods:
        set_seed(int(settings.get("seed", 42)))
        made = create_detector(student, train, width=width, image_size=image_size)
        folder = out / method.replace(":", "_").replace(",", "_")
        args = settings_for(student, made.model, len(train.dataset), _given(settings, folder, method))
        runs[method] = _run(made, None if method == BASELINE else teacher, teacher, (train, val), args, number)
    rows = [{"run": name, **row} for name, own in runs.items() for row in own]
    return [save(draw(runs), out / "curves.png"), write_csv(out / "curves.csv", rows)]


def _given(settings: Mapping[str, Any], folder: Path, method: str) -> dict[str, Any]:
    own = {} if method == BASELINE else {"methods": [method]}
    fixed = {"output_dir": str(folder), "eval_strategy": "epoch", "load_best_model_at_end": False}
    return {**settings, **fixed, **own}


def _run(
    student: Detector,
    teacher: Detector | None,
    beside: Detector,
    splits: tuple[DetectionData, DetectionData],
    args: CrossKDConfig,
    number: int,
) -> list[dict[str, float]]:
    """One training, with the rows of its curves, whose distances are those from `beside`."""
    train, val = (split.for_model(student.model.config) for split in splits)
    student.model.config.category_ids = list(train.categories.raw_ids)
    inputs = [*batches(student, val, number)]
    callback = DistanceCurves(student.processor, beside, inputs, Path(args.output_dir) / "distances.csv")
    trainer = CrossKDTrainer(
        model=student.model,
        args=args,
        train_dataset=train.dataset,
        eval_dataset=val.dataset,
        processing_class=student.processor,
        teacher_model=None if teacher is None else teacher.model,
        teacher_processing_class=None if teacher is None else teacher.processor,
        train_transform=training_transform((), None, ()),
        callbacks=[callback],
    )
    tell_readably(trainer)
    trainer.train()
    trainer.save_model()
    return callback.rows
