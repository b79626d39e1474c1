"""CrossKD's own invariants: where heads are cut, what is aligned, and where gradient flows."""

import pytest
import torch
from torch import Tensor, nn

from crosskd_hf.distillation import DenseDistiller, DistillationConfig, make_distiller
from crosskd_hf.distillation.cross_head import align
from crosskd_hf.distillation.statistics import AXES
from crosskd_hf.models import DenseDetector
from crosskd_hf.models.losses import divide
from tests.tiny_dense import KINDS, make_batch, make_detector

CUTS = range(5)


def losses_of(student: DenseDetector, distiller: DenseDistiller, batch: dict) -> dict[str, Tensor]:
    return divide(distiller(student(**batch, **distiller.student_request), batch))


class TestAlign:
    FEATURE = torch.randn(3, 5, 6, 7, generator=torch.Generator().manual_seed(0)) * 3 + 1
    REFERENCE = torch.rand(3, 5, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 7

    @pytest.mark.parametrize("statistics", ["image", "batch"])
    def test_takes_over_the_teachers_mean_and_deviation(self, statistics: str) -> None:
        aligned, axes = align(self.FEATURE, self.REFERENCE, statistics), AXES[statistics]
        torch.testing.assert_close(aligned.mean(axes), self.REFERENCE.mean(axes))
        torch.testing.assert_close(aligned.std(axes), self.REFERENCE.std(axes), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("statistics", ["image", "batch"])
    def test_forgets_scale_and_offset_of_the_student(self, statistics: str) -> None:
        scale, offset = torch.rand(5, 1, 1) * 9 + 0.1, torch.randn(5, 1, 1)
        torch.testing.assert_close(
            align(self.FEATURE * scale + offset, self.REFERENCE, statistics),
            align(self.FEATURE, self.REFERENCE, statistics),
            rtol=1e-4,
            atol=1e-4,
        )

    def test_is_the_identity_between_equals(self) -> None:
        torch.testing.assert_close(align(self.FEATURE, self.FEATURE), self.FEATURE, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("statistics", ["image", "batch"])
    def test_a_single_element_is_left_alone(self, statistics: str) -> None:
        feature = torch.randn(1, 5, 1, 1, requires_grad=True)
        aligned = align(feature, torch.randn(1, 5, 1, 1), statistics)
        aligned.sum().backward()
        assert torch.equal(aligned, feature)
        assert feature.grad.isfinite().all()

    def test_a_constant_map_is_finite(self) -> None:
        feature = torch.ones(2, 5, 3, 3, requires_grad=True)
        aligned = align(feature, self.REFERENCE[:2])
        aligned.sum().backward()
        assert aligned.isfinite().all()
        assert feature.grad.isfinite().all()

    def test_no_gradient_reaches_the_teacher(self) -> None:
        reference = self.REFERENCE.clone().requires_grad_()
        assert not align(self.FEATURE, reference).requires_grad


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_head_is_its_two_halves(kind: str, cut: int) -> None:
    head = make_detector(kind).head
    features = [torch.randn(2, 16, size, size) for size in (8, 4, 2, 1, 1)]
    whole, halves = head(features), head.finish(head.tap(features, cut), cut)
    for expected, got in zip(whole, halves, strict=True):
        assert (expected is None) == (got is None)
        assert expected is None or torch.equal(expected, got)
    assert (whole.centerness is not None) == (kind in ("fcos", "atss"))


@pytest.mark.parametrize("cut", [*CUTS, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_learn_from_oneself(kind: str, cut: int) -> None:
    teacher, student = make_detector(kind), make_detector(kind).train()
    distiller = make_distiller(student, teacher, DistillationConfig(methods=("crosskd", "pkd"), cut=cut))
    losses = losses_of(student, distiller, make_batch())
    assert {"loss_cls_kd", "loss_reg_kd", "loss_feat_kd"} <= set(losses)
    assert ("loss_centerness_kd" in losses) == (kind == "atss")
    for key, loss in losses.items():
        # The entropy of the centerness stays: it is not modulated. Its gradient is zero, as the next test shows.
        if key != "loss_centerness_kd":
            assert abs(loss.item()) < 1e-4, key


@pytest.mark.parametrize("kind", KINDS)
def test_equals_give_no_gradient(kind: str) -> None:
    """Of the smooth distances; a quality focal loss of exponent 1 and overlaps of boxes have a kink there."""
    teacher, student = make_detector(kind), make_detector(kind).train()
    other = make_detector(kind, seed=1).train()
    weights = None if kind == "gfl" else {"loss_reg_kd": 0.0}
    config = DistillationConfig(methods=("crosskd", "kd", "pkd"), beta=2.0, loss_weights=weights)
    norms = []
    for model in (student, other):
        losses = losses_of(model, make_distiller(model, teacher, config), make_batch())
        torch.stack(list(losses.values())).sum().backward()
        norms.append(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item())
    assert norms[0] < 1e-3 * norms[1]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_flows_in_front_of_the_cut_only(kind: str, cut: int) -> None:
    student, teacher = make_detector(kind).train(), make_detector(kind, seed=1)
    distiller = make_distiller(student, teacher, DistillationConfig(cut=cut))
    loss = torch.stack(list(losses_of(student, distiller, make_batch()).values())).sum()
    distiller.check_gradients(student, loss)
    loss.backward()
    before = {id(p) for module in student.head.modules_before(cut) for p in module.parameters()}
    for name, parameter in student.head.named_parameters():
        assert (parameter.grad is None) == (id(parameter) not in before), name
        assert parameter.grad is None or parameter.grad.any(), name
    trunk = [p for part in (student.backbone, student.neck) for p in part.parameters() if p.requires_grad]
    assert trunk
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trunk)
    assert any(p.grad.any() for p in trunk)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_plain_kd_trains_the_predictors(kind: str) -> None:
    student, teacher = make_detector(kind).train(), make_detector(kind, seed=1)
    distiller = make_distiller(student, teacher, DistillationConfig(methods=("kd",)))
    torch.stack(list(losses_of(student, distiller, make_batch()).values())).sum().backward()
    assert student.head.classifier.weight.grad.any()
    assert student.head.regressor.weight.grad.any()
    assert distiller.silent_parameters(student) == []


@pytest.mark.parametrize("kind", KINDS)
def test_cut_behind_the_predictors_is_plain_kd(kind: str) -> None:
    student, teacher = make_detector(kind).train(), make_detector(kind, seed=1)
    batch = make_batch()
    behind = student.head.num_convs + 1
    by_cut = losses_of(student, make_distiller(student, teacher, DistillationConfig(cut=behind)), batch)
    by_name = losses_of(student, make_distiller(student, teacher, DistillationConfig(methods=("kd",))), batch)
    assert by_cut.keys() == by_name.keys()
    assert all(torch.equal(by_cut[key], by_name[key]) for key in by_cut)


@pytest.mark.parametrize("cut", [-1, 6])
def test_cut_out_of_range(cut: int) -> None:
    student, teacher = make_detector("gfl"), make_detector("gfl")
    with pytest.raises(ValueError, match="choose 0 to 4"):
        make_distiller(student, teacher, DistillationConfig(cut=cut))


def test_teachers_tower_may_be_cut_elsewhere() -> None:
    student, teacher = make_detector("gfl", num_convs=2).train(), make_detector("gfl", seed=1)
    distiller = make_distiller(student, teacher, DistillationConfig(cut=1, teacher_cut=3))
    losses = losses_of(student, distiller, make_batch())
    torch.stack(list(losses.values())).sum().backward()
    assert student.head.cls_tower[0].conv.weight.grad.any()
    assert student.head.cls_tower[1].conv.weight.grad is None


@pytest.mark.parametrize(("cut", "field"), [(0, "fpn_channels"), (3, "head_channels")])
def test_another_width_gets_adapters_of_the_distillers_own(cut: int, field: str) -> None:
    student, teacher = make_detector("gfl", **{field: 8}).train(), make_detector("gfl", seed=1)
    names = set(student.state_dict())
    distiller = make_distiller(student, teacher, DistillationConfig(cut=cut))
    adapters = dict(distiller.named_parameters())
    assert set(adapters) == {
        f"cross_head.{branch}_adapter.{p}" for branch in ("cls", "reg") for p in ("weight", "bias")
    }
    losses = losses_of(student, distiller, make_batch())
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapters.values())
    assert adapters["cross_head.cls_adapter.weight"].grad.any()
    assert adapters["cross_head.reg_adapter.weight"].grad.any()
    assert set(student.state_dict()) == names
    assert distiller.describe()["adapters"] == ["cross_head.cls_adapter", "cross_head.reg_adapter"]


def test_the_teacher_is_no_part_of_the_distiller() -> None:
    student, teacher = make_detector("gfl"), make_detector("gfl", seed=1).train()
    distiller = make_distiller(student, teacher, DistillationConfig())
    distiller.train()
    assert not teacher.training
    assert not list(distiller.parameters())
    assert not distiller.state_dict()
    assert distiller.teacher is teacher
