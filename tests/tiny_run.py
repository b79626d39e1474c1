"""A training run on a tiny detector and synthetic images. Imported by tests, and run by them in processes of its own:

python -m tests.tiny_run cases.json
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from transformers import (
    BaseImageProcessor,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessor,
    PreTrainedModel,
    TimmBackboneConfig,
)

from crosskd_hf.data import DetectionData, load_coco
from crosskd_hf.data.shapes import make_shapes
from crosskd_hf.data.transforms import TrainTransform
from crosskd_hf.models import DETECTORS, DetectionImageProcessor, FasterRCNNConfig, GFLConfig
from crosskd_hf.models.backbone import weights_follow
from crosskd_hf.training.config import CrossKDConfig
from crosskd_hf.training.trainer import CrossKDTrainer
from tests.tiny_backbone import as_if_loaded

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
    head = {"head_channels": width, "norm_groups": 4, "num_convs": 4}
    if kind is FasterRCNNConfig:  # without chance, which falls differently on differently spread images
        head = {
            "rpn_channels": width,
            "fc_channels": 16,
            "rpn_samples": None,
            "roi_samples": None,
            "train_proposals": 20,
        }
    config = kind(
        backbone="test_resnet",
        fpn_channels=width,
        **head,
        id2label=names,
        label2id={name: index for index, name in names.items()},
        category_ids=[1, 3, 4, 7],
        **settings,
    )
    with weights_follow():
        return as_if_loaded(DETECTORS[kind](config))


def processor() -> DetectionImageProcessor:
    """Every image becomes SIZE x SIZE, and untrained detectors find something."""
    return DetectionImageProcessor(size={"height": SIZE, "width": SIZE}, score_threshold=0.0, nms_threshold=1.0)


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


def make_deformable_detr(seed: int, d_model: int = 32) -> PreTrainedModel:
    """A Deformable DETR of transformers, as small as it gets, for the same classes."""
    torch.manual_seed(seed)
    names = make_detector(seed).config.id2label
    backbone = TimmBackboneConfig(backbone="test_resnet", out_indices=(2, 3, 4), freeze_batch_norm_2d=True)
    sizes = {f"{part}_{size}": number for part in ("encoder", "decoder") for size, number in
             (("layers", 2), ("attention_heads", 2), ("ffn_dim", 16))}  # fmt: skip
    config = DeformableDetrConfig(
        backbone_config=backbone,
        d_model=d_model,
        num_queries=10,
        num_feature_levels=3,
        auxiliary_loss=True,
        dropout=0.0,
        id2label=names,
        label2id={name: index for index, name in names.items()},
        category_ids=[1, 3, 4, 7],
        **sizes,
    )
    return as_if_loaded(DeformableDetrForObjectDetection(config))


def make_pair(family: str) -> tuple[PreTrainedModel, PreTrainedModel, BaseImageProcessor]:
    """Student, wider teacher and image processor."""
    if family == "deformable_detr":
        images = DeformableDetrImageProcessor(size={"height": SIZE, "width": SIZE})
        return make_deformable_detr(2), make_deformable_detr(1, d_model=64), images
    (kind,) = (kind for kind in DETECTORS if kind.model_type == f"crosskd_{family}")
    return make_detector(2, kind=kind), make_detector(1, 12, kind), processor()


def make_trainer(
    folder: Path,
    teacher: bool | PreTrainedModel | str = True,
    augment: bool = False,
    family: str = "gfl",
    **changes: Any,
) -> CrossKDTrainer:
    """A trainer of a tiny student, with a wider teacher unless `teacher` is False. Makes the data if there are none."""
    if not (folder / "annotations").is_dir():
        make_data(folder)
    train, val = load_data(folder)
    student, its_teacher, images = make_pair(family)
    return CrossKDTrainer(
        student,
        settings(folder, **changes),
        train.dataset,
        val.dataset,
        images,
        teacher_model=its_teacher if teacher is True else teacher or None,
        train_transform=TrainTransform() if augment else None,
    )


def equal(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    """Whether both hold the same tensors, bit by bit."""
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


def losses(trainer: CrossKDTrainer) -> list[dict[str, float]]:
    """What was logged of every update: loss parts and gradient norm."""
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [
        {name: v for name, v in entry.items() if name.startswith("loss") or "/" in name or name == "grad_norm"}
        for entry in logs
    ]


def perform(case: dict[str, Any]) -> dict[str, Any]:
    """Train and evaluate once. Returns losses, metrics and the like; the weights go to `case["weights"]`.

    Args:
        case: `folder`, `changes` to :func:`make_trainer`, and maybe `evaluate_first`, `resume` (True or a folder) and
            `weights`.
    """
    trainer = make_trainer(Path(case["folder"]), **case["changes"])
    if case.get("evaluate_first"):
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=case.get("resume"))
    metrics = trainer.evaluate()
    detections = trainer.predict(trainer.eval_dataset).predictions
    if "weights" in case:
        save_model(trainer.model, f"{case['weights']}.{trainer.args.process_index}.safetensors")
    return {
        "losses": losses(trainer),
        "metrics": {name: value for name, value in metrics.items() if "map" in name},
        "detections": {str(image): rows.tolist() for image, rows in detections.items()},
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
