"""Figures of localization distillation on GFL, ATSS, FCOS and RetinaNet heads, with the labels' losses beside it."""

from typing import Any

import torch
from torch import Tensor

from crosskd_hf.distillation import LD, FineGrained
from crosskd_hf.distillation.passes import Pass
from crosskd_hf.models.assigners import Assignment
from crosskd_hf.models.dense import DenseHead, Predictions
from crosskd_hf.models.losses import divide
from tests.golden.methods import seeded_methods as sm
from tests.parity.drawn import (
    CLASSES,
    DrawnView,
    build,
    by_level,
    drawn_batch,
    drawn_pass,
    gradient_figures,
    region_figures,
    weighted,
)
from tests.parity.ties import adopted_assignment, listed_rows
from tests.tiny_dense import make_detector

# Our terms by the names that the file has for them.
TERMS = {
    "loss_ld": "main",
    "loss_ld_vlr": "region",
    "loss_ld_neg": "region",
    "loss_kd": "cls",
    "loss_cls_kd": "cls",
}
LABELS = ("loss_cls", "loss_bbox", "loss_dfl", "loss_centerness")


class HeadView(DrawnView):
    """A view of drawn outputs of one kind of head."""

    def __init__(self, head: DenseHead, role: Any) -> None:
        super().__init__(256, role)
        self.head = head
        self.model.config = head.config


class Case:
    """The drawn outputs of a student's and a teacher's head."""

    def __init__(self, document: dict[str, Any], kind: str, multiple: int = 32, **changes: Any) -> None:
        case = document["case"]
        self.batch = drawn_batch(case, multiple)
        names = {f"c{index}": index for index in range(CLASSES)}
        self.head = make_detector(kind, num_labels=CLASSES, label2id=names, reg_max=16, **changes).head
        anchors = self.head.priors_per_location
        self.maps: dict[str, dict[str, list[Tensor]]] = {}
        for who in ("student", "teacher"):
            self.maps[who] = {
                "logits": sm.seeded_logits(case, who, "cls", CLASSES * anchors),
                "regression": sm.seeded_logits(case, who, "dist", 68 * anchors),
                "features": sm.seeded_features(case, who, 256),
            }
            if self.head.centerness is not None:
                self.maps[who]["centerness"] = sm.seeded_logits(case, who, "ctr", 1)
        for maps in self.maps["student"].values():
            for values in maps:
                values.requires_grad_()
        self.student, self.teacher = (
            drawn_pass(self.batch, maps["features"], self.head, maps) for maps in self.maps.values()
        )

    def method(self, config: Any) -> Any:
        """A method between the two."""
        return build(config, HeadView(self.head, "student"), HeadView(self.head, "teacher"))

    def add(self, found: dict[str, Any], name: str, method: Any, term: str) -> None:
        """Figures of one term of a method, under a name of the file."""
        passes = self.student, self.teacher, self.batch
        loss = weighted(method, *passes)[term]
        found["losses"][name] = {"total": loss.item(), "per_level": by_level(method, *passes)[term]}
        student = self.maps["student"]
        found["gradients"][name] = {
            "student_cls_logits": gradient_figures(loss, student["logits"]),
            "student_dist_logits": gradient_figures(loss, student["regression"]),
            "student_features": gradient_figures(loss, student["features"]),
        }

    def labels(self) -> dict[str, Any]:
        """The student's own losses."""
        rows, priors, assignment = self.student.predictions[-1], self.student.priors, self.student.assignment
        assert priors is not None
        assert assignment is not None
        boxes = self.head.decode(rows.regression, priors)
        whole = self.head.loss(Predictions(*rows), boxes, priors, assignment)
        total = divide(whole)
        found: dict[str, Any] = {name: {"total": loss.item(), "per_level": []} for name, loss in total.items()}
        for level in self.student.rows.values():
            parts = self.head.loss(Predictions(*rows), boxes, priors, _only(assignment, level))
            for name, part in parts.items():
                divisor = whole[name].normalizer.clamp(min=whole[name].floor)
                found[name]["per_level"].append((part.total / divisor).item())
        return found


def _only(assignment: Assignment, level: slice) -> Assignment:
    """The assignment of one level's rows; the others take no part."""
    here = torch.zeros_like(assignment.positive)
    here[:, level] = True
    return assignment._replace(positive=assignment.positive & here, weight=assignment.weight * here)


def figures(case: Case, document: dict[str, Any], joint_sides: bool = False) -> dict[str, Any]:
    """Losses and gradients of the terms, as the released code computes them."""
    found: dict[str, Any] = {"losses": case.labels(), "gradients": {}, "regions": {}}
    options = {"normalize": "official", "joint_sides": joint_sides}
    released = case.method(LD(**options, **({} if "fcos" in document["method"] else {"iou": "released"})))
    for name in document["expected"]["losses"]:
        if name in TERMS:
            case.add(found, name, released, TERMS[name])
    add_sum(found, document)
    return found


def add_sum(found: dict[str, Any], document: dict[str, Any]) -> None:
    """The sum of those terms that the file adds up."""
    known = document["expected"]["losses"]["sum_of_distillation_terms"]["terms"]
    total = sum(found["losses"][name]["total"] for name in known if name in found["losses"])
    found["losses"]["sum_of_distillation_terms"] = {"total": total, "terms": known}


def of_levels(rows: Tensor, own: Pass, valued: bool = False) -> list[list[dict[str, Any]]]:
    """Rows (B, N), level after level."""
    return [region_figures(rows[:, level], valued) for level in own.rows.values()]


def gfl(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """GFL, with the feature imitation that the released head adds, and the regions."""
    case = Case(document, "gfl")
    found = figures(case, document)
    official = {"normalize": "official", "terms": {"main": 0, "cls": 0}}
    variants = {
        "loss_ld_vlr with binary weights (composition)": LD(**official, iou="released", weights="binary"),
        "loss_ld_vlr with the true DIoU (composition)": LD(**official),
    }
    for name, config in variants.items():
        case.add(found, name, case.method(config), "region")
    case.add(found, "loss_im", case.method(FineGrained(preset="ld", positive_levels=True)), "features")
    found["gradients"]["loss_im"]["student_dist_logits"] = "zero"
    zeros = [0.0] * len(case.student.rows)
    found["losses"]["loss_kd_neg"] = {"total": 0.0, "per_level": zeros}  # a term of weight 0, which isn't built
    found["gradients"]["loss_kd_neg"] = dict.fromkeys(("student_cls_logits", "student_dist_logits"), "zero")
    found["gradients"]["loss_kd_neg"]["student_features"] = "none"
    add_sum(found, document)
    assignment = case.student.assignment
    assert assignment is not None
    regions = {
        "main (assigner positives)": assignment.positive.float(),
        "label_weights (0 = padding anchor)": assignment.weight,
    }
    found["regions"] = {name: of_levels(rows, case.student) for name, rows in regions.items()}
    for name, iou in (("vlr (value = IoU weight)", "released"), ("vlr with the true DIoU (composition)", "diou")):
        rows = case.method(LD(iou=iou)).region(case.student, case.batch)  # type: ignore[arg-type]
        found["regions"][name] = of_levels(rows, case.student, valued=True)
    found["num_total_pos"] = int(assignment.count_positives())
    return {"": found}


def atss(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """ATSS with distributions."""
    return {"": figures(Case(document, "atss"), document)}


def fcos(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """FCOS with distributions and center sampling; nothing of it is padding."""
    case = Case(document, "fcos", 1 << 20, center_radius=1.5)
    found = figures(case, document)
    assert case.student.assignment is not None
    second = case.method(LD()).region(case.student, case.batch)
    found["regions"] = {
        "main (assigner positives)": of_levels(case.student.assignment.positive.float(), case.student),
        "second region (in a box but not positive)": of_levels(second, case.student),
    }
    return {"": found}


def adopt_positives(case: Case, document: dict[str, Any]) -> None:
    """Let ties between anchors fall as in the file."""
    own, name = case.student, "positives (row = (y*W+x)*9+anchor)"
    assert own.assignment is not None
    assert own.priors is not None
    listed = zip(document["expected"]["regions"][name], own.priors.level_lengths, strict=True)
    levels = [listed_rows(level, length) for level, length in listed]
    known = [level for level in levels if level is not None]
    theirs = torch.cat(known, 1) if len(known) == len(levels) else None
    own.assignment = adopted_assignment(own.assignment, theirs, own.priors, case.batch.targets)


def retinanet(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """RetinaNet with distributions: one softmax over the bins of all sides, as released."""
    case = Case(document, "retinanet")
    adopt_positives(case, document)
    found = figures(case, document, joint_sides=True)
    assignment = case.student.assignment
    assert assignment is not None
    value = case.method(LD(iou="released", without_positives=False)).region(case.student, case.batch)
    found["regions"] = {
        "positives (row = (y*W+x)*9+anchor)": of_levels(assignment.positive.float(), case.student),
        "vlr (value = IoU weight; positives are then removed)": of_levels(value, case.student, valued=True),
    }
    found["num_total_pos"] = int(assignment.count_positives())
    return {"": found}
