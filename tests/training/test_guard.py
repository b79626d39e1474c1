"""What the guard says, whatever else goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from crosskd_hf.training.guard import NonFiniteGuard

PARTS = {"loss_cls": torch.tensor(float("nan")), "loss_box": torch.tensor(1.0)}


def report(folder: Path, labels: list[dict[str, torch.Tensor]]) -> str:
    guard = NonFiniteGuard(folder, rank=0)
    guard.watch(PARTS, {"pixel_values": torch.zeros(1), "labels": labels}, torch.tensor(1.0))
    assert guard.triggered(None)
    return guard.report(7, None)


def test_names_part_update_and_images_and_saves_the_batch(tmp_path: Path) -> None:
    message = report(tmp_path, [{"image_id": torch.tensor([4])}])
    assert message.startswith("Update 7 is not finite: loss_cls = nan for image ids [4] on process 0.")
    (path,) = tmp_path.iterdir()
    assert str(path) in message
    (batch,) = torch.load(path, weights_only=True)
    assert batch["losses"]["loss_box"] == 1


@pytest.mark.parametrize("norm", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_triggers(tmp_path: Path, norm: float) -> None:
    guard = NonFiniteGuard(tmp_path, rank=0)
    guard.watch({"loss": torch.tensor(1.0)}, {}, torch.tensor(0.0))
    assert guard.triggered(torch.tensor(norm))
    assert not guard.triggered(torch.tensor(3.0))
    assert not guard.triggered(None)  # a gradient scaler judges


@pytest.mark.parametrize("error", [OSError("No space left on device"), RuntimeError("unexpected pos 64")])
def test_a_full_disk_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("torch.save", fail)
    message = report(tmp_path, [])
    assert "loss_cls = nan" in message
    assert f"could not be saved in {tmp_path}/step-7-rank-0.pt ({error})" in message


def test_labels_of_a_collator_of_ones_own(tmp_path: Path) -> None:
    assert "image ids [4]" in report(tmp_path, [{}, {"image_id": torch.tensor(4)}])
