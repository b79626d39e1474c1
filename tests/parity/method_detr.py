"""Figures of plain mimicking between matched queries of two DETR-type models."""

from typing import Any

import torch
from torch import Tensor

from crosskd_hf.distillation import KD
from crosskd_hf.distillation.passes import Batch, Pass, Prediction
from crosskd_hf.models.boxes import to_absolute
from tests.golden.methods import seeded_methods as sm
from tests.parity import wording
from tests.parity.drawn import CLASSES, DrawnView, build, by_level, drawn_batch, gradient_figures, weighted

NAMES = {"cls": "loss_cls_distill", "reg": "loss_bbox_distill", "iou": "loss_iou_distill"}
LAYERS = 2


def drawn_queries(case: dict[str, Any], who: str, queries: int) -> dict[str, list[Tensor]]:
    """Logits of classes and of boxes of each decoder layer."""
    images = len(case["image_shapes"])
    draw = {
        kind: [
            sm._normal(case["seed"], f"{who}.detr.{kind}.{layer}.{queries}", (images, queries, width))
            for layer in range(LAYERS)
        ]
        for kind, width in (("cls", CLASSES), ("box", 4))
    }
    return {"cls": [-1.5 + 1.2 * values for values in draw["cls"]], "box": draw["box"]}


def queries_pass(maps: dict[str, list[Tensor]], batch: Batch) -> Pass:
    """The predictions of these logits."""
    rows = [Prediction(logits, boxes.sigmoid()) for logits, boxes in zip(maps["cls"], maps["box"], strict=True)]
    return Pass(predictions=rows, decode=lambda boxes: to_absolute(boxes, batch.sizes))


def detrdistill(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The three terms and the pairs of each layer; queries without a partner are filled as the released code does."""
    case, found = document["case"], {}
    batch = drawn_batch(case, 1)
    for name, said in wording.variants(document).items():
        maps = drawn_queries(case, "student", int(said["student"]))
        for values in (*maps["cls"], *maps["box"]):
            values.requires_grad_()
        student = queries_pass(maps, batch)
        teacher = queries_pass(drawn_queries(case, "teacher", int(said["teacher"])), batch)
        views = DrawnView(1, kind="queries"), DrawnView(1, "teacher", "queries")
        method: Any = build(KD(unmatched="released"), *views)
        losses = weighted(method, student, teacher, batch)
        layers = by_level(method, student, teacher, batch)
        pairs = method.layers(student, teacher, batch)
        partners = [
            torch.full(maps["cls"][0].shape[:2], -1).scatter(1, rows.student, rows.teacher).tolist()
            for rows in method.matches(pairs, batch)
        ]
        found[name] = {
            "losses": {
                NAMES[term]: {"total": loss.item(), "per_decoder_layer": layers[term]} for term, loss in losses.items()
            },
            "matched_teacher_query_per_layer_image_query (-1 = none)": partners,
            "gradients": {
                NAMES[term]: {
                    "student_logits_per_layer": gradient_figures(loss, maps["cls"]),
                    "student_box_logits_per_layer": gradient_figures(loss, maps["box"]),
                }
                for term, loss in losses.items()
            },
        }
    return found
