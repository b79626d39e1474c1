"""Figures of GID on drawn outputs of a RetinaNet."""

from typing import Any

import torch
from torch import Tensor

from crosskd_hf.distillation import GID
from crosskd_hf.distillation.passes import Pass, Prediction
from crosskd_hf.distillation.regions import anchors as anchors_of
from crosskd_hf.models.assigners import Targets
from crosskd_hf.models.box_coders import DeltaCoder
from crosskd_hf.models.layers import maps_to_rows
from tests.golden.methods import seeded_methods as sm
from tests.parity import wording
from tests.parity.drawn import (
    CLASSES,
    STRIDES,
    DrawnView,
    build,
    drawn_batch,
    drawn_pass,
    gradient_figures,
    region_figures,
    weighted,
)
from tests.parity.ties import adopted, listed_rows, tied

NAMES = {
    "feature": "loss_distill_feature",
    "relation": "loss_distill_relation",
    "cls": "loss_distill_cls_logits",
    "reg": "loss_distill_reg_deltas",
}


def anchors() -> list[Tensor]:
    """Nine at the first cell of each level: sizes 32 * 2^(level + k / 3), each with three ratios."""
    found = []
    for level in range(len(STRIDES)):
        sizes = 32 * 2 ** (level + torch.arange(3, dtype=torch.float64) / 3)
        roots = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).sqrt()
        widths, heights = (sizes[:, None] / roots).flatten(), (sizes[:, None] * roots).flatten()
        found.append((torch.stack([-widths, -heights, widths, heights], -1) / 2).float())
    return found


def gid(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The four terms, the instances and the anchors that match them."""
    case, found = document["case"], {}
    batch = drawn_batch(case, 1)
    maps = {
        kind: [values.requires_grad_() for values in sm.seeded_logits(case, "student", kind, width * 9)]
        for kind, width in (("cls", CLASSES), ("delta", 4))
    }
    maps["features"] = [values.requires_grad_() for values in sm.seeded_features(case, "student", 32)]
    drawn = {kind: sm.seeded_logits(case, "teacher", kind, w * 9) for kind, w in (("cls", CLASSES), ("delta", 4))}
    drawn["features"] = sm.seeded_features(case, "teacher", 32)
    student, teacher = (with_predictions(drawn_pass(batch, each["features"], anchors=anchors()), each)
                        for each in (maps, drawn))  # fmt: skip
    for name, said in wording.variants(document).items():
        views = DrawnView(32, kind="delta"), DrawnView(32, "teacher", "delta")
        method: Any = build(GID(**said, statistics="batch"), *views)
        losses = {NAMES[term]: loss for term, loss in weighted(method, student, teacher, batch).items()}
        instances = method.instances(student, teacher, batch)
        found[name] = {
            "losses": {key: {"total": loss.item()} for key, loss in losses.items()},
            "gradients": {key: {
                "student_features": gradient_figures(loss, maps["features"]),
                "student_cls_logits": gradient_figures(loss, maps["cls"]),
                "student_deltas": gradient_figures(loss, maps["delta"]),
            } for key, loss in losses.items()},
            "gi": [
                {"count": int(mask.sum()), "boxes": boxes[mask].tolist(), "scores": scores[mask].tolist()}
                for mask, boxes, scores in zip(instances.mask, instances.boxes, instances.scores, strict=True)
            ],
            "matched_anchors_per_image": region_figures(method.matches(student, instances).float()),
        }  # fmt: skip
        found[name]["losses"]["total"] = {"total": sum(losses.values()).item()}  # type: ignore[union-attr]
    return found


def adopt_matches(method: Any, expected: dict[str, Any]) -> None:
    """Let ties between anchors fall as in the file."""
    computed = method.matches

    def matches(own: Pass, found: Any) -> Tensor:
        ours, (priors, _) = computed(own, found), anchors_of(own)
        targets = Targets(found.boxes * found.mask[..., None], found.rows, found.mask)
        theirs = listed_rows(expected["matched_anchors_per_image"], ours.shape[1])
        return adopted(ours, theirs, tied(priors, targets)[0])

    if method.config.low_quality:
        method.matches = matches


def with_predictions(found: Pass, maps: dict[str, list[Tensor]]) -> Pass:
    """A pass with what the last convolutions of a RetinaNet returned."""
    priors = found.priors
    assert priors is not None
    found.predictions = [Prediction(maps_to_rows(maps["cls"], CLASSES), maps_to_rows(maps["delta"], 4))]
    found.decode = lambda regression: DeltaCoder().decode(regression, priors)
    return found
