"""Localization distillation: its regions, what its sums are divided by, and the heads that it works for."""

from typing import Any

import pytest
import torch
from torch import Tensor

from crosskd_hf.distillation import LD, Distiller
from crosskd_hf.distillation.regions import valuable
from crosskd_hf.models.assigners import Priors, Targets
from crosskd_hf.models.losses import divide
from tests.distillation.step import distilled_parts
from tests.tiny_dense import make_batch, make_detector

KINDS = ("gfl", "atss", "fcos", "retinanet")


def pair(kind: str = "gfl", config: LD | str = "ld", teacher_seed: int = 1, **changes: Any) -> tuple[Distiller, Any]:
    student, teacher = (make_detector(kind, seed, reg_max=16, **changes).eval() for seed in (0, teacher_seed))
    return Distiller(student, teacher, [config]), student


def losses(distiller: Distiller, student: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    parts = distilled_parts(distiller, student, batch)
    return {name.removeprefix("ld/"): loss for name, loss in divide(parts).items()}


@pytest.mark.parametrize("kind", KINDS)
class TestHeads:
    def test_every_term_counts_and_none_of_a_students_own(self, kind: str) -> None:
        found = losses(*pair(kind), make_batch())
        assert set(found) == {"main", "region", "cls"}
        assert all(loss > 0 for loss in found.values())
        own = losses(*pair(kind, teacher_seed=0), make_batch())
        assert all(loss.item() == pytest.approx(0, abs=1e-6) for loss in own.values())

    def test_gradients(self, kind: str) -> None:
        distiller, student = pair(kind)
        batch = make_batch()
        parts = losses(distiller, student, batch)
        torch.stack(list(parts.values())).sum().backward()
        assert student.head.regressor.weight.grad.norm() > 0
        assert student.head.classifier.weight.grad.norm() > 0
        assert all(p.grad is None for p in distiller.teacher.parameters())

    def test_no_objects_no_loss(self, kind: str) -> None:
        found = losses(*pair(kind), make_batch(counts=(0, 0)))
        assert all(loss == 0 for loss in found.values())

    def test_weights_are_those_of_the_released_code(self, kind: str) -> None:
        (method,) = pair(kind)[0].named_methods.values()
        main, factor = (5.0, 0.03) if kind == "retinanet" else (0.25, {"atss": 0.15}.get(kind, 0.25))
        assert method.config.terms == pytest.approx({"main": main, "region": main * factor, "cls": 10})
        assert method.config.cls_temperature == (8 if kind == "retinanet" else 2)
        assert method.config.region == ("inside" if kind == "fcos" else "valuable")


class TestDivision:
    def test_images_are_two_of_a_process_however_many_there_are(self) -> None:
        """As released with the two images that its configurations give a process."""
        batch = make_batch()
        official = losses(*pair(config=LD(normalize="official")), batch)
        torch.testing.assert_close(losses(*pair(), batch), official)
        one = {key: value[:1] for key, value in batch.items()}
        half = losses(*pair(), one)
        torch.testing.assert_close(half["main"], 2 * losses(*pair(config=LD(normalize="official")), one)["main"])

    def test_the_mean_does_not_grow_with_the_batch(self) -> None:
        one = {key: value[:1] for key, value in make_batch().items()}
        two = {
            key: list(value) * 2 if isinstance(value, list) else torch.cat([value] * 2) for key, value in one.items()
        }
        mean = LD(normalize="avg")
        torch.testing.assert_close(losses(*pair(config=mean), one), losses(*pair(config=mean), two))

    def test_half_the_temperature_is_about_the_same_gradient(self) -> None:
        """Squared temperatures undo what they divide logits by, as long as logits are small beside them."""
        found = [losses(*pair(config=LD(temperature=t)), make_batch())["main"].item() for t in (1000.0, 2000.0)]
        assert found[0] == pytest.approx(found[1], rel=0.01)


class TestValuableRegion:
    """One box, and squares of 32 pixels around the centres of 8-pixel cells in its row."""

    def values(self, union: bool) -> Tensor:
        priors = Priors.on_grid([(1, 16)], [8], [(8, 8)], [torch.tensor([[-16.0, -16, 16, 16]])])
        targets = Targets(torch.tensor([[[40.0, -16, 72, 16]]]), torch.zeros(1, 1).long(), torch.ones(1, 1).bool())
        return valuable(priors, torch.ones(1, 16).bool(), targets, union)[0]

    def test_locations_beside_the_best_ones(self) -> None:
        """IoU 1 at 56, .6 at a cell's distance, 1/3 at two, 1/7 at three: the threshold is .61 for nine candidates."""
        iou = torch.tensor([max(0, 32 - 8 * d) / (32 + 8 * d) for d in (4, 3, 2, 1, 0, 1, 2, 3, 4)])
        threshold = iou.mean() + iou.std()
        distance = torch.tensor([(8 * d) ** 2 / ((32 + 8 * d) ** 2 + 32**2) for d in (4, 3, 2, 1, 0, 1, 2, 3, 4)])
        diou = iou - distance
        expected = torch.where((diou >= threshold / 4) & (diou < threshold), iou, 0)
        torch.testing.assert_close(self.values(union=True)[3:12], expected)
        assert not self.values(union=True)[[0, 1, 2, 12, 13]].any()

    def test_the_released_quotient_divides_by_the_anchor(self) -> None:
        found, paper = self.values(union=False), self.values(union=True)
        assert (found > 0).sum() > (paper > 0).sum() or not torch.equal(found, paper)
        assert found[7] == 0  # the box itself is a positive's


class TestSwitches:
    def test_individual_leaves_no_label_to_the_boxes(self) -> None:
        distiller, student = pair(config=LD(individual=True, terms={"region": 0, "cls": 0}))
        distiller.prepare_student()
        parts = divide(student(**make_batch()).loss_parts)
        assert parts["loss_bbox"] == 0
        assert parts["loss_dfl"] == 0
        assert parts["loss_cls"] > 0
        assert student.config.loss_weights == {"loss_cls": 1.0, "loss_bbox": 0.0, "loss_dfl": 0.0}

    def test_weights_of_the_valuable_region_are_overlaps_or_ones(self) -> None:
        batch, found = make_batch(), {}
        for weights in ("iou", "binary"):
            distiller, student = pair(config=LD(weights=weights))  # type: ignore[arg-type]
            found[weights] = losses(distiller, student, batch)["region"]
        assert found["binary"] > found["iou"] > 0

    def test_options_without_effect(self) -> None:
        with pytest.raises(ValueError, match="iou='diou' has no effect"):
            pair("fcos", LD(iou="diou"))
        with pytest.raises(ValueError, match="cls_temperature=3 has no effect"):
            pair(config=LD(cls_temperature=3, terms={"cls": 0}))

    def test_heads_of_numbers_say_what_they_need(self) -> None:
        student, teacher = make_detector("fcos"), make_detector("fcos", 1)
        with pytest.raises(ValueError, match="both heads must predict distributions of the distances of equal priors"):
            Distiller(student, teacher, ["ld"])

    def test_a_copy_teaches_itself_until_it_changes(self) -> None:
        distiller, student = pair(config="ld:terms.region=0,terms.cls=0", teacher_seed=0)
        assert losses(distiller, student, make_batch())["main"].item() == pytest.approx(0, abs=1e-6)
        with torch.no_grad():
            student.head.regressor.weight += 0.1 * torch.randn_like(student.head.regressor.weight)
        assert losses(distiller, student, make_batch())["main"] > 0
