"""bf16 autocast and channels-last weights: nearly the same losses, the same files, and weights as they were."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from crosskd_hf.cli import main
from crosskd_hf.inference import evaluation, speed
from crosskd_hf.inference.evaluation import evaluate_data
from crosskd_hf.inference.predict import predict
from crosskd_hf.inference.speed import Speed, bf16_gain, running, to_channels_last
from crosskd_hf.models.losses import integral
from tests.tiny_run import load_data, losses, make_detector, make_trainer, processor, settings

CHECKPOINTS: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(autouse=True)
def _device_that_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any CPU computes in bfloat16, some slowly."""
    monkeypatch.setattr(speed, "bf16_gain", lambda device: (True, "so the test says"))


def trained(folder: Path, run: Path, resume: Any = None, **changes: Any) -> Any:
    trainer = make_trainer(folder, output_dir=str(run), **changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def tensors(content: Any) -> list[Tensor]:
    """All tensors somewhere inside."""
    if isinstance(content, Tensor):
        return [content]
    values = content.values() if isinstance(content, dict) else content if isinstance(content, list | tuple) else ()
    return [tensor for value in values for tensor in tensors(value)]


def lies_channels_last(model: nn.Module) -> bool:
    kernels = [p for p in model.parameters() if p.ndim == 4]
    return all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


def test_a_fast_run_is_nearly_that_in_float32_and_its_files_are_the_same_kind(folder: Path, tmp_path: Path) -> None:
    plain = trained(folder, tmp_path / "plain", max_steps=1)
    fast = trained(folder, tmp_path / "fast", max_steps=1, fast=True, save_strategy="steps", save_steps=1)
    assert (fast.args.bf16, fast.args.channels_last) == (True, True)
    (expected,), (found,) = losses(plain), losses(fast)
    assert found == pytest.approx(expected, rel=0.1)
    assert found != expected
    assert lies_channels_last(fast.model)
    assert lies_channels_last(fast.distiller.teacher)
    checkpoint = tmp_path / "fast" / "checkpoint-1"
    saved = load_file(checkpoint / "model.safetensors")
    state = tensors(torch.load(checkpoint / "optimizer.pt", weights_only=True))
    assert {t.dtype for t in saved.values() if t.is_floating_point()} == {torch.float32}
    assert state
    assert all(tensor.is_contiguous() for tensor in state)
    assert saved.keys() == plain.model.state_dict().keys()


def test_channels_last_alone_changes_no_loss(folder: Path, tmp_path: Path) -> None:
    plain, laid_out = (trained(folder, tmp_path / str(on), channels_last=on) for on in (False, True))
    for expected, found in zip(losses(plain), losses(laid_out), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_fast_run_resumes_as_if_uninterrupted(folder: Path, tmp_path: Path, ema_decay: float | None) -> None:
    options = {**CHECKPOINTS, "fast": True, "ema_decay": ema_decay}
    whole = trained(folder, tmp_path, **options)
    again = trained(folder, tmp_path, str(tmp_path / "checkpoint-2"), **options)
    weights, others = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_run_goes_on_with_another_layout(folder: Path, tmp_path: Path) -> None:
    trained(folder, tmp_path, **CHECKPOINTS, channels_last=True)
    checkpoint = str(tmp_path / "checkpoint-2")
    same, other = (trained(folder, tmp_path, checkpoint, **CHECKPOINTS, channels_last=on) for on in (True, False))
    assert losses(other)[-1] == pytest.approx(losses(same)[-1], rel=1e-4)


def test_a_model_without_convolutions_has_nothing_to_lay_channels_last() -> None:
    with pytest.raises(ValueError, match="channels_last=True would have no effect: Linear has no convolutions"):
        to_channels_last(nn.Linear(2, 2))
    to_channels_last(nn.Linear(2, 2), needed=False)


def test_fp16_is_kept(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    chosen = Speed(fast=True).on(torch.device("cpu"), fp16=True)
    assert not chosen.bf16
    assert "fast: channels_last, no bf16 autocast (fp16 is given)" in caplog.text


class TestBf16Gain:
    @pytest.mark.parametrize(
        ("supported", "said"),
        [({"_is_amx_tile_supported"}, "AMX"), ({"_is_avx512_bf16_supported"}, "AVX-512 bf16"), (set(), "neither")],
    )
    def test_of_a_cpu(self, monkeypatch: pytest.MonkeyPatch, supported: set[str], said: str) -> None:
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda name=name: name in supported, raising=False)
        gains, reason = bf16_gain(torch.device("cpu"))
        assert gains is bool(supported)
        assert said in reason

    def test_of_what_nobody_has_measured(self) -> None:
        assert bf16_gain(torch.device("mps")) == (False, "nobody has measured it on mps")

    def test_the_log_says_in_a_line_what_a_run_chose(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            settings(tmp_path, fast=True)
        (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("fast:")]
        assert line == "fast: channels_last, bf16 autocast (so the test says)"


class TestOutsideOfTraining:
    def test_a_fast_evaluation_finds_what_a_slow_one_does(self, folder: Path) -> None:
        model, val = make_detector(1, 8).eval(), load_data(folder)[1]
        before = {name: (tensor.clone(), tensor.stride()) for name, tensor in model.state_dict().items()}
        expected = evaluate_data(model, processor(), val)
        found = evaluate_data(model, processor(), val, fast=True)
        assert found["map"] == pytest.approx(expected["map"], abs=0.05)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor.cpu(), before[name][0])
            assert tensor.stride() == before[name][1]

    def test_predictions_are_float32_and_near(self, tmp_path: Path) -> None:
        model = make_detector(1, 8).eval()
        Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
        kinds: list[dict[str, bool]] = [{}, {"fast": True}, {"channels_last": True}]
        slow, fast, laid_out = (next(predict(model, processor(), tmp_path, 0.0, **kind)) for kind in kinds)
        highest = [max(d["score"] for d in each.record["detections"]) for each in (slow, fast, laid_out)]
        assert highest[1] == pytest.approx(highest[0], rel=0.05)
        assert highest[2] == pytest.approx(highest[0], rel=1e-4)
        assert highest[1] != highest[0]

    def test_autocast_and_layout_end_with_the_context(self) -> None:
        model = make_detector(1, 8)
        with running(model, Speed(bf16=True, channels_last=True)):
            assert torch.is_autocast_enabled("cpu")
            assert lies_channels_last(model)
        assert not torch.is_autocast_enabled("cpu")
        assert not lies_channels_last(model)

    def test_the_command_line_hands_the_choice_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        found: list[dict[str, bool]] = []
        monkeypatch.setattr("crosskd_hf.inference.loading.load_detector", lambda name: (None, None))
        monkeypatch.setattr(evaluation, "evaluate", lambda *args, **kwargs: found.append(kwargs) or {})
        monkeypatch.setattr(evaluation, "table", lambda metrics: "")
        assert main(["evaluate", "model", "val.json", "val", "--fast"]) == 0
        assert [(each["bf16"], each["channels_last"], each["fast"]) for each in found] == [(False, False, True)]


def test_distances_keep_their_digits_under_autocast() -> None:
    logits = torch.randn(64, 17, generator=torch.Generator().manual_seed(0)) * 3
    with torch.autocast("cpu", torch.bfloat16):
        found = integral(logits)
    assert torch.equal(found, integral(logits))
