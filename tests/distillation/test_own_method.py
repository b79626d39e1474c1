"""A method, and a view, that a user brings: trained, saved with its adapters, resumed, described."""

import copy
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import HfArgumentParser

from crosskd_hf.cli import main
from crosskd_hf.distillation import CrossKD, Distiller, Method, MethodConfig, option
from crosskd_hf.distillation.detectors import VIEWS
from crosskd_hf.distillation.detectors.dense import DenseView
from crosskd_hf.distillation.method import Paper
from crosskd_hf.distillation.passes import Batch, DetectorView, Pair, Pass
from crosskd_hf.models import GFLConfig, GFLForObjectDetection
from crosskd_hf.models.losses import LossPart
from crosskd_hf.training.config import CrossKDConfig
from crosskd_hf.training.trainer import CrossKDTrainer
from tests import tiny_run
from tests.distillation import detector_zoo
from tests.distillation.step import distilled_losses, distilled_parts
from tests.tiny_backbone import as_if_loaded


class MeansMethod(Method):
    """The mean of each level, by a trainable adapter; copies the teacher's last predictor bias at the start."""

    name = "means"
    terms = ("features", "never")
    paper = Paper("Means", "nowhere")

    def __init__(self, config: "Means", student: DetectorView, teacher: DetectorView):
        super().__init__(config, student, teacher)
        self.adapter = nn.Linear(student.channels[0], teacher.channels[0])
        self.updates: list[int] = []

    def forward(self, student: Pass, teacher: Pass, batch: Batch) -> dict[str, LossPart]:
        self.updates.append(batch.update)
        own, target = (each.features[0].values.mean((2, 3)) for each in (student, teacher))
        total = self.config.alpha * (self.adapter(own) - target).square().sum()
        images = total.new_tensor(float(len(own)))
        return {"features": LossPart(total, images), "never": LossPart(total * float("nan"), images)}

    def prepare_student(self, student: DetectorView, teacher: DetectorView) -> None:
        with torch.no_grad():
            student.model.head.classifier.bias.fill_(0.25)


@dataclass(frozen=True)
class Means(MethodConfig):
    """Means of features."""

    method = MeansMethod

    alpha: float = option(1.0, "Factor.", least=0)

    def defaults(self, pair: Pair) -> dict[str, Any]:
        """One term counts."""
        return {"terms": {"features": 1.0, "never": 0.0}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    tiny_run.make_data(folder)
    return folder


def make_trainer(data: Path, out: Path, **changes: Any) -> CrossKDTrainer:
    options = {"methods": [CrossKD(cut=2), Means(alpha=0.5)], "output_dir": str(out), "save_strategy": "steps"}
    return tiny_run.make_trainer(data, **(options | {"save_steps": 2} | changes))


def test_is_trained_saved_resumed_and_described(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(data, tmp_path / "run", max_steps=4)
    assert not trainer.model.head.classifier.bias.eq(0.25).all()
    trainer.train()
    method = trainer.distiller.named_methods["means"]
    assert method.updates == [0, 1, 2, 3]
    assert all("means/features" in entry and "crosskd/cls" in entry for entry in tiny_run.losses(trainer))
    checkpoint = tmp_path / "run" / "checkpoint-2"
    record = json.loads((checkpoint / "distillation.json").read_text())["distillation"]
    assert record["methods"]["means"] == {"weight": 1.0, "terms": {"features": 1.0}, "alpha": 0.5}
    assert record["methods"]["crosskd"]["cut"] == 2
    assert record["adapters"]["means.adapter.weight"] == [12, 8]
    saved = json.loads((checkpoint / "training_args.json").read_text())
    assert saved["methods"] == ["crosskd:cut=2", f"{__name__}:Means:alpha=0.5"]
    trainer.save_model()
    assert "means: Means (nowhere)" in (tmp_path / "run" / "README.md").read_text()

    again = make_trainer(data, tmp_path / "run", max_steps=4, methods=saved["methods"])  # a user's strings import

    def refuse(text: str) -> MethodConfig:
        raise AssertionError(f"{text} was read from the checkpoint")

    monkeypatch.setattr(MethodConfig, "parse", refuse)  # what a checkpoint says imports nothing
    again.train(resume_from_checkpoint=str(checkpoint))
    assert tiny_run.losses(again)[-2:] == tiny_run.losses(trainer)[-2:]
    for mine, other in zip(again.distiller.parameters(), trainer.distiller.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_is_said_in_every_way_that_settings_are_said(tmp_path: Path) -> None:
    """Constructor, command line, dict, json file: the same objects."""
    said = [f"{__name__}:Means:alpha=0.5", "crosskd:cut=2"]
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none"]
    parser = HfArgumentParser((CrossKDConfig,))
    (given,) = parser.parse_args_into_dataclasses([*words, "--methods", *said])
    assert given.methods == [Means(alpha=0.5), CrossKD(cut=2)]
    assert given.to_dict()["methods"] == said
    again = CrossKDConfig(str(tmp_path), use_cpu=True, report_to="none", methods=given.to_dict()["methods"])
    assert again.methods == given.methods
    (tmp_path / "args.json").write_text(json.dumps({"output_dir": str(tmp_path), "use_cpu": True, "methods": said}))
    (read,) = parser.parse_json_file(str(tmp_path / "args.json"))
    assert read.methods == given.methods
    assert json.loads(given.to_json_string())["methods"] == said
    assert pickle.loads(pickle.dumps(given.methods)) == given.methods
    assert copy.deepcopy(given).methods == given.methods


MODULE = """
from dataclasses import dataclass
from crosskd_hf.distillation import Method, MethodConfig
from crosskd_hf.models.losses import LossPart

class MineMethod(Method):
    name = "mine"

    def forward(self, student, teacher, batch):
        own, target = (each.features[0].values.mean(1) for each in (student, teacher))
        total = (own - target).square().mean((1, 2)).sum()
        return {"features": LossPart(total, total.new_tensor(float(len(own))))}

@dataclass(frozen=True)
class MyConfig(MethodConfig):
    method = MineMethod
"""


def test_its_module_is_imported_by_the_command_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package/__init__.py").touch()
    (tmp_path / "my_package/my_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    for name, model in {"teacher": tiny_run.make_detector(1, 12), "student": tiny_run.make_detector(2)}.items():
        model.save_pretrained(tmp_path / name)
        tiny_run.processor().save_pretrained(tmp_path / name)
    words = {
        "--train_annotations": data / "annotations/instances_train.json",
        "--train_images": data / "train",
        "--student": tmp_path / "student",
        "--teacher": tmp_path / "teacher",
        "--output_dir": tmp_path / "out",
        "--methods": "my_package.my_module:MyConfig:weight=0.5",
        "--max_steps": 1,
        "--save_strategy": "no",
        "--disable_tqdm": True,
    }
    status = main(["train", "--use_cpu", *(str(word) for pair in words.items() for word in pair)])
    assert status == 0
    record = json.loads((tmp_path / "out/distillation.json").read_text())["distillation"]
    assert record["methods"]["mine"]["weight"] == 0.5
    saved = json.loads((tmp_path / "out/training_args.json").read_text())
    assert saved["methods"] == ["my_package.my_module:MyConfig:weight=0.5"]


def test_prepares_the_student_once_and_not_on_resume(data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data, tmp_path / "run", max_steps=2, learning_rate=1e-12)
    trainer.train()
    torch.testing.assert_close(trainer.model.head.classifier.bias, torch.full((4,), 0.25))
    with torch.no_grad():
        trainer.model.head.classifier.bias.fill_(0.5)
    trainer.train()
    torch.testing.assert_close(trainer.model.head.classifier.bias, torch.full((4,), 0.5))
    resumed = make_trainer(data, tmp_path / "run", max_steps=3, learning_rate=1e-12)
    prepared: list[str] = []
    resumed.distiller.prepare_student = lambda: prepared.append("yes")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert not prepared


def test_a_term_that_is_not_named_is_an_error() -> None:
    student, teacher = detector_zoo.build("gfl"), detector_zoo.build("gfl", 1)
    distiller, inputs = Distiller(student, teacher, [Means()]), detector_zoo.batch("gfl")
    distiller.named_methods["means"].forward = lambda *passes: {"other": LossPart(torch.ones(()), torch.ones(()))}
    with pytest.raises(ValueError, match=r"means returned the term 'other', but it names \('features', 'never'\)"):
        distilled_parts(distiller, student, inputs)


class MyConfig(GFLConfig):
    model_type = "my_gfl"


class MyDetector(GFLForObjectDetection):
    """A detector of the user's own, whose view names other strides than it has."""

    config_class = MyConfig


class MyView(DenseView):
    """Leaves out the finest level."""

    family = "my detectors"

    def __init__(self, model: Any, role: Any, pixels: Any = None) -> None:
        super().__init__(model, role, pixels)
        self.keep(self.strides[1:])


def test_a_view_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = detector_zoo.build("gfl").config.to_dict()
    del settings["model_type"]
    student, teacher = MyDetector(MyConfig(**settings)), detector_zoo.build("gfl", 1)
    assert isinstance(Distiller(student, teacher, ["fitnets"]).pair.student, DenseView)  # that of its base class
    monkeypatch.setitem(VIEWS, MyDetector, MyView)
    distiller = Distiller(student, teacher, ["fitnets"])
    assert distiller.pair.teacher.strides == (16, 32, 64, 128)
    inputs = detector_zoo.batch("gfl")
    losses = distilled_losses(distiller, student, inputs)
    assert losses["fitnets/features"] > 0
    with pytest.raises(ValueError, match="these are my detectors and dense detectors"):
        Distiller(student, teacher, ["crosskd"])


def test_a_detector_and_a_view_of_ones_own_are_trained(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VIEWS, MyDetector, MyView)
    settings = tiny_run.make_detector(2).config.to_dict()
    del settings["model_type"]
    train, val = tiny_run.load_data(data)
    options = tiny_run.settings(data, output_dir=str(tmp_path / "run"), max_steps=1, methods=[Means()])
    student = as_if_loaded(MyDetector(MyConfig(**settings)))
    teacher = tiny_run.make_detector(1, 12)
    images = tiny_run.processor()
    trainer = CrossKDTrainer(student, options, train.dataset, val.dataset, images, teacher_model=teacher)
    assert isinstance(trainer.distiller.pair.student, MyView)
    trainer.train()
    (update,) = tiny_run.losses(trainer)
    assert update["means/features"] > 0
