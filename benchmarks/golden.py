"""Run a golden case of a dense detector through the code that the trainer runs.

A golden case holds figures that the authors' implementation printed on seeded weights; `tests/golden/seeded.py` draws
the same weights and images here. MMDetection's parameter names are converted by `crosskd_hf.convert`.
"""

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "golden"))
from seeded import seeded_images, seeded_state_dict, seeded_targets

from crosskd_hf.convert.mmdet import MMDetOptions, convert_mmdet, rename
from crosskd_hf.distillation import DistillationConfig, make_distiller
from crosskd_hf.models import DETECTORS, DenseDetector, DetectionImageProcessor
from crosskd_hf.models.boxes import to_relative
from crosskd_hf.models.losses import divide

# The reference's FCOS divides by at least 1e-6, to which it adds float32's epsilon: empty batches explode there.
REFERENCE_FLOOR = 1e-6 + torch.finfo(torch.float32).eps
# The reference's names of losses where they differ from ours.
LOSS_NAMES = {"loss_centerness_kd": "losses_center_kd"}


class Figures(NamedTuple):
    """What a case compares: each figure's largest relative error (detections: 1 - the worst IoU, score difference)."""

    losses: float
    gradients: float
    outputs: float
    iou_gap: float
    score_gap: float
    trajectory: float | None


def load_model(spec: dict[str, Any], seed: int) -> DenseDetector:
    """The seeded model of one side of a case."""
    options = MMDetOptions(
        caffe_style="caffe" in spec.get("backbone_style", ""),
        bgr=spec.get("channel_order") == "BGR",
        fpn_extra_relu="ReLU before" in spec.get("fpn_extra_levels", ""),
    )
    state = seeded_state_dict(spec["checkpoint_shapes"], seed)
    config, converted = convert_mmdet(state, options)
    model = DETECTORS[type(config)](config)
    incompatible = model.load_state_dict(converted, strict=False)
    assert not any(incompatible), incompatible
    return model


def distillation_config(case: dict[str, Any]) -> DistillationConfig:
    """Parity settings: statistics over the batch, and FCOS's normalizer floor of the reference."""
    settings = case["distillation"]
    weights = {"loss_cls_kd": _weight(settings["cls"]), "loss_reg_kd": _weight(settings["reg"])}
    weights["loss_centerness_kd"] = _weight(settings["centerness"]) if "centerness" in settings else 0.0
    methods = ["crosskd"]
    if "pkd" in settings:
        methods.append("pkd")
        weights["loss_feat_kd"] = float(settings["pkd"]["weight"])
    return DistillationConfig(
        methods=tuple(methods),
        cut=settings["cross_head_index"],
        loss_weights=weights,
        statistics="batch",
        normalizer_floor=REFERENCE_FLOOR if case["teacher"]["architecture"] == "fcos" else 1.0,
    )


def _weight(text: str) -> float:
    found = re.search(r"weight ([\d.]+)", text)
    return float(found[1]) if found else 1.0


class Case:
    """A golden case set up: seeded student, teacher and batch."""

    def __init__(self, case: dict[str, Any]):
        self.case = case
        self.student = load_model(case["student"], case["seed"]["student"]).train()
        self.teacher = load_model(case["teacher"], case["seed"]["teacher"]).eval()
        self.distiller = make_distiller(self.student, self.teacher, distillation_config(case))
        self.shapes = [tuple(shape) for shape in case["batch"]["image_shapes"]]
        pad = tuple(case["batch"]["pad_shape"])
        pixels = seeded_images([len(self.shapes), 3, *pad], self.shapes, case["seed"]["inputs"])
        self.pixels = pixels.flip(1) if case["student"].get("channel_order") == "BGR" else pixels
        targets = seeded_targets(
            self.shapes, case["num_classes"], case["seed"]["inputs"], case["batch"]["boxes_per_image"]
        )
        # The reference trains with every image padded to the whole batch, so its losses see no padding.
        sizes = torch.tensor([pad], dtype=torch.float32)
        self.inputs = {
            "pixel_values": self.pixels,
            "labels": [
                {"class_labels": t["labels"], "boxes": to_relative(t["boxes"][None], sizes)[0]} for t in targets
            ],
        }

    def losses(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Total and parts of one training step, under the reference's names."""
        outputs = self.student(**self.inputs, **self.distiller.student_request)
        parts = divide({**outputs.loss_parts, **self.distiller(outputs, self.inputs)})
        named = {LOSS_NAMES.get(key, key): value for key, value in parts.items()}
        return torch.stack(list(named.values())).sum(), named

    def run(self) -> Figures:
        """Compare everything the case holds."""
        expected = self.case["expected"]
        total, losses = self.losses()
        total.backward()
        loss_error = self._loss_error(total, losses, expected["losses"])
        gradient_error = self._gradient_error(expected)
        output_error = max(
            self._output_error(model, expected[key])
            for model, key in ((self.student, "student_outputs"), (self.teacher, "teacher_outputs"))
        )
        iou_gap, score_gap = self._detection_gaps(expected["detections"])
        self.student.train()
        trajectory = self._trajectory(expected["trajectory"]) if "trajectory" in expected else None
        return Figures(loss_error, gradient_error, output_error, iou_gap, score_gap, trajectory)

    def _loss_error(self, total: Tensor, losses: dict[str, Tensor], expected: dict[str, Any]) -> float:
        got = {**{key: value.item() for key, value in losses.items()}, "total": total.item()}
        names = {key for key in expected if not key.endswith("_per_level")}
        if names != set(got):
            raise ValueError(f"The case lists losses {sorted(names)}, computed were {sorted(got)}.")
        return max(relative_error(got[name], expected[name]) for name in names)

    def _gradient_error(self, expected: dict[str, Any]) -> float:
        names = rename(self.case["student"]["checkpoint_shapes"], self.student.config)
        parameters = dict(self.student.named_parameters())
        gradients = {theirs: parameters[ours].grad for theirs, ours in names.items() if ours in parameters}
        got = {name: gradients[name] for name in expected["grad_norms"]}
        largest = max(expected["grad_norms"].values())
        errors = [
            relative_error(0.0 if got[name] is None else got[name].norm().item(), value, 1e-6 * largest)
            for name, value in expected["grad_norms"].items()
        ]
        total = nn.utils.get_total_norm([g for g in gradients.values() if g is not None])
        return max(*errors, relative_error(total.item(), expected["total_grad_norm"]))

    @torch.no_grad()
    def _output_error(self, model: DenseDetector, expected: dict[str, Any]) -> float:
        model.eval()
        predictions = model(self.pixels, cut=0).predictions
        rows = {"cls_logits": predictions.logits, "bbox_pred": predictions.regression, "centerness": None}
        if model.head.regression_kind == "distance":  # the reference lists distances, not their logarithms
            rows["bbox_pred"] = predictions.regression.exp()
        if predictions.centerness is not None:
            rows["centerness"] = predictions.centerness[..., None]
        error = 0.0
        for key, levels in expected.items():
            start = 0
            for level in levels:
                _, channels, height, width = level["shape"]
                anchors = model.head.priors_per_place
                length = height * width * anchors
                maps = rows[key][:, start : start + length].reshape(len(self.pixels), height, width, channels)
                start += length
                error = max(error, _map_error(maps.permute(0, 3, 1, 2), level))
        return error

    @torch.no_grad()
    def _detection_gaps(self, expected: list[dict[str, Any]]) -> tuple[float, float]:
        self.student.eval()
        mask = torch.zeros(len(self.shapes), *self.pixels.shape[-2:], dtype=torch.long)
        for image, (height, width) in zip(mask, self.shapes, strict=True):
            image[:height, :width] = 1
        nms = self.case["student"]["nms"]
        processor = DetectionImageProcessor(
            nms_threshold=nms["iou_threshold"],
            score_threshold=nms["score_threshold"],
            candidates_per_level=nms["candidates_per_level"],
            max_detections=nms["detections_per_image"],
        )
        results = processor.post_process_object_detection(
            self.student(self.pixels, mask), target_sizes=torch.tensor(self.shapes)
        )
        gaps = [_match(result, listed) for result, listed in zip(results, expected, strict=True)]
        return max(gap[0] for gap in gaps), max(gap[1] for gap in gaps)

    def _trajectory(self, expected: dict[str, Any]) -> float:
        settings = {key: float(value) for key, value in re.findall(r"(\w+) ([\d.]+(?:e-?\d+)?)", expected["optimizer"])}
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(
            parameters, expected["lr"], momentum=settings["momentum"], weight_decay=settings["weight_decay"]
        )
        error = 0.0
        for step in expected["steps"]:
            optimizer.zero_grad()
            total, _ = self.losses()
            error = max(error, relative_error(total.item(), step["total"]))
            total.backward()
            if "clip_grad_norm" in settings:
                nn.utils.clip_grad_norm_(parameters, settings["clip_grad_norm"])
            optimizer.step()
        return error


def relative_error(got: float, expected: float, smallest: float = 1e-6) -> float:
    """|got - expected| / |expected|, where values below `smallest` count as `smallest`."""
    return abs(got - expected) / max(abs(expected), smallest)


def _map_error(got: Tensor, level: dict[str, Any]) -> float:
    if list(got.shape) != level["shape"]:
        raise ValueError(f"A map has shape {list(got.shape)}, the case {level['shape']}.")
    flat = got.flatten()
    places = torch.linspace(0, len(flat) - 1, len(level["samples"])).long()
    scale = abs(level["mean"]) + level["std"]
    values = [got.mean().item(), got.std().item(), *flat[places].tolist()]
    listed = [level["mean"], level["std"], *level["samples"]]
    return max(abs(a - b) / scale for a, b in zip(values, listed, strict=True))


def _match(result: dict[str, Tensor], listed: dict[str, Any]) -> tuple[float, float]:
    """Worst (1 - IoU, score difference) of the listed detections against the closest of ours with the same label."""
    if not listed["boxes"]:
        return 0.0, 0.0
    if not len(result["boxes"]):
        return 1.0, 1.0
    iou = box_iou(torch.tensor(listed["boxes"]), result["boxes"])
    iou[torch.tensor(listed["labels"])[:, None] != result["labels"]] = -1
    scores = (torch.tensor(listed["scores"])[:, None] - result["scores"]).abs()
    best = (iou - scores).argmax(1, keepdim=True)
    return 1 - iou.gather(1, best).min().item(), scores.gather(1, best).max().item()
