"""Checkpoint folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crosskd_hf.training.checkpoints import (
    MANIFEST,
    checkpoints,
    fault,
    is_complete,
    last_checkpoint,
    publish,
    recover,
    remove,
    rotate,
    write_manifest,
)
from crosskd_hf.training.saving import checkpoint_to_resume
from tests.tiny_run import make_trainer


def make(run: Path, name: str, content: str = "weights") -> Path:
    folder = run / name
    (folder / "inner").mkdir(parents=True)
    (folder / "inner/model").write_text(content)
    write_manifest(folder)
    return folder


def test_a_folder_is_complete_with_all_its_files(tmp_path: Path) -> None:
    folder = make(tmp_path, "checkpoint-1")
    assert is_complete(folder)
    (folder / "inner/model").write_text("weigh")
    assert not is_complete(folder)
    (folder / "inner/model").unlink()
    assert not is_complete(folder)


@pytest.mark.parametrize(
    "manifest", [None, "", "{", "[]", "\0" * 80, '{"files": 3}', '{"files": {}}', '{"files": {"inner/model": {}}}']
)
def test_a_broken_manifest(tmp_path: Path, manifest: str | None) -> None:
    folder = make(tmp_path, "checkpoint-1")
    (folder / MANIFEST).unlink()
    if manifest is not None:
        (folder / MANIFEST).write_text(manifest)
    assert not is_complete(folder)
    assert MANIFEST in str(fault(folder))


def flipped(content: bytes) -> bytes:
    middle = len(content) * 2 // 3
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def halved(content: bytes) -> bytes:
    return content[: len(content) // 2]


DAMAGES = {"flipped": flipped, "zeros": lambda content: bytes(len(content)), "short": halved}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints of all kinds of files."""
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, max_steps=2, save_strategy="steps", save_steps=1, ema_decay=0.9).train()
    return folder / "run"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_recognised_and_the_earlier_checkpoint_taken(
    run: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run / "checkpoint-2"
    names = sorted(path.name for path in folder.iterdir())
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(names)
    for name in names:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(DAMAGES[damage](content))
        caplog.clear()
        assert checkpoint_to_resume(run, True) == run / "checkpoint-1", name
        assert name in caplog.text
        with pytest.raises(ValueError, match=f"is no complete checkpoint of CrossKDTrainer: .*{name}"):
            checkpoint_to_resume(run, str(folder))
        (folder / name).write_bytes(content)
    assert fault(folder) is None
    assert checkpoint_to_resume(run, True) == folder


def test_a_manifest_that_leads_out_of_the_checkpoint(tmp_path: Path) -> None:
    folder = make(tmp_path, "checkpoint-1")
    (tmp_path / "other").write_text("other")
    for name in ("../other", str(tmp_path / "other"), "/dev/zero"):
        (folder / MANIFEST).write_text(json.dumps({"files": {name: {"size": 5, "sha256": "0"}}}))
        assert fault(folder) == f"{name} lies outside of the checkpoint"
    (folder / MANIFEST).write_text(json.dumps({"files": {"inner": {"size": 0, "sha256": "0"}}}))
    assert fault(folder) == "inner is missing, though manifest.json lists it"


def test_the_first_manifests_had_sizes_alone(tmp_path: Path) -> None:
    folder = make(tmp_path, "checkpoint-1")
    (folder / MANIFEST).write_text(json.dumps({"files": {"inner/model": 7}}))
    assert fault(folder) is None
    (folder / MANIFEST).write_text(json.dumps({"files": {"inner/model": 8}}))
    assert fault(folder) == "inner/model has 7 bytes, manifest.json says 8"


def test_the_newest_complete_one_is_the_last(tmp_path: Path) -> None:
    for number in (2, 10, 9):
        make(tmp_path, f"checkpoint-{number}")
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert last_checkpoint(tmp_path / "checkpoint-11") is None


@pytest.mark.parametrize(("given", "name"), [(True, "checkpoint-2"), ("True", "checkpoint-2"), ("False", None)])
def test_what_a_command_line_says_of_resuming(tmp_path: Path, given: str | bool, name: str | None) -> None:
    make(tmp_path, "checkpoint-2")
    assert checkpoint_to_resume(tmp_path, given) == (name and tmp_path / name)


@pytest.mark.parametrize("resume", [True, "True", "checkpoint-1", "/"])
def test_nothing_to_resume(tmp_path: Path, resume: str | bool) -> None:
    with pytest.raises(ValueError, match="no complete checkpoint"):
        checkpoint_to_resume(tmp_path, resume)


def test_links_are_removed_and_what_they_point_to_stays(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    outside = make(tmp_path, "outside")
    (run / "checkpoint-1").symlink_to(outside)
    (run / "_deleting-checkpoint-2").symlink_to(outside)
    (run / "_saving-checkpoint-3").symlink_to(outside / "inner")
    make(run, "checkpoint-4")
    recover(run)
    rotate(run, 1, None)
    assert [path.name for path in checkpoints(run)] == ["checkpoint-4"]
    assert is_complete(outside)


def test_publish_replaces(tmp_path: Path) -> None:
    make(tmp_path, "checkpoint-1", "old")
    publish(make(tmp_path, "_saving-checkpoint-1", "new"), tmp_path / "checkpoint-1")
    assert (tmp_path / "checkpoint-1/inner/model").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_recover_finishes_what_is_whole_and_clears_the_rest(tmp_path: Path) -> None:
    make(tmp_path, "_saving-checkpoint-3")
    (make(tmp_path, "_saving-checkpoint-4") / MANIFEST).unlink()
    make(tmp_path, "_deleting-checkpoint-1")
    recover(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_rotate_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for number in range(1, 6):
        make(tmp_path, f"checkpoint-{number}")
    rotate(tmp_path, None, None)
    assert len(checkpoints(tmp_path)) == 5
    rotate(tmp_path, 3, str(tmp_path / "checkpoint-1"))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-4", "checkpoint-5"]
    rotate(tmp_path, 1, str(tmp_path / "checkpoint-1"))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-5"]


def test_remove_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path, "checkpoint-1")
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # killed before anything is deleted
    remove(folder)
    assert not checkpoints(tmp_path)
