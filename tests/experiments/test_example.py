"""The examples: `distill_coco.py` as a newcomer runs it, in a small form; the options of both."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import DeformableDetrImageProcessor

from crosskd_hf.create import DetectorSpec, build_detector
from crosskd_hf.data.categories import CategoryMap
from crosskd_hf.models import DetectionImageProcessor
from tests import fresh
from tests.fake_hub import FakeHub
from tests.ports import free_port
from tests.tiny_run import make_deformable_detr

ROOT = Path(__file__).parents[2]
SMALL = [
    *("--num_synthetic_images", "24", "--max_steps", "3", "--logging_steps", "1", "--shortest_edge", "64"),
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
    return [
        {k: v for k, v in entry.items() if k.startswith("loss") or "/" in k} for entry in history if "loss" in entry
    ]


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
    rows = ("teacher ", "baseline ", "distilled ")
    assert [line.split()[0] for line in output.splitlines() if line.startswith(rows)] == [row.strip() for row in rows]
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert output.splitlines()[-1].startswith(("{'score'", "nothing found"))


def test_every_saved_folder_is_a_plain_student(run: tuple[Path, str]) -> None:
    folder, _ = run
    for name in ("teacher", "baseline", "distilled"):
        keys = load_file(folder / name / "model.safetensors").keys()
        assert keys
        assert not [key for key in keys if key.startswith(("teacher", "distiller"))]
    record = json.loads((folder / "distilled" / "distillation.json").read_text())
    assert record["distillation"]["methods"]["crosskd"]["cut"] == 3
    assert not (folder / "baseline" / "distillation.json").exists()


def test_distillation_losses_are_logged_under_their_names(run: tuple[Path, str]) -> None:
    folder, _ = run
    last = losses(folder / "distilled")[-1]
    assert {"loss_cls", "loss_bbox", "loss_dfl", "crosskd/cls", "crosskd/reg"} <= set(last)
    assert all(value > 0 for value in last.values())
    assert not [key for key in losses(folder / "baseline")[-1] if "/" in key]


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
def test_student_answers_in_a_pipeline_of_a_fresh_process(run: tuple[Path, str], hidden: bool, tmp_path: Path) -> None:
    classes = ["circle", "square", "triangle", "star"]
    options = "trust_remote_code=True" if hidden else ""
    code = PIPELINE.format(hidden=hidden, folder=str(run[0] / "distilled"), options=options, classes=classes)
    done = fresh.run(code, folder=tmp_path)
    assert done.stdout.strip().endswith("answered"), done.stderr[-2000:]


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
@pytest.mark.slow
def test_two_processes_log_the_losses_of_one(tmp_path: Path) -> None:
    steps = ("--steps", "teacher", "distilled")
    one = example(*SMALL, *steps, "--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "one"))
    assert one.returncode == 0, one.stderr[-2000:]
    launcher = (
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *(
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            str(free_port()),
        ),
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
        (("--push_to_hub", "--steps", "teacher", "baseline"), "pushes the distilled student"),
        (("--steps", "warm_up"), "choose from teacher, baseline, distilled"),
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
    program = fresh.script(ROOT / "examples" / "distill_coco.py")
    done = fresh.run(program, *SMALL, "--output_dir", str(tmp_path), "--methods", "crosskd:cut=9", folder=ROOT)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("error: crosskd: cut=9")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "teacher").exists()


class TestGivenStudent:
    NAMES = ("star", "triangle", "square", "circle")  # the data has them the other way round

    def save(self, folder: Path, kind: str = "gfl", names: tuple[str, ...] = NAMES) -> Path:
        categories = CategoryMap(tuple(range(len(names))), names)
        torch.manual_seed(0)
        build_detector(DetectorSpec(kind, "test_resnet", width=16), categories).save_pretrained(folder)
        size = {"shortest_edge": 48, "longest_edge": 96}
        DetectionImageProcessor(size=size, image_mean=[0.1, 0.2, 0.3]).save_pretrained(folder)
        return folder

    def test_keeps_its_processor_and_its_classes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(ROOT / "examples")
        module = importlib.import_module("distill_coco")
        student = self.save(tmp_path / "student")
        options = ("--student", str(student), "--steps", "baseline", "--output_dir", str(tmp_path / "out"))
        quiet = ("--learning_rate", "1e-12", "--dataloader_num_workers", "0")
        arguments, config = module.parse([*SMALL, *options, *quiet])
        comparison = module.prepare(arguments, config)
        assert comparison.train.categories == CategoryMap((7, 4, 3, 1), self.NAMES)
        assert comparison.val.categories == comparison.train.categories
        models: dict[str, Any] = {}
        module.run(arguments, comparison, models)
        saved = tmp_path / "out" / "baseline"
        before, after = (json.loads((folder / "config.json").read_text()) for folder in (student, saved))
        assert after["id2label"] == before["id2label"] == {str(i): name for i, name in enumerate(self.NAMES)}
        assert after["category_ids"] == [7, 4, 3, 1]
        files = [folder / "preprocessor_config.json" for folder in (student, saved)]
        assert files[0].read_text() == files[1].read_text()
        assert models["baseline"][1].size == {"shortest_edge": 48, "longest_edge": 96}
        weights = [load_file(folder / "model.safetensors") for folder in (student, saved)]
        assert all(torch.allclose(weights[0][key], weights[1][key], atol=1e-6) for key in weights[0])

    @pytest.mark.parametrize(
        ("kind", "names", "message"),
        [
            ("faster_rcnn", NAMES, "only models of one family"),
            ("gfl", ("star", "triangle"), "has other classes than the data.*2 classes, 'star', 'triangle'.*4 classes"),
            ("gfl", (*NAMES, "moon"), "has other classes than the data.*5 classes.*4 classes"),
        ],
    )
    def test_is_checked_before_a_teacher_is_trained(
        self, kind: str, names: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.syspath_prepend(ROOT / "examples")
        module = importlib.import_module("distill_coco")
        student = self.save(tmp_path / "student", kind, names)
        arguments, config = module.parse([*SMALL, "--student", str(student), "--output_dir", str(tmp_path / "out")])
        with pytest.raises(ValueError, match=message):
            module.run(arguments, module.prepare(arguments, config), {})
        assert not (tmp_path / "out" / "teacher").exists()

    def test_of_detr_keeps_the_head_of_its_classes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(ROOT / "examples")
        module = importlib.import_module("distill_deformable_detr")
        student = make_deformable_detr(0)
        student.config.id2label = dict(enumerate(self.NAMES))
        student.save_pretrained(tmp_path / "student")
        DeformableDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "student")
        options = ("--student", str(tmp_path / "student"), "--output_dir", str(tmp_path / "out"))
        arguments, config = module.parse([*SMALL, *options])
        comparison = module.prepare(arguments, config)
        assert comparison.train.categories.names == self.NAMES
        model, _ = module.given_student(arguments.student, comparison.train.categories)
        assert model.config.id2label == dict(enumerate(self.NAMES))
        assert torch.equal(model.class_embed[0].weight, student.class_embed[0].weight)

    def test_of_detr_with_other_classes_keeps_the_rows_of_those_it_shares(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.syspath_prepend(ROOT / "examples")
        module = importlib.import_module("distill_deformable_detr")
        student = make_deformable_detr(0)
        student.config.id2label = dict(enumerate(("star", "moon", "square", "sun")))
        student.save_pretrained(tmp_path / "student")
        DeformableDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "student")
        categories = CategoryMap((1, 2, 3), ("circle", "square", "star"))
        model, _ = module.given_student(str(tmp_path / "student"), categories)
        assert list(model.config.id2label.values()) == ["circle", "square", "star"]
        assert torch.equal(model.class_embed[0].weight[1:], student.class_embed[0].weight[[2, 0]])


def test_a_teacher_with_other_classes_is_evaluated_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    module = importlib.import_module("distill_coco")
    options = ("--output_dir", str(tmp_path / "out"), "--dataloader_num_workers", "0")
    arguments, config = module.parse([*SMALL, *options])
    comparison = module.prepare(arguments, config)
    spec = DetectorSpec("gfl", "test_resnet", width=16)
    names = comparison.train.categories.names
    order = [3, 1, 0, 2]
    torch.manual_seed(0)
    model = build_detector(spec, CategoryMap((1, 2, 3, 4, 5), (*names, "moon")))
    torch.nn.init.normal_(model.head.classifier.weight, std=0.3)
    other = build_detector(spec, CategoryMap((1, 2, 3, 4, 5), (*(names[i] for i in order), "moon")))
    other.load_state_dict(model.state_dict())
    other.head.classifier.load_state_dict({k: v[[*order, 4]] for k, v in model.head.classifier.state_dict().items()})
    processor = DetectionImageProcessor(size=arguments.image_size, score_threshold=0.0)
    for name, detector in (("one", model), ("two", other)):
        comparison.evaluate(name, detector, processor)
    keys = [f"map_{name}" for name in (*names, "moon")]
    assert [comparison.results["one"][key] for key in keys] == pytest.approx(
        [comparison.results["two"][key] for key in keys], nan_ok=True
    )
    stranger = build_detector(spec, CategoryMap((1, 2), ("moon", "circle")))
    comparison.evaluate("three", stranger, processor)
    assert "three" not in comparison.results
    assert "three is not evaluated. The data set has classes that the model doesn't know" in caplog.text
