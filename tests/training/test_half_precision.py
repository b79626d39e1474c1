"""Students and teachers that are stored in bfloat16 or float16: trained and run in float32, saved in their own type."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForObjectDetection, PreTrainedModel

from crosskd_hf.experiments.check_pair import check_pair
from crosskd_hf.inference.detection import detect
from crosskd_hf.inference.precision import widen
from crosskd_hf.training.ema import WeightAverage
from crosskd_hf.training.saving import AVERAGED_WEIGHTS, TRAINING_WEIGHTS
from crosskd_hf.training.trainer import CrossKDTrainer
from tests.tiny_run import equal, load_data, losses, make_pair, settings

HALF = [torch.bfloat16, torch.float16]
OTHERS = ("retinanet", "fcos", "atss", "faster_rcnn", "deformable_detr")
FAMILIES = ["gfl", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]


def trainer_of(
    folder: Path,
    output_dir: Path,
    student: torch.dtype = torch.float32,
    teacher: torch.dtype | str | None = None,
    family: str = "gfl",
    **changes: Any,
) -> CrossKDTrainer:
    """A trainer whose weights were rounded to bfloat16 once, and are stored in the given types.

    Args:
        student: Its type.
        teacher: Its type, or the folder that it is saved in; None for no teacher.
        family, changes: As of `tests.tiny_run.make_trainer`.
    """
    train, val = load_data(folder)
    model, its_teacher, images = make_pair(family)
    for part in (model, its_teacher):
        part.to(torch.bfloat16).float()
    changes = {"methods": ["crosskd"], "output_dir": str(output_dir), **changes}
    given = its_teacher.to(teacher) if isinstance(teacher, torch.dtype) else teacher
    args = settings(folder, **changes)
    return CrossKDTrainer(model.to(student), args, train.dataset, val.dataset, images, teacher_model=given)


def floats(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def types(model: PreTrainedModel) -> set[torch.dtype]:
    return {tensor.dtype for tensor in floats(model.state_dict()).values()}


# ---- Student ----


@pytest.mark.parametrize("family", FAMILIES)
def test_a_half_student_trains_as_one_in_float32(folder: Path, tmp_path: Path, family: str) -> None:
    half = trainer_of(folder, tmp_path / "half", torch.bfloat16, family=family, max_steps=2)
    wide = trainer_of(folder, tmp_path / "wide", family=family, max_steps=2)
    for trainer in (half, wide):
        trainer.train()
    assert losses(half) == losses(wide)
    assert types(half.model) == {torch.float32}
    assert equal(half.model.state_dict(), wide.model.state_dict())


@pytest.mark.parametrize(
    ("family", "dtype"), [("gfl", torch.bfloat16), ("gfl", torch.float16), ("deformable_detr", torch.bfloat16)]
)
def test_a_half_student_is_saved_in_its_type(folder: Path, tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    changes = {"family": family, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(folder, tmp_path, dtype, torch.float32, **changes)
    trainer.train()
    trainer.save_model()
    trained = floats(trainer.model.state_dict())
    for saved in (tmp_path, tmp_path / "checkpoint-1"):
        assert {tensor.dtype for tensor in floats(load_file(saved / "model.safetensors")).values()} == {dtype}
        assert json.loads((saved / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
        loaded = AutoModelForObjectDetection.from_pretrained(saved)
        assert types(loaded) == {dtype}
        assert equal(floats(loaded.state_dict()), {name: tensor.to(dtype) for name, tensor in trained.items()})
    assert types(trainer.model) == {torch.float32}


def test_a_student_of_mixed_types_keeps_them(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(folder, tmp_path, max_steps=1)
    trainer.model.backbone.to(torch.bfloat16)
    before = {name: tensor.dtype for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    trainer.save_model()
    assert {name: tensor.dtype for name, tensor in load_file(tmp_path / "model.safetensors").items()} == before


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_half_student_resumes_as_if_uninterrupted(folder: Path, tmp_path: Path, ema_decay: float | None) -> None:
    """`model.safetensors` is rounded; the float32 weights lie beside it."""
    changes = {"ema_decay": ema_decay, "save_steps": 1, "save_strategy": "steps", "max_steps": 2}
    whole = trainer_of(folder, tmp_path, torch.bfloat16, torch.float32, **changes)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-2")
    names = {path.name for path in (tmp_path / "checkpoint-1").glob("*_weights.safetensors")}
    assert names == {TRAINING_WEIGHTS} | ({AVERAGED_WEIGHTS} if ema_decay else set())
    again = trainer_of(folder, tmp_path, torch.bfloat16, torch.float32, **changes)
    again.train(resume_from_checkpoint=True)
    assert losses(again) == losses(whole)
    assert equal(again.model.state_dict(), whole.model.state_dict())


def test_the_average_of_half_weights_is_float32() -> None:
    """Steps of a hundredth of a rounding add up."""
    model = torch.nn.Linear(1, 1).to(torch.bfloat16)
    torch.nn.init.ones_(model.weight)
    average = WeightAverage(model, 0.9999, updates=10**6)
    torch.nn.init.constant_(model.weight, 1.5)
    for _ in range(1000):
        average.update(model)
    wide = torch.nn.Linear(1, 1)
    average.copy_to(wide)
    assert wide.weight.item() == pytest.approx(1.5 - 0.5 * 0.9999**1000, rel=1e-4)
    with average.swapped(model):
        assert model.weight.item() == pytest.approx(1.0476, rel=1 / 256)
    assert model.weight.item() == 1.5
    average.copy_to(wide)
    assert wide.weight.item() == pytest.approx(1.5 - 0.5 * 0.9999**1000, rel=1e-4)


# ---- Teacher ----


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_half_teacher_teaches_as_one_in_float32(
    folder: Path, tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    _, teacher, _ = make_pair(family)
    teacher.to(torch.bfloat16).to(dtype).save_pretrained(tmp_path / "teacher")
    teachers = {"given": dtype, "loaded": str(tmp_path / "teacher"), "wide": torch.float32}
    trainers = {
        name: trainer_of(folder, tmp_path / name, teacher=given, family=family, max_steps=1)
        for name, given in teachers.items()
    }
    for trainer in trainers.values():
        trainer.train()
    ((given,), (loaded,), (wide,)) = (losses(trainer) for trainer in trainers.values())
    assert given == pytest.approx(wide, rel=1e-4, abs=1e-6)  # float16 rounds the smallest bfloat16 weights
    assert loaded == given


# ---- Evaluation ----


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_half_student_evaluates_as_in_float32(folder: Path, tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    half, wide = (trainer_of(folder, tmp_path, type_, family=family) for type_ in (dtype, dtype))
    widen(wide.model)
    before = copy.deepcopy(half.model.state_dict())
    got, expected = half.evaluate(), wide.evaluate()
    assert {k: v for k, v in got.items() if "map" in k} == pytest.approx(
        {k: v for k, v in expected.items() if "map" in k}, nan_ok=True
    )
    assert equal(half.model.state_dict(), before)


@pytest.mark.parametrize(
    ("family", "option"), [("gfl", "bf16_full_eval"), ("gfl", "fp16_full_eval"), ("deformable_detr", "bf16_full_eval")]
)
def test_evaluation_in_half_precision_rounds_no_trained_weight(
    folder: Path, tmp_path: Path, family: str, option: str
) -> None:
    plain = trainer_of(folder, tmp_path / "plain", family=family, max_steps=1)
    trainer = trainer_of(folder, tmp_path / "half", family=family, max_steps=1, **{option: True})
    trainer.evaluate()
    for part in (plain, trainer):
        part.train()
    assert losses(trainer) == losses(plain)
    metrics = trainer.evaluate()
    assert metrics["eval_map"] == pytest.approx(plain.evaluate()["eval_map"], abs=0.05)
    assert equal(trainer.model.state_dict(), plain.model.state_dict())


def test_prediction_and_the_check_of_a_pair_take_half_models(folder: Path, tmp_path: Path) -> None:
    train, _ = load_data(folder)
    student, teacher, images = make_pair("gfl")
    student.to(torch.bfloat16)
    wide = copy.deepcopy(student).float()
    picture = Image.new("RGB", (64, 48), (200, 30, 60))
    (found,), (expected,) = (detect(model, images, [picture], 0.0) for model in (student, wide))
    assert equal(found, expected)
    report = check_pair(student, teacher.to(torch.float16), dataset=train, student_processor=images)
    assert report.ok
    assert report.cost is not None
    assert types(student) == {torch.bfloat16}
    assert types(teacher) == {torch.float16}
