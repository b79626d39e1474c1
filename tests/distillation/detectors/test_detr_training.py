"""`CrossKDTrainer` on every family of DETR-type models: width, resuming, empty batches, reloading, evaluation."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForObjectDetection, PreTrainedModel

from crosskd_hf.training.trainer import CrossKDTrainer
from tests.distillation.detr_zoo import MODELS, SIZE, build
from tests.tiny_run import load_data, losses, make_data, settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NAMES = {0: "circle", 1: "square", 2: "triangle", 3: "star"}
PROCESSORS = {"detr": "Detr", "conditional_detr": "ConditionalDetr", "dab-detr": "ConditionalDetr"}
PROCESSORS |= dict.fromkeys(("rt_detr", "rt_detr_v2", "d_fine", "deimv2"), "RTDetr")


def width(name: str, channels: int) -> dict[str, Any]:
    """The settings that make memory and decoder `channels` wide."""
    if name == "dab-detr":
        return {"hidden_size": channels}
    if MODELS[name][1].get("encoder_hidden_dim"):
        return {"d_model": channels, "encoder_hidden_dim": channels, "decoder_in_channels": [channels] * 3}
    return {"d_model": channels}


def make_student(name: str) -> PreTrainedModel:
    # 64 channels: with one channel a group, GroupNorm refuses the 1x1 level of a single image
    channels = width(name, 64) if "deformable" in name else {}
    model = build(name, seed=2, num_labels=len(NAMES), **channels)
    model.config.id2label, model.config.label2id = dict(NAMES), {label: index for index, label in NAMES.items()}
    return model


def make_trainer(name: str, student: PreTrainedModel, folder: Path, **changes: Any) -> CrossKDTrainer:
    train, val = load_data(folder)
    kind = PROCESSORS.get(name, "DeformableDetr")
    processor = getattr(transformers, f"{kind}ImageProcessor")(size={"height": SIZE, "width": SIZE})
    options = {"schedule": None, "learning_rate": 1e-4, "max_grad_norm": 0.1, "methods": ["crosskd"], **changes}
    teacher = build(name, seed=1, **width(name, 128 if "deformable" in name else 64))
    return CrossKDTrainer(
        student, settings(folder, **options), train.dataset, val.dataset, processor, teacher_model=teacher
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shapes")
    make_data(path, empty=(0, 1, 2, 3))  # the first batch of four images has no object
    return path


@pytest.mark.parametrize("name", MODELS)
def test_a_narrower_student_trains_resumes_and_reloads(name: str, folder: Path) -> None:
    shutil.rmtree(folder / "run", ignore_errors=True)
    student = make_student(name)
    again = copy.deepcopy(student)
    assert "category_ids" not in student.config.to_dict()  # as of a model that was trained elsewhere
    torch.manual_seed(0)
    trainer = make_trainer(name, student, folder, save_strategy="steps", save_steps=2)
    trainer.train()
    assert len(losses(trainer)) == 4
    assert 0 <= trainer.evaluate()["eval_map"] <= 1

    checkpoint = folder / "run" / "checkpoint-2"
    assert (checkpoint / "distiller.safetensors").is_file()
    torch.manual_seed(0)
    resumed = make_trainer(name, again, folder)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed)[-2:] == losses(trainer)[-2:]
    for key, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[key]), key

    trainer.save_model(str(folder / "final"))
    plain, loading = AutoModelForObjectDetection.from_pretrained(folder / "final", output_loading_info=True)
    assert not any(loading.values())
    for key, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[key]), key
