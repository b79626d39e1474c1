"""PKD between detectors of different kinds."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from crosskd_hf.distillation import DistillationConfig, make_distiller
from crosskd_hf.distillation.features import FeatureDistiller, by_stride
from crosskd_hf.distillation.pkd import PearsonKD
from crosskd_hf.models.losses import divide
from tests.distillation import detr_zoo
from tests.tiny_dense import make_detector
from tests.tiny_faster_rcnn import make_faster_rcnn

PKD = DistillationConfig(methods=("pkd",))
WITH_LEVELS = ["deformable_detr two-stage", "rt_detr", "rt_detr_v2", "d_fine", "deimv2", "lw_detr", "rf_detr"]


def dense(**changes: Any) -> PreTrainedModel:
    return make_detector("gfl", seed=1, num_labels=detr_zoo.CLASSES, **changes).train()


def batch() -> dict[str, Any]:
    torch.manual_seed(3)
    return detr_zoo.batch()


def kd_loss(distiller: FeatureDistiller, student: PreTrainedModel) -> torch.Tensor:
    inputs = batch()
    outputs = student(**inputs, **distiller.student_request)
    return divide(distiller(outputs, inputs))["loss_feat_kd"]


@pytest.mark.parametrize("name", WITH_LEVELS)
def test_a_dense_student_of_a_detr(name: str) -> None:
    student, teacher = dense(), detr_zoo.build(name)
    before = {key: tensor.clone() for key, tensor in teacher.state_dict().items()}
    distiller = make_distiller(student, teacher, PKD)
    loss = kd_loss(distiller, student)
    distiller.check_gradients(student, loss)
    loss.backward()
    reached = {key.split(".")[0] for key, parameter in student.named_parameters() if parameter.grad is not None}
    assert reached == {"backbone", "neck"}
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in teacher.state_dict().items())
    assert distiller.describe()["adapters"] == {"pearson.adapter.weight": [32, 16, 1, 1], "pearson.adapter.bias": [32]}


def test_a_detr_student_of_a_dense_teacher() -> None:
    student, teacher = detr_zoo.build("rt_detr").train(), dense(fpn_channels=32)
    distiller = make_distiller(student, teacher, PKD)
    loss = kd_loss(distiller, student)
    distiller.check_gradients(student, loss)
    assert loss.item() > 0
    assert not list(distiller.parameters())
    with torch.no_grad():
        student.eval()(pixel_values=batch()["pixel_values"])
    with pytest.raises(RuntimeError, match="No pass of the decoder"):  # nothing is kept of evaluation
        distiller(None, batch())


def test_a_dense_student_of_a_faster_rcnn() -> None:
    student, teacher = dense(), make_faster_rcnn(seed=2)
    distiller = make_distiller(student, teacher, PKD)
    loss = kd_loss(distiller, student)
    pixels = batch()["pixel_values"]
    maps = [by_stride(model.pyramid(pixels), pixels) for model in (student, teacher)]
    assert maps[0].keys() & maps[1].keys() == {8, 16, 32, 64}
    pairs = [[found[stride] for stride in (8, 16, 32, 64)] for found in maps]
    expected = divide({"loss_feat_kd": PearsonKD(16, 16, 6.0, "image")(*pairs)})
    assert loss.item() == pytest.approx(expected["loss_feat_kd"].item(), rel=1e-5)


def test_maps_are_compared_by_stride() -> None:
    pixels = torch.zeros(1, 3, 100, 130)
    maps = [torch.zeros(1, 2, *shape) for shape in ((13, 17), (7, 9), (4, 5), (2, 3))]
    assert {stride: tuple(m.shape[-2:]) for stride, m in by_stride(maps, pixels).items()} == {
        8: (13, 17), 16: (7, 9), 32: (4, 5), 64: (2, 3)
    }  # fmt: skip


def test_other_methods_are_refused_and_pkd_is_named() -> None:
    for student, teacher in ((dense(), detr_zoo.build("rt_detr")), (detr_zoo.build("rt_detr"), dense())):
        with pytest.raises(ValueError, match=r"methods=\('crosskd',\) can't lead from .* to .*methods=\('pkd',\)"):
            make_distiller(student, teacher, DistillationConfig())


def test_strangers_are_refused() -> None:
    stranger = detr_zoo.build("detr")
    stranger.config.model_type = "yolos"
    with pytest.raises(
        ValueError, match=r"The teacher is a DetrForObjectDetection \('yolos'\), .* Give dense detectors"
    ):
        make_distiller(dense(), stranger, PKD)


def test_encoders_of_one_level_are_refused() -> None:
    student = dense()
    distiller = make_distiller(student, detr_zoo.build("detr"), PKD)
    with pytest.raises(ValueError, match="tells the shapes of its maps, such as Deformable DETR's"):
        kd_loss(distiller, student)
