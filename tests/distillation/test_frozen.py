"""A teacher with folded batch norms teaches the same, and stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crosskd_hf.distillation import Distiller
from crosskd_hf.distillation.frozen import FrozenCopy
from tests.distillation.step import distilled_losses, distilled_parts
from tests.tiny_dense import make_batch, make_detector
from tests.tiny_run import make_deformable_detr


def lively(seed: int = 1, kind: str = "gfl") -> Any:
    """A detector whose batch norms do something."""
    model = make_detector(kind, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert tensor is not None
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "BatchNorm" in type(module).__name__]


@torch.no_grad()
def logits(model: Any, size: int = 64) -> Tensor:
    return model(torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(3))).logits  # type: ignore[no-any-return]


def test_a_copy_without_batch_norms_finds_the_same() -> None:
    teacher = lively()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    copy = FrozenCopy(teacher).model
    assert norms(teacher)
    assert not norms(copy)
    torch.testing.assert_close(logits(copy), logits(teacher), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert copy.head.classifier.weight is teacher.head.classifier.weight


def test_frozen_norms_of_transformers_are_folded() -> None:
    teacher = make_deformable_detr(1).eval()
    for module in norms(teacher):
        for buffer in module.buffers():
            buffer.copy_(torch.rand(buffer.shape, generator=torch.Generator().manual_seed(5)) + 0.5)
    copy = FrozenCopy(teacher).model
    assert len(norms(copy)) < len(norms(teacher))
    torch.testing.assert_close(logits(copy, 256), logits(teacher, 256), rtol=1e-4, atol=1e-4)


def test_a_copy_follows_a_teacher_that_changes() -> None:
    teacher = lively()
    frozen = FrozenCopy(teacher)
    other = lively(2)
    teacher.load_state_dict(other.state_dict())
    frozen.refresh()
    torch.testing.assert_close(logits(frozen.model), logits(other), rtol=1e-5, atol=1e-5)


def test_weights_of_products_are_kept_as_autocast_rounds_them() -> None:
    teacher = lively()
    copy = FrozenCopy(teacher, torch.bfloat16).model
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    assert copy.head.classifier.weight.dtype == torch.bfloat16
    assert copy.head.cls_tower[0].norm.weight.dtype == torch.float32
    features = [torch.rand(1, teacher.config.fpn_channels, 8, 8)] * len(teacher.config.strides)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(copy.head(features).logits, teacher.head(features).logits)
        rounded = [logits(model).float() for model in (teacher, copy)]
    errors = [float((found - logits(teacher)).square().mean().sqrt()) for found in rounded]
    assert errors[1] < 2 * errors[0]  # no further from float32 than autocast takes the teacher


class _Added(nn.BatchNorm2d):
    """A norm behind which there is more than its formula."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input


def test_a_norm_that_does_more_stays(caplog: pytest.LogCaptureFixture) -> None:
    teacher = lively()
    teacher.backbone.net.bn1.__class__ = _Added
    assert FrozenCopy(teacher).model is teacher
    assert "batch norms stay as they are" in caplog.text


def test_a_model_with_hooks_is_not_copied() -> None:
    teacher = lively()
    teacher.backbone.register_forward_hook(lambda *_: None)
    assert FrozenCopy(teacher, torch.bfloat16).model is teacher


@pytest.mark.parametrize("methods", [["crosskd"], ["kd", "pkd"]])
def test_it_teaches_the_same(methods: list[str]) -> None:
    found = []
    for fast in (False, True):
        student, teacher, inputs = lively(2).train(), lively(1), make_batch()
        with Distiller(student, teacher, methods, fast_teacher=fast) as distiller:
            assert distiller.teacher is teacher
            assert (distiller.pair.teacher.model is teacher) is not fast
            found.append(distilled_losses(distiller, student, inputs))
    for name, value in found[0].items():
        assert float(found[1][name].detach()) == pytest.approx(float(value.detach()), rel=1e-4)


def test_what_a_student_begins_with_is_not_rounded() -> None:
    seen = []
    with Distiller(lively(2), lively(1), ["crosskd"], fast_teacher=True, dtype=torch.bfloat16) as distiller:
        method = distiller.named_methods["crosskd"]
        method.prepare_student = lambda student, teacher: seen.append(teacher.model)  # type: ignore[method-assign]
        distiller.prepare_student()
        assert seen == [distiller.teacher]
        assert distiller.pair.teacher.model is not distiller.teacher


@pytest.mark.parametrize("kind", ["gfl", "tood"])
def test_a_kept_pass_serves_one_more_pass_of_the_student(kind: str) -> None:
    student, teacher, inputs = make_detector(kind, 2).train(), make_detector(kind, 1), make_batch()
    with Distiller(student, teacher, ["crosskd", "pkd"]) as distiller:
        calls: list[int] = []
        teacher.backbone.register_forward_hook(lambda *_: calls.append(1))
        plain = distilled_losses(distiller, student, inputs)
        with distiller.keeping_passes(), torch.no_grad():
            distilled_parts(distiller, student, inputs)
        again = distilled_losses(distiller, student, inputs)
        assert len(calls) == 2
        assert all(torch.equal(again[name], value) for name, value in plain.items())
        distilled_parts(distiller, student, inputs)
        assert len(calls) == 3
