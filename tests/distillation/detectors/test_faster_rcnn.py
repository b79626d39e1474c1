"""CrossKD in front of the RoI head: where the gradient goes, where the loss is zero, which numbers count."""

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from crosskd_hf.distillation import CrossKD, Distiller
from crosskd_hf.models import FasterRCNNForObjectDetection
from crosskd_hf.models.losses import divide
from tests.distillation.step import distilled_losses
from tests.tiny_dense import make_batch, make_detector
from tests.tiny_faster_rcnn import make_faster_rcnn

METHODS = [("crosskd",), ("kd",), ("pkd",), ("crosskd", "pkd"), ("crosskd", "kd")]
NAMES = {0: "cat", 1: "dog", 2: "cow"}


def make_pair(**changes: Any) -> tuple[FasterRCNNForObjectDetection, FasterRCNNForObjectDetection]:
    return make_faster_rcnn(**changes).train(), make_faster_rcnn(seed=1)


@pytest.mark.parametrize("methods", METHODS, ids="+".join)
@pytest.mark.parametrize("counts", [(3, 2), (0, 2), (0, 0)])
def test_every_method_on_every_batch(methods: tuple[str, ...], counts: tuple[int, int]) -> None:
    student, teacher = make_pair()
    distiller = Distiller(student, teacher, methods)
    losses = distilled_losses(distiller, student, make_batch(counts=counts))
    assert all(loss.isfinite() for loss in losses.values())
    assert ("pkd/features" in losses) == ("pkd" in methods)
    for name in ("crosskd", "kd"):
        assert (f"{name}/cls" in losses) == (f"{name}/reg" in losses) == (name in methods)
    distiller.check_gradients(losses)
    torch.stack(list(losses.values())).sum().backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert any(p.grad is not None and p.grad.any() for p in student.backbone.parameters())
    json.dumps(distiller.describe())


@pytest.mark.parametrize("width", [16, 8])
def test_gradient_reaches_the_pyramid_but_neither_head(width: int) -> None:
    student, teacher = make_pair(fpn_channels=width)
    distiller = Distiller(student, teacher, ["crosskd"])
    losses = distilled_losses(distiller, student, make_batch())
    torch.stack(list(losses.values())).sum().backward()
    assert student.neck.output[0].weight.grad.any()
    unreached = distiller.named_methods["crosskd"].unreached(distiller.pair.student)
    assert all(parameter.grad is None for parameter in unreached)
    heads = {id(p) for head in (student.rpn, student.roi_head) for p in head.parameters()}
    assert {id(p) for p in unreached} == heads
    names = {f"crosskd.adapters.pyramid.{p}" for p in ("weight", "bias")}
    assert set(distiller.describe()["adapters"]) == (set() if width == 16 else names)
    assert all(parameter.grad.any() for parameter in distiller.parameters())


def test_zero_where_the_pyramids_are_equal() -> None:
    student = make_faster_rcnn(seed=1).train()
    distiller = Distiller(student, make_faster_rcnn(seed=1), ["crosskd", "kd"])
    losses = distilled_losses(distiller, student, make_batch())
    assert losses["crosskd/reg"] == losses["kd/reg"] == 0
    assert losses["crosskd/cls"].abs() < 1e-6
    assert losses["kd/cls"].abs() < 1e-6
    torch.stack(list(losses.values())).sum().backward()
    assert max(p.grad.abs().max() for p in student.parameters() if p.grad is not None) < 1e-6


def test_own_head_does_not_matter() -> None:
    """Only the pyramid and the regions of the student enter."""
    student, teacher = make_pair()
    distiller = Distiller(student, teacher, ["crosskd"])
    batch = make_batch()
    outputs = student(**batch, **distiller.student_request)
    before = divide(distiller(outputs, batch))
    with torch.no_grad():
        for parameter in student.roi_head.parameters():
            parameter.add_(1.0)
    after = divide(distiller(outputs, batch))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_losses_against_plain_steps() -> None:
    student, teacher = make_pair(roi_samples=None)
    distiller = Distiller(student, teacher, ["crosskd"])
    batch = make_batch(counts=(3, 0))
    outputs = student(**batch, **distiller.student_request)
    losses = divide(distiller(outputs, batch))
    rois = outputs.rois
    with torch.no_grad():
        target = teacher.roi_head(teacher.pyramid(batch["pixel_values"]), rois.boxes)
        cross = teacher.roi_head(outputs.features, rois.boxes)
    rows = rois.mask
    divergence = F.kl_div(
        (cross.logits[rows] / 3).log_softmax(-1), (target.logits[rows] / 3).softmax(-1), reduction="sum"
    )
    # The second image has no positive and counts one region too many.
    torch.testing.assert_close(losses["crosskd/cls"], 0.5 * 9 * divergence / (rows.sum() + 1))
    score, best = target.logits[rows].softmax(-1)[:, :3].max(-1)
    index = torch.arange(len(best))
    distance = (cross.deltas[rows][index, best] - target.deltas[rows][index, best]).abs().sum(-1)
    torch.testing.assert_close(losses["crosskd/reg"], (distance * score).sum() / (4 * score.sum()))


def test_regions_of_the_padding_do_not_count() -> None:
    student, teacher = make_pair(roi_samples=12)
    distiller = Distiller(student, teacher, ["crosskd"])
    batch = make_batch()
    outputs = student(**batch, **distiller.student_request)
    before = divide(distiller(outputs, batch))
    filler = outputs.rois._replace(
        boxes=F.pad(outputs.rois.boxes, (0, 0, 0, 3), value=7.0),
        mask=F.pad(outputs.rois.mask, (0, 3)),
        positive=F.pad(outputs.rois.positive, (0, 3)),
    )
    outputs["rois"] = filler
    after = divide(distiller(outputs, batch))
    for key, loss in before.items():
        torch.testing.assert_close(after[key], loss)


class TestClasses:
    def test_are_matched_by_name_and_background_always(self) -> None:
        """A teacher that knows the classes in another order, and one more, teaches the same."""
        student = make_faster_rcnn(id2label=NAMES).train()
        teacher = make_faster_rcnn(seed=1, id2label=NAMES)
        other = make_faster_rcnn(seed=1, id2label={0: "bus", 1: "cow", 2: "Dog", 3: "cat"})
        order = [2, 1, 0]  # cow, dog, cat in the teacher's classes
        state = {k: v for k, v in teacher.state_dict().items() if not k.startswith("roi_head.c")}
        state = {k: v for k, v in state.items() if not k.startswith("roi_head.r")}
        assert not other.load_state_dict(state, strict=False).unexpected_keys
        with torch.no_grad():
            for name in ("weight", "bias"):
                source, target = (m.roi_head.classifier.get_parameter(name) for m in (teacher, other))
                target[1:4], target[4] = source[order], source[3]
                source, target = (m.roi_head.regressor.get_parameter(name) for m in (teacher, other))
                target.view(4, 4, -1)[1:4] = source.view(3, 4, -1)[order]
        batch = make_batch()
        results = []
        for model in (teacher, other):
            torch.manual_seed(0)
            distiller = Distiller(student, model, ["crosskd", "kd"])
            results.append(distilled_losses(distiller, student, batch))
        assert distiller.describe()["classes"]["teacher"] == [3, 2, 1]
        for key, loss in results[0].items():
            torch.testing.assert_close(results[1][key], loss, rtol=1e-4, atol=1e-6)

    def test_unknown_classes_are_left_out(self) -> None:
        student = make_faster_rcnn(id2label=NAMES).train()
        teacher = make_faster_rcnn(seed=1, id2label={0: "cow", 1: "cat"})
        distiller = Distiller(student, teacher, ["crosskd", "kd"])
        assert distiller.describe()["classes"]["unknown"] == ["dog"]
        assert all(loss.isfinite() for loss in distilled_losses(distiller, student, make_batch()).values())


class TestRefuses:
    def test_a_cut(self) -> None:
        with pytest.raises(ValueError, match="cut=3 has no effect on a FasterRCNN.* Leave it out"):
            Distiller(*make_pair(), [CrossKD(cut=3)])

    def test_other_strides(self) -> None:
        student = make_faster_rcnn(strides=(8, 16, 32, 64), backbone_strides=(8, 16, 32))
        with pytest.raises(ValueError, match=r"build the student with strides=\(4, 8, 16, 32, 64\)"):
            Distiller(student, make_faster_rcnn(), ["crosskd"])

    def test_another_family(self) -> None:
        with pytest.raises(ValueError, match="are Faster R-CNN and dense detectors.* compares features, such as pkd"):
            Distiller(make_faster_rcnn(), make_detector("gfl"), ["crosskd"])

    def test_outputs_without_regions(self) -> None:
        student, teacher = make_pair()
        distiller, batch = Distiller(student, teacher, ["crosskd"]), make_batch()
        with pytest.raises(ValueError, match="outputs hold no features"):
            distiller(student(**batch), batch)
        unlabelled = {key: value for key, value in batch.items() if key != "labels"}
        with pytest.raises(ValueError, match="call the student with labels"):
            distiller(student(**unlabelled, **distiller.student_request), batch)

    def test_plain_kd_between_other_boxes(self) -> None:
        pair = make_pair(class_agnostic=True)
        with pytest.raises(ValueError, match="regions of class-agnostic heads have no classes"):
            Distiller(*pair, ["kd"])
        losses = distilled_losses(Distiller(*pair, ["crosskd"]), pair[0], make_batch())
        assert losses["crosskd/reg"] > 0


def test_class_agnostic_teacher() -> None:
    student, teacher = make_faster_rcnn().train(), make_faster_rcnn(seed=1, class_agnostic=True)
    losses = distilled_losses(Distiller(student, teacher, ["crosskd"]), student, make_batch())
    assert losses["crosskd/reg"] > 0


def test_weights_and_temperature() -> None:
    student, teacher = make_pair(roi_samples=None)
    batch = make_batch()
    plain = distilled_losses(Distiller(student, teacher, ["crosskd"]), student, batch)
    heavy = distilled_losses(Distiller(student, teacher, ["crosskd:terms.cls=1,terms.reg=3"]), student, batch)
    torch.testing.assert_close(heavy["crosskd/cls"], 2 * plain["crosskd/cls"])
    torch.testing.assert_close(heavy["crosskd/reg"], 3 * plain["crosskd/reg"])
    sharp = distilled_losses(Distiller(student, teacher, ["crosskd:temperature=1"]), student, batch)
    assert sharp["crosskd/cls"] != plain["crosskd/cls"]


def test_one_step_leaves_the_teacher_as_it_was() -> None:
    student, teacher = make_pair()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    distiller = Distiller(student, teacher, ["crosskd", "pkd"])
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], 0.1)
    torch.stack(list(distilled_losses(distiller, student, make_batch()).values())).sum().backward()
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not teacher.training


def test_halves_of_a_batch_add_up() -> None:
    """Totals and normalizers of single images are those of the batch, so that processes don't matter."""
    student, teacher = make_pair(rpn_samples=None, roi_samples=None)
    distiller = Distiller(student, teacher, ["crosskd", "pkd"])
    batch = make_batch()
    whole = student(**batch, **distiller.student_request)
    whole_parts = {**whole.loss_parts, **distiller(whole, batch)}
    halves = []
    for image in (slice(0, 1), slice(1, 2)):
        half = {key: value[image] for key, value in batch.items()}
        outputs = student(**half, **distiller.student_request)
        halves.append({**outputs.loss_parts, **distiller(outputs, half)})
    for key, part in whole_parts.items():
        total, normalizer = (sum(half[key][index] for half in halves) for index in (0, 1))
        torch.testing.assert_close(total, part.total, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.as_tensor(normalizer).float(), part.normalizer.float(), rtol=1e-4, atol=1e-5)
