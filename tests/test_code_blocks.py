"""What README and model card show for pasting runs as it stands, in an empty folder, on a CPU, without a network."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from crosskd_hf import cli
from crosskd_hf.data.shapes import make_shapes
from tests.tiny_formats import MAKERS
from tests.tiny_run import make_trainer

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Commands that install or that run for minutes, and where each of them is tried.
ELSEWHERE = {
    "make demo": "the example without arguments, tests/experiments/test_example.py runs it with less data",
    "make test": "this very run",
    "python3 -m venv": "installing needs a network; continuous integration installs before it tests",
    ". .venv/bin/activate": "continuous integration calls the programs of the environment",
    "pip install": "installing needs a network; continuous integration installs before it tests",
    "git clone": "needs a network",
    "torchrun": "tests/training/test_distributed.py launches by it",
    "accelerate launch": "tests/experiments/test_example.py and tests/training/test_distributed.py launch",
}
# What makes a command of the README small enough for a test, and keeps it from downloading a pretrained backbone.
SMALL = "--max_steps 2 --shortest_edge 64 --longest_edge 64 --width 64 --use_cpu --disable_tqdm true --eval_strategy no"
OFFLINE = {"--student_backbone resnet18 --backbone_weights timm": "--student_backbone test_resnet"}


def blocks(text: str, language: str) -> list[str]:
    return [code for name, code in BLOCK.findall(text) if name == language]


def commands(block: str) -> list[str]:
    """The commands of a shell block, continued lines joined, without comments."""
    lines = block.replace("\\\n", " ").splitlines()
    return [" ".join(shlex.split(line, comments=True)) for line in lines if line.split("#")[0].strip()]


def execute(code: str, folder: Path) -> str:
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


@pytest.mark.timeout(400)
@pytest.mark.parametrize("code", blocks(README, "python"))
def test_python_of_the_readme(code: str, tmp_path: Path) -> None:
    assert float(execute(code, tmp_path).splitlines()[-1]) >= 0  # it ends with an AP
    assert (tmp_path / "student" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_commands_of_the_readme(tmp_path: Path) -> None:
    paths = make_shapes(tmp_path, 4, 2, 64)
    for name in ("train", "val"):
        getattr(paths, f"{name}_annotations").rename(tmp_path / f"{name}.json")
    make_trainer(tmp_path / "made").save_model(str(tmp_path / "TEACHER"))
    listed = [line for block in blocks(README, "bash") for line in commands(block)]
    own = [line for line in listed if not line.startswith(tuple(ELSEWHERE))]
    assert len(own) >= 2
    program = Path(sys.executable).parent
    for line in own:
        for published, offline in OFFLINE.items():
            line = line.replace(published, offline)
        line = line.replace("examples/", f"{ROOT}/examples/") + (f" {SMALL}" if "examples/" in line else "")
        line = re.sub(r"^(python|crosskd-hf) ", rf"{program}/\1 ", line)
        process = subprocess.run(
            shlex.split(line), cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300
        )
        assert process.returncode == 0, f"{line}\n{process.stdout[-1000:]}\n{process.stderr[-3000:]}"


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
        words = shlex.split(line.replace("gfl:resnet18", "gfl:test_resnet"))
        words += SMALL.split() if "train" in words else []
        assert cli.main(words[1:]) == 0, line


TITLES = {"coco": "COCO", "roboflow": "Roboflow", "voc": "PASCAL VOC", "yolo": "YOLO", "csv": "csv"}


@pytest.mark.parametrize(("name", "title"), [*TITLES.items(), ("imagefolder", "imagefolder")])
def test_trees_of_the_page_on_data(name: str, title: str, tmp_path: Path) -> None:
    """Each folder tree is one that was read: the tests of the formats make such folders."""
    section = DATA_PAGE.split(f"### {title}\n")[1].split("\n### ")[0]
    root, *paths = blocks(section, "text")[0].split()
    folder = MAKERS[name](tmp_path / root)
    assert len(paths) >= 3
    assert not [path for path in paths if not (folder / path).is_file()]
