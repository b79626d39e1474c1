"""What a run of a preset says before and after, and the row that it leaves."""

import contextlib
import csv
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser

from crosskd_hf.experiments import data_options, presets
from crosskd_hf.experiments.presets import preset
from crosskd_hf.experiments.published import aim, is_whole, outcome, record
from crosskd_hf.training.config import CrossKDConfig

METRICS = {"map": 0.4213, "map_50": 0.6, "map_75": 0.45}


def test_before_the_first_step_the_target_is_named() -> None:
    text = aim(preset("crosskd-gfl-r50-from-r101"))
    assert "aims at AP 43.7 (t5_crosskd, s2_r50_ck)" in text
    assert "gfl_r101_fpn_ms-2x_coco, AP 44.9" in text
    fcos = preset("crosskd-fcos-r50-from-r101")
    assert "Without --backbone_checkpoint FILE" in aim(fcos)
    assert "Without --backbone_checkpoint FILE" not in aim(fcos, "resnet50_caffe.pth")
    assert "aims at an AP that was not published" in aim(preset("crosskd-retinanet-r18-from-r50"))


def test_afterwards_ours_stands_beside_the_published() -> None:
    text = outcome(preset("crosskd-gfl-r50-from-r101"), METRICS)
    assert text == "crosskd-gfl-r50-from-r101: AP 42.1, published 43.7, difference -1.6"
    assert outcome(preset("retinanet-r18"), METRICS) == "retinanet-r18: AP 42.1; none was published"


def test_single_ious_where_they_were_published() -> None:
    metrics = METRICS | {"map_50": 0.75, "map_60": 0.7, "map_70": 0.6, "map_80": 0.5, "map_90": 0.2}
    lines = outcome(preset("gfl-r18-voc"), metrics).splitlines()
    assert lines[0] == "gfl-r18-voc: AP 42.1, published 51.8, difference -9.7"
    assert lines[1] == "  AP50 75.0, published 75.8, difference -0.8"
    assert [line.split()[0] for line in lines[1:]] == ["AP50", "AP60", "AP70", "AP80", "AP90"]


def test_a_row_with_the_name_of_the_preset(tmp_path: Path) -> None:
    experiment = preset("crosskd-gfl-r50-from-r101")
    args = CrossKDConfig(str(tmp_path / "run"), use_cpu=True, **experiment.training_arguments())
    assert is_whole(experiment, args)
    assert not is_whole(experiment, CrossKDConfig(str(tmp_path / "run"), use_cpu=True, schedule="1x", max_steps=2))
    path = tmp_path / "results.csv"
    record(path, experiment, METRICS, args)
    first = path.read_text().splitlines()[0]
    record(path, preset("gfl-r18"), METRICS, args)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert path.read_text().splitlines()[0] == first
    assert [row["run"] for row in rows] == ["crosskd-gfl-r50-from-r101", "gfl-r18"]
    assert (rows[0]["map"], rows[0]["methods"], rows[1]["teacher"]) == ("42.13", "crosskd:statistics=batch", "")


def test_an_older_file_keeps_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("run,map\nold,1.00\n")
    args = CrossKDConfig(str(tmp_path / "run"), use_cpu=True, schedule="1x")
    record(path, preset("gfl-r18"), METRICS, args)
    assert path.read_text() == "run,map\nold,1.00\ngfl-r18,42.13\n"


@pytest.mark.parametrize(("process", "decoded"), [(0, True), (1, False), (7, False)])
def test_of_several_processes_one_decodes_all_images(
    process: int, decoded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Config:
        local_process_index = process

        def main_process_first(self, desc: str) -> Any:
            return contextlib.nullcontext()

    asked = []
    monkeypatch.setattr(data_options, "load_coco", lambda *_, decode: asked.append(decode))
    files = data_options.DataOptions(train_annotations="train.json", train_images="train")
    files.read_files(Config())  # type: ignore[arg-type]
    assert asked == [decoded]


@pytest.mark.parametrize(("machines", "line"), [(1, 0), (2, 1)])
def test_lines_for_eight_gpus_are_what_accelerate_understands(machines: int, line: int) -> None:
    page = (Path(__file__).parents[2] / "docs" / "reproduce.md").read_text().replace("\\\n", " ")
    words = re.findall(r"^accelerate launch (.+)$", page, re.MULTILINE)[line].split()
    found = launch_command_parser().parse_args(words)
    assert (found.multi_gpu, found.num_processes, found.num_machines) == (True, 8, machines)
    assert (found.machine_rank, found.main_process_ip) == ((0, "HOST") if machines > 1 else (None, None))
    assert found.training_script == "examples/distill_coco.py"
    assert preset(found.training_script_args[1]).teacher is not None


PATHS = [f"--{split}_{kind}={split}" for split in ("train", "val") for kind in ("images", "annotations")]


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))


@pytest.mark.usefixtures("examples")
class TestCommandLines:
    """What the options of a preset become; what is given beside it wins."""

    def test_deformable_detr(self, tmp_path: Path) -> None:
        words = ["--preset", "crosskd-deformable-detr-r18-from-r50", "--teacher", "t", "--output_dir", str(tmp_path)]
        arguments, config = importlib.import_module("distill_deformable_detr").parse([*words, *PATHS, "--use_cpu"])
        assert (arguments.student_backbone, arguments.backbone_weights) == ("resnet18", "tv_in1k")
        assert (arguments.steps, arguments.shortest_edge, arguments.longest_edge) == (["distilled"], 800, 1333)
        assert arguments.multi_scale == list(range(480, 801, 32))
        assert (config.schedule, config.learning_rate, config.num_train_epochs) == ("50e", 2e-4, 50)
        assert (config.decay_epochs, config.get_warmup_steps(1000)) == ([40], 0)
        assert (config.lr_factors, config.max_grad_norm) == (["backbone=0.1", "sampling_offsets=0.1"], 0.1)
        assert (config.per_device_train_batch_size, config.per_device_eval_batch_size) == (4, 1)

    def test_dense(self, tmp_path: Path) -> None:
        words = ["--preset", "fcos-r50-ms-2x", "--max_grad_norm", "1", "--output_dir", str(tmp_path), "--use_cpu"]
        arguments, config = importlib.import_module("distill_coco").parse([*words, *PATHS])
        assert (arguments.steps, arguments.multi_scale) == (["baseline"], [640, 800])
        assert (config.warmup_kind, config.bias_lr_factor, config.bias_weight_decay) == ("constant", 2, 0)
        assert config.max_grad_norm == 1

    def test_the_baselines_old_name(self) -> None:
        arguments, _ = importlib.import_module("distill_coco").parse(["--steps", "alone", "--use_cpu"])
        assert arguments.steps == ["baseline"]

    @pytest.mark.parametrize(
        ("script", "name"), [("distill_coco", "deformable-detr-r18"), ("distill_deformable_detr", "gfl-r18")]
    )
    def test_the_other_example_is_named(self, script: str, name: str) -> None:
        other = {"distill_coco": "distill_deformable_detr", "distill_deformable_detr": "distill_coco"}[script]
        with pytest.raises(ValueError, match=f"is run by another example: python examples/{other}.py"):
            importlib.import_module(script).parse(["--preset", name, *PATHS])

    def test_a_method_that_does_not_exist(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(presets, "METHODS", {})
        with pytest.raises(ValueError, match="needs the methods crosskd, which this version"):
            importlib.import_module("distill_coco").parse(["--preset", "crosskd-gfl-r18-from-r50", *PATHS])
