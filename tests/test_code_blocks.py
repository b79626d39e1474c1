"""What README and model card show for pasting runs as it stands, in an empty folder, on a CPU, without a network."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from tests import fresh
from tests.page_runner import ROOT, blocks, commands, elsewhere, run_command, run_page
from tests.tiny_formats import MAKERS
from tests.tiny_run import make_trainer

README = (ROOT / "README.md").read_text(encoding="utf-8")


def execute(code: str, folder: Path) -> str:
    done = fresh.run(code, folder=folder, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.timeout(400)
@pytest.mark.parametrize("code", blocks(README, "python"))
def test_python_of_the_readme(code: str, tmp_path: Path) -> None:
    assert float(execute(code, tmp_path).splitlines()[-1]) >= 0  # it ends with an AP
    assert (tmp_path / "student" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_commands_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("crosskd_hf.experiments.distill._ap_of_teacher", lambda comparison: 0.5)  # of two updates
    listed = [line for block in blocks(README, "bash") for line in commands(block)]
    assert len([line for line in listed if not elsewhere(line)]) >= 5
    run_page(re.sub(r"^```python$", "```text", README, flags=re.MULTILINE), tmp_path)
    assert (tmp_path / "run" / "distilled" / "model.safetensors").is_file()
    assert (tmp_path / "found" / "predictions.json").is_file()


@pytest.mark.parametrize("family", ["gfl", "deformable_detr"])
def test_python_of_the_model_card(family: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", family=family)
    folder = tmp_path / trainer._card().data.model_name
    trainer.save_model(str(folder))
    Image.new("RGB", (64, 48)).save(tmp_path / "image.jpg")
    (code,) = blocks((folder / "README.md").read_text(encoding="utf-8"), "python")
    assert ("trust_remote_code=True" in code) == (family == "gfl")
    assert execute(code, tmp_path).startswith("[")


DATA_PAGE = (ROOT / "docs/data.md").read_text(encoding="utf-8")


@pytest.fixture
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page on data calls `photos` and `saved`."""
    MAKERS["voc"](tmp_path / "photos")
    MAKERS["datasets"](tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("code", blocks(DATA_PAGE, "python"))
def test_python_of_the_page_on_data(code: str, data_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "a block of docs/data.md", "exec"), {"__name__": "__main__"})
    assert re.search(r"\d$", capsys.readouterr().out.strip())  # it ends with the number of images


def test_commands_of_the_page_on_data(data_folder: Path) -> None:
    lines = [line for block in blocks(DATA_PAGE, "bash") for line in commands(block)]
    assert len(lines) == 4
    for line in lines:
        run_command(line, data_folder)


TITLES = {"coco": "COCO", "roboflow": "Roboflow", "voc": "PASCAL VOC", "yolo": "YOLO", "csv": "csv"}


@pytest.mark.parametrize(("name", "title"), [*TITLES.items(), ("imagefolder", "imagefolder")])
def test_trees_of_the_page_on_data(name: str, title: str, tmp_path: Path) -> None:
    """Each folder tree is one that was read: the tests of the formats make such folders."""
    section = DATA_PAGE.split(f"### {title}\n")[1].split("\n### ")[0]
    root, *paths = blocks(section, "text")[0].split()
    folder = MAKERS[name](tmp_path / root)
    assert len(paths) >= 3
    assert not [path for path in paths if not (folder / path).is_file()]
