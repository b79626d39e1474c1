"""Resuming with other batches, data, order or optimiser; and `auto_find_batch_size`."""

from __future__ import annotations

import inspect
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import find_executable_batch_size
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from crosskd_hf.training import checkpoints, resumption
from crosskd_hf.training.guard import image_ids
from crosskd_hf.training.trainer import CrossKDTrainer
from tests.tiny_run import equal, load_data, losses, make_trainer

STEPS = {"save_strategy": "steps", "save_steps": 1}


class Watch(TrainerCallback):
    """Notes the images of every update, and the learning rates."""

    def __init__(self, trainer: CrossKDTrainer) -> None:
        self.images: list[list[int]] = [[]]
        self.rates: list[list[float]] = []
        compute_loss = trainer.compute_loss

        def watched(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.images[-1] += image_ids(inputs)
            return compute_loss(model, inputs, *args, **kwargs)

        trainer.compute_loss = watched
        trainer.add_callback(self)

    def on_pre_optimizer_step(self, *_: Any, optimizer: torch.optim.Optimizer, **__: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.images.append([])


def run_in(folder: Path, output: Path, **changes: Any) -> CrossKDTrainer:
    base = {"output_dir": str(output), "methods": ["crosskd"], "max_steps": 4, "per_device_train_batch_size": 2}
    return make_trainer(folder, **(base | STEPS | {"train_sampling_strategy": "random"} | changes))


def without_last(output: Path, number: int) -> None:
    shutil.rmtree(output / f"checkpoint-{number}")


# ---- Files ----


@pytest.fixture(scope="module")
def two_updates(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with the checkpoints of two updates."""
    output = tmp_path_factory.mktemp("run")
    run_in(folder, output, max_steps=2).train()
    return output


FILES = ("run.json", "training_args.json", "distillation.json", "trainer_state.json", "distiller.safetensors")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"", b"[1, 2]", bytes(range(128, 192))])
def test_a_file_that_the_manifest_does_not_list_and_that_is_damaged(
    two_updates: Path, folder: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    """Such as one that somebody edited: each was an error of its reader."""
    shutil.copytree(two_updates, tmp_path, dirs_exist_ok=True)
    checkpoint = tmp_path / "checkpoint-2"
    manifest = json.loads((checkpoint / checkpoints.MANIFEST).read_text())
    del manifest["files"][name]
    (checkpoint / checkpoints.MANIFEST).write_text(json.dumps(manifest))
    (checkpoint / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} can't be read \(.*resume from an earlier checkpoint"):
        run_in(folder, tmp_path).train(resume_from_checkpoint=True)
    if name.startswith("train"):
        (checkpoint / name).unlink()
        with pytest.raises(ValueError, match=rf"checkpoint-2 lacks {name}: resume from an earlier checkpoint"):
            run_in(folder, tmp_path).train(resume_from_checkpoint=True)


def test_other_words_for_a_checkpoint(two_updates: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(two_updates, tmp_path, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"is no checkpoint, it holds checkpoint-1, checkpoint-2: .* such as .*-2\."):
        run_in(folder, tmp_path).train(resume_from_checkpoint=str(tmp_path))
    with pytest.raises(ValueError, match="no complete checkpoint of CrossKDTrainer: there is no such folder"):
        run_in(folder, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    trainer = run_in(folder, tmp_path, max_steps=3)
    trainer.train(resume_from_checkpoint="true")
    assert trainer._resumed == tmp_path / "checkpoint-2"


def test_what_else_is_changed_is_told(
    two_updates: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Augmentation, size of images, precision and length of the run; the run goes on."""
    shutil.copytree(two_updates, tmp_path, dirs_exist_ok=True)
    trainer = run_in(folder, tmp_path, max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2  # `Trainer` made one update more
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    assert equal(trainer.model.state_dict(), load_file(tmp_path / "checkpoint-2/model.safetensors"))
    assert "goes on with other settings" not in caplog.text
    assert "checkpoint-2 is of update 2, and the run has 2: nothing is left to train" in caplog.text
    caplog.clear()
    changed = run_in(folder, tmp_path, max_steps=3, augment=True, max_grad_norm=1.0)
    changed.processing_class.score_threshold = 0.1
    changed.train(resume_from_checkpoint=True)
    assert changed.state.global_step == 3
    told = next(record.message for record in caplog.records if "goes on with other settings" in record.message)
    for words in (
        "image processor: score_threshold 0.0 -> 0.1",
        "augmentation: class None -> TrainTransform",
        "max_steps: 2 -> 3",
        "max_grad_norm: 35.0 -> 1.0",
    ):
        assert words in told
    assert str(tmp_path) not in (tmp_path / "checkpoint-3/run.json").read_text()


# ---- Batches ----


def test_another_way_to_the_same_update_goes_on_as_if_uninterrupted(folder: Path, tmp_path: Path) -> None:
    """2 images at once become 1 and 1: rates, images and losses are those of the uninterrupted run."""
    whole = run_in(folder, tmp_path)
    seen = Watch(whole)
    whole.train()
    for number in (4, 3):
        without_last(tmp_path, number)
    again = run_in(folder, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    seen_again = Watch(again)
    again.train(resume_from_checkpoint=True)
    assert seen_again.images[:2] == seen.images[2:4]
    assert seen_again.rates == seen.rates[2:]
    for ours, theirs in zip(losses(again)[2:], losses(whole)[2:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_a_resumed_epoch_has_its_own_order(folder: Path, tmp_path: Path) -> None:
    """The second epoch goes on with the images that it had left."""
    whole = run_in(folder, tmp_path, max_steps=6)
    seen = Watch(whole)
    whole.train()
    without_last(tmp_path, 6)
    again = run_in(folder, tmp_path, max_steps=6)
    seen_again = Watch(again)
    again.train(resume_from_checkpoint=True)
    assert seen_again.images[:1] == seen.images[5:6]
    assert seen.images[4:6] != seen.images[:2]


def test_every_epoch_has_its_own_augmentation(folder: Path, tmp_path: Path) -> None:
    """The same batch of seven images twice: some are turned round in one epoch only."""
    changes = {"per_device_train_batch_size": 7, "max_steps": 2, "train_sampling_strategy": "sequential"}
    trainer = run_in(folder, tmp_path, augment=True, **changes)
    batches: list[Tensor] = []
    compute_loss = trainer.compute_loss

    def watched(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        batches.append(inputs["pixel_values"])
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = watched
    trainer.train()
    first, second = batches
    turned = [(image, other) for image, other in zip(first, second, strict=True) if not torch.equal(image, other)]
    assert 0 < len(turned) < 7
    assert all(torch.equal(image.flip(-1), other) for image, other in turned)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_device_train_batch_size": 1}, "images an update: 2 -> 1"),
        ({"gradient_accumulation_steps": 3}, "images an update: 2 -> 6"),
        ({"seed": 7}, "seed: 42 -> 7"),
        ({"data_seed": 8}, "seed: 42 -> 8"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy: random -> sequential"),
        ({"group_by_aspect_ratio": True}, "group_by_aspect_ratio: False -> True"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last: False -> True"),
        ({"schedule": None}, "optimizer: SGD -> AdamW"),
        ({"backbone_lr": 1e-4}, r"parameters: \[\d+, \d+\] -> \[\d+, \d+, \d+\]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    run_in(folder, tmp_path, max_steps=1).train()
    with pytest.raises(ValueError, match=message):
        run_in(folder, tmp_path, **changes).train(resume_from_checkpoint=True)


def test_epochs_that_leave_out_images_must_leave_out_the_same(folder: Path, tmp_path: Path) -> None:
    run_in(folder, tmp_path, max_steps=1, dataloader_drop_last=True).train()
    changes = {"dataloader_drop_last": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    with pytest.raises(ValueError, match="images at once: 2 -> 1"):
        run_in(folder, tmp_path, **changes).train(resume_from_checkpoint=True)


def test_a_new_epoch_may_have_another_order(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_in(folder, tmp_path, max_steps=1).train()
    trainer = run_in(folder, tmp_path, seed=7, ignore_data_skip=True, max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    assert "seed: 42 -> 7" in caplog.text


def test_older_checkpoints_are_gone_on_from(folder: Path, tmp_path: Path) -> None:
    run_in(folder, tmp_path, max_steps=1).train()
    (tmp_path / "checkpoint-1" / resumption.FILE).unlink()
    checkpoints.write_manifest(tmp_path / "checkpoint-1")
    trainer = run_in(folder, tmp_path, max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2


# ---- Data ----


def altered(dataset: Dataset, kind: str) -> Dataset:
    """The same data set with one difference."""
    if kind == "fewer":
        return dataset.select(range(5))
    if kind == "turned round":
        return dataset.select(range(6, -1, -1))

    def change(example: dict[str, Any], index: int) -> dict[str, Any]:
        objects = dict(example["objects"])
        if index == 0 and kind == "a box":
            objects["bbox"] = [[x, y, w, h + 1] for x, y, w, h in objects["bbox"]]
        if index == 0 and kind == "a class":
            objects["category"] = [(label + 1) % 4 for label in objects["category"]]
        return {"objects": objects}

    return dataset.map(change, with_indices=True, features=dataset.features)


@pytest.mark.parametrize("kind", ["fewer", "turned round", "a box", "a class"])
def test_other_data_are_refused(folder: Path, tmp_path: Path, kind: str) -> None:
    run_in(folder, tmp_path, max_steps=1).train()
    trainer = run_in(folder, tmp_path)
    trainer.train_dataset = altered(trainer.train_dataset, kind)
    with pytest.raises(ValueError, match=f"training data: 7 images -> {5 if kind == 'fewer' else 'others, 7'}"):
        trainer.train(resume_from_checkpoint=True)


def test_the_same_data_are_known_however_they_lie(folder: Path, tmp_path: Path) -> None:
    """Read again, moved, or put together of parts."""
    data = load_data(folder)[0].dataset
    shutil.copytree(folder, tmp_path / "moved")
    moved = load_data(tmp_path / "moved")[0].dataset
    turned = data.select(range(6, -1, -1)).select(range(6, -1, -1))
    digests = {json.dumps(resumption.describe_data(each)) for each in (data, moved, turned, data.flatten_indices())}
    assert len(digests) == 1
    assert resumption.describe_data([1, 2]) == {"images": 2}
    assert resumption.describe_data(iter([1])) == {"images": None}


def test_data_of_another_schema_are_known_too() -> None:
    """Names as ids, objects one by one, missing values: of a data set for a collator of one's own."""

    def data(box: float) -> Dataset:
        objects = [[{"bbox": [box, 0.0, 1.0, None], "label": "cat"}], []]
        return Dataset.from_dict({"image_id": ["a", "b"], "objects": objects, "width": [3, None]})

    digests = [resumption.describe_data(data(box))["sha256"] for box in (0.5, 0.5, 0.75)]
    assert digests[0] == digests[1] != digests[2]


# ---- Optimiser ----


def test_weights_alone_are_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    run_in(folder, tmp_path, max_steps=1, save_only_model=True).train()
    with pytest.raises(ValueError, match=r"weights only, for it lacks optimizer.pt and scheduler.pt"):
        run_in(folder, tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="weights only"):
        run_in(folder, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("schedule", ["1x", None])
def test_a_new_learning_rate_is_taken_and_told(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, schedule: str | None
) -> None:
    changes = {"schedule": schedule, "max_steps": 6, "learning_rate": 0.02}
    whole = run_in(folder, tmp_path, **changes)
    seen = Watch(whole)
    whole.train()
    for number in (3, 4, 5, 6):
        without_last(tmp_path, number)
    again = run_in(folder, tmp_path, **changes | {"learning_rate": 0.01, "weight_decay": 0.25})
    seen_again = Watch(again)
    again.train(resume_from_checkpoint=True)
    assert torch.allclose(torch.tensor(seen_again.rates), torch.tensor(seen.rates[2:]) / 2, rtol=1e-6)
    assert again.state.log_history[2]["learning_rate"] == pytest.approx(seen.rates[2][0] / 2)
    assert {group["weight_decay"] for group in again.optimizer.param_groups} <= {0.0, 0.25}
    fresh = run_in(folder, tmp_path / "fresh", **changes | {"learning_rate": 0.01})
    fresh.create_optimizer_and_scheduler(6)
    initial = [[group["initial_lr"] for group in trainer.optimizer.param_groups] for trainer in (again, fresh)]
    assert initial[0] == initial[1]
    assert "goes on with other settings" in caplog.text
    assert "weight_decay: " in caplog.text


# ---- Callbacks ----


class Counter(TrainerCallback, ExportableState):
    """A callback of a user's own with something to remember."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.count += 1

    def state(self) -> dict[str, Any]:
        return {"args": {"count": self.count}, "attributes": {}}


def counts(trainer: CrossKDTrainer) -> list[int]:
    return [callback.count for callback in trainer.callback_handler.callbacks if isinstance(callback, Counter)]


def test_callbacks_go_on_where_they_were(folder: Path, tmp_path: Path) -> None:
    first = run_in(folder, tmp_path, max_steps=2)
    for callback in (Counter(), Counter(10)):
        first.add_callback(callback)
    first.train()
    again = run_in(folder, tmp_path, max_steps=3)
    for callback in (Counter(), Counter(), EarlyStoppingCallback(5)):  # the last one is new
        again.add_callback(callback)
    again.args.metric_for_best_model, again.args.eval_strategy = "eval_map", "steps"
    again.train(resume_from_checkpoint=True)
    assert counts(first) == [2, 12]
    assert counts(again) == [3, 13]
    state = json.loads((tmp_path / "checkpoint-3/trainer_state.json").read_text())["stateful_callbacks"]
    assert [entry["args"]["count"] for entry in state["Counter"]] == [3, 13]
    assert "EarlyStoppingCallback" in state


def test_patience_needs_a_best_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="patience=3 needs load_best_model_at_end=True"):
        run_in(folder, tmp_path, teacher=False, patience=3)


def test_early_stopping_remembers_its_patience(folder: Path, tmp_path: Path) -> None:
    changes = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0, "load_best_model_at_end": True}
    first = run_in(folder, tmp_path, teacher=False, max_steps=3, **changes)
    first.add_callback(EarlyStoppingCallback(4))
    first.train()
    again = run_in(folder, tmp_path, teacher=False, max_steps=20, **changes)
    again.add_callback(EarlyStoppingCallback(4))
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5


# ---- A batch that does not fit ----


def out_of_memory(trainer: CrossKDTrainer, most: int, from_update: int = 0) -> None:
    """Let `trainer` run out of memory with more than `most` images at once, from an update on."""
    training_step = trainer.training_step

    def limited(model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        if len(inputs["labels"]) > most and trainer.state.global_step >= from_update:
            raise RuntimeError("CUDA out of memory.")
        return training_step(model, inputs, *args)

    trainer.training_step = limited


# What accelerate tries after 4 images an update: 0.9 of them, and half of them before its release 1.4.
NEXT = 3 if "reduce_batch_size_fn" in inspect.signature(find_executable_batch_size).parameters else 2


@pytest.fixture
def found(folder: Path, tmp_path: Path) -> tuple[CrossKDTrainer, Watch]:
    """A run that began with 4 images an update and found out in its third one that fewer fit (the second has but 3)."""
    trainer = run_in(
        folder, tmp_path / "found", auto_find_batch_size=True, per_device_train_batch_size=4, ema_decay=0.9, max_steps=3
    )
    watch = Watch(trainer)
    out_of_memory(trainer, most=3, from_update=1)
    trainer.train()
    return trainer, watch


@pytest.mark.slow
def test_a_given_up_attempt_leaves_no_checkpoint(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An epoch of 7 images is 2 updates of 4, then 3 of 3 (or 4 of 2); a folder that the run did not write stays."""
    changes = {"per_device_train_batch_size": 4, "save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}
    (tmp_path / "checkpoint-1").mkdir()
    trainer = run_in(folder, tmp_path, auto_find_batch_size=True, **changes)
    out_of_memory(trainer, most=3, from_update=2)
    trainer.train()
    epoch = math.ceil(7 / NEXT)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        f"checkpoint-{n}" for n in (1, epoch, 2 * epoch)
    ]
    assert "checkpoint-2 is removed: it belongs to the attempt that ran out of memory" in caplog.text


@pytest.mark.slow
def test_a_resumed_run_that_runs_out_of_memory_keeps_what_it_has_saved(folder: Path, tmp_path: Path) -> None:
    """It can't go on with fewer images an update, but with the same ones, once there is memory."""
    run_in(folder, tmp_path, max_steps=1).train()
    trainer = run_in(folder, tmp_path, auto_find_batch_size=True)
    out_of_memory(trainer, most=1, from_update=2)
    with pytest.raises(ValueError, match="images an update: 2 -> 1"):
        trainer.train(resume_from_checkpoint=True)
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]


def test_a_smaller_batch_is_the_run_of_that_batch(
    folder: Path, tmp_path: Path, found: tuple[CrossKDTrainer, Watch]
) -> None:
    """Rates, weights and average, as if it had been chosen from the start."""
    trainer, watch = found
    plain = run_in(folder, tmp_path / "plain", per_device_train_batch_size=NEXT, ema_decay=0.9, max_steps=3)
    expected = Watch(plain)
    plain.train()
    assert watch.rates[0][0] == pytest.approx(0.05 * 4 / 16)
    assert watch.rates[2:] == expected.rates
    assert watch.rates[2][0] == pytest.approx(0.05 * NEXT / 16)
    assert losses(trainer) == losses(plain)
    state, other = trainer.model.state_dict(), plain.model.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in other)
    assert all(map(torch.equal, trainer.distiller.parameters(), plain.distiller.parameters()))


def test_a_found_batch_is_gone_on_with(folder: Path, tmp_path: Path, found: tuple[CrossKDTrainer, Watch]) -> None:
    trainer, watch = found
    without_last(tmp_path / "found", 3)
    changes = {"auto_find_batch_size": True, "per_device_train_batch_size": 4, "ema_decay": 0.9, "max_steps": 3}
    again = run_in(folder, tmp_path / "found", **changes)
    seen = Watch(again)
    again.train(resume_from_checkpoint=True)
    assert losses(again) == losses(trainer)
    assert seen.rates == watch.rates[4:]
    for number in (3, 2):
        without_last(tmp_path / "found", number)
    smaller = run_in(folder, tmp_path / "found", **changes)
    out_of_memory(smaller, most=NEXT - 1)
    with pytest.raises(ValueError, match=f"images an update: {NEXT} -> {NEXT - 1}"):
        smaller.train(resume_from_checkpoint=True)
