"""A checkpoint with other classes gets a head for those of the data: rows of shared names are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForObjectDetection, DeformableDetrImageProcessor, PreTrainedModel

from crosskd_hf.create import create_detector, with_classes
from crosskd_hf.data.categories import CategoryMap
from crosskd_hf.models import (
    DETECTORS,
    ATSSConfig,
    FasterRCNNConfig,
    FCOSConfig,
    GFLConfig,
    RetinaNetConfig,
    TOODConfig,
)
from crosskd_hf.models.backbone import weights_follow
from crosskd_hf.training.trainer import CrossKDTrainer
from tests.distillation import detr_zoo
from tests.tiny_backbone import as_if_loaded
from tests.tiny_run import SIZE, load_data, make_data, make_detector, processor, settings

WANTED = CategoryMap((1, 2, 3), ("star", "cell", "Circle"))  # of which a model of COCO's size knows two
KEPT = {0: 50, 2: 7}  # the index of each in the model

# Configuration -> layers with rows of classes: rows of each class, and whether those of a class lie together.
DENSE = {
    GFLConfig: {"head.classifier": (1, False)},
    RetinaNetConfig: {"head.classifier": (9, False)},
    ATSSConfig: {"head.classifier": (1, False)},
    FCOSConfig: {"head.classifier": (1, False)},
    TOODConfig: {"head.classifier": (1, False)},
    FasterRCNNConfig: {"roi_head.classifier": (1, True), "roi_head.regressor": (4, True)},
}


def of_coco(model: PreTrainedModel, classes: int) -> PreTrainedModel:
    """The model with names, two of which are wanted."""
    names = {i: f"thing {i}" for i in range(classes)} | {7: "circle", 50: "star"}
    model.config.id2label, model.config.label2id = names, {name: i for i, name in names.items()}
    return model


def dense(kind: type, seed: int = 0) -> PreTrainedModel:
    config = make_detector(0, kind=kind).config
    config.id2label, config.category_ids = {i: f"thing {i}" for i in range(80)}, None
    torch.manual_seed(seed)
    with weights_follow():
        return of_coco(as_if_loaded(DETECTORS[kind](config)), 80)


def rows(tensor: Tensor, classes: int, each: int, class_major: bool, index: int) -> Tensor:
    """The rows of one class, found another way than in the code: by a view (classes, each) or its mirror."""
    part = tensor[: classes * each]
    view = part.view(classes, each, *part.shape[1:]) if class_major else part.view(each, classes, *part.shape[1:])
    return view[index] if class_major else view[:, index]


@pytest.mark.parametrize("kind", DENSE)
def test_rows_of_shared_names_are_kept(kind: type) -> None:
    old, layers = dense(kind), DENSE[kind]
    new, change = with_classes(old, WANTED)
    assert change.kept == ("star", "Circle")
    assert change.new == ("cell",)
    assert change.dropped == 78
    assert {tensor.rpartition(".")[0] for tensor in change.tensors} == set(layers)
    before, after = old.state_dict(), new.state_dict()
    for tensor in change.tensors:
        each, class_major = layers[tensor.rpartition(".")[0]]
        for index, former in KEPT.items():
            kept = rows(after[tensor], 3, each, class_major, index)
            assert torch.equal(kept, rows(before[tensor], 80, each, class_major, former))
        assert torch.equal(after[tensor][3 * each :], before[tensor][80 * each :])  # the background
    for tensor in set(after) - set(change.tensors):
        assert torch.equal(after[tensor], before[tensor])
    assert new.config.id2label == WANTED.id2label


@pytest.mark.parametrize("name", detr_zoo.MODELS)
def test_rows_of_detrs_are_kept_in_every_head_and_embedding(name: str) -> None:
    levels = {"num_feature_levels": 3} if name.startswith("deformable") else {}
    old = of_coco(detr_zoo.build(name, num_labels=91, **levels), 91)
    new, change = with_classes(old, WANTED)
    before, after = old.state_dict(), new.state_dict()
    for tensor in change.tensors:
        assert len(after[tensor]) in (3, 4)  # 4 with "no object", or with the padding of denoising
        for index, former in KEPT.items():
            assert torch.equal(after[tensor][index], before[tensor][former])
        assert torch.equal(after[tensor][3:], before[tensor][91:])
    inputs = {key: detr_zoo.batch()[key] for key in ("pixel_values", "pixel_mask")}
    with torch.no_grad():
        wide, narrow = old(**inputs), new.eval()(**inputs)
    assert wide.logits.shape[-1] - narrow.logits.shape[-1] == 88
    if name in ("deformable_detr", "detr", "conditional_detr", "dab-detr"):  # others choose queries by their classes
        torch.testing.assert_close(narrow.logits[..., [0, 2]], wide.logits[..., [50, 7]], rtol=0, atol=1e-5)


def test_another_order_of_the_same_classes_is_the_same_function() -> None:
    old = make_detector(3).eval()
    names = tuple(old.config.id2label.values())
    new, change = with_classes(old, CategoryMap((1, 2, 3, 4), names[::-1]))
    assert change.new == ()
    pixels = torch.rand(1, 3, SIZE, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(new.eval()(pixels).logits.flip(-1), old(pixels).logits, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    make_data(folder)
    return folder


def checkpoint(family: str, seed: int = 0) -> tuple[PreTrainedModel, Any]:
    if family == "gfl":
        return dense(GFLConfig, seed), processor()
    model = detr_zoo.build(family, seed, num_labels=91, num_feature_levels=3)
    return of_coco(model, 91), DeformableDetrImageProcessor(size={"height": SIZE, "width": SIZE})


@pytest.mark.parametrize("family", ["gfl", "deformable_detr"])
def test_a_detector_of_coco_is_distilled_on_other_classes_saved_and_loaded(
    family: str, shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for seed, folder in enumerate(("coco", "teacher")):
        for part in checkpoint(family, seed):
            part.save_pretrained(tmp_path / folder)
    train, val = load_data(shapes)  # circle and star are known to the model, square and triangle are not
    student, its_processor = create_detector(tmp_path / "coco", train)
    assert "2 classes, 'circle', 'star'; new are 2 classes, 'square', 'triangle'" in caplog.text
    args = settings(tmp_path, methods=["crosskd"], schedule=None, learning_rate=1e-4, max_steps=2)
    trainer = CrossKDTrainer(
        student, args, train.dataset, val.dataset, its_processor, teacher_model=str(tmp_path / "teacher")
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    distilled = [sum(value for key, value in entry.items() if "crosskd" in key) for entry in logs]
    assert len(distilled) == 2
    assert min(distilled) > 0
    assert "eval_map_circle" in trainer.evaluate()
    trainer.save_model()
    again = AutoModelForObjectDetection.from_pretrained(tmp_path / "run")
    assert list(again.config.id2label.values()) == list(train.categories.names)
    for one, two in zip(again.state_dict().values(), trainer.model.state_dict().values(), strict=True):
        assert torch.equal(one, two)
