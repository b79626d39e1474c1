"""The pages for users: their blocks run as they stand, their commands are understood, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from crosskd_hf.cli.parser import make_parser as make_commands
from crosskd_hf.data.shapes import make_shapes
from crosskd_hf.distillation import METHODS
from crosskd_hf.distillation.detectors import VIEWS
from crosskd_hf.experiments.command_line import Words, make_parser, parse
from crosskd_hf.experiments.plan import DistillArguments
from crosskd_hf.experiments.train import RunArguments
from tests.page_runner import ROOT, blocks, commands, run_command, run_page, tiny
from tests.tiny_formats import picture, write, xml
from tests.tiny_run import make_trainer

PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
# Pages whose blocks are not run by this file's tests, and what is.
TRIED_ELSEWHERE = {
    "cli.md": "COCO and published checkpoints; its options are read below, its commands run in tests/cli",
    "data.md": "tests/test_code_blocks.py",
    "detr.md": "parts of examples/distill_deformable_detr.py, which tests/experiments/test_example.py runs",
    "figures.md": "trained models; tests/cli/test_analyse.py runs every command on tiny ones",
    "pairs.md": "models of full size; tests/experiments/test_check_pair.py has small ones",
    "reproduce.md": "COCO on eight GPUs; tests/experiments/test_presets_dry.py runs every preset in small",
    "results.md": "tests/parity holds the golden cases",
}
TRAINS = ("choose.md", "faq.md", "look.md", "logs.md", "resume.md", "teachers.md")


def text(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they were, when the page is done."""
    for registry in (METHODS, VIEWS):
        for name in registry:
            monkeypatch.setitem(registry, name, registry[name])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registries: None) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages call `photos`, `TEACHER` and `run`."""
    root = tmp_path_factory.mktemp("finished")
    make_shapes(root / "photos", 6, 3, 64)
    make_trainer(root / "made").save_model(str(root / "TEACHER"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        any_teacher(patch)
        line = "crosskd-hf distill --data photos --student gfl:resnet18 --teacher gfl:resnet50 --output_dir run"
        run_command(line, root)
    return root


def any_teacher(patch: pytest.MonkeyPatch) -> None:
    """Teachers of two updates may find nothing, which stops a run."""
    patch.setattr("crosskd_hf.experiments.distill._ap_of_teacher", lambda comparison: 0.5)
    patch.setattr("crosskd_hf.training.trainer.teacher_metrics", lambda *arguments: {"map": 0.5})


def make_blood_cells(root: Path) -> None:
    """A data set of four images in the form of BCCD."""
    splits = {"train": ("00000", "00001"), "val": ("00002",), "test": ("00003",)}
    for split, numbers in splits.items():
        write(root / f"ImageSets/Main/{split}.txt", "".join(f"BloodImage_{number}\n" for number in numbers))
        for number in numbers:
            picture(root / f"JPEGImages/BloodImage_{number}.jpg")
            objects = [("RBC", 4, 2, 20, 12), ("WBC", 10, 5, 20, 10)]
            write(root / f"Annotations/BloodImage_{number}.xml", xml(f"BloodImage_{number}.jpg", objects))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_tutorial(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_blood_cells(folder / "photos")
    any_teacher(monkeypatch)
    run_page(text("tutorial.md"), folder)
    assert (folder / "run" / "results.json").is_file()
    assert (folder / "found" / "predictions.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", TRAINS)
def test_pages_that_train(name: str, finished: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("photos", "TEACHER", "run"):
        shutil.copytree(finished / part, folder / part)
    any_teacher(monkeypatch)
    run_page(text(name), folder)


def test_the_page_on_installing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_page(text("install.md"), folder)
    assert "transformers" in capsys.readouterr().out


def test_write_your_own_method(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    any_teacher(monkeypatch)
    run_page(text("own_method.md"), folder)
    assert (folder / "student" / "model.safetensors").is_file()
    printed = capsys.readouterr().out
    assert "'attention/map'" in printed
    assert "| `power` | `2` | float, at least 1 | Exponent of the activations. |" in printed


def test_add_a_detector(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_page(text("own_detector.md"), folder)
    printed = capsys.readouterr().out
    assert "'eval_map'" in printed
    assert "{'fitnets/features': " in printed


def test_every_page_with_code_is_run() -> None:
    run = {*TRAINS, *TRIED_ELSEWHERE, "tutorial.md", "install.md", "own_method.md", "own_detector.md"}
    with_code = {name for name in PAGES if any(blocks(text(name), kind) for kind in ("python", "bash", "sh"))}
    assert with_code == run


def own_commands() -> list[tuple[str, str]]:
    pages = [("README.md", (ROOT / "README.md").read_text(encoding="utf-8"))]
    pages += [(name, text(name)) for name in PAGES if name != "own_method.md"]  # its command needs its file, and is run
    found = [
        (name, command)
        for name, page in pages
        for kind in ("bash", "sh")
        for block in blocks(page, kind)
        for command in commands(block)
    ]
    return [(name, command) for name, command in found if command.startswith("crosskd-hf ")]


@pytest.mark.parametrize(("name", "command"), own_commands())
def test_commands_of_pages_are_understood(name: str, command: str, folder: Path) -> None:
    """Without running them: every command and option is one that there is."""
    words = shlex.split(tiny(command))[1:]
    if words[0] in ("train", "distill"):
        parser = make_parser(RunArguments if words[0] == "train" else DistillArguments)
        if words[1].endswith(".yaml"):
            path = folder / words[1]
            path.parent.mkdir(exist_ok=True)
            path.write_text("learning_rate: 0.001\n")
        parse(parser, Words.of(words[1:], parser))
    elif words != ["--version"]:
        make_commands(words[0]).parse_args(words)


def anchors(path: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))], ids=str
)
def test_links_lead_somewhere(path: Path) -> None:
    page = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", page):
        file, _, anchor = target.partition("#")
        if file.startswith(("http:", "https:")):
            continue
        other = (path.parent / file).resolve() if file else path
        assert other.exists(), f"{path.name}: {target}"
        assert not anchor or anchor in anchors(other), f"{path.name}: {target}"


def test_the_index_lists_every_page() -> None:
    listed = set(re.findall(r"\]\((\w+\.md)\)", text("README.md")))
    assert listed == {name for name in PAGES if name != "README.md"}
