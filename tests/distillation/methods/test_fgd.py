"""FGD: attention, masks, context blocks, its four terms, and inheriting."""

from typing import Any

import pytest
import torch
from torch import Tensor

from crosskd_hf.distillation import FGD, Distiller
from crosskd_hf.distillation.methods.fgd import ContextBlock
from crosskd_hf.distillation.passes import Batch, FeatureMap
from crosskd_hf.models.assigners import Targets
from crosskd_hf.models.losses import divide
from tests.distillation.step import distilled_losses
from tests.distillation.stubs import build_method, maps_pass
from tests.tiny_dense import make_batch, make_detector

FEATURE = FeatureMap(8, torch.zeros(1, 1, 4, 6))


def batch_of(*boxes: list[float], height: int = 32, width: int = 48) -> Batch:
    batch = Batch(torch.zeros(1, 3, height, width), None, [])
    rows = torch.tensor([[*boxes, [0.0, 0, 0, 0]]])
    there = torch.arange(len(boxes) + 1)[None] < len(boxes)
    batch.__dict__["targets"] = Targets(rows, torch.zeros(rows.shape[:2]).long(), there)
    return batch


def method_of(levels: int = 1, **options: Any) -> Any:
    return build_method(FGD(**options), 3, 3, levels)


class TestAttention:
    def test_sums(self) -> None:
        places, channels = method_of().attention(torch.randn(2, 3, 4, 6))
        torch.testing.assert_close(places.sum((1, 2)), torch.tensor([24.0, 24]))
        torch.testing.assert_close(channels.sum(1), torch.tensor([3.0, 3]))

    def test_a_colder_one_is_sharper(self) -> None:
        values = torch.randn(1, 3, 4, 6)
        sharp, flat = (method_of(temperature=t).attention(values)[0].max() for t in (0.1, 10.0))
        assert sharp > flat


class TestMasks:
    def test_cells_of_a_box_and_the_one_in_which_it_ends(self) -> None:
        foreground, background = method_of().masks(FEATURE, batch_of([8.0, 0, 15, 8]))
        assert foreground[0].nonzero().tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]]
        assert foreground.sum() == background.sum() == 1

    def test_the_smaller_of_two_boxes_wins_a_cell(self) -> None:
        foreground, _ = method_of().masks(FEATURE, batch_of([0.0, 0, 40, 24], [8.0, 8, 8, 8]))
        assert foreground[0, 1, 1] == 1
        assert foreground[0, 0, 0] == pytest.approx(1 / 24)

    def test_no_box_is_all_background(self) -> None:
        foreground, background = method_of().masks(FEATURE, batch_of())
        assert not foreground.any()
        torch.testing.assert_close(background, torch.full((1, 4, 6), 1 / 24))

    def test_a_box_on_everything_leaves_no_background(self) -> None:
        assert not method_of().masks(FEATURE, batch_of([0.0, 0, 48, 32]))[1].any()

    def test_padding_stretches_boxes_in_the_authors_code_alone(self) -> None:
        batch = batch_of([0.0, 0, 7, 7])
        batch.pixel_mask = torch.zeros(1, 32, 48)
        batch.pixel_mask[:, :16, :24] = 1
        assert method_of().masks(FEATURE, batch)[0].count_nonzero() == 4
        assert method_of(box_scale="image").masks(FEATURE, batch)[0].count_nonzero() == 9


class TestTerms:
    def losses(self, method: Any, factor: float = 1.0) -> dict[str, Tensor]:
        torch.manual_seed(0)
        own, goal = torch.randn(2, 1, 3, 4, 6)
        student = goal + factor * (own - goal)
        return divide(method(maps_pass([student], (8,)), maps_pass([goal], (8,)), batch_of([8.0, 0, 15, 8])))

    def test_squares(self) -> None:
        once, twice = (self.losses(method_of(), factor) for factor in (1.0, 2.0))
        for name in ("foreground", "background"):
            torch.testing.assert_close(4 * once[name], twice[name])
        assert self.losses(method_of(), 0.0) == dict.fromkeys(FGD.method.terms, 0)

    def test_a_context_block_is_at_first_the_map_itself(self) -> None:
        values = torch.randn(2, 4, 3, 3)
        torch.testing.assert_close(ContextBlock(4)(values), values)

    def test_the_relation_between_maps_alone_needs_blocks(self) -> None:
        method = method_of(terms={"relation": 0})
        assert not list(method.parameters())
        assert set(self.losses(method)) == {"foreground", "background", "attention"}


def test_numbers_of_the_authors_by_the_students_kind() -> None:
    def config(kind: str) -> Any:
        pair = make_detector(kind), make_detector(kind, 1)
        return Distiller(*pair, ["fgd"]).named_methods["fgd"].config

    assert config("gfl").terms == {"foreground": 1e-3, "background": 5e-4, "attention": 5e-4, "relation": 5e-6}
    assert (config("fcos").temperature, config("fcos").terms["foreground"]) == (0.8, 1.6e-3)


class TestInheriting:
    def test_neck_and_head_of_the_teacher_as_far_as_they_fit(self) -> None:
        student, teacher = make_detector("gfl"), make_detector("gfl", 1)
        distiller = Distiller(student, teacher, [FGD(inherit=True)])
        before = student.backbone.state_dict()
        distiller.prepare_student()
        for name, value in student.state_dict().items():
            same = torch.equal(value, teacher.state_dict()[name])
            assert same or name.startswith("backbone"), name
        assert all(torch.equal(value, before[name]) for name, value in student.backbone.state_dict().items())
        batch = make_batch()
        parts = distilled_losses(distiller, student, batch)
        assert all(torch.isfinite(loss) for loss in parts.values())

    @pytest.mark.parametrize(
        "changes", [{"num_labels": 4}, {"head_channels": 32}, {"label2id": {"x": 0, "y": 1, "z": 2}}]
    )
    def test_other_heads_and_classes_are_refused(self, changes: dict[str, Any]) -> None:
        if "label2id" in changes:
            changes = {**changes, "id2label": {0: "x", 1: "y", 2: "z"}}
        with pytest.raises(ValueError, match="can't inherit: heads and classes must be equal"):
            Distiller(make_detector("gfl"), make_detector("gfl", 1, **changes), ["fgd:inherit=true"])
