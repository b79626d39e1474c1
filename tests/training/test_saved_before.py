"""Students and checkpoints that an earlier commit saved load, evaluate and go on as they did then."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForObjectDetection, PreTrainedModel

from crosskd_hf.training.trainer import CrossKDTrainer
from tests import tiny_run

SAVED = Path(__file__).parents[1] / "golden/saved_by_f9e0fc9"
EXPECTED = json.loads((SAVED / "expected.json").read_text())
PIXELS = "8d32e08ca8ac33bb822ded75e8778b5acdc2d9fbdb4c4618e164baa381b4c73a"  # of the images, decoded
SETTINGS: dict[str, Any] = {"learning_rate": 0.001}

each_folder = pytest.mark.parametrize("name", ["student", "checkpoint-2"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    tiny_run.make_data(folder, 24, 12)
    pixels = hashlib.sha256()
    for path in sorted(folder.glob("*/*.png")) + sorted(folder.glob("*/*.jpg")):
        pixels.update(np.asarray(PIL.Image.open(path)).tobytes())
    if pixels.hexdigest() != PIXELS:
        pytest.skip(f"Pillow {PIL.__version__} draws other images than those that the figures are of")
    return folder


def load(name: str) -> PreTrainedModel:
    return AutoModelForObjectDetection.from_pretrained(SAVED / name)


def make_trainer(data: Path, model: PreTrainedModel, teacher: str | None = None, **changes: Any) -> CrossKDTrainer:
    train, val = tiny_run.load_data(data)
    settings = tiny_run.settings(data, **(SETTINGS | changes))
    images = tiny_run.processor()
    data = {"train_dataset": train.dataset, "eval_dataset": val.dataset, "processing_class": images}
    return CrossKDTrainer(model, settings, **data, teacher_model=teacher, train_transform=None)


@each_folder
def test_weights_are_bit_equal(name: str) -> None:
    saved, loaded = load_file(SAVED / name / "model.safetensors"), load(name).state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in saved.items())


@each_folder
def test_outputs_are_equal(name: str) -> None:
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = load_file(SAVED / "expected.safetensors")
    with torch.no_grad():
        outputs = load(name).eval()(pixels)
    for key in ("logits", "pred_boxes"):
        torch.testing.assert_close(outputs[key], expected[f"{name}.{key}"], rtol=1e-5, atol=1e-5)


@each_folder
def test_evaluates_equal(name: str, data: Path) -> None:
    metrics, expected = make_trainer(data, load(name)).evaluate(), EXPECTED["evaluate"][name]
    assert expected["eval_map"] > 0.03
    assert {key: metrics[key] for key in expected} == pytest.approx(expected, rel=1e-5, nan_ok=True)


def test_the_run_goes_on(data: Path) -> None:
    """Updates 3 and 4 after resuming are those of the run that wasn't interrupted, losses and gradients."""
    shutil.copytree(SAVED / "checkpoint-2", data / "run/checkpoint-2")
    student = load("checkpoint-2")
    with torch.no_grad():
        student.head.classifier.weight.zero_()  # resuming brings its weights back
    trainer = make_trainer(data, student, str(SAVED / "student"))
    trainer.train(resume_from_checkpoint=True)
    logged = tiny_run.losses(trainer)
    assert len(logged) == 4
    names = {"loss_cls_kd": "crosskd/cls", "loss_reg_kd": "crosskd/reg", "loss_feat_kd": "pkd/features"}
    for number, (update, expected) in enumerate(zip(logged, EXPECTED["losses"], strict=True), start=1):
        if number > 2:
            expected = {names.get(key, key): value for key, value in expected.items()}
        assert update == pytest.approx(expected, rel=1e-3, abs=1e-7)
