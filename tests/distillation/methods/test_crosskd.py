"""CrossKD's own invariants: where heads are cut, what is aligned and compared, and where gradient flows."""

import pytest
import torch
from torch import Tensor, nn

from crosskd_hf.distillation import KD, CrossKD, Distiller, MethodConfig
from crosskd_hf.distillation.passes import Cut
from crosskd_hf.distillation.statistics import AXES, align
from crosskd_hf.models import DenseDetector
from tests.distillation import detector_zoo
from tests.distillation.step import distilled_losses
from tests.tiny_dense import KINDS, make_batch, make_detector

CUTS = range(5)


def distil(
    student: DenseDetector, teacher: DenseDetector, *methods: MethodConfig | str
) -> tuple[Distiller, dict[str, Tensor]]:
    distiller = Distiller(student, teacher, methods)
    return distiller, distilled_losses(distiller, student, make_batch())


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


class TestCut:
    @pytest.mark.parametrize("cut", CUTS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_head_is_its_two_halves(self, kind: str, cut: int) -> None:
        head = make_detector(kind).head
        features = [torch.randn(2, 16, size, size) for size in (8, 4, 2, 1, 1)]
        whole, halves = head(features), head.finish(head.tap(features, cut), cut)
        for expected, got in zip(whole, halves, strict=True):
            assert (expected is None) == (got is None)
            assert expected is None or torch.equal(expected, got)
        assert (whole.centerness is not None) == (kind in ("fcos", "atss"))

    @pytest.mark.parametrize("cut", CUTS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_nothing_to_learn_from_oneself(self, kind: str, cut: int) -> None:
        teacher, student = make_detector(kind), make_detector(kind).train()
        _, losses = distil(student, teacher, CrossKD(cut=cut))
        assert set(losses) == {"crosskd/cls", "crosskd/reg"} | ({"crosskd/centerness"} if kind == "atss" else set())
        for key, loss in losses.items():
            # The entropy of the centerness stays: it is not modulated. Its gradient is zero, as the next test shows.
            if key != "crosskd/centerness":
                assert abs(loss.item()) < 1e-4, key

    @pytest.mark.parametrize("kind", KINDS)
    def test_equals_give_no_gradient(self, kind: str) -> None:
        """Of the smooth distances; a quality focal loss of exponent 1 and overlaps of boxes have a kink there."""
        teacher, student = make_detector(kind), make_detector(kind).train()
        other = make_detector(kind, seed=1).train()
        terms = None if kind == "gfl" else {"reg": 0.0}
        methods = CrossKD(beta=2.0, terms=terms), KD(beta=2.0, terms=terms), "pkd"
        norms = []
        for model in (student, other):
            torch.stack(list(distil(model, teacher, *methods)[1].values())).sum().backward()
            norms.append(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item())
        assert norms[0] < 1e-3 * norms[1]

    @pytest.mark.parametrize("hold", ["post", "pre"])
    @pytest.mark.parametrize("cut", CUTS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_gradient_flows_in_front_of_the_cut_only(self, kind: str, cut: int, hold: str) -> None:
        student, teacher = make_detector(kind).train(), make_detector(kind, seed=1)
        distiller, losses = distil(student, teacher, CrossKD(cut=cut, hold=hold if cut else None))
        distiller.check_gradients(losses)
        torch.stack(list(losses.values())).sum().backward()
        before = {id(p) for module in student.head.modules_before(cut) for p in module.parameters()}
        for name, parameter in student.head.named_parameters():
            assert (parameter.grad is None) == (id(parameter) not in before), name
            assert parameter.grad is None or parameter.grad.any(), name
        trunk = [p for part in (student.backbone, student.neck) for p in part.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trunk)
        assert any(p.grad.any() for p in trunk)
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())

    def test_a_cut_behind_the_predictors_is_another_method(self) -> None:
        with pytest.raises(ValueError, match="cut=5 lies behind the predictors, .* choose 0 to 4.* is the method kd"):
            Distiller(make_detector("gfl"), make_detector("gfl"), ["crosskd:cut=5"])
        with pytest.raises(ValueError, match="cut=-1 must be at least 0"):
            CrossKD(cut=-1)

    def test_the_teachers_tower_may_be_cut_elsewhere(self) -> None:
        student, teacher = make_detector("gfl", num_convs=2).train(), make_detector("gfl", seed=1)
        _, losses = distil(student, teacher, CrossKD(cut=1, teacher_cut=3))
        torch.stack(list(losses.values())).sum().backward()
        assert student.head.cls_tower[0].conv.weight.grad.any()
        assert student.head.cls_tower[1].conv.weight.grad is None

    def test_a_published_cut_that_the_student_does_not_have(self) -> None:
        student, teacher = make_detector("gfl", num_convs=2), make_detector("gfl")
        described = Distiller(student, teacher, ["crosskd"]).describe()["methods"]["crosskd"]
        assert (described["cut"], described["teacher_cut"]) == (2, 2)
        assert Distiller(*[make_detector("fcos")] * 2, ["crosskd"]).describe()["methods"]["crosskd"]["cut"] == 2

    @pytest.mark.parametrize(("cut", "field"), [(0, "fpn_channels"), (3, "head_channels")])
    def test_another_width_gets_adapters_of_the_methods_own(self, cut: int, field: str) -> None:
        student, teacher = make_detector("gfl", **{field: 8}).train(), make_detector("gfl", seed=1)
        names = set(student.state_dict())
        distiller, losses = distil(student, teacher, CrossKD(cut=cut))
        expected = {f"crosskd.adapters.{tap}.{p}" for tap in ("cls", "reg") for p in ("weight", "bias")}
        assert set(distiller.describe()["adapters"]) == expected
        torch.stack(list(losses.values())).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.parameters())
        assert all(adapter.weight.grad.any() for adapter in distiller.named_methods["crosskd"].adapters.values())
        assert set(student.state_dict()) == names

    def test_taps_are_aligned_and_rectified_but_the_pyramid_is_not(self) -> None:
        method = Distiller(make_detector("gfl"), make_detector("gfl", seed=1), ["crosskd"]).named_methods["crosskd"]
        feature, reference = torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8)
        aligned = align(feature, reference, method.config.statistics)
        assert aligned.min() < 0
        assert torch.equal(method._adapted("cls", feature, reference, Cut(2)), aligned.relu())
        assert torch.equal(method._adapted("cls", feature, reference, Cut(0)), aligned)


class TestHold:
    def test_before_the_relu_is_what_the_relu_makes_the_tap_of(self) -> None:
        head = make_detector("gfl").head
        features = [torch.randn(2, 16, 4, 4)] * 5
        before, after = head.tap(features, 3, activated=False), head.tap(features, 3)
        assert torch.equal(before.cls[0].relu(), after.cls[0])
        assert before.cls[0].min() < 0

    def test_matters(self) -> None:
        student, teacher = make_detector("gfl").train(), make_detector("gfl", seed=1)
        post, pre = (distil(student, teacher, CrossKD(hold=hold))[1]["crosskd/cls"] for hold in ("post", "pre"))
        assert post != pre

    def test_two_methods_may_need_different_taps(self) -> None:
        student, teacher = make_detector("gfl").train(), make_detector("gfl", seed=1)
        alone = [distil(student, teacher, method)[1] for method in ("crosskd:cut=1", "pkd:location=cls")]
        _, together = distil(student, teacher, "crosskd:cut=1", "pkd:location=cls")
        for key, loss in (alone[0] | alone[1]).items():
            torch.testing.assert_close(together[key], loss)


class TestStrategy:
    """Definitions: the supplement's figure 1. The second operand is constant; boxes count by the teacher's scores."""

    REACHED = {  # of the student: first convolution of a tower, its last one, predictors, trunk
        "a": (True, False, False, True),
        "b": (True, True, True, True),
        "c": (True, True, True, True),
        "d": (False, True, True, False),
    }

    @pytest.mark.parametrize("strategy", REACHED)
    @pytest.mark.parametrize("kind", KINDS)
    def test_where_gradient_flows(self, kind: str, strategy: str) -> None:
        student, teacher = make_detector(kind).train(), make_detector(kind, seed=1)
        distiller, losses = distil(student, teacher, CrossKD(strategy=strategy))
        distiller.check_gradients(losses)
        torch.stack(list(losses.values())).sum().backward()
        head = student.head
        tower = head.convs if kind == "tood" else head.cls_tower
        modules = tower[0], tower[3], head.classifier, student.neck
        reached = tuple(any(p.grad is not None for p in module.parameters()) for module in modules)
        assert reached == self.REACHED[strategy]
        assert all(p.grad is None for p in teacher.parameters())

    @pytest.mark.parametrize("strategy", REACHED)
    @pytest.mark.parametrize("kind", KINDS)
    def test_nothing_to_learn_from_oneself(self, kind: str, strategy: str) -> None:
        config = CrossKD(strategy=strategy, terms={"centerness": 0})
        _, losses = distil(make_detector(kind).train(), make_detector(kind), config)
        assert set(losses) == {"crosskd/cls", "crosskd/reg"}
        assert all(abs(loss.item()) < 1e-4 for loss in losses.values())

    @pytest.mark.parametrize("strategy", ["b", "d"])
    def test_the_way_back_has_adapters_of_its_own(self, strategy: str) -> None:
        student, teacher = make_detector("gfl", head_channels=8).train(), make_detector("gfl", seed=1)
        distiller, losses = distil(student, teacher, CrossKD(strategy=strategy))
        assert distiller.describe()["adapters"]["crosskd.adapters.cls.weight"] == [8, 16, 1, 1]
        assert all(loss.isfinite() for loss in losses.values())

    def test_needs_rows_that_mean_the_same(self) -> None:
        with pytest.raises(ValueError, match="strategy='c' compares predictions of both heads row by row"):
            Distiller(make_detector("gfl"), make_detector("atss"), ["crosskd:strategy=c"])


class TestRegion:
    def test_positives_and_negatives_add_up(self) -> None:
        student, teacher = make_detector("retinanet").train(), make_detector("retinanet", seed=1)
        found = {r: distil(student, teacher, CrossKD(region=r))[1] for r in ("P", "N", "P+N")}
        for region in ("P", "N"):
            assert found[region]["crosskd/cls"] > 0
            assert found[region]["crosskd/reg"] == found["P+N"]["crosskd/reg"]
        total = found["P"]["crosskd/cls"] + found["N"]["crosskd/cls"]
        torch.testing.assert_close(total, found["P+N"]["crosskd/cls"])

    def test_without_objects_all_rows_are_negatives(self) -> None:
        student, teacher = make_detector("retinanet").train(), make_detector("retinanet", seed=1)
        distillers = {r: Distiller(student, teacher, [CrossKD(region=r)]) for r in ("P", "N", "P+N")}
        empty = make_batch(counts=(0, 0))
        found = {r: distilled_losses(each, student, empty)["crosskd/cls"] for r, each in distillers.items()}
        assert found["P"] == 0
        assert found["N"] == found["P+N"] > 0

    def test_of_regions(self) -> None:
        student, teacher = detector_zoo.build("faster_rcnn").train(), detector_zoo.build("faster_rcnn", 1)
        found = []
        for region in ("P", "N", "P+N"):
            distiller = Distiller(student, teacher, [CrossKD(region=region)])
            found.append(distilled_losses(distiller, student, make_batch())["crosskd/cls"])
        torch.testing.assert_close(found[0] + found[1], found[2])


def test_the_padding_can_be_taken_in() -> None:
    student, teacher = (make_detector("fcos", seed=seed, size_divisor=8) for seed in (0, 1))
    student.train()
    masked, whole = (distil(student, teacher, CrossKD(mask_padding=mask))[1] for mask in (True, False))
    assert whole["crosskd/cls"] > masked["crosskd/cls"]
    full = make_batch(((64, 64), (64, 64)))
    both = [Distiller(student, teacher, [CrossKD(mask_padding=mask)]) for mask in (True, False)]
    first, second = (distilled_losses(distiller, student, full) for distiller in both)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_beta_0_is_binary_cross_entropy() -> None:
    student, teacher = make_detector("gfl").train(), make_detector("gfl")
    distiller, losses = distil(student, teacher, CrossKD(beta=0))
    outputs = teacher(**make_batch(), cut=0)
    scores = outputs.logits.sigmoid()
    entropy = nn.functional.binary_cross_entropy(scores, scores, reduction="none").sum(-1) * outputs.assignment.weight
    expected = entropy.sum() / outputs.assignment.count_positives()
    torch.testing.assert_close(losses["crosskd/cls"], expected, rtol=1e-4, atol=1e-4)
    assert distiller.describe()["methods"]["crosskd"]["beta"] == 0


@pytest.mark.parametrize(
    ("pair", "option"),
    [
        (("faster_rcnn", "faster_rcnn"), "cut=3"),
        (("faster_rcnn", "faster_rcnn"), "beta=1"),
        (("faster_rcnn", "faster_rcnn"), "strategy=a"),
        (("detr", "detr"), "beta=1"),
        (("rt_detr", "rt_detr"), "temperature=1"),
        (("rt_detr", "rt_detr"), "statistics=image"),
        (("rt_detr", "rt_detr"), "region=P"),
        (("gfl", "retinanet"), "temperature=2"),
        (("gfl", "gfl"), "queries=teacher"),
        (("gfl", "gfl"), "box_loss=giou"),
        (("gfl", "gfl"), "cut=0,hold=pre"),
        (("gfl", "gfl"), "terms.cls=0,beta=1"),
        (("gfl", "gfl"), "terms.cls=0,region=P"),
        (("gfl", "gfl"), "terms.reg=0,temperature=2"),
        (("rt_detr", "rt_detr"), "terms.reg=0,box_loss=l1+giou,terms.iou=0"),
    ],
)
def test_an_option_without_effect_is_an_error_that_names_pair_and_option(pair: tuple[str, str], option: str) -> None:
    student, teacher = detector_zoo.build(pair[0]), detector_zoo.build(pair[1], 1)
    with pytest.raises(ValueError, match=r"crosskd: \w+=.* has no effect on a \w+ that learns from a \w+\. Leave it"):
        Distiller(student, teacher, [f"crosskd:{option}"])


@pytest.mark.parametrize("term", ["centerness", "iou"])
def test_a_term_that_the_pair_does_not_have(term: str) -> None:
    with pytest.raises(ValueError, match=rf"the terms \['{term}'\] don't exist for a GFL\w+ that learns from a GFL"):
        Distiller(make_detector("gfl"), make_detector("gfl"), [CrossKD(terms={term: 1})])


def test_the_teacher_is_no_part_of_the_distiller() -> None:
    student, teacher = make_detector("gfl"), make_detector("gfl", seed=1).train()
    distiller = Distiller(student, teacher, ["crosskd"])
    distiller.train()
    assert not teacher.training
    assert not list(distiller.parameters())
    assert not distiller.state_dict()
    assert distiller.teacher is teacher
