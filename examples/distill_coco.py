"""Distil a detector on COCO-format data, and compare it with the baseline: the same student without a teacher.

    python examples/distill_coco.py                      # synthetic data, tiny models: about 5 minutes on two cores

    accelerate launch --multi_gpu --num_processes 8 examples/distill_coco.py \\
        --train_images coco/train2017 --train_annotations coco/annotations/instances_train2017.json \\
        --val_images coco/val2017 --val_annotations coco/annotations/instances_val2017.json \\
        --teacher TEACHER_FOLDER_OR_HUB_ID --student_backbone resnet18 --backbone_weights timm \\
        --per_device_train_batch_size 2 --bf16          # schedule 1x: 12 epochs of COCO, hours on 8 GPUs (not run)

Three steps, together or apart (`--steps`): train the teacher, or load it with `--teacher`; train the baseline;
train the same student with CrossKD. All of Hugging Face's training arguments hold, e.g. `--report_to tensorboard`.
"""

import sys
from pathlib import Path
from typing import Any

from transformers import BaseImageProcessor, HfArgumentParser, PreTrainedModel, pipeline

from crosskd_hf import CrossKDConfig
from crosskd_hf.create import DetectorSpec
from crosskd_hf.experiments.comparison import Comparison, picture
from crosskd_hf.experiments.comparison_options import DenseOptions
from crosskd_hf.experiments.presets import preset
from crosskd_hf.experiments.published import announce, conclude
from crosskd_hf.inference.detection import detect
from crosskd_hf.inference.loading import load_detector
from crosskd_hf.text import escape_on_output
from crosskd_hf.training.moved import refuse_words

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results.csv"
Trained = tuple[PreTrainedModel, BaseImageProcessor]

# Defaults of a run on synthetic data, where there is neither a COCO folder nor a pretrained backbone.
SYNTHETIC_DATA = {
    "output_dir": "outputs/demo",
    "student_backbone": "test_efficientnet_gn",
    "teacher_backbone": "test_resnet",
    "width": 64,
    "shortest_edge": 128,
    "longest_edge": 128,
    "fixed_canvas": True,
    "num_train_epochs": 6.0,
    "teacher_epochs": 12.0,
    "per_device_train_batch_size": 4,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "weight_decay": 1e-4,
    "max_grad_norm": 10.0,
}
# Defaults of the real job: the published recipe of GFL.
COCO = {"output_dir": "outputs/coco", "schedule": "1x", "per_device_train_batch_size": 2}


def parse(argv: list[str]) -> tuple[DenseOptions, CrossKDConfig]:
    """Command line over the defaults of a run on synthetic data or of the real job."""
    parser = HfArgumentParser((DenseOptions, CrossKDConfig))
    synthetic = not any(word.split("=")[0] in ("--train_annotations", "--data") for word in argv)
    common = {"eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 1, "logging_steps": 20}
    common |= {"report_to": "none", "dataloader_num_workers": 1} | (SYNTHETIC_DATA if synthetic else COCO)
    name = next((argv[i + 1] for i, word in enumerate(argv[:-1]) if word == "--preset"), None)
    if any(word.split("=")[0] == "--schedule" for word in argv):
        common.pop("lr_scheduler_type", None)  # a schedule has its own
    elif any(word.split("=")[0] == "--lr_scheduler_type" for word in argv):
        common.pop("schedule", None)
    parser.set_defaults(**common | ({} if name is None else published_defaults(name)))
    refuse_words(argv)
    arguments, config = parser.parse_args_into_dataclasses(argv)
    arguments.check_push(config)
    return arguments, config


def published_defaults(name: str) -> dict[str, Any]:
    """Defaults of a published experiment; what is given on the command line still wins."""
    experiment = preset(name)
    experiment.runs_in("distill_coco")
    return experiment.example_arguments()


def prepare(arguments: DenseOptions, config: CrossKDConfig) -> Comparison:
    """Read or make the data; for a given student in the order of its classes."""
    train, val = arguments.read_data(config)
    print(train.report, val.report, sep="\n")
    if arguments.student is not None:
        known = load_detector(arguments.student)[0].config
        train, val = train.for_model(known), val.for_model(known)
    return Comparison(train, val, new_processor(arguments, student_spec(arguments)), config, arguments.transform)


def student_spec(arguments: DenseOptions) -> DetectorSpec:
    """A new student."""
    if arguments.published_model is not None:
        return arguments.published_model.spec
    return DetectorSpec(arguments.detector, arguments.student_backbone, arguments.backbone_weights, arguments.width)


def teacher_spec(arguments: DenseOptions) -> DetectorSpec:
    """A new teacher."""
    architecture = arguments.teacher_detector or arguments.detector
    return DetectorSpec(architecture, arguments.teacher_backbone, arguments.backbone_weights, arguments.width)


def new_processor(arguments: DenseOptions, spec: DetectorSpec) -> BaseImageProcessor:
    """The image processor of a new model."""
    canvas = {"height": arguments.longest_edge, "width": arguments.longest_edge} if arguments.fixed_canvas else None
    published = arguments.published_model
    kind = published if published is not None and published.spec == spec else spec
    return kind.image_processor(size=arguments.image_size, pad_size=canvas)


def run(arguments: DenseOptions, comparison: Comparison, models: dict[str, Trained]) -> None:
    """Do the steps that `models` does not hold yet, and put their models there."""
    teacher, its_processor = teacher_spec(arguments), new_processor(arguments, teacher_spec(arguments))
    if arguments.teacher is not None and "teacher" not in models:
        models["teacher"] = load_detector(arguments.teacher)
    if "distilled" in arguments.steps:
        student, processor = start(arguments, comparison)
        given, given_processor = models.get("teacher", (teacher, its_processor))
        comparison.check(student, given, processor, given_processor)
    if arguments.teacher is not None:
        comparison.evaluate("teacher", *models["teacher"])
    elif "teacher" in arguments.steps and "teacher" not in models:
        epochs = arguments.teacher_epochs or comparison.args.num_train_epochs
        trained = comparison.run("teacher", teacher, processor=its_processor, num_train_epochs=epochs)
        models["teacher"] = trained, its_processor
    for step in ("baseline", "distilled"):
        if step in arguments.steps:
            student, processor = start(arguments, comparison)
            pair = models["teacher"] if step == "distilled" else (None, None)
            models[step] = comparison.run(step, student, *pair, processor=processor), processor


def start(arguments: DenseOptions, comparison: Comparison) -> tuple[DetectorSpec | PreTrainedModel, BaseImageProcessor]:
    """What the student starts from, and its image processor."""
    if arguments.student is not None:
        return load_detector(arguments.student)
    return student_spec(arguments), comparison.processor


def main() -> None:
    """Run the steps and compare."""
    escape_on_output()
    arguments, config = parse(sys.argv[1:])
    announce(arguments.preset, arguments.backbone_checkpoint, config)
    comparison = prepare(arguments, config)
    models: dict[str, Trained] = {}
    run(arguments, comparison, models)
    if config.process_index == 0:
        report(comparison, models)
    conclude(arguments.preset, comparison.results, config, RESULTS)


def report(comparison: Comparison, models: dict[str, Trained]) -> None:
    """Print the table, draw the picture, and use the saved student as anybody would."""
    folder = Path(comparison.args.output_dir)
    print(f"\nCOCO AP on {len(comparison.val.dataset)} validation images, in percent\n{comparison.table()}\n")
    comparison.save()
    picture(folder / "comparison.png", comparison.val.dataset, models)
    print(f"Picture: {folder / 'comparison.png'}")
    last = [name for name in ("distilled", "baseline", "teacher") if name in models and (folder / name).is_dir()]
    if not last:
        return
    saved = folder / last[0]
    example = next(e for e in comparison.val.dataset if e["objects"]["bbox"])
    found = pipeline("object-detection", model=str(saved), device=-1)(example["image"], threshold=0.0)
    reloaded, processor = load_detector(saved)
    count = len(detect(reloaded, processor, [example["image"]], 0.05)[0]["scores"])
    print(f"Student: {saved}, reloaded with from_pretrained ({count} detections in the first picture) and pipeline:")
    print(max(found, key=lambda detection: detection["score"]) if found else "nothing found in it")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
