"""A DETR-type checkpoint that a user gave a new head as transformers does it: distilled, saved, loaded, resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForObjectDetection, DeformableDetrImageProcessor, DetrImageProcessor

from crosskd_hf.training.trainer import CrossKDTrainer
from tests.distillation import detr_zoo
from tests.tiny_run import SIZE, load_data, settings

NAMES = ("circle", "square", "triangle", "star")
FAMILIES = [name for name in detr_zoo.MODELS if " " not in name]
QUICK = {"deformable_detr", "detr"}


def checkpoint(folder: Path, family: str, seed: int, processor: Any) -> Path:
    """A saved model of 80 classes; two of them are in the data, in other places and capitals."""
    levels = {"num_feature_levels": 3} if family == "deformable_detr" else {}  # a fourth one would be of one pixel
    model = detr_zoo.build(family, seed, num_labels=80, **levels)
    names = {i: f"class {i}" for i in range(80)} | {7: "Circle", 50: "star"}
    model.config.id2label, model.config.label2id = names, {name: i for i, name in names.items()}
    model.save_pretrained(folder / f"{seed}")
    processor.save_pretrained(folder / f"{seed}")
    return folder / f"{seed}"


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_a_checkpoint_with_a_new_head(family: str, named: bool, folder: Path, tmp_path: Path) -> None:
    train, val = load_data(folder)
    kind = DetrImageProcessor if family == "detr" else DeformableDetrImageProcessor
    images = kind(size={"height": SIZE, "width": SIZE})
    source, teacher = (checkpoint(tmp_path, family, seed, images) for seed in (1, 2))
    head: dict[str, Any] = {"num_labels": 4}
    if named:
        head = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}

    def make() -> CrossKDTrainer:
        torch.manual_seed(0)  # of the head
        model = AutoModelForObjectDetection.from_pretrained(source, **head, ignore_mismatched_sizes=True)
        options = {"methods": ["crosskd"], "schedule": None, "learning_rate": 1e-4, "max_steps": 2, "ema_decay": 0.9}
        args = settings(tmp_path, **options, save_strategy="steps", save_steps=1)
        return CrossKDTrainer(model, args, train.dataset, val.dataset, images, teacher_model=teacher)

    trainer = make()
    trainer.train()
    assert trainer.distiller is not None
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    kd = [[value for name, value in entry.items() if "kd" in name] for entry in logs]
    assert len(kd) == 2
    assert all(values and min(values) > 0 for values in kd)
    assert "eval_map_circle" in trainer.evaluate()
    trainer.save_model()

    again = AutoModelForObjectDetection.from_pretrained(tmp_path / "run")
    assert again.config.id2label == dict(enumerate(NAMES))
    batch = {key: detr_zoo.batch()[key] for key in ("pixel_values", "pixel_mask")}
    with torch.no_grad():
        outputs = [model.eval()(**batch).logits for model in (trainer.model, again)]
    assert torch.equal(*outputs)
    assert outputs[0].shape[-1] == 4 + (family == "detr")

    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    for one, two in zip(trainer.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=1e-6)
