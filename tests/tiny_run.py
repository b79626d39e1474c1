"""A training run on a tiny detector and made images. Imported by tests, and run by them in processes of its own:

    python -m tests.tiny_run cases.json
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from crosskd_hf.data import DetectionData, load_coco
from crosskd_hf.models import DETECTORS, DetectionImageProcessor, GFLConfig
from crosskd_hf.shapes import make_shapes
from crosskd_hf.trainer import CrossKDTrainer
from crosskd_hf.training_args import CrossKDConfig
from crosskd_hf.transforms import TrainTransform

SIZE = 64


def make_data(folder: Path, num_train: int = 7, num_val: int = 5, empty: tuple[int, ...] = (2, 3)) -> None:
    """Shapes in `folder`; the training images number `empty` lose their objects."""
    paths = make_shapes(folder, num_train, num_val, SIZE)
    content = json.loads(paths.train_annotations.read_text())
    emptied = {content["images"][number]["id"] for number in empty}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in emptied]
    paths.train_annotations.write_text(json.dumps(content))


def load_data(folder: Path) -> tuple[DetectionData, DetectionData]:
    """Both splits."""
    train = load_coco(folder / "annotations/instances_train.json", folder / "train")
    return train, load_coco(folder / "annotations/instances_val.json", folder / "val", train.categories)


def make_detector(seed: int, width: int = 8, kind: type = GFLConfig, **settings: Any) -> PreTrainedModel:
    """A detector of a few thousand weights for the classes of the shapes."""
    torch.manual_seed(seed)
    names = dict(enumerate(("circle", "square", "triangle", "star")))
    config = kind(
        backbone="test_resnet",
        fpn_channels=width,
        head_channels=width,
        norm_groups=4,
        num_convs=4,
        id2label=names,
        label2id={name: index for index, name in names.items()},
        category_ids=[1, 3, 4, 7],
        **settings,
    )
    return DETECTORS[kind](config)


def processor() -> DetectionImageProcessor:
    """Every image becomes SIZE x SIZE."""
    return DetectionImageProcessor(size={"height": SIZE, "width": SIZE})


def settings(folder: Path, **changes: Any) -> CrossKDConfig:
    """Quiet settings for a short run in `folder / "run"`."""
    options: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "use_cpu": True,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "schedule": "1x",
        "learning_rate": 0.05,
        "warmup_steps": 0,
        "methods": ["crosskd", "pkd"],
        "disable_tqdm": True,
        "report_to": "none",
    }
    return CrossKDConfig(**(options | changes))


def make_trainer(
    folder: Path, teacher: bool | PreTrainedModel = True, augment: bool = False, **changes: Any
) -> CrossKDTrainer:
    """A trainer of a tiny student, with a wider teacher unless `teacher` is False. Makes the data if there are none."""
    if not (folder / "annotations").is_dir():
        make_data(folder)
    train, val = load_data(folder)
    if teacher is True:
        teacher = make_detector(1, width=12)
    args = settings(folder, **changes)
    return CrossKDTrainer(
        make_detector(2),
        args,
        train.dataset,
        val.dataset,
        processor(),
        teacher_model=teacher or None,
        train_transform=TrainTransform() if augment else None,
    )


def losses(trainer: CrossKDTrainer) -> list[dict[str, float]]:
    """What was logged of every update: loss parts and gradient norm."""
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{name: v for name, v in entry.items() if name.startswith("loss") or name == "grad_norm"} for entry in logs]


def perform(case: dict[str, Any]) -> dict[str, Any]:
    """Train and evaluate once. Returns losses, metrics and the like; writes this process's weights to `case["weights"]`.

    Args:
        case: `folder`, `changes` to :func:`settings`, and maybe `augment`, `evaluate_first`, `resume` (True or a folder), `weights`.
    """
    trainer = make_trainer(Path(case["folder"]), augment=case.get("augment", False), **case["changes"])
    if case.get("evaluate_first"):
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=case.get("resume"))
    metrics = trainer.evaluate() if case.get("evaluate", True) else {}
    if "weights" in case:
        save_file(trainer.model.state_dict(), f"{case['weights']}.{trainer.args.process_index}.safetensors")
    return {
        "losses": losses(trainer),
        "metrics": {name: value for name, value in metrics.items() if "map" in name},
        "wrapped": type(trainer.model_wrapped).__name__,
        "processes": trainer.args.world_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", type=Path, help="json list of cases; their results are written beside it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = [perform(case) for case in json.loads(given.cases.read_text())]
    if int(os.environ.get("RANK", "0")) == 0:
        given.cases.with_suffix(".results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
