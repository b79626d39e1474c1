"""Students and teachers with adapters of peft."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file
from transformers import AutoModelForObjectDetection, PreTrainedModel

from crosskd_hf.training.trainer import CrossKDTrainer
from tests.tiny_run import load_data, losses, make_pair, settings

peft = pytest.importorskip("peft")

TARGETS = {
    "gfl": ["conv", "classifier"],
    "faster_rcnn": ["output.0", "output.1", "output.2", "regressor"],
}


def adapted(model: PreTrainedModel, family: str, wrapped: bool, folder: Path) -> Any:
    """`model` with LoRA, by peft's wrapper or by transformers' own method, and saved in `folder` before."""
    model.save_pretrained(folder)
    model = type(model).from_pretrained(folder)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=TARGETS[family])
    if wrapped:
        return peft.get_peft_model(model, config)
    try:
        model.add_adapter(config)
    except ValueError as error:  # transformers may ask for a peft that isn't out yet
        pytest.skip(str(error))
    return model


def trainer(folder: Path, tmp_path: Path, family: str, wrapped: bool, **changes: Any) -> CrossKDTrainer:
    train, val = load_data(folder)
    student, teacher, images = make_pair(family)
    student = adapted(student, family, wrapped, tmp_path / "base")
    options: dict[str, Any] = {"methods": ["crosskd"], "schedule": None, "learning_rate": 0.01, "max_steps": 2}
    args = settings(tmp_path, **options | {"save_strategy": "steps", "save_steps": 1} | changes)
    return CrossKDTrainer(student, args, train.dataset, val.dataset, images, teacher_model=teacher)


@pytest.mark.parametrize(("family", "wrapped"), [("gfl", True), ("faster_rcnn", True), ("gfl", False)])
def test_adapters_are_trained_saved_and_resumed(folder: Path, tmp_path: Path, family: str, wrapped: bool) -> None:
    whole = trainer(folder, tmp_path, family, wrapped)
    before = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    whole.train()
    moved = {name for name, tensor in whole.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    assert losses(whole)[0].keys() >= {"loss", "grad_norm"}

    saved = tmp_path / "run/checkpoint-1"
    state = load_file(saved / "adapter_model.safetensors")
    assert state
    assert all("lora_" in name for name in state)

    again = trainer(folder, tmp_path, family, wrapped)
    again.train(resume_from_checkpoint=str(saved))
    assert losses(again) == losses(whole)
    expected = whole.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.model.state_dict().items())

    base = AutoModelForObjectDetection.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "run/checkpoint-2").eval()
    batch = whole.data_collator([whole.train_dataset[1]])
    with torch.no_grad():
        outputs = [model.eval()(pixel_values=batch["pixel_values"]) for model in (loaded, whole.model)]
    assert torch.equal(outputs[0].pred_boxes, outputs[1].pred_boxes)


def test_adapters_of_another_student_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer(folder, tmp_path, "gfl", True, max_steps=1).train()
    monkeypatch.setitem(TARGETS, "gfl", ["regressor"])
    other = trainer(folder, tmp_path, "gfl", True)
    with pytest.raises(ValueError, match="are not those of this student"):
        other.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"))


def test_the_best_adapters_are_kept_and_averaged(folder: Path, tmp_path: Path) -> None:
    steps = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "ema_decay": 0.5}
    best = trainer(folder, tmp_path, "gfl", True, **steps)
    best.train()
    best.save_model()
    expected = load_file(Path(best.state.best_model_checkpoint) / "adapter_model.safetensors")
    saved = load_file(tmp_path / "run/adapter_model.safetensors")
    assert set(saved) == set(expected)
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    assert "GFLForObjectDetection" in (tmp_path / "run/README.md").read_text()


@pytest.mark.parametrize("wrapped", [True, False])
def test_pushed_adapters_do_not_name_the_folder_of_their_base(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrapped: bool
) -> None:
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="org/student"))
    monkeypatch.setattr(HfApi, "upload_folder", lambda *_, **__: None)
    pushed = trainer(folder, tmp_path, "gfl", wrapped, max_steps=1, push_to_hub=True, hub_model_id="org/student")
    pushed.train()
    pushed.push_to_hub()
    for saved in (tmp_path / "run", tmp_path / "run/checkpoint-1"):
        assert json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    texts = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(texts) > 10
    assert not [text for text in texts if str(tmp_path).encode() in text]


def test_a_teacher_with_adapters_teaches_with_them(folder: Path, tmp_path: Path) -> None:
    train, val = load_data(folder)
    student, teacher, images = make_pair("gfl")
    wrapped = adapted(teacher, "gfl", True, tmp_path / "teacher")
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    args = settings(tmp_path, max_steps=1, methods=["crosskd"])
    run = CrossKDTrainer(student, args, train.dataset, val.dataset, images, teacher_model=wrapped)
    run.train()
    student, teacher, _ = make_pair("gfl")
    plain = CrossKDTrainer(student, args, train.dataset, val.dataset, images, teacher_model=teacher)
    plain.train()
    assert losses(run)[0]["loss_cls"] == losses(plain)[0]["loss_cls"]
    assert losses(run)[0]["crosskd/cls"] != pytest.approx(losses(plain)[0]["crosskd/cls"], rel=1e-3)
