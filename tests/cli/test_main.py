"""What all commands share: messages, exit statuses, help, and names of others on a terminal."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForObjectDetection

from crosskd_hf.cli import main
from crosskd_hf.data.shapes import ShapesPaths
from tests.cli.running import Output, run


@pytest.mark.parametrize("command", ["methods", "env"])  # more and less than a buffer
def test_a_reader_that_has_seen_enough_gets_no_error(command: str) -> None:
    words = [sys.executable, "-m", "crosskd_hf", command]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()  # as head does
        assert process.stderr.read() == ""
    assert process.returncode == 1


@pytest.mark.parametrize("name", ["\x1b[31mred", "two\nlines", "\u202egnp.exe", "<b>bold</b>"])
def test_names_of_others_stay_text(
    tmp_path: Path, shapes: ShapesPaths, detector: Path, capsys: Output, name: str
) -> None:
    """In the table of classes, the report on a pair, the findings of a data set and the errors of files."""
    model = AutoModelForObjectDetection.from_pretrained(detector)
    model.config.id2label = {**model.config.id2label, 0: name}
    content = json.loads(shapes.val_annotations.read_text())
    content["categories"][0]["name"] = name
    (tmp_path / "val.json").write_text(json.dumps(content))
    shutil.copytree(detector, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / f"{name}.png".replace("/", "")).write_bytes(b"no image")
    assert run("evaluate", tmp_path / "model", tmp_path / "val.json", shapes.val_images) == 0
    run("check-pair", tmp_path / "model", detector)
    run("check-data", tmp_path / "val.json", shapes.val_images, "--all")
    assert run("evaluate", detector, tmp_path / "val.json", shapes.val_images) == 1
    run("predict", tmp_path / "model", tmp_path / "photos", "--out", tmp_path / "out", "--device", "cpu")
    captured = capsys.readouterr()
    printed = captured.out + captured.err.replace("\r", "\n")  # progress bars
    assert not [line for line in printed.splitlines() if line.startswith("lines")]
    assert not {"\x1b", "\u202e"} & set(printed)
    assert (name if name.isprintable() else name.encode("unicode_escape").decode()) in captured.out


def test_a_terminal_of_ascii(tmp_path: Path, detector: Path, shapes: ShapesPaths) -> None:
    content = json.loads(shapes.val_annotations.read_text())
    content["images"][0]["file_name"] = "Käse 猫.png"
    (tmp_path / "val.json").write_text(json.dumps(content))
    words = [sys.executable, "-m", "crosskd_hf", "check-data", tmp_path / "val.json", shapes.val_images]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    done = subprocess.run(words, capture_output=True, env=environment, timeout=100)
    assert done.returncode == 1
    assert b"K\\xe4se \\u732b.png" in done.stdout


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["check-data", "photos", "--format", "voc"], "did you mean '--data-format'"),
        (["evaluate", "model", "photos", "--most-detections=300"], "did you mean '--max-detections'"),
        (["predict", "model", "photos", "--treshold", "0.3"], "did you mean '--threshold'"),
    ],
)
def test_near_names_of_options(words: list[str], hint: str, capsys: Output) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["fly"], ["env", "--bogus"], ["convert"], ["predict", "a"]])
def test_wrong_usage(words: list[str], capsys: Output) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage: crosskd-hf" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["convert", "mmdet", "-h"], ["check-pair", "-h"], ["predict", "-h"]])
def test_help(words: list[str], capsys: Output) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 0
    assert "usage: crosskd-hf" in capsys.readouterr().out


def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError):
        run("convert", "mmdet", tmp_path / "a.pth", tmp_path, "--debug")
    monkeypatch.setenv("CROSSKD_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        run("convert", "mmdet", tmp_path / "a.pth", tmp_path)


def test_an_error_of_the_program_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setattr("crosskd_hf.data.inspection.check_data", lambda *_: 1 / 0)
    assert run("check-data", "a", "b") == 1
    assert capsys.readouterr().err == (
        "error: ZeroDivisionError: division by zero (run again with --debug to see where)\n"
    )


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("crosskd_hf.data.inspection.check_data", interrupt)
    assert run("check-data", "a", "b") == 130


def test_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "crosskd_hf", "convert", "mmdet", "nowhere.pth", "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.endswith("error: There is no checkpoint nowhere.pth.\n")
    assert "Traceback" not in done.stderr
