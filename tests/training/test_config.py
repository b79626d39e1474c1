"""Options: defaults, the command line, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

from crosskd_hf.distillation import KD, PKD, CrossKD, Method, MethodConfig
from crosskd_hf.training import ineffective
from crosskd_hf.training.config import CrossKDConfig
from crosskd_hf.training.moved import refuse_words


def config(tmp_path: Path, **options: Any) -> CrossKDConfig:
    return CrossKDConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)


def test_without_a_schedule_the_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    ours, theirs = config(tmp_path), TrainingArguments(str(tmp_path), use_cpu=True)
    for name in ("learning_rate", "weight_decay", "max_grad_norm", "num_train_epochs", "optim", "lr_scheduler_type"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.get_warmup_steps(1000) == theirs.get_warmup_steps(1000) == 0
    assert ours.label_names == ["labels"]
    assert not ours.remove_unused_columns
    assert not ours.accelerator_config.dispatch_batches


@pytest.mark.parametrize(("name", "epochs"), [("1x", 12), ("2x", 24)])
def test_a_schedule_sets_what_is_not_given(tmp_path: Path, name: str, epochs: int) -> None:
    args = config(tmp_path, schedule=name)
    assert (args.learning_rate, args.weight_decay, args.max_grad_norm) == (0.01, 1e-4, 35.0)
    assert args.num_train_epochs == epochs
    given = config(tmp_path, schedule=name, learning_rate=0.1, num_train_epochs=3, warmup_steps=7, max_grad_norm=0)
    assert (given.learning_rate, given.num_train_epochs, given.max_grad_norm) == (0.1, 3, 0)
    assert given.get_warmup_steps(10_000) == 7


def test_warm_up_is_at_most_a_tenth_of_the_run(tmp_path: Path) -> None:
    args = config(tmp_path, schedule="1x")
    assert [args.get_warmup_steps(updates) for updates in (90_000, 5000, 1000, 25)] == [500, 500, 100, 3]
    assert dataclasses.replace(args).get_warmup_steps(1000) == 100
    assert config(tmp_path, schedule="1x", warmup_steps=0).get_warmup_steps(1000) == 0


def test_memory_is_pinned_for_accelerators_only(tmp_path: Path) -> None:
    args = CrossKDConfig(str(tmp_path), report_to="none")
    assert args.dataloader_pin_memory is (args.device.type != "cpu")
    assert CrossKDConfig(str(tmp_path), report_to="none", dataloader_pin_memory=True).dataloader_pin_memory is True


@pytest.mark.parametrize(
    ("options", "name", "needed"),
    [
        ({"num_train_epochs": 0}, "num_train_epochs", "a number above 0"),
        ({"num_train_epochs": float("nan")}, "num_train_epochs", "a number above 0"),
        ({"seed": -1}, "seed", "a whole number from 0 to 4294967295"),
        ({"data_seed": 2**32}, "data_seed", "a whole number from 0"),
        ({"logging_steps": float("nan")}, "logging_steps", "a number above 0"),
        ({"save_strategy": "steps", "save_steps": 0}, "save_steps", "a number above 0"),
        ({"eval_strategy": "steps", "eval_steps": -5}, "eval_steps", "a number above 0"),
        ({"save_total_limit": -1}, "save_total_limit", "a whole number of at least 0"),
    ],
)
def test_a_number_out_of_range_is_refused(tmp_path: Path, options: dict[str, Any], name: str, needed: str) -> None:
    """Some failed late, after the first update or evaluation; others trained nothing, or saved nothing."""
    with pytest.raises(ValueError, match=f"^{name}={options[name]} is out of range: give {needed}"):
        config(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fast": "false"}, "fast='false' is neither True nor False"),
        ({"exact_accumulation": "no"}, "exact_accumulation='no' is neither True nor False"),
        ({"bf16": 2}, "bf16=2 is neither True nor False"),
        ({"ema_decay": "0.9"}, "ema_decay='0.9' is no number"),
        ({"patience": "3"}, "patience='3' is no number"),
        ({"eval_threshold": "0.1"}, "eval_threshold='0.1' is no number"),
        ({"schedule": "1x", "decay_epochs": ["8"]}, "give numbers of epochs above 0"),
        ({"schedule": "1x", "decay_epochs": "8"}, "give numbers of epochs above 0"),
        ({"schedule": "1x", "bias_lr_factor": float("nan")}, "bias_lr_factor=nan is out of range"),
        ({"schedule": "1x", "bias_weight_decay": -1.0}, "bias_weight_decay=-1.0 is out of range"),
    ],
)
def test_words_for_switches_and_numbers_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    """The word "false" was taken for on, without a word."""
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_numbers_that_nothing_reads_may_be_anything(tmp_path: Path) -> None:
    args = config(tmp_path, max_steps=2, num_train_epochs=0, save_strategy="no", save_steps=0, logging_strategy="epoch")
    assert (args.max_steps, args.save_total_limit) == (2, None)
    assert config(tmp_path, per_device_train_batch_size=np.int64(4), save_total_limit=0).train_batch_size == 4


class MineMethod(Method):
    name = "mine"


@dataclasses.dataclass(frozen=True)
class Mine(MethodConfig):
    """A method that is at home in a test."""

    method = MineMethod

    alpha: float = 1.0


class TestMethods:
    def test_objects_and_strings_mean_the_same(self, tmp_path: Path) -> None:
        objects = config(tmp_path, methods=[CrossKD(cut=2, terms={"reg": 0.5}), PKD(weight=3)])
        strings = config(tmp_path, methods=["crosskd:terms.reg=0.5,cut=2", "pkd:weight=3"])
        assert objects.methods == strings.methods == [CrossKD(cut=2, terms={"reg": 0.5}), PKD(weight=3)]
        assert objects.to_dict()["methods"] == ["crosskd:terms.reg=0.5,cut=2", "pkd:weight=3"]
        assert config(tmp_path).methods == [CrossKD()]
        assert config(tmp_path, methods="kd").methods == [KD()]

    def test_the_command_line_knows_them(self, tmp_path: Path) -> None:
        line = f"--output_dir {tmp_path} --use_cpu --schedule 1x --ema_decay .99 --exact_accumulation false"
        words = [*line.split(), "--methods", "crosskd:cut=3", "kd:reduce=max,joint_quality=true"]
        (args,) = HfArgumentParser(CrossKDConfig).parse_args_into_dataclasses(words)
        assert args.methods == [CrossKD(cut=3), KD(reduce="max", joint_quality=True)]
        assert (args.schedule, args.learning_rate, args.ema_decay) == ("1x", 0.01, 0.99)
        assert not args.exact_accumulation

    def test_a_yaml_file_knows_them(self, tmp_path: Path) -> None:
        (tmp_path / "run.yaml").write_text(
            f"output_dir: {tmp_path}\nuse_cpu: true\nmethods:\n- crosskd:cut=2\n- pkd:location=cls\n"
        )
        (args,) = HfArgumentParser(CrossKDConfig).parse_yaml_file(str(tmp_path / "run.yaml"))
        assert args.methods == [CrossKD(cut=2), PKD(location="cls")]

    def test_a_class_of_ones_own_by_its_module(self, tmp_path: Path) -> None:
        (written,) = config(tmp_path, methods=[Mine(alpha=0.5)]).to_dict()["methods"]
        assert written == f"{__name__}:Mine:alpha=0.5"
        assert config(tmp_path, methods=[written]).methods == [Mine(alpha=0.5)]


class TestMovedOptions:
    @pytest.mark.parametrize(
        ("options", "new"),
        [
            ({"cut": 2}, ["crosskd:cut=2"]),
            (
                {"methods": ("crosskd", "pkd"), "loss_weights": {"loss_cls_kd": 2.0, "loss_feat_kd": 3.0}},
                ["crosskd:terms.cls=2.0", "pkd:weight=3.0"],
            ),
            ({"methods": ["kd"], "mapping": '{"reduce": "max"}', "beta": 2.0}, ["kd:beta=2.0,reduce=max"]),
            (
                {"methods": ["crosskd", "pkd"], "statistics": "batch"},
                ["crosskd:statistics=batch", "pkd:statistics=batch"],
            ),
        ],
    )
    def test_are_answered_with_their_new_spelling(
        self, tmp_path: Path, options: dict[str, Any], new: list[str]
    ) -> None:
        with pytest.raises(ValueError, match="have moved to the methods") as raised:
            config(tmp_path, **options)
        assert f"methods={new}" in str(raised.value)
        assert config(tmp_path, methods=new).methods

    @pytest.mark.parametrize(
        ("option", "value", "new"),
        [
            ("cut", 2, "crosskd:cut=2 kd pkd"),
            ("teacher_cut", 3, "crosskd:teacher_cut=3 kd pkd"),
            ("loss_weights", {"loss_centerness_kd": 0.5}, "crosskd:terms.centerness=0.5 kd:terms.centerness=0.5 pkd"),
            ("statistics", "batch", "crosskd:statistics=batch kd pkd:statistics=batch"),
            ("normalizer", "student", "crosskd:normalizer=student kd:normalizer=student pkd"),
            ("normalizer_floor", 2.0, "crosskd:normalizer_floor=2.0 kd:normalizer_floor=2.0 pkd"),
            ("beta", 2.0, "crosskd:beta=2.0 kd:beta=2.0 pkd"),
            ("temperature", 2.0, "crosskd:temperature=2.0 kd:temperature=2.0 pkd"),
            ("queries", "student", "crosskd:queries=student kd pkd"),
            ("box_loss", "giou", "crosskd:box_loss=giou kd pkd"),
            ("mapping", {"broadcast": True}, "crosskd kd:broadcast=True pkd"),
        ],
    )
    def test_each_of_them(self, tmp_path: Path, option: str, value: Any, new: str) -> None:
        """All that `CrossKDConfig` had before methods were objects, and has no more."""
        with pytest.raises(ValueError, match=f"^{option}: options of distillation have moved") as raised:
            config(tmp_path, methods=["crosskd", "kd", "pkd"], **{option: value})
        assert f"--methods {new};" in str(raised.value)
        assert config(tmp_path, methods=new.split()).methods

    def test_on_a_command_line_too(self) -> None:
        words = ["--methods", "crosskd", "kd", "--cut=2", "--loss_weights", '{"loss_reg_kd": 0.5}', "--max_steps", "2"]
        with pytest.raises(ValueError, match=r"--methods crosskd:cut=2,terms.reg=0.5 kd:terms.reg=0.5;"):
            refuse_words(words)
        refuse_words(["--methods", "crosskd:cut=2", "--max_steps", "2"])


def test_the_best_model_is_the_one_of_highest_ap(tmp_path: Path) -> None:
    args = config(tmp_path, load_best_model_at_end=True, eval_strategy="epoch", save_strategy="epoch")
    assert args.metric_for_best_model == "eval_map"
    assert args.greater_is_better
    assert config(tmp_path, save_strategy="best", eval_strategy="epoch").metric_for_best_model == "eval_map"
    assert config(tmp_path).metric_for_best_model is None


@pytest.mark.parametrize("plateau", ["reduce_lr_on_plateau", "greedy"])
def test_a_plateau_is_one_of_ap(tmp_path: Path, plateau: str) -> None:
    """Evaluation computes no loss, which would be transformers' default."""
    args = config(tmp_path, lr_scheduler_type=plateau, eval_strategy="epoch")
    assert (args.metric_for_best_model, args.greater_is_better) == ("eval_map", True)


WITHOUT_EFFECT: dict[str, Any] = {
    "label_smoothing_factor": 0.1,
    "average_tokens_across_devices": False,
    "include_num_input_tokens_seen": "all",
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "use_cache": True,
    "neftune_noise_alpha": 5.0,
    "logging_nan_inf_filter": True,
    "prediction_loss_only": True,
    "eval_use_gather_object": True,
    "eval_accumulation_steps": 2,
    "length_column_name": "width",
    "parallelism_config": {"tp_size": 2},
    "label_names": ["label"],
    "train_sampling_strategy": "group_by_length",
}


def test_float16_on_a_cpu_is_refused(tmp_path: Path) -> None:
    """accelerate leaves it out there without a word: losses were those of float32, bit by bit."""
    with pytest.raises(ValueError, match="fp16=True would have no effect on a CPU"):
        config(tmp_path, fp16=True)


@pytest.mark.parametrize(("name", "value"), WITHOUT_EFFECT.items())
def test_an_option_without_effect_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}={re.escape(repr(value))} (would have no effect|has nothing)"):
        config(tmp_path, **{name: value})


def test_every_option_without_effect_is_tried() -> None:
    assert set(WITHOUT_EFFECT) == {*ineffective.REASONS, "train_sampling_strategy"}


BESIDE_A_SCHEDULE: dict[str, Any] = {
    "optim": "sgd",
    "optim_args": "momentum=0.5",
    "optim_target_modules": ["head"],
    "adam_beta1": 0.8,
    "adam_beta2": 0.99,
    "adam_epsilon": 1e-6,
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {"num_cycles": 2},
}


@pytest.mark.parametrize(("name", "value"), BESIDE_A_SCHEDULE.items())
def test_a_schedule_takes_no_other_optimiser(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} would have no effect beside schedule='1x'"):
        config(tmp_path, schedule="1x", **{name: value})
    reader = {"optim_args": "sgd", "optim_target_modules": "galore_adamw"}.get(name)
    options = {name: value} if reader is None else {name: value, "optim": reader}
    assert getattr(config(tmp_path, **options), name) == value


@pytest.mark.parametrize(
    ("options", "unread"),
    [
        ({"optim": "sgd", "adam_beta1": 0.5}, "adam_beta1 would have no effect beside optim='sgd'"),
        ({"optim": "adafactor", "adam_epsilon": 1e-6, "adam_beta2": 0.9}, "adam_beta2, adam_epsilon would have"),
        ({"optim_args": "momentum=0.9"}, "optim_args would have no effect beside optim='adamw_torch"),
        ({"optim": "adamw_torch", "optim_target_modules": ["head"]}, "optim_target_modules would have no effect"),
    ],
)
def test_settings_of_an_optimiser_that_is_not_chosen_are_refused(
    tmp_path: Path, options: dict[str, Any], unread: str
) -> None:
    with pytest.raises(ValueError, match=f"^{unread}"):
        config(tmp_path, **options)


def test_even_their_defaults_are_not_taken_where_they_are_given(tmp_path: Path) -> None:
    given = {"optim": "adamw_torch_fused", "lr_scheduler_type": "linear"}
    with pytest.raises(ValueError, match="^optim, lr_scheduler_type would have no effect"):
        config(tmp_path, schedule="1x", **given)


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({"schedule": "1x"}, (None, object()), "schedule='1x' would have no effect"),
        ({"backbone_lr": 1e-5}, (object(), None), "backbone_lr would have no effect"),
        ({"schedule": "1x", "bias_lr_factor": 2.0}, (object(), None), "bias_lr_factor would have no effect"),
        ({"adam_beta1": 0.5}, (object(), None), "adam_beta1 would have no effect beside the optimiser"),
        ({"optim": "sgd"}, (object(), None), "optim would have no effect beside the optimiser"),
        (
            {"lr_scheduler_type": "cosine"},
            (None, object()),
            "lr_scheduler_type would have no effect beside",
        ),
        ({"lr_scheduler_type": "cosine"}, (object(), None), None),
        ({"schedule": "1x"}, (object(), None), None),
        ({"schedule": "1x", "backbone_lr": 1e-5}, (None, None), None),
    ],
)
def test_what_a_given_optimiser_does_not_read_is_refused(
    tmp_path: Path, options: dict[str, Any], given: tuple[Any, Any], message: str | None
) -> None:
    args = config(tmp_path, **options)
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        ineffective.refuse_beside_given(args, given)


def test_what_a_given_kind_of_optimiser_does_not_read_is_refused(tmp_path: Path) -> None:
    kind = (torch.optim.SGD, {"lr": 0.1})
    with pytest.raises(ValueError, match="adam_beta1 would have no effect beside the optimiser"):
        ineffective.refuse_beside_given(config(tmp_path, adam_beta1=0.5), (None, None), kind)


def test_a_copy_of_the_arguments_is_equal(tmp_path: Path) -> None:
    for schedule in (None, "1x"):
        args = config(tmp_path, schedule=schedule)
        assert dataclasses.replace(args).to_dict() == args.to_dict()
        assert CrossKDConfig(**json.loads(json.dumps(args.to_dict()))).to_dict() == args.to_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_by_aspect_ratio": True, "train_sampling_strategy": "sequential"}, "beside group_by_aspect_ratio"),
        ({"schedule": "3x"}, "schedule='3x': choose one of 1x, 2x"),
        ({"bias_lr_factor": 2.0}, "bias_lr_factor belong to a schedule"),
        ({"decay_epochs": [1], "warmup_kind": "none"}, "decay_epochs, warmup_kind belong to a schedule"),
        ({"schedule": "1x", "warmup_kind": "cosine"}, "warmup_kind='cosine': choose one of linear, constant, none"),
        ({"schedule": "50e", "warmup_steps": 7}, "warmup_steps=7 would have no effect with warmup_kind='none'"),
        ({"schedule": "1x", "decay_epochs": [0]}, "give numbers of epochs above 0"),
        ({"lr_factors": ["backbone=0.1"], "backbone_lr": 1e-5}, "both set the learning rate of the backbone"),
        ({"lr_factors": ["backbone"]}, "give NAME=FACTOR"),
        ({"nonfinite": "ignore"}, "choose 'stop' or 'skip'"),
        (
            {"learning_rate": float("nan")},
            "learning_rate=nan is out of range: give a number of at least 0 that is finite",
        ),
        ({"backbone_lr": -1e-4}, "backbone_lr=-0.0001 is out of range: give a number"),
        ({"weight_decay": float("inf")}, "weight_decay=inf is out of range: give a number"),
        (
            {"learning_rate": "1e-4"},
            "learning_rate='1e-4' is no number: give .*YAML file takes 1e-4 for a text",
        ),
        (
            {"per_device_train_batch_size": 0},
            "per_device_train_batch_size=0 is out of range: give a whole number of at least 1",
        ),
        (
            {"per_device_eval_batch_size": -1},
            "per_device_eval_batch_size=-1 is out of range: give a whole number of at least 1",
        ),
        (
            {"gradient_accumulation_steps": 0},
            "gradient_accumulation_steps=0 is out of range: give a whole number of at least 1",
        ),
        (
            {"gradient_accumulation_steps": 1.5},
            "gradient_accumulation_steps=1.5 is out of range: give a whole number of at least 1",
        ),
        (
            {"max_steps": 0},
            "max_steps=0 is out of range: give a whole number of at least 1, or -1 for num_train_epochs",
        ),
        (
            {"dataloader_num_workers": -1},
            "dataloader_num_workers=-1 is out of range: give a whole number of at least 0",
        ),
        ({"dataloader_in_order": False}, "would leave the order of batches to chance"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches=True would make an update of fewer images"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True would merge the labels"),
        ({"accelerator_config": {"even_batches": False}}, "even_batches=False would let a process with fewer images"),
        ({"optim": "galore_adamw_layerwise"}, "moves each weight within the backward pass"),
        ({"optim": "adalomo"}, "optim='adalomo' moves each weight within the backward pass"),
        ({"ema_decay": 1.0}, "must lie between 0 and 1"),
        ({"eval_threshold": 1.5}, "must lie in"),
        ({"remove_unused_columns": True}, "would drop the image"),
        ({"methods": ["fitnots"]}, "choose from crosskd"),
        ({"methods": ["crosskd:terms.kd=1"]}, r"crosskd has no terms \['kd'\]"),
        ({"methods": ["kd:anchors=1"]}, "kd has no option 'anchors=1'; its options are weight, terms, beta"),
        ({"methods": ["kd:reduce=mean"]}, "reduce='mean': choose one of 'best', 'max'"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_processes_that_do_not_know_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = config(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"started 2 processes, but each of them would train alone"):
        args._check_processes()


def test_one_device_of_several_is_used_and_the_launch_line_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    args = config(tmp_path, per_device_train_batch_size=4)
    monkeypatch.setattr(sys, "argv", ["train.py", "--schedule", "1x"])
    args._n_gpu = 4
    with caplog.at_level(logging.WARNING):
        args._check_processes()
    assert args.n_gpu == 1
    assert args.train_batch_size == 4
    assert "accelerate launch --multi_gpu --num_processes 4 train.py --schedule 1x" in caplog.text


def test_a_missing_logger_is_named_with_its_pip_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'crosskd_hf\[wandb\]'"):
        CrossKDConfig(str(tmp_path), report_to=["wandb"])


def test_patience_is_a_number_of_evaluations(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="patience=0: needed is a number of evaluations"):
        CrossKDConfig(str(tmp_path), patience=0, report_to="none")
    assert CrossKDConfig(str(tmp_path), patience=3, report_to="none").patience == 3
