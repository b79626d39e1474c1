"""Distil a DETR-type detector: a teacher's decoder reads the student's encoder memory.

    python examples/distill_deformable_detr.py           # synthetic data, tiny models: 3 minutes on one core

    accelerate launch --multi_gpu --num_processes 8 examples/distill_deformable_detr.py \\
        --teacher SenseTime/deformable-detr-with-box-refine-two-stage --backbone_weights timm --bf16 \\
        --train_images coco/train2017 --train_annotations coco/annotations/instances_train2017.json \\
        --val_images coco/val2017 --val_annotations coco/annotations/instances_val2017.json \\
        --steps distilled                                # the paper's R18 student, 50 epochs: days on 8 GPUs (not run)

    accelerate launch --multi_gpu --num_processes 8 examples/distill_deformable_detr.py \\
        --preset crosskd-deformable-detr-r18-from-r50 --teacher TEACHER \\
        --train_images ...                               # the same with every published setting, see docs/reproduce.md

    python examples/distill_deformable_detr.py --dataset cppe-5 --val_split test --drop size-mismatch \\
        --student SenseTime/deformable-detr --teacher A_DEFORMABLE_DETR_THAT_KNOWS_THE_CLASSES

The student may be new (a two-stage Deformable DETR with box refinement) or a trained model of any family in
docs/detr.md, given by `--student`. Teacher and student need as many feature levels; widths and classes may differ.
All of Hugging Face's training arguments hold. On synthetic data the models see some hundred updates, where a DETR needs
ten thousands: the run shows that everything works and costs, not what distillation gains.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BaseImageProcessor,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessor,
    HfArgumentParser,
    PreTrainedModel,
)

from crosskd_hf import CrossKDConfig
from crosskd_hf.create import Detector, create_detector
from crosskd_hf.data.categories import CategoryMap
from crosskd_hf.experiments.comparison import Comparison
from crosskd_hf.experiments.comparison_options import DetrOptions
from crosskd_hf.experiments.deformable_detr import new_deformable_detr
from crosskd_hf.experiments.presets import preset
from crosskd_hf.experiments.published import announce, conclude
from crosskd_hf.inference.loading import load_detector
from crosskd_hf.text import escape_on_output
from crosskd_hf.training.moved import refuse_words

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results.csv"
Trained = tuple[PreTrainedModel, BaseImageProcessor]

# Defaults of a run on synthetic data: small images, nets without batch norm (transformers freezes it), short schedule.
SYNTHETIC_DATA: dict[str, Any] = {
    "output_dir": "outputs/detr_demo",
    "student_backbone": "test_convnext",
    "teacher_backbone": "test_convnext2",
    "d_model": 64,
    "feature_levels": 3,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_queries": 20,
    "shortest_edge": 96,
    "longest_edge": 96,
    "num_train_epochs": 6.0,
    "teacher_epochs": 9.0,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 8,
}
# Defaults of the real job: the published recipe (AdamW, batch 32, backbone at a tenth, gradient norm clipped at 0.1).
PUBLISHED: dict[str, Any] = {
    "output_dir": "outputs/deformable_detr",
    "learning_rate": 2e-4,
    "backbone_lr": 2e-5,
    "num_train_epochs": 50.0,
    "per_device_train_batch_size": 4,
    "dataloader_num_workers": 4,
}
COMMON: dict[str, Any] = {
    "weight_decay": 1e-4,
    "max_grad_norm": 0.1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.02,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "logging_steps": 20,
    "report_to": "none",
}


def parse(argv: list[str]) -> tuple[DetrOptions, CrossKDConfig]:
    """Command line over the defaults of a run on synthetic data or of the real job."""
    parser = HfArgumentParser((DetrOptions, CrossKDConfig))
    real = any(word.split("=")[0] in ("--train_annotations", "--data", "--dataset") for word in argv)
    defaults = COMMON | (PUBLISHED if real else SYNTHETIC_DATA)
    name = next((argv[i + 1] for i, word in enumerate(argv[:-1]) if word == "--preset"), None)
    if name is not None or any(word.split("=")[0] == "--schedule" for word in argv):
        del defaults["lr_scheduler_type"]  # a schedule has its own
    if name is not None:
        defaults = defaults | published_defaults(name)
        defaults["warmup_steps"] = None
    parser.set_defaults(**defaults)
    refuse_words(argv)
    arguments, config = parser.parse_args_into_dataclasses(argv)
    arguments.check_push(config)
    return arguments, config


def published_defaults(name: str) -> dict[str, Any]:
    """Defaults of a published experiment; what is given on the command line still wins."""
    experiment = preset(name)
    experiment.runs_in("distill_deformable_detr")
    unread = {"backbone_lr": None}  # the factors say the same
    return experiment.example_arguments() | unread | {"backbone_weights": experiment.student.backbone_weights}


def new_model(arguments: DetrOptions, backbone: str, categories: CategoryMap) -> DeformableDetrForObjectDetection:
    """A new detector of the sizes that were given."""
    names = ("d_model", "feature_levels", "encoder_layers", "decoder_layers", "num_queries")
    sizes = {name: getattr(arguments, name) for name in names}
    return new_deformable_detr(backbone, categories, arguments.backbone_weights, **sizes)


def given_student(source: str, categories: CategoryMap) -> Detector:
    """A trained student to go on with; one of other classes gets a head for these, as `create_detector` says.

    Every layer gets a loss, except where that would make transformers' model compute something else than it learnt.
    """
    model, processor = create_detector(source, categories)
    if model.config.model_type not in ("detr", "conditional_detr"):
        model.config.auxiliary_loss = True
    return Detector(model, processor)


def prepare(arguments: DetrOptions, config: CrossKDConfig) -> Comparison:
    """Read or make the data."""
    train, val = arguments.read_data(config)
    print(train.report, val.report, sep="\n")
    if arguments.student is None:
        published, size = arguments.published_model, arguments.image_size
        new = DeformableDetrImageProcessor if published is None else published.image_processor
        processor: BaseImageProcessor = new(size=size)
    else:
        student, processor = given_student(arguments.student, train.categories)
        train, val = train.for_model(student.config), val.for_model(student.config)
    return Comparison(train, val, processor, config, arguments.transform)


def run(arguments: DetrOptions, comparison: Comparison, models: dict[str, Trained]) -> None:
    """Do the steps that `models` does not hold yet, and put their models there."""
    categories = comparison.train.categories
    if arguments.teacher is not None:
        models["teacher"] = load_detector(arguments.teacher)
        comparison.evaluate("teacher", *models["teacher"])
    elif "teacher" in arguments.steps and "teacher" not in models:
        epochs = arguments.teacher_epochs or comparison.args.num_train_epochs
        torch.manual_seed(comparison.args.seed)
        model = new_model(arguments, arguments.teacher_backbone, categories)
        models["teacher"] = comparison.run("teacher", model, num_train_epochs=epochs), comparison.processor
    for step in ("baseline", "distilled"):
        if step in arguments.steps:
            torch.manual_seed(comparison.args.seed)
            if arguments.student is not None:
                student, _ = given_student(arguments.student, categories)
            else:
                student = new_model(arguments, arguments.student_backbone, categories)
            pair = models["teacher"] if step == "distilled" else (None, None)
            models[step] = comparison.run(step, student, *pair), comparison.processor


def main() -> None:
    """Read, train, compare."""
    escape_on_output()
    arguments, config = parse(sys.argv[1:])
    announce(arguments.preset, None, config)
    comparison = prepare(arguments, config)
    run(arguments, comparison, {})
    if config.process_index == 0:
        count = len(comparison.val.dataset)
        print(f"\nCOCO AP on {count} validation images, in percent\n{comparison.table()}")
        print(f"Written to {comparison.save()}")
    conclude(arguments.preset, comparison.results, config, RESULTS)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
