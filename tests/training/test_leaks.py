"""What lies beside the weights or is uploaded names no folder of this machine, and lists no file that isn't there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects

from crosskd_hf.experiments.run_file import write_run_file
from crosskd_hf.experiments.train import RunArguments
from crosskd_hf.training import checkpoints, provenance
from crosskd_hf.training.trainer import CrossKDTrainer
from tests.tiny_run import make_data, make_detector, make_trainer, processor

SAVING: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "load_best_model_at_end": True,
    "ema_decay": 0.9,
}


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a person, with data and a teacher."""
    folder = tmp_path_factory.mktemp("private person")
    make_data(folder)
    teacher = make_detector(1, 12)
    teacher.save_pretrained(folder / "secret teacher")
    processor().save_pretrained(folder / "secret teacher")
    return folder


def trained(private: Path, **changes: Any) -> CrossKDTrainer:
    options = SAVING | {"teacher": str(private / "secret teacher")} | changes
    return make_trainer(private, **({"output_dir": str(private / "run")} | options))


def assert_private(private: Path, folder: Path) -> None:
    secrets = [str(private), private.name, "secret teacher", str(Path.home()), str(Path.cwd())]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content], path


@pytest.fixture(scope="module")
def run(private: Path) -> Path:
    """A run with checkpoints, and everything that a trainer writes at its end."""
    pytest.importorskip("tensorboard")
    trainer = trained(private, report_to="tensorboard")
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card()
    return private / "run"


def test_no_folder_is_named(private: Path, run: Path) -> None:
    names = {path.name for path in run.rglob("*")}
    assert {"training_args.json", "trainer_state.json", "distillation.json", "README.md", "manifest.json"} <= names
    assert [name for name in names if name.startswith("events.out")]
    assert_private(private, run)
    assert json.loads((run / "training_args.json").read_text())["output_dir"] == "run"
    teacher = json.loads((run / provenance.FILE).read_text())["teacher"]
    assert teacher["name_or_path"] is None
    assert len(teacher["sha256"]) == 64


def test_the_best_checkpoint_is_found_again_without_its_path(private: Path, run: Path, tmp_path: Path) -> None:
    assert json.loads((run / "checkpoint-2/trainer_state.json").read_text())["best_model_checkpoint"] is None
    moved = tmp_path / "moved"
    run.rename(moved)
    try:
        trainer = trained(private, output_dir=str(moved), max_steps=3, save_total_limit=1)
        trainer.train(resume_from_checkpoint=True)
        best = trainer.state.best_global_step
        assert trainer.state.best_model_checkpoint == str(moved / f"checkpoint-{best}")
        assert {path.name for path in checkpoints.checkpoints(moved)} == {f"checkpoint-{best}"}
    finally:
        moved.rename(run)


def test_a_best_checkpoint_that_is_gone_is_forgotten_with_a_warning(
    private: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(private, output_dir=str(tmp_path)).train()
    state = json.loads((tmp_path / "checkpoint-2/trainer_state.json").read_text())
    state |= {"best_global_step": 1, "best_metric": 2.0}
    (tmp_path / "checkpoint-2/trainer_state.json").write_text(json.dumps(state))
    checkpoints.write_manifest(tmp_path / "checkpoint-2")
    shutil.rmtree(tmp_path / "checkpoint-1")
    trainer = trained(private, output_dir=str(tmp_path), max_steps=3)
    trainer.train(resume_from_checkpoint=True)
    assert "that of update 1 (2.0)" in caplog.text
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    assert trainer.state.best_metric < 2


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints", "end"])
def test_what_is_uploaded(private: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    uploads: list[dict[str, bytes]] = []

    def upload(_: HfApi, *, folder_path: str, ignore_patterns: Any = None, **__: Any) -> None:
        paths = {path.relative_to(folder_path).as_posix(): path for path in Path(folder_path).rglob("*")}
        names = filter_repo_objects(
            [name for name, path in paths.items() if path.is_file()], ignore_patterns=ignore_patterns
        )
        uploads.append({name: paths[name].read_bytes() for name in names})

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="org/student"))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    changes = {"push_to_hub": True, "hub_model_id": "org/student", "hub_strategy": strategy}
    trainer = trained(private, output_dir=str(tmp_path / "run"), **changes)
    trainer.train()
    files = RunArguments(train_annotations=str(private / "train.json"), train_images=str(private))
    write_run_file(tmp_path / "run", files, trainer.args)
    (tmp_path / "run/worst.png").write_bytes(b"pixels of private images")
    trainer.push_to_hub(tags="mine")
    assert not {"run.yaml", "worst.png"} & set(uploads[-1])
    assert {"object-detection", "mine"} <= set(ModelCard.load(tmp_path / "run/README.md").data.tags)
    assert len(uploads) == {"every_save": 3, "end": 1}.get(strategy, 5)
    for number, files in enumerate(uploads):
        folder = tmp_path / f"upload-{number}"
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        assert_private(private, folder)
        if (folder / checkpoints.MANIFEST).exists():
            assert checkpoints.fault(folder) is None
        assert not list(folder.glob("_*"))


def test_a_teacher_of_the_hub_is_named(private: Path, tmp_path: Path) -> None:
    teacher = make_detector(1, 12)
    teacher.config._name_or_path = "org/teacher"
    trainer = trained(private, teacher=teacher, output_dir=str(tmp_path / "run"))
    trainer.save_model()
    assert json.loads((tmp_path / "run" / provenance.FILE).read_text())["teacher"]["name_or_path"] == "org/teacher"
    card = ModelCard.load(tmp_path / "run/README.md")
    assert card.data.base_model == "org/teacher"
    assert "distilled from `org/teacher`" in card.text


def test_a_teacher_in_a_folder_below_is_not_taken_for_one_of_the_hub(
    private: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_detector(1, 12).save_pretrained(tmp_path / "mine/teacher")
    monkeypatch.chdir(tmp_path)
    trainer = trained(private, teacher="mine/teacher", output_dir="run")
    trainer.save_model()
    assert "mine" not in (tmp_path / "run" / provenance.FILE).read_text()
    assert "base_model" not in (tmp_path / "run/README.md").read_text()
