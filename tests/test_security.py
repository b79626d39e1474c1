"""Nothing leaves the machine unasked, and no file runs code that the user didn't ask for."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file

from crosskd_hf.data.images import open_image, probe_image
from crosskd_hf.inference.loading import load_detector
from crosskd_hf.training import checkpoints
from crosskd_hf.training.trainer import CrossKDTrainer, load_teacher
from tests.tiny_run import make_detector, make_trainer, processor

ROOT = Path(__file__).parents[1]

OFFLINE = """
import sys
attempts = []
NETWORK = ("connect", "sendto", "sendmsg", "getaddrinfo", "gethostbyname", "gethostbyaddr", "getnameinfo")

def refuse(event, arguments):
    if event.startswith("socket.") and event.endswith(NETWORK):
        attempts.append(f"{event} {arguments[1:]}")
        raise OSError("refused")

sys.addaudithook(refuse)  # sees every way to a socket or a name server, also from C, and can't be taken away
from pathlib import Path
import torch
from huggingface_hub.constants import is_offline_mode
from crosskd_hf.inference.loading import load_detector
from tests.tiny_run import make_detector, make_trainer, processor

assert not is_offline_mode()
torch.set_num_threads(1)
folder = Path(sys.argv[1])
make_detector(1, width=12).save_pretrained(folder / "teacher")
processor().save_pretrained(folder / "teacher")
options = {"teacher": str(folder / "teacher"), "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
make_trainer(folder, **options).train()
trainer = make_trainer(folder, **(options | {"max_steps": 3}))
trainer.train(resume_from_checkpoint=True)
trainer.evaluate()
trainer.save_model()
trainer.create_model_card()
load_detector(folder / "run")
print("attempts:", attempts)
"""


PROBES = """
import socket
for name, arguments in (
    ("getaddrinfo", ("example.org", 443)), ("gethostbyname", ("example.org",)), ("gethostbyname_ex", ("example.org",)),
    ("gethostbyaddr", ("192.0.2.1",)), ("getnameinfo", (("192.0.2.1", 443), 0)),
    ("create_connection", (("192.0.2.1", 9),)),
):
    try:
        getattr(socket, name)(*arguments)
    except OSError as error:
        assert str(error) == "refused", (name, error)
for name in ("connect", "connect_ex"):
    try:
        getattr(socket.socket(), name)(("192.0.2.1", 9))
    except OSError as error:
        assert str(error) == "refused", (name, error)
try:
    socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53))
except OSError as error:
    assert str(error) == "refused"
print(len(attempts))
"""


def test_the_watch_sees_connections_and_names() -> None:
    program = OFFLINE.partition("from pathlib")[0] + PROBES
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "9"), done.stderr


def test_no_network_without_a_hub_id(tmp_path: Path) -> None:
    """Teacher, training, resuming, evaluation, saving and the card; the Hub's offline mode is off."""
    environment = {k: v for k, v in os.environ.items() if not k.endswith(("_OFFLINE", "_TELEMETRY"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", OFFLINE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "attempts: []"


@pytest.mark.parametrize("name", ["a.eps", "a.jpg"])
def test_no_image_is_run_by_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    runs: list[Any] = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *arguments: runs.append(arguments))
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / name, "EPS")
    for read in (open_image, probe_image):
        for source in (tmp_path / name, {"path": None, "bytes": (tmp_path / name).read_bytes()}):
            with pytest.raises(OSError, match="cannot identify"):
                read(source)
    with contextlib.suppress(Exception):
        PIL.Image.open(tmp_path / name).load()
    assert len(runs) == 1, "only the last one, which shows that the test would notice"


class Touch:
    """Pickles as a call that leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def plant(path: Path, mark: Path) -> None:
    """Replace `path` by a pickle that makes `mark`, in a checkpoint that is complete by its manifest."""
    torch.save({"state": Touch(mark)}, path)
    checkpoints.write_manifest(path.parent)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a run with one checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    trained(folder, max_steps=1, save_strategy="steps", save_steps=1).train()
    return folder


def trained(folder: Path, **changes: Any) -> CrossKDTrainer:
    return make_trainer(folder, ema_decay=0.9, **changes)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_resuming_refuses_a_pickle_that_runs_code(run: Path, tmp_path: Path, name: str) -> None:
    mark, planted = tmp_path / "mark", run / "run/checkpoint-1" / name
    original = planted.read_bytes()
    plant(planted, mark)
    try:
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            trained(run, max_steps=2).train(resume_from_checkpoint=True)
    finally:
        planted.write_bytes(original)
        checkpoints.write_manifest(planted.parent)
    assert not mark.exists()


def test_files_that_are_no_part_of_a_checkpoint_are_not_read(run: Path, tmp_path: Path) -> None:
    mark, folder = tmp_path / "mark", run / "run/checkpoint-1"
    planted = [folder / name for name in ("training_args.bin", "pytorch_model.bin")]
    for path in planted:
        plant(path, mark)
    trainer = trained(run, max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    for path in planted:
        path.unlink()
    checkpoints.write_manifest(folder)
    assert trainer.state.global_step == 2
    assert not mark.exists()


def test_a_teacher_in_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    mark, folder = tmp_path / "mark", tmp_path / "teacher"
    make_detector(1).save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state | {"extra": Touch(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only|pickle"):
        load_teacher(folder)
    assert not mark.exists()


CODE = """
from pathlib import Path
Path({mark!r}).touch()
from crosskd_hf.models import GFLConfig, GFLForObjectDetection

class FarConfig(GFLConfig):
    model_type = "far_away"

class FarForObjectDetection(GFLForObjectDetection):
    config_class = FarConfig
"""


def with_code(folder: Path, mark: Path, model_type: str) -> Path:
    """A saved detector beside which lies code that leaves a mark when it runs."""
    make_detector(1).save_pretrained(folder)
    processor().save_pretrained(folder)
    (folder / "far.py").write_text(CODE.format(mark=str(mark)))
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = model_type
    config["auto_map"] = {"AutoConfig": "far.FarConfig", "AutoModelForObjectDetection": "far.FarForObjectDetection"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_teachers_code_runs_only_on_request(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    folder = with_code(tmp_path / "teacher", mark, "far_away")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load_teacher(folder)
    assert not mark.exists()
    teacher, _ = load_teacher(folder, trust_remote_code=True)
    assert mark.exists()
    assert type(teacher).__name__ == "FarForObjectDetection"


def test_known_detectors_run_the_installed_code(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    folder = with_code(tmp_path / "teacher", mark, "crosskd_gfl")
    assert type(load_teacher(folder)[0]).__module__ == "crosskd_hf.models.gfl"
    assert type(load_detector(folder)[0]).__module__ == "crosskd_hf.models.gfl"
    assert not mark.exists()
