"""`CrossKDTrainer` on TOOD: it is told the epochs, it learns, and it is distilled in both directions."""

from pathlib import Path

import pytest
import torch

from crosskd_hf.distillation import CrossKD
from crosskd_hf.models import GFLConfig, TOODConfig
from crosskd_hf.training.trainer import CrossKDTrainer
from tests import tiny_run
from tests.saved_models import same_state


def make_trainer(folder: Path, student: object, teacher: object = None, **changes: object) -> CrossKDTrainer:
    train, val = tiny_run.load_data(folder)
    settings = tiny_run.settings(folder, learning_rate=0.002, **changes)
    return CrossKDTrainer(student, settings, train.dataset, val.dataset, tiny_run.processor(), teacher_model=teacher)


def make_tood(seed: int = 2, width: int = 8, **changes: object) -> object:
    return tiny_run.make_detector(seed, width, TOODConfig, **changes)


@pytest.mark.slow
def test_the_trainer_tells_the_epochs_and_a_resumed_run_knows_them(folder: Path, tmp_path: Path) -> None:
    """Two updates an epoch: labels are static in the first epoch, and in no other."""
    student, seen = make_tood(static_epochs=1), []
    student.register_forward_pre_hook(lambda model, _: seen.append(model.head.static))
    trainer = make_trainer(folder, student, output_dir=str(tmp_path), save_strategy="steps", save_steps=1, max_steps=4)
    trainer.train()
    assert seen == [True, True, False, False]
    for step in (1, 3):
        again = make_trainer(folder, make_tood(seed=7, static_epochs=1), output_dir=str(tmp_path), max_steps=4)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert same_state(again.model, trainer.model)


@pytest.mark.parametrize(
    ("pair", "static_epochs", "cut"),
    [("gfl->tood", 0, 3), ("gfl->tood", 4, 0), ("tood->gfl", 0, 3), ("tood->gfl", 0, 0), ("tood->tood", 4, 3)],
)
def test_distilled_in_both_directions(pair: str, static_epochs: int, cut: int, folder: Path) -> None:
    """The first update checks that the losses reach the student in front of the cut and nothing behind it."""
    teacher_name, student_name = pair.split("->")
    kinds = {"gfl": (GFLConfig, {}), "tood": (TOODConfig, {"static_epochs": static_epochs})}
    teacher, student = (
        tiny_run.make_detector(seed, width, kinds[name][0], **kinds[name][1])
        for seed, width, name in ((1, 12, teacher_name), (2, 8, student_name))
    )
    before = student.head.convs[0].conv.weight.clone() if student_name == "tood" else None
    trainer = make_trainer(folder, student, teacher, methods=[CrossKD(cut=cut)], max_steps=2)
    trainer.train()
    logged = tiny_run.losses(trainer)
    assert [update["crosskd/cls"] > 0 and update["crosskd/reg"] > 0 for update in logged] == [True, True]
    if before is not None:
        assert not torch.equal(student.head.convs[0].conv.weight, before)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_learns_the_shapes(folder: Path) -> None:
    """Static labels first, then aligned ones: the detector finds the images that it was trained on."""
    student = make_tood(3, 16, static_epochs=10, frozen_stages=0, norm_eval=False)
    settings = {"schedule": None, "optim": "adamw_torch", "lr_scheduler_type": "cosine", "max_steps": 120}
    trainer = make_trainer(folder, student, **settings)
    trainer.train()
    first, last = tiny_run.losses(trainer)[0]["loss"], tiny_run.losses(trainer)[-1]["loss"]
    assert last < 0.5 * first
    assert trainer.evaluate(trainer.train_dataset)["eval_map_50"] > 0.1
