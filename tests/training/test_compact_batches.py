"""What the trainer's loaders carry, and what student and teacher see of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from crosskd_hf.data import DetectionCollator
from crosskd_hf.distillation.passes import Batch
from crosskd_hf.models import DetectionImageProcessor
from crosskd_hf.training.trainer import CrossKDTrainer
from tests.tiny_run import SIZE, load_data, make_detector, settings

EDGES = {"shortest_edge": SIZE, "longest_edge": 80}
BGR: dict[str, Any] = {"channel_order": "bgr", "image_mean": [0.4, 0.45, 0.5], "image_std": [1 / 255] * 3}


def make_trainer(folder: Path, tmp_path: Path, **options: Any) -> CrossKDTrainer:
    train, val = load_data(folder)
    return CrossKDTrainer(
        make_detector(2),
        settings(folder, output_dir=str(tmp_path), **options.pop("args", {})),
        train_dataset=train.dataset,
        eval_dataset=val.dataset,
        processing_class=DetectionImageProcessor(size=EDGES),
        train_transform=None,
        **options,
    )


@pytest.mark.parametrize("student_order", ["rgb", "bgr"])
def test_student_and_teacher_see_what_their_own_processors_make(
    folder: Path, tmp_path: Path, student_order: str
) -> None:
    own = DetectionImageProcessor(size=EDGES, **(BGR if student_order == "bgr" else {}))
    other = DetectionImageProcessor(size=EDGES, **({} if student_order == "bgr" else BGR))
    train, _ = load_data(folder)
    trainer = CrossKDTrainer(
        make_detector(2),
        settings(folder, output_dir=str(tmp_path)),
        teacher_model=make_detector(1),
        train_dataset=train.dataset,
        processing_class=own,
        teacher_processing_class=other,
        train_transform=None,
    )
    raw = next(iter(trainer.get_train_dataloader()))
    assert raw["pixel_values"].dtype == torch.uint8
    assert raw["pixel_mask"].dtype == torch.bool
    batch = trainer._prepare_inputs(raw)
    rows = {row: number for number, row in enumerate(train.dataset["image_id"])}
    examples = [train.dataset[rows[int(label["image_id"])]] for label in raw["labels"]]
    for processor, seen in ((own, batch["pixel_values"]), (other, _seen_by_teacher(trainer, batch))):
        expected = DetectionCollator(processor)(examples)["pixel_values"]
        atol = 1e-6 * expected.abs().max().item()
        torch.testing.assert_close(seen, expected, rtol=0, atol=max(atol, 2e-6))


def _seen_by_teacher(trainer: CrossKDTrainer, batch: dict[str, Any]) -> torch.Tensor:
    assert trainer.distiller is not None
    seen = Batch(batch["pixel_values"], batch["pixel_mask"], batch["labels"], 0)
    return trainer.distiller.pair.teacher.own_pixels(seen)


def test_a_users_own_collator_of_floats_trains_alike(folder: Path, tmp_path: Path) -> None:
    collator = DetectionCollator(DetectionImageProcessor(size=EDGES))
    losses = []
    for name, options in (("own", {"data_collator": collator}), ("compact", {})):
        trainer = make_trainer(folder, tmp_path / name, args={"max_steps": 2}, **options)
        losses.append(trainer.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_raw_batch_is_refused_by_the_model_and_taken_by_compute_loss(folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(folder, tmp_path)
    raw = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(ValueError, match="pixel_values are uint8"):
        trainer.model(raw["pixel_values"], raw["pixel_mask"])
    loss = trainer.compute_loss(trainer.model, raw)
    assert torch.equal(loss, trainer.compute_loss(trainer.model, trainer._prepare_inputs(raw)))


def test_a_collator_that_takes_the_place_of_the_trainers(folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(folder, tmp_path)
    before, called = trainer.data_collator, []

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        called.append(len(examples))
        return before(examples)

    trainer.data_collator = collate
    batch = next(iter(trainer.get_train_dataloader()))
    assert called
    assert batch["pixel_values"].dtype == torch.float32
