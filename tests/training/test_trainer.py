"""CrossKDTrainer in one process, on tiny detectors and synthetic data."""

from __future__ import annotations

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoImageProcessor, AutoModelForObjectDetection, TrainerCallback

from crosskd_hf.data import DetectionCollator
from crosskd_hf.data.transforms import TrainTransform
from crosskd_hf.inference.coco_evaluator import CocoEvaluator
from crosskd_hf.models.losses import LossPart
from crosskd_hf.training import adapters, checkpoints, provenance
from crosskd_hf.training.config import CrossKDConfig
from crosskd_hf.training.guard import NonFiniteLossError
from crosskd_hf.training.loss_parts import UpdateSums, add_up
from crosskd_hf.training.saving import TRAINING_WEIGHTS
from crosskd_hf.training.trainer import CrossKDTrainer
from tests.tiny_run import equal, load_data, losses, make_detector, make_trainer, processor, settings

PARTS = {"loss_cls", "loss_bbox", "loss_dfl", "crosskd/cls", "crosskd/reg", "pkd/features"}
SUMMARY = {"eval_map", "eval_map_50", "eval_map_75", "eval_map_small", "eval_map_medium", "eval_map_large"}


def copied(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def run_in(folder: Path, tmp_path: Path, **changes: Any) -> CrossKDTrainer:
    return make_trainer(folder, **({"output_dir": str(tmp_path / "run")} | changes))


# ---- Losses and logs ----


def test_every_part_is_logged_and_their_sum_is_the_loss(folder: Path, tmp_path: Path) -> None:
    trainer = run_in(folder, tmp_path, max_steps=2)
    trainer.train()
    for entry in losses(trainer):
        assert set(entry) == PARTS | {"loss", "grad_norm"}
        assert sum(entry[name] for name in PARTS) == pytest.approx(entry["loss"], rel=1e-4)
        assert entry["crosskd/cls"] > 0
        assert entry["pkd/features"] > 0


def test_without_a_teacher_the_student_learns_alone(folder: Path, tmp_path: Path) -> None:
    trainer = run_in(folder, tmp_path, teacher=False, max_steps=2)
    before = copied(trainer.model)
    trainer.train()
    trainer.save_model()
    assert set(losses(trainer)[0]) == {"loss", "grad_norm", "loss_cls", "loss_bbox", "loss_dfl"}
    assert not equal(before, trainer.model.state_dict())
    assert not (tmp_path / "run" / provenance.FILE).exists()


@pytest.mark.parametrize("precision", ["float32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_accumulation_is_one_big_batch(folder: Path, tmp_path: Path, precision: str) -> None:
    bf16 = precision == "bf16"
    whole = run_in(folder, tmp_path, per_device_train_batch_size=4, max_steps=2, bf16=bf16)
    changes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 2, "bf16": bf16}
    small = run_in(folder, tmp_path, **changes)
    rough = run_in(folder, tmp_path, exact_accumulation=False, **changes)
    for trainer in (whole, small, rough):
        trainer.train()
    tolerance = 0.05 if bf16 else 1e-4
    for ours, theirs in zip(losses(small), losses(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)
    assert losses(rough)[0]["loss"] != pytest.approx(losses(whole)[0]["loss"], rel=1e-3)


@pytest.mark.parametrize("exact", [True, False])
def test_accumulation_runs_the_teacher_once(folder: Path, tmp_path: Path, exact: bool) -> None:
    changes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 2}
    trainer = run_in(folder, tmp_path, exact_accumulation=exact, **changes)
    calls: list[int] = []
    trainer.distiller.teacher.backbone.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert len(calls) == 7  # images of an epoch, each of which is a micro-batch; the second update has three


@pytest.mark.slow
def test_compiled_models_train_alike(folder: Path, tmp_path: Path) -> None:
    """With the graphs of `torch.compile`, but torch's own kernels: making others takes minutes on a CPU."""
    changes = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    compiled, plain = run_in(folder, tmp_path, max_steps=2, **changes), run_in(folder, tmp_path, max_steps=2)
    torch.compiler.reset()
    counters["frames"].clear()
    compiled.train()
    assert counters["frames"]["ok"] > 0
    plain.train()
    for ours, theirs in zip(losses(compiled), losses(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    compiled.save_model()
    _, report = AutoModelForObjectDetection.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"]


def _live_statistics(norm: torch.nn.Module, inputs: Any) -> None:
    norm.train()
    torch.rand(())


def test_normalizer_pass_leaves_no_trace(folder: Path, tmp_path: Path) -> None:
    trainer = run_in(folder, tmp_path, gradient_accumulation_steps=2)
    norms = [module for module in trainer.model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms
    for norm in norms:  # live statistics and noise, which the tiny detector doesn't have by itself
        norm.register_forward_pre_hook(_live_statistics)
    before, state = copied(trainer.model), torch.get_rng_state()
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    trainer._normalizer_pass([batch, batch])
    assert equal(before, trainer.model.state_dict())
    assert torch.equal(state, torch.get_rng_state())


def test_augmentation_depends_on_image_and_epoch_alone(folder: Path, tmp_path: Path) -> None:
    trainer = run_in(folder, tmp_path, augment=True)
    examples = [trainer.train_dataset[number] for number in range(6)]
    together = trainer.data_collator(examples)["pixel_values"]
    alone = torch.cat([trainer.data_collator([example])["pixel_values"] for example in reversed(examples)]).flip(0)
    assert torch.equal(together, alone)
    trainer.data_collator.set_epoch(1)
    assert not torch.equal(together, trainer.data_collator(examples)["pixel_values"])
    assert trainer.get_eval_dataloader().collate_fn.collator.transform is None


# ---- What is saved ----


def test_a_saved_student_is_plain(folder: Path, tmp_path: Path) -> None:
    trainer = run_in(folder, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    run = tmp_path / "run"
    for saved in (run, run / "checkpoint-2"):
        student = AutoModelForObjectDetection.from_pretrained(saved)
        assert equal(student.state_dict(), trainer.model.state_dict())
        assert AutoImageProcessor.from_pretrained(saved).to_dict() == trainer.processing_class.to_dict()
        assert not any("teacher" in name or "adapter" in name for name in load_file(saved / "model.safetensors"))
        assert load_file(saved / adapters.FILE)
        content = json.loads((saved / provenance.FILE).read_text())
        assert content["teacher"]["sha256"] == provenance.weight_hash(trainer.distiller.teacher)
        assert list(content["distillation"]["methods"]) == ["crosskd", "pkd"]
        assert content["distillation"]["methods"]["crosskd"]["terms"] == {"cls": 1.0, "reg": 4.0}
        assert not (saved / "training_args.bin").exists()
    assert (run / "README.md").read_text().startswith("---\n")
    assert not list(run.glob("_*"))


def test_save_total_limit_keeps_the_best_and_the_newest(folder: Path, tmp_path: Path) -> None:
    changes = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = run_in(folder, tmp_path, save_total_limit=1, load_best_model_at_end=True, **changes)
    scores = iter([0.1, 0.3, 0.2, 0.2])
    evaluation_loop = trainer.evaluation_loop

    def scored(*args: Any, **kwargs: Any) -> Any:
        output = evaluation_loop(*args, **kwargs)
        output.metrics["eval_map"] = next(scores)
        return output

    trainer.evaluation_loop = scored
    trainer.train()
    run = tmp_path / "run"
    assert trainer.state.best_metric == 0.3
    assert equal(load_file(run / "checkpoint-2/model.safetensors"), trainer.model.state_dict())
    assert {path.name for path in checkpoints.checkpoints(run)} == {"checkpoint-2"}


# ---- Resume ----


@pytest.mark.parametrize(
    "teacher", [pytest.param(True, id="distilled"), pytest.param(False, id="baseline", marks=pytest.mark.slow)]
)
def test_resume_repeats_the_run(folder: Path, tmp_path: Path, teacher: bool) -> None:
    changes: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "save_total_limit": 2,
        "train_sampling_strategy": "random",
        "ema_decay": 0.9,
        "teacher": teacher,
        "augment": True,
    }
    whole = run_in(folder, tmp_path, **changes)
    whole.train()
    shutil.rmtree(tmp_path / "run/checkpoint-6")
    again = run_in(folder, tmp_path, **changes)
    again.train(resume_from_checkpoint=True)
    assert losses(again) == losses(whole)
    assert equal(again.model.state_dict(), whole.model.state_dict())
    if teacher:
        assert equal(again.distiller.state_dict(), whole.distiller.state_dict())


def test_resume_of_a_model_of_transformers(folder: Path, tmp_path: Path) -> None:
    """Their weights are stored under other names than the modules have."""
    changes: dict[str, Any] = {"family": "deformable_detr", "schedule": None, "backbone_lr": 1e-5, "save_steps": 2}
    changes |= {"teacher": False}
    whole = run_in(folder, tmp_path, save_strategy="steps", **changes)
    whole.train()
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    again = run_in(folder, tmp_path, **changes)
    again.train(resume_from_checkpoint=True)
    assert set(losses(whole)[0]) == {"loss", "grad_norm", "loss_ce", "loss_bbox", "loss_giou"}
    assert losses(again) == losses(whole)
    assert equal(again.model.state_dict(), whole.model.state_dict())
    assert {group["initial_lr"] for group in whole.optimizer.param_groups} == {0.05, 1e-5}


def test_another_teacher_is_refused(folder: Path, tmp_path: Path) -> None:
    run_in(folder, tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    other = run_in(folder, tmp_path, teacher=make_detector(5, width=12), max_steps=2)
    with pytest.raises(ValueError, match=r"written by a run with the teacher .* this run has a teacher with sha256"):
        other.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="this run has no teacher"):
        run_in(folder, tmp_path, teacher=False, max_steps=2).train(resume_from_checkpoint=True)


def test_other_settings_on_resume(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_in(folder, tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match="without ema_decay"):
        run_in(folder, tmp_path, max_steps=2, ema_decay=0.9).train(resume_from_checkpoint=True)
    run_in(folder, tmp_path, max_steps=2, methods=["crosskd:beta=2", "pkd"]).train(resume_from_checkpoint=True)
    assert "methods.crosskd.beta: 1.0 -> 2.0" in caplog.text


def test_incomplete_checkpoints_are_passed_over(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_in(folder, tmp_path, max_steps=3, save_strategy="steps", save_steps=1).train()
    (run / "checkpoint-3/optimizer.pt").write_bytes(b"")
    (run / "checkpoint-2").rename(run / "_saving-checkpoint-2")
    (run / "_saving-checkpoint-2" / checkpoints.MANIFEST).unlink()
    trainer = run_in(folder, tmp_path, max_steps=2)
    with pytest.raises(ValueError, match="is no complete checkpoint"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    assert checkpoints.last_checkpoint(run) == str(run / "checkpoint-1")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    assert not (run / "_saving-checkpoint-2").exists()


def test_no_checkpoint_to_resume_from(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        run_in(folder, tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "stage",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("model.safetensors", "optimizer.pt")), "manifest.json"],
)
def test_a_failed_save_loses_no_earlier_checkpoint(
    folder: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = run_in(folder, tmp_path, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    def from_second_step(original: Any) -> Any:
        return lambda *args, **kwargs: (full if trainer.state.global_step > 1 else original)(*args, **kwargs)

    place = {
        "model.safetensors": (trainer.model, "save_pretrained"),
        "optimizer.pt": (trainer, "_save_optimizer_and_scheduler"),
        "manifest.json": (checkpoints, "write_manifest"),
    }[stage]
    monkeypatch.setattr(*place, from_second_step(getattr(*place)))
    with pytest.raises(RuntimeError, match=r"update 2 could not be written .*No space left on device"):
        trainer.train()
    run = tmp_path / "run"
    assert checkpoints.last_checkpoint(run) == str(run / "checkpoint-1")
    assert not list(run.glob("_saving*"))


# ---- Averaged weights ----


def test_the_average_is_what_is_evaluated_saved_and_kept(folder: Path, tmp_path: Path) -> None:
    trainer = run_in(folder, tmp_path, max_steps=3, save_strategy="steps", save_steps=3, ema_decay=0.5)
    trainer.train()
    saved = tmp_path / "run/checkpoint-3"
    average, raw = load_file(saved / "model.safetensors"), load_file(saved / TRAINING_WEIGHTS)
    assert equal(average, trainer.model.state_dict())
    assert not equal(average, raw)
    assert trainer.ema is None


# ---- Clipping ----


class GradientNorms(TrainerCallback):
    """The norm of the clipped gradients, and of the adapters' share, at every update."""

    def __init__(self, trainer: CrossKDTrainer) -> None:
        self.trainer = trainer
        self.norms: list[tuple[float, float]] = []
        trainer.add_callback(self)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        own, adapters_ = (self.norm(module) for module in (self.trainer.model, self.trainer.distiller))
        self.norms.append((math.hypot(own, adapters_), adapters_))

    @staticmethod
    def norm(module: torch.nn.Module) -> float:
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))


@pytest.mark.parametrize("bound", [1e-3, 0.0])
def test_student_and_adapters_are_clipped_together(folder: Path, tmp_path: Path, bound: float) -> None:
    """The logged norm is that of both before clipping; 0 leaves gradients as they are."""
    trainer = run_in(folder, tmp_path, max_steps=2, max_grad_norm=bound)
    seen = GradientNorms(trainer)
    trainer.train()
    assert len(seen.norms) == 2
    for (both, of_adapters), entry in zip(seen.norms, losses(trainer), strict=True):
        assert of_adapters > 0.01 * both
        assert both == pytest.approx(bound or entry["grad_norm"], rel=1e-3)
        assert entry["grad_norm"] > 10 * 1e-3


# ---- Repeated images ----


@pytest.mark.parametrize("images", [5, 6, 7, 8])
def test_images_that_fill_up_the_last_batches_do_not_count(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: int
) -> None:
    """At the end of an epoch of two processes with batches of two, each of them simulated here.

    With 5 images the second process has none of its own; the sampler repeats the first ones.
    """
    trainer = run_in(folder, tmp_path, per_device_train_batch_size=2)
    trainer.current_gradient_accumulation_steps = 1
    trainer.train_dataset = trainer.train_dataset.select([*range(7), 0][:images])
    examples = [trainer.train_dataset[number] for number in range(images)]
    last = examples[4 * ((images - 1) // 4) :]
    expected = counted_parts(trainer, last, monkeypatch)
    monkeypatch.setattr(CrossKDConfig, "world_size", 2)
    monkeypatch.setattr(type(trainer.accelerator.gradient_state), "end_of_dataloader", True)
    filled = [*last, *examples, *examples][:4]
    spread = []
    for rank in (0, 1):
        monkeypatch.setattr(CrossKDConfig, "process_index", rank)
        spread.append(counted_parts(trainer, filled[2 * rank : 2 * rank + 2], monkeypatch))
    assert set(expected) == PARTS
    for name, part in expected.items():
        for field in ("total", "normalizer"):
            found = sum(getattr(parts[name], field).item() for parts in spread)
            assert found == pytest.approx(getattr(part, field).item(), rel=1e-4), (name, field)


def counted_parts(
    trainer: CrossKDTrainer, examples: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> dict[str, LossPart]:
    """What a process adds to the sums over all processes for an update of these examples."""
    added: list[dict[str, LossPart]] = []

    def noting(micro_batches: list[dict[str, LossPart]]) -> UpdateSums:
        added.extend(micro_batches)
        return add_up(micro_batches)

    monkeypatch.setattr("crosskd_hf.training.update_trainer.add_up", noting)
    batches, _ = trainer.get_batch_samples(iter([trainer.data_collator(examples)]), 1, trainer.args.device)
    trainer.compute_loss(trainer.model.train(), *batches)
    (parts,) = added
    return parts


# ---- Values that aren't finite ----


class Poison(DetectionCollator):
    """Puts an infinite pixel into one image."""

    def __call__(self, examples: Any) -> dict[str, Any]:
        batch = super().__call__(examples)
        for row, example in enumerate(examples):
            if example["image_id"] == 41:
                batch["pixel_values"][row, 0, 0, 0] = torch.inf
        return batch


def poisoned(folder: Path, tmp_path: Path, teacher: bool = False, **changes: Any) -> CrossKDTrainer:
    train, val = load_data(folder)
    args = settings(folder, output_dir=str(tmp_path / "run"), per_device_train_batch_size=1, max_steps=7, **changes)
    pair = make_detector(2), make_detector(1, width=12) if teacher else None
    data = train.dataset, val.dataset, processor()
    return CrossKDTrainer(pair[0], args, *data, teacher_model=pair[1], data_collator=Poison(processor()))


def test_a_part_that_is_not_finite_stops_the_run(folder: Path, tmp_path: Path) -> None:
    trainer = poisoned(folder, tmp_path)
    with pytest.raises(NonFiniteLossError, match=r"Update 5 is not finite: .*loss_cls = nan.* image ids \[41\]"):
        trainer.train()
    assert all(torch.isfinite(tensor).all() for tensor in trainer.model.state_dict().values())
    (batch,) = torch.load(tmp_path / "run/_nonfinite/step-5-rank-0.pt", weights_only=True)
    assert batch["inputs"]["labels"][0]["image_id"].item() == 41
    assert batch["losses"]["loss_cls"] != batch["losses"]["loss_cls"]


def test_a_part_that_is_not_finite_is_skipped_and_counted(folder: Path, tmp_path: Path) -> None:
    trainer = poisoned(folder, tmp_path, nonfinite="skip")
    trainer.train()
    assert trainer.state.global_step == 7
    assert all(torch.isfinite(tensor).all() for tensor in trainer.model.state_dict().values())
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry.get("skipped_updates", 0) for entry in logs] == [0, 0, 0, 0, 1, 1, 1]
    assert all(torch.isfinite(torch.tensor([entry["loss"], entry["grad_norm"]])).all() for entry in logs)


class Snapshots(TrainerCallback):
    """Student and adapters before the first update and after each."""

    def __init__(self, trainer: CrossKDTrainer) -> None:
        self.parts = (trainer.model, trainer.distiller)
        self.taken: list[tuple[dict[str, Tensor], ...]] = []
        self.take()
        trainer.add_callback(self)

    def take(self) -> None:
        self.taken.append(tuple(copied(part) for part in self.parts))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.take()


def test_a_skipped_update_moves_neither_student_nor_adapters(folder: Path, tmp_path: Path) -> None:
    trainer = poisoned(folder, tmp_path, teacher=True, nonfinite="skip")
    snapshots = Snapshots(trainer)
    trainer.train()
    assert trainer.state.log_history[-2]["skipped_updates"] == 1
    for part in (0, 1):
        states = [taken[part] for taken in snapshots.taken]
        assert states[0]
        assert all(tensor.isfinite().all() for tensor in states[-1].values())
        still = [equal(before, after) for before, after in pairwise(states)]
        assert still == [False, False, False, False, True, False, False]


def test_a_gradient_that_is_not_finite_stops_the_run(folder: Path, tmp_path: Path) -> None:
    trainer = run_in(folder, tmp_path, teacher=False)
    weight = next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
    weight.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(
        NonFiniteLossError, match=r"Update 1 .* gradient norm is nan; every part is finite, image ids \["
    ):
        trainer.train()


# ---- The first update ----


def test_a_teacher_that_changes_is_noticed(folder: Path, tmp_path: Path) -> None:
    trainer = run_in(folder, tmp_path)
    teacher = trainer.distiller.teacher

    def drift(*_: Any) -> None:
        next(teacher.buffers()).add_(1)

    teacher.register_forward_hook(drift)
    with pytest.raises(RuntimeError, match="teacher's weights or statistics changed"):
        trainer.train()


def test_a_distillation_of_zero_is_warned_about(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = run_in(folder, tmp_path, teacher=make_detector(2), max_steps=1, methods=["fitnets:adapter=False"])
    trainer.train()
    assert "exactly 0" in caplog.text


def test_adapters_learn_and_the_teacher_does_not(folder: Path, tmp_path: Path) -> None:
    trainer = run_in(folder, tmp_path, max_steps=2)
    teacher = trainer.distiller.teacher
    before, of_adapters = copied(teacher), copied(trainer.distiller)
    trainer.train()
    assert equal(before, teacher.state_dict())
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert of_adapters
    assert not any(torch.equal(of_adapters[name], tensor) for name, tensor in trainer.distiller.state_dict().items())


def test_gradients_of_adapters_are_those_of_their_update(folder: Path, tmp_path: Path) -> None:
    """Weights that don't move get the same gradients from the same images, in every update."""
    changes = {"learning_rate": 1e-30, "per_device_train_batch_size": 7, "max_steps": 2, "schedule": None}
    trainer = run_in(folder, tmp_path, max_grad_norm=1e9, **changes)
    norms: list[float] = []

    class Note(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            norms.append(float(torch.stack([p.grad.norm() for p in trainer.distiller.parameters()]).norm()))

    trainer.add_callback(Note())
    trainer.train()
    assert norms[0] > 0
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_an_evaluation_forgets_the_one_before(folder: Path, tmp_path: Path) -> None:
    trainer = run_in(folder, tmp_path)
    found = []
    for _ in range(2):
        rows = trainer.predict(trainer.eval_dataset).predictions
        found.append(torch.cat([torch.as_tensor(rows[image])[:, 4] for image in sorted(rows)]))
        with torch.no_grad():
            trainer.model.head.classifier.bias -= 1
    assert found[1].max() < found[0].max()


def test_evaluating_first_and_training_twice_change_nothing(folder: Path, tmp_path: Path) -> None:
    plain = run_in(folder, tmp_path, max_steps=1, bf16=True)
    plain.train()
    evaluated = run_in(folder, tmp_path, max_steps=1, bf16=True)
    evaluated.evaluate()
    evaluated.train()
    assert losses(evaluated) == losses(plain)
    evaluated.train()
    assert losses(evaluated)[0]["loss"] < losses(plain)[0]["loss"]


# ---- Teachers from a folder ----


def test_a_teacher_is_loaded_with_its_processor(folder: Path, tmp_path: Path) -> None:
    make_detector(1).save_pretrained(tmp_path / "teacher")
    other = processor()
    other.image_mean = [0.5, 0.5, 0.5]
    other.save_pretrained(tmp_path / "teacher")
    train, _ = load_data(folder)
    args = settings(folder, output_dir=str(tmp_path / "run"), max_steps=1)
    trainer = CrossKDTrainer(
        make_detector(2), args, train.dataset, processing_class=processor(), teacher_model=tmp_path / "teacher"
    )
    assert trainer.distiller.pair.teacher.pixels is not None
    trainer.train()
    assert losses(trainer)[0]["crosskd/cls"] > 0


def test_a_teacher_with_missing_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    teacher = make_detector(1)
    state = teacher.state_dict()
    removed = next(name for name in state if "classifier" in name)
    teacher.save_pretrained(tmp_path, state_dict={name: tensor for name, tensor in state.items() if name != removed})
    with pytest.raises(ValueError, match=r"1 missing keys, such as .*classifier.*would be random"):
        make_trainer(folder, teacher=str(tmp_path))


# ---- Random students ----


@pytest.mark.parametrize(
    ("fields", "held"),
    [
        ({}, "frozen_stages=1 and norm_eval=True"),
        ({"norm_eval": False}, "frozen_stages=1"),
        ({"frozen_stages": 0}, "norm_eval=True"),
        ({"frozen_stages": 0, "norm_eval": False}, None),
    ],
)
def test_a_random_backbone_that_would_stay_so_is_refused(
    folder: Path, tmp_path: Path, fields: dict[str, Any], held: str | None
) -> None:
    train, val = load_data(folder)
    model = make_detector(2, **fields)
    for norm in model.backbone.net.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.reset_parameters()
    args = {"args": settings(folder, output_dir=str(tmp_path)), "processing_class": processor()}
    CrossKDTrainer(model, eval_dataset=val.dataset, **args)  # evaluation alone may be of anything
    if held is None:
        CrossKDTrainer(model, train_dataset=train.dataset, **args)
        return
    message = f"test_resnet is random, and {held} would keep .* frozen_stages=0, norm_eval=False"
    with pytest.raises(ValueError, match=message):
        CrossKDTrainer(model, train_dataset=train.dataset, **args)


# ---- Evaluation ----


def test_evaluate_is_coco_ap_of_every_image(folder: Path, tmp_path: Path) -> None:
    trainer = run_in(folder, tmp_path, teacher=False, per_device_eval_batch_size=2)
    metrics = trainer.evaluate()
    assert set(metrics) >= SUMMARY | {"eval_map_circle", "eval_map_star"}
    evaluator = CocoEvaluator(trainer.eval_dataset, load_data(folder)[1].categories)
    for example in trainer.eval_dataset:
        batch = DetectionCollator(processor())([example])
        with torch.no_grad():
            outputs = trainer.model(batch["pixel_values"], batch["pixel_mask"])
        sizes = [(example["height"], example["width"])]
        evaluator.update([example["image_id"]], processor().post_process_object_detection(outputs, 0.0, sizes))
    rows = trainer.predict(trainer.eval_dataset).predictions
    assert set(rows) == set(evaluator.rows)
    assert all(len(rows[image]) > 10 for image in rows)
    assert all(np.allclose(rows[image], evaluator.rows[image], atol=1e-3) for image in rows)
    expected = {f"eval_{name}": value for name, value in evaluator.compute().items()}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_evaluation_data_of_another_kind_is_refused(folder: Path, tmp_path: Path) -> None:
    trainer = run_in(folder, tmp_path, teacher=False)
    with pytest.raises(ValueError, match="columns .*image_id"):
        trainer.evaluate(Dataset.from_dict({"image": [0]}))


def test_weights_that_are_parts_of_one_tensor(folder: Path, tmp_path: Path) -> None:
    """As transformers loads RF-DETR: the first checkpoint with averaged weights could not be written."""
    train, _ = load_data(folder)
    student = make_detector(2)
    layers = [module for module in student.modules() if isinstance(module, torch.nn.GroupNorm)]
    whole = torch.cat([layer.weight.detach() for layer in layers])
    for layer, part in zip(layers, whole.split([len(layer.weight) for layer in layers]), strict=True):
        layer.weight = torch.nn.Parameter(part)
    changes = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "ema_decay": 0.9}
    trainer = CrossKDTrainer(student, settings(tmp_path, **changes), train.dataset, processing_class=processor())
    trainer.train()
    assert [path.name for path in checkpoints.checkpoints(tmp_path / "run")] == ["checkpoint-1", "checkpoint-2"]


# ---- Hub ----


def test_no_pickle_is_uploaded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: list[dict[str, Any]] = []
    url = SimpleNamespace(repo_id="org/student")
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: url)
    monkeypatch.setattr(HfApi, "upload_folder", lambda _, **options: uploads.append(options | _listed(options)))
    changes = {"save_strategy": "steps", "save_steps": 1, "push_to_hub": True, "hub_model_id": "org/student"}
    trainer = run_in(folder, tmp_path, max_steps=1, **changes)
    trainer.train()
    trainer.push_to_hub(license="mit", dataset="shapes")
    during, final = uploads
    student = {"config.json", "model.safetensors", "preprocessor_config.json", provenance.FILE}
    for upload in uploads:
        assert upload["repo_id"] == "org/student"
        assert upload["files"] >= student
        assert not [name for name in upload["files"] if Path(name).suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert "README.md" in final["files"]
    card = (tmp_path / "run/README.md").read_text()
    assert "license: mit" in card
    assert 'model="org/student"' in card
    assert during["folder_path"].endswith("checkpoint-1")


def test_a_failing_hub_stops_no_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first checkpoint that could not be uploaded ended the training. At the end the error is the user's to see."""

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("server error 500")

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="org/student"))
    monkeypatch.setattr(HfApi, "upload_folder", fail)
    changes = {"save_strategy": "steps", "save_steps": 1, "push_to_hub": True, "hub_model_id": "org/student"}
    trainer = run_in(folder, tmp_path, max_steps=2, **changes)
    trainer.train()
    assert trainer.state.global_step == 2
    assert [path.name for path in checkpoints.checkpoints(tmp_path / "run")] == ["checkpoint-1", "checkpoint-2"]
    for number in (1, 2):
        assert f"checkpoint-{number} could not be uploaded to org/student (ConnectionError: server error" in caplog.text
    with pytest.raises(OSError, match="could not be uploaded to org/student; .*server error 500. Nothing is lost"):
        trainer.push_to_hub()
    assert (tmp_path / "run/model.safetensors").is_file()


def _listed(options: dict[str, Any]) -> dict[str, Any]:
    names = [str(p.relative_to(options["folder_path"])) for p in Path(options["folder_path"]).rglob("*") if p.is_file()]
    return {"files": set(filter_repo_objects(names, ignore_patterns=options["ignore_patterns"]))}


# ---- Data order ----


def test_batches_of_one_orientation(folder: Path, tmp_path: Path) -> None:
    options = {"group_by_aspect_ratio": True, "train_sampling_strategy": "random"}
    trainer = run_in(folder, tmp_path, teacher=False, max_steps=1, **options)
    order = list(trainer._get_train_sampler())
    assert sorted(order) == list(range(7))
    trainer.train()
    assert trainer.state.global_step == 1


def test_an_image_processor_is_needed(folder: Path) -> None:
    with pytest.raises(ValueError, match="processing_class is missing"):
        CrossKDTrainer(make_detector(2), settings(folder))


def test_random_transform_is_used_for_training_only(folder: Path, tmp_path: Path) -> None:
    trainer = run_in(folder, tmp_path, augment=True)
    assert isinstance(trainer.get_train_dataloader().collate_fn.collator.transform, TrainTransform)
