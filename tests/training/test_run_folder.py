"""The folder of a run: writable before step 0, one run at a time, and what its files give away."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from crosskd_hf.training import checkpoints, run_folder
from crosskd_hf.training.run_folder import LOCK, RunFolderError, held
from tests.tiny_run import make_trainer

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that can't be written, by root neither."""
    location = tmp_path / "read-only"
    location.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(location)]
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0:
        yield location
        subprocess.run(["umount", "-l", str(location)], check=True)
        return
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere but on a read-only file system, which can't be mounted here")
    location.chmod(0o500)
    yield location
    location.chmod(0o700)


def test_a_folder_that_cannot_be_written_is_noticed_before_step_0(folder: Path, read_only: Path) -> None:
    with pytest.raises(RunFolderError, match=r"output_dir='.*/sub' can't be written .*give a folder that can"):
        make_trainer(folder, output_dir=str(read_only / "sub"), **SAVING)
    trainer = make_trainer(folder, output_dir=str(read_only), **SAVING)
    with pytest.raises(RunFolderError, match="can't be written"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_run_that_saves_nothing_is_warned(folder: Path, read_only: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(folder, output_dir=str(read_only), save_strategy="no", max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1
    assert "save_model() would fail" in caplog.text


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_file_in_the_place_of_the_folder(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match=f"{name}' can't be written"):
        make_trainer(folder, output_dir=str(tmp_path / name), **SAVING)


class Second(TrainerCallback):
    """Starts a second run in the folder while the first one runs."""

    def __init__(self, folder: Path, run: Path) -> None:
        self.data, self.run, self.refused = folder, run, ""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with pytest.raises(RunFolderError, match="is in use by another run") as caught:
            make_trainer(self.data, output_dir=str(self.run), **SAVING).train()
        self.refused = str(caught.value)


def test_a_second_run_in_the_folder_is_refused_and_harms_nothing(folder: Path, tmp_path: Path) -> None:
    trainer, second = make_trainer(folder, output_dir=str(tmp_path), **SAVING), Second(folder, tmp_path)
    trainer.add_callback(second)
    trainer.train()
    assert f"process {os.getpid()} on " in second.refused
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    assert not (tmp_path / LOCK).exists()
    make_trainer(folder, output_dir=str(tmp_path), **(SAVING | {"max_steps": 3})).train(resume_from_checkpoint=True)


HOLDER = """
import os, sys, time
from pathlib import Path
from crosskd_hf.training.run_folder import held
with held(Path(sys.argv[1]), True, True):
    child = os.fork()  # as a loader's process, which outlives the killed run for seconds
    if child == 0:
        print("child", os.getpid(), flush=True)
    time.sleep(60)
"""


def test_the_lock_ends_with_its_process_though_a_child_of_it_lives_on(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline().split()[1])
    try:
        with pytest.raises(RunFolderError, match=f"process {process.pid} on "), held(tmp_path, True, True):
            pass
        process.kill()
        process.wait()
        os.kill(child, 0)  # is alive
        with held(tmp_path, True, True):
            assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    finally:
        os.kill(child, 9)


def test_a_lock_that_its_holder_removes_meanwhile_is_not_taken_for_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, opened = fcntl.flock, []

    def flock(descriptor: int, kind: int) -> None:
        opened.append(descriptor)
        if len(opened) == 1:
            (tmp_path / LOCK).unlink()
        real(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", flock)
    with held(tmp_path, True, True):
        assert len(opened) == 2
        with pytest.raises(RunFolderError), held(tmp_path, True, True):
            pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def flock(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with held(tmp_path, True, True):
        assert "file system without locks" in caplog.text
    monkeypatch.setattr(run_folder, "fcntl", None)
    caplog.clear()
    with held(tmp_path, True, True):
        assert "file system without locks" in caplog.text


def test_files_get_the_usual_permissions(folder: Path, tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        trainer = make_trainer(folder, output_dir=str(tmp_path / "run"), ema_decay=0.9, **SAVING)
        trainer.train()
        trainer.save_model()
    finally:
        os.umask(umask)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".safetensors"]) >= 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}
