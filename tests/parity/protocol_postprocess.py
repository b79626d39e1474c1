"""Seeded outputs of a head to detections: the model's own decoding and its image processor, beside the authors'."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from crosskd_hf.inference.detection import detections
from crosskd_hf.models import DETECTORS, DenseDetector, FasterRCNNForObjectDetection, image_processor
from crosskd_hf.models.dense import Predictions, Taps
from crosskd_hf.models.layers import maps_to_rows
from crosskd_hf.models.roi_head import RoIPredictions
from crosskd_hf.models.rpn import Proposals, RPNPredictions
from tests.golden.protocol import draw
from tests.parity.protocol_fields import Field, beside, numbers, unknown

Case = dict[str, Any]
HEADS = {"GFLHead": "gfl", "ATSSHead": "atss", "FCOSHead": "fcos", "RetinaHead": "retinanet"}
PIXELS, SCORE = 0.02, 1e-4
CLASSES = 80
KNOWN = {
    *("case", "head", "config", "note", "frame", "regression", "seed", "images", "maps", "proposals", "cls", "reg"),
    *("box", "test_cfg", "train_proposal_cfg", "proposals_in_training", "detections"),
    "detections_in_the_resized_image",
}


def compare(case: Case) -> list[Field]:
    """All detections of a case beside ours."""
    runs: dict[str, Callable[[Case], list[Field]]] = {
        "RPNHead": _rpn,
        "Shared2FCBBoxHead": _roi,
        "DeformableDETRHead": _deformable_detr,
    }
    head = case["head"]
    if head not in runs and head not in HEADS:
        raise ValueError(f"head {head!r} is none of {sorted({**runs, **HEADS})}")
    kept = {key: value for key, value in case.items() if not key.startswith("other_nms_")}
    return [*unknown("", kept, KNOWN), *runs.get(head, _dense)(case)]


def evaluate(expression: str, case: Case, **names: Any) -> Tensor:
    """A map as its file says how to draw it, of the functions of `draw.py` and nothing else."""
    functions = {"class_map": draw.class_map, "normal": draw.normal, "boxes": draw.boxes}
    return torch.from_numpy(eval(expression, {"__builtins__": {}}, functions | {"seed": case["seed"]} | names))


def tiny(architecture: str) -> Any:
    """A detector of 80 classes whose backbone doesn't matter."""
    config = next(kind for kind in DETECTORS if kind.model_type == f"crosskd_{architecture}")
    fields: dict[str, Any] = {"backbone": "test_resnet", "fpn_channels": 32, "num_labels": CLASSES}
    if issubclass(DETECTORS[config], DenseDetector):
        fields["head_channels"] = 32
    return DETECTORS[config](config(**fields)).eval()


def inputs(case: Case) -> dict[str, Tensor]:
    """Empty images of the case's sizes, with their masks."""
    height, width = case["images"][0]["batch_input_shape"]
    mask = torch.zeros(len(case["images"]), height, width, dtype=torch.int64)
    for row, image in zip(mask, case["images"], strict=True):
        row[: image["img_shape"][0], : image["img_shape"][1]] = 1
    return {"pixel_values": torch.zeros(len(mask), 3, height, width), "pixel_mask": mask}


def _dense(case: Case) -> list[Field]:
    architecture = HEADS[case["head"]]
    model: DenseDetector = tiny(architecture)
    maps = [{key: evaluate(m[key], case) for key in ("cls", "reg", "centerness") if m.get(key)} for m in case["maps"]]
    centerness = None
    if "centerness" in maps[0]:
        centerness = maps_to_rows([level["centerness"] for level in maps], 1)[..., 0]
    predictions = Predictions(
        maps_to_rows([level["cls"] for level in maps], CLASSES),
        maps_to_rows([level["reg"] for level in maps], model.head.regression_width),
        centerness,
    )
    pyramid = [level["cls"] for level in maps]
    model.pyramid = lambda pixels: pyramid  # type: ignore[method-assign]
    model.head.tap = lambda features, cut: Taps([], [])  # type: ignore[method-assign, assignment]
    model.head.finish = lambda taps, cut: predictions  # type: ignore[method-assign]
    return _detections(case, architecture, model(**inputs(case)))


def _roi(case: Case) -> list[Field]:
    model: FasterRCNNForObjectDetection = tiny("faster_rcnn")
    shapes = [image["img_shape"] for image in case["images"]]
    proposals, logits, deltas = [], [], []
    for index, (height, width) in enumerate(shapes):
        proposals.append(_of_image(case["proposals"], case, index, height=height, width=width))
        cls = _of_image(case["cls"], case, index)
        cls[:, [*draw.ACTIVE, CLASSES]] += float(case["cls"].partition("plus ")[2].split()[0])
        logits.append(cls)
        deltas.append(_of_image(case["reg"], case, index))
    boxes = torch.stack(proposals)
    found = Proposals(boxes, torch.ones(boxes.shape[:2], dtype=torch.bool))
    predictions = RoIPredictions(torch.stack(logits), torch.stack(deltas).unflatten(-1, (CLASSES, 4)))
    model.rpn.propose = lambda *_: found  # type: ignore[method-assign]
    model.roi_head.forward = lambda *_: predictions  # type: ignore[method-assign, assignment]
    return _detections(case, "faster_rcnn", model(**inputs(case)))


def _of_image(words: str, case: Case, index: int, **names: Any) -> Tensor:
    """The map of one image: the call that a sentence begins with, its name ending on the number of the image."""
    call = re.sub(r"width of the resized image I", "width", words)
    call = call[: re.search(r"\)(?=[,;]|$)(?![^(]*\))", call).end()]  # type: ignore[union-attr]
    return evaluate(call.replace('.I"', f'.{index}"'), case, **names)


def _deformable_detr(case: Case) -> list[Field]:
    boxes = evaluate(case["box"].partition("sigmoid(")[2].rpartition(")")[0], case).sigmoid()
    outputs = ModelOutput(logits=evaluate(case["cls"], case), pred_boxes=boxes)
    return _detections(case, "deformable_detr", outputs)


def _rpn(case: Case) -> list[Field]:
    rpn = tiny("faster_rcnn").rpn
    config, fields = rpn.config, []
    logits = [evaluate(level["objectness"], case) for level in case["maps"]]
    deltas = [evaluate(level["reg"], case) for level in case["maps"]]
    predictions = RPNPredictions(maps_to_rows(logits, 1)[..., 0], maps_to_rows(deltas, 4))
    sizes = torch.tensor([image["img_shape"] for image in case["images"]], dtype=torch.float32)
    limits = {
        "detections": ("test_cfg", config.test_proposals_per_level, config.test_proposals),
        "proposals_in_training": ("train_proposal_cfg", config.train_proposals_per_level, config.train_proposals),
    }
    for name, (key, per_level, per_image) in limits.items():
        ours = {"nms_pre": per_level, "max_per_img": per_image, "nms": _nms(config.proposal_nms)}
        ours["min_bbox_size"] = int(config.min_proposal_size)
        fields.append(Field(key, case[key], ours))
        found = rpn.propose(predictions, rpn.anchors(logits), sizes, per_level, per_image)
        assert found.scores is not None
        for index, expected in enumerate(case[name]):
            result = {"boxes": found.boxes[index][found.mask[index]], "scores": found.scores[index][found.mask[index]]}
            fields += in_order(f"{name}[{index}]", expected, result)
    return fields


def _detections(case: Case, architecture: str, outputs: ModelOutput) -> list[Field]:
    """Our detections in pixels of the original and of the resized image."""
    processor = image_processor(architecture)
    settings = {
        "nms_pre": processor.candidates_per_level,
        "score_thr": processor.score_threshold,
        "nms": _nms(processor.nms_threshold),
        "max_per_img": processor.max_detections,
        "min_bbox_size": 0,
    }
    fields = list(beside("test_cfg", case["test_cfg"], settings))
    for name, frame in (("detections", "ori_shape"), ("detections_in_the_resized_image", "img_shape")):
        if name in case:
            sizes = torch.tensor([image[frame] for image in case["images"]])
            results = detections(processor, outputs, sizes, 0.0)
            for index, pair in enumerate(zip(case[name], results, strict=True)):
                fields += in_order(f"{name}[{index}]", *pair)
    return fields


def _nms(threshold: float) -> dict[str, Any]:
    return {"type": "nms", "iou_threshold": threshold}


def in_order(name: str, expected: dict[str, Any], result: dict[str, Tensor]) -> list[Field]:
    """The fields of one image's detections, the surest first; those of (nearly) equal score may change places."""
    count = len(expected["scores"])
    order = _matching(expected, result)
    boxes, scores = result["boxes"][order], result["scores"][order]
    fields = [
        Field(f"{name}.count", expected["count"], len(result["scores"])),
        Field(f"{name}.boxes", expected["boxes"], boxes[:count].tolist(), PIXELS),
        Field(f"{name}.scores", expected["scores"], scores[:count].tolist(), SCORE),
        # a sum of n boxes, each within the tolerance: errors of chance add up as their square root
        Field(
            f"{name}.box_sum", expected["box_sum"], numbers(boxes.double().sum(0)), PIXELS * math.sqrt(len(boxes)) + 0.1
        ),
    ]
    if "labels" in expected:
        fields.append(Field(f"{name}.labels", expected["labels"], result["labels"][order][:count].tolist()))
    return fields


def _matching(expected: dict[str, Any], result: dict[str, Tensor]) -> list[int]:
    """Our rows in the order of the file: within its tolerance of scores, the nearest box of those not taken."""
    scores = result["scores"].tolist()
    left, order = list(range(len(scores))), []
    for box, score in zip(expected["boxes"], expected["scores"], strict=True):
        near = [row for row in left if abs(scores[row] - score) <= SCORE]
        if not near:
            break
        best = min(near, key=lambda row: float((result["boxes"][row] - torch.tensor(box)).abs().max()))
        left.remove(best)
        order.append(best)
    return order + left
