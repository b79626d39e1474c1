"""The examples: `distill_coco.py` as a newcomer runs it, in a small form; the options of both."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fake_hub import FakeHub

ROOT = Path(__file__).parents[2]
SMALL = [
    *("--num_made_images", "24", "--max_steps", "3", "--logging_steps", "1", "--shortest_edge", "64"),
    *("--longest_edge", "64", "--save_strategy", "no", "--eval_strategy", "no", "--disable_tqdm", "true", "--use_cpu"),
]


def example(
    *arguments: str,
    launcher: tuple[str, ...] = (sys.executable,),
    name: str = "distill_coco",
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    command = [*launcher, str(ROOT / "examples" / f"{name}.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300, env=environment
    )


def losses(folder: Path) -> list[dict[str, float]]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{k: v for k, v in entry.items() if k.startswith("loss")} for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, hub: FakeHub) -> tuple[Path, str]:
    """The folder and the output of a run of all steps that pushes its student to the Hub."""
    folder = tmp_path_factory.mktemp("example")
    push = ("--push_to_hub", "--hub_model_id", "me/student")
    environment = hub.environment(tmp_path_factory.mktemp("cache"))
    process = example(*SMALL, *push, "--output_dir", str(folder), environment=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    return folder, process.stdout


def test_prints_a_table_and_writes_a_picture(run: tuple[Path, str]) -> None:
    folder, output = run
    assert [line.split()[0] for line in output.splitlines() if line.startswith(("teacher", "alone", "distilled"))] == [
        "teacher",
        "alone",
        "distilled",
    ]
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert output.splitlines()[-1].startswith(("{'score'", "nothing found"))


def test_every_saved_folder_is_a_plain_student(run: tuple[Path, str]) -> None:
    folder, _ = run
    for name in ("teacher", "alone", "distilled"):
        keys = load_file(folder / name / "model.safetensors").keys()
        assert keys
        assert not [key for key in keys if key.startswith(("teacher", "distiller"))]
    record = json.loads((folder / "distilled" / "distillation.json").read_text())
    assert "cut" in json.dumps(record)
    assert not (folder / "alone" / "distillation.json").exists()


def test_distillation_losses_are_logged_under_their_names(run: tuple[Path, str]) -> None:
    folder, _ = run
    last = losses(folder / "distilled")[-1]
    assert {"loss_cls", "loss_bbox", "loss_dfl", "loss_cls_kd", "loss_reg_kd"} <= set(last)
    assert all(value > 0 for value in last.values())
    assert not [key for key in losses(folder / "alone")[-1] if key.endswith("_kd")]


def test_the_distilled_student_alone_is_pushed(run: tuple[Path, str], hub: FakeHub) -> None:
    assert list(hub.files) == ["me/student"]
    pushed = hub.files["me/student"]
    assert pushed["model.safetensors"] == (run[0] / "distilled" / "model.safetensors").read_bytes()
    assert {"README.md", "config.json", "preprocessor_config.json", "gfl.py"} <= pushed.keys()
    assert not [path for path in pushed if path.endswith((".bin", ".pt", ".pth"))]


PIPELINE = """
import sys
if {hidden}:
    sys.modules["crosskd_hf"] = None
else:
    import crosskd_hf
from PIL import Image
from transformers import pipeline
found = pipeline("object-detection", model={folder!r}, {options})(Image.new("RGB", (64, 48)), threshold=0.0)
assert all(detection["label"] in {classes!r} for detection in found)
assert "crosskd_hf.training.trainer" not in sys.modules  # nor the data sets: importing stays quick
print("answered")
"""


@pytest.mark.parametrize("hidden", [False, True])
def test_student_answers_in_a_pipeline_of_a_fresh_process(run: tuple[Path, str], hidden: bool) -> None:
    classes = ["circle", "square", "triangle", "star"]
    options = "trust_remote_code=True" if hidden else ""
    code = PIPELINE.format(hidden=hidden, folder=str(run[0] / "distilled"), options=options, classes=classes)
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120
    )
    assert process.stdout.strip().endswith("answered"), process.stderr[-2000:]


def test_a_pushed_student_answers_by_its_id_without_the_package(
    run: tuple[Path, str], hub: FakeHub, tmp_path: Path
) -> None:
    classes = ["circle", "square", "triangle", "star"]
    code = PIPELINE.format(hidden=True, folder="me/student", options="trust_remote_code=True", classes=classes)
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
        env=hub.environment(tmp_path),
    )
    assert process.stdout.strip().endswith("answered"), process.stderr[-2000:]


@pytest.mark.distributed
def test_two_processes_log_the_losses_of_one(tmp_path: Path) -> None:
    steps = ("--steps", "teacher", "distilled")
    one = example(*SMALL, *steps, "--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "one"))
    assert one.returncode == 0, one.stderr[-2000:]
    launcher = (
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "29641"),
    )
    two = example(
        *SMALL, *steps, "--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "two"), launcher=launcher
    )
    assert two.returncode == 0, two.stderr[-2000:]
    for name in ("teacher", "distilled"):
        pairs = zip(losses(tmp_path / "one" / name), losses(tmp_path / "two" / name), strict=True)
        for expected, got in pairs:
            assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_a_trained_detr_student_goes_on(tmp_path: Path) -> None:
    first = example(*SMALL, "--output_dir", str(tmp_path / "first"), name="distill_deformable_detr")
    assert first.returncode == 0, first.stderr[-2000:]
    models = ("--student", str(tmp_path / "first" / "distilled"), "--teacher", str(tmp_path / "first" / "teacher"))
    options = ("--steps", "distilled", "--output_dir", str(tmp_path / "second"), "--learning_rate", "1e-12")
    second = example(*SMALL, *models, *options, name="distill_deformable_detr")
    assert second.returncode == 0, second.stderr[-2000:]
    before, after = (load_file(tmp_path / run / "distilled" / "model.safetensors") for run in ("first", "second"))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)
    assert losses(tmp_path / "second" / "distilled")[-1]["loss"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--train_annotations", "a.json"), "missing: train_images"),
        (("--steps", "distilled"), "needs a teacher"),
        (("--push_to_hub", "--steps", "teacher", "alone"), "pushes the distilled student"),
        (("--steps", "warm_up"), "choose from teacher, alone, distilled"),
    ],
)
@pytest.mark.parametrize("name", ["distill_coco", "distill_deformable_detr"])
def test_bad_arguments_are_refused_before_anything_is_read(
    name: str, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    with pytest.raises(ValueError, match=message):
        importlib.import_module(name).parse([*SMALL, *arguments])


def test_a_preset_needs_the_data_it_was_published_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    with pytest.raises(ValueError, match="is an experiment on COCO: give --train_images, --train_annotations"):
        importlib.import_module("distill_coco").parse(["--preset", "crosskd-gfl-r18-from-r50", "--teacher", "t"])


def test_a_pair_that_cannot_be_distilled_ends_with_one_line_before_training(tmp_path: Path) -> None:
    process = example(*SMALL, "--output_dir", str(tmp_path), "--cut", "9")
    assert process.returncode != 0
    assert process.stderr.splitlines()[-1].startswith("error: cut=9")
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "teacher").exists()
