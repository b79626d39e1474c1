"""GID: which instances are chosen, and what is compared of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from crosskd_hf.distillation import GID, Distiller
from crosskd_hf.distillation.methods.gid import feature_loss, pool, relation_loss, select
from crosskd_hf.distillation.passes import Batch
from crosskd_hf.models.losses import divide
from tests.tiny_dense import make_batch, make_detector


class TestSelection:
    BOXES = torch.tensor([[[0.0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60], [0, 4, 10, 14], [90, 90, 99, 99]]])

    def test_the_highest_score_suppresses_its_neighbours(self) -> None:
        found = select(self.BOXES, torch.tensor([[0.5, 0.9, 0.7, 0.6, -1.0]]), 4)
        assert found.rows[0, :2].tolist() == [1, 2]
        assert found.mask.tolist() == [[True, True, False, False]]
        torch.testing.assert_close(found.scores[0, :2], torch.tensor([0.9, 0.7]))

    def test_so_many_at_most_and_each_image_by_itself(self) -> None:
        scores = torch.tensor([[0.5, 0.4, 0.7, 0.0, 0.6], [-1.0, -1, -1, -1, 0.1]])
        found = select(self.BOXES.expand(2, -1, -1), scores, 2)
        assert found.rows[0].tolist() == [2, 4]
        assert found.mask.tolist() == [[True, True], [True, False]]


def distil(config: GID | str = "gid", kind: str = "retinanet", teacher_seed: int = 1) -> tuple[Any, Any, Any, Batch]:
    """Method, both passes and the batch."""
    student, teacher = (make_detector(kind, seed).eval() for seed in (0, teacher_seed))
    distiller, inputs = Distiller(student, teacher, [config]), make_batch()
    batch = Batch(inputs["pixel_values"], inputs["pixel_mask"], inputs["labels"])
    outputs = student(**inputs, **distiller.student_request)
    passes = distiller.pair.student.read(outputs, batch), distiller.pair.teacher.teacher_pass(batch)
    (method,) = distiller.named_methods.values()
    method.distiller = [distiller]  # views live as long
    return method, *passes, batch


class TestInstances:
    def test_boxes_of_an_image_lie_inside_and_are_large(self) -> None:
        method, student, teacher, batch = distil()
        found = method.instances(student, teacher, batch)
        assert found.mask.any(1).all()
        for image, size in enumerate(batch.sizes.flip(-1)):
            boxes = found.boxes[image][found.mask[image]]
            assert (boxes >= 0).all()
            assert (boxes <= size.repeat(2)).all()
            assert (boxes[:, 2:] - boxes[:, :2] > 10).all()

    def test_every_instance_has_an_anchor(self) -> None:
        method, student, teacher, batch = distil()
        found = method.instances(student, teacher, batch)
        assert method.matches(student, found).any(1).all()
        none = found._replace(mask=torch.zeros_like(found.mask))
        assert not method.matches(student, none).any()


class TestTerms:
    @pytest.mark.parametrize("kind", ["retinanet", "gfl", "fcos", "tood"])
    def test_all_of_them(self, kind: str) -> None:
        found = divide(self.parts(kind=kind))
        assert set(found) == {"feature", "relation", "cls", "reg"}
        assert all(found[name] > 0 for name in ("feature", "cls", "reg"))

    def parts(self, config: GID | str = "gid", **options: Any) -> Any:
        method, student, teacher, batch = distil(config, **options)
        return method(student, teacher, batch)

    def test_equal_models_have_no_gradient(self) -> None:
        method, student, teacher, batch = distil(teacher_seed=0)
        total = torch.stack(list(divide(method(student, teacher, batch)).values())).sum()
        gradients = torch.autograd.grad(total, [student.predictions[-1].logits, *(f.values for f in student.features)])
        assert all(gradient.abs().max() < 1e-5 for gradient in gradients)

    def test_the_form_of_ld_compares_features_alone(self) -> None:
        found = divide(self.parts("gid:preset=ld"))
        assert set(found) == {"feature"}
        with pytest.raises(ValueError, match="low_quality=True has no effect"):
            distil(GID(preset="ld", low_quality=True))

    def test_other_rows_are_refused(self) -> None:
        with pytest.raises(ValueError, match="looks for the priors about which both models disagree"):
            Distiller(make_detector("gfl"), make_detector("retinanet", 1), ["gid"])


class TestRelation:
    def relation(self, own: Tensor, goal: Tensor, pooled: bool = False) -> Tensor:
        mask = torch.ones(own.shape[:2], dtype=torch.bool)
        return divide({"r": relation_loss(own, goal, mask, pooled)})["r"]

    def test_the_scale_of_features_makes_no_difference(self) -> None:
        own, goal = torch.randn(2, 2, 4, 7)
        torch.testing.assert_close(self.relation(own, goal), self.relation(3 * own, 5 * goal))
        assert self.relation(own, 2 * own) == pytest.approx(0, abs=1e-6)

    def test_two_instances_have_no_relation(self) -> None:
        own, goal = torch.randn(2, 2, 2, 7)
        assert self.relation(own, goal) == 0
        assert self.relation(own, goal, pooled=True) > 0

    def test_instances_that_are_not_there_do_not_count(self) -> None:
        own, goal = torch.randn(2, 1, 5, 7)
        mask = torch.tensor([[True, True, True, False, False]])
        torch.testing.assert_close(
            divide({"r": relation_loss(own, goal, mask, False)})["r"], self.relation(own[:, :3], goal[:, :3])
        )
        part = feature_loss(own, goal, mask)
        torch.testing.assert_close(part.total, (own - goal)[:, :3].square().sum())
        assert part.normalizer == 300


def test_a_box_is_read_on_the_level_of_its_size() -> None:
    maps = [torch.full((1, 1, 64 // s, 64 // s), float(s)) for s in (8, 16, 32)]
    boxes = torch.tensor([[[0.0, 0, 50, 50], [0, 0, 224, 224], [0, 0, 60, 900]]])
    assert pool(maps, [8, 16, 32], boxes)[0].amax(-1).tolist() == [8, 16, 16]
