"""Run a golden case of a dense detector through the code that the trainer runs.

A golden case holds figures that the authors' implementation printed on seeded weights; `tests/golden/seeded.py` draws
the same weights and images here. MMDetection's parameter names are converted by `crosskd_hf.convert`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from crosskd_hf.convert.mmdet import MMDetOptions, convert_mmdet, rename
from crosskd_hf.distillation import PKD, CrossKD, Distiller, MethodConfig
from crosskd_hf.models import DETECTORS, DenseDetector, DetectionImageProcessor
from crosskd_hf.models.boxes import to_relative
from crosskd_hf.models.losses import divide
from tests.golden.seeded import seeded_images, seeded_state_dict, seeded_targets
from tests.parity import wording
from tests.parity.figures import Figures, in_order, on_device

# The reference's FCOS divides by at least 1e-6, to which it adds float32's epsilon: empty batches explode there.
REFERENCE_FLOOR = 1e-6 + torch.finfo(torch.float32).eps
TERMS = ("cls", "reg", "centerness")
# The reference's names of losses where they differ from ours.
LOSS_NAMES = {
    "crosskd/cls": "loss_cls_kd",
    "crosskd/reg": "loss_reg_kd",
    "crosskd/iou": "loss_iou_kd",
    "crosskd/centerness": "losses_center_kd",
    "pkd/features": "loss_feat_kd",
}


def run(case: dict[str, Any]) -> Figures:
    """Our figures of a case, under the names of its expected ones."""
    return Case(case).run()


def load_model(spec: dict[str, Any], seed: int) -> DenseDetector:
    """The seeded model of one side of a case."""
    state = seeded_state_dict(spec["checkpoint_shapes"], seed)
    config, converted = convert_mmdet(state, options_of(spec))
    model = DETECTORS[type(config)](config)
    incompatible = model.load_state_dict(converted, strict=False)
    assert not any(incompatible), incompatible
    return model


def options_of(spec: dict[str, Any]) -> MMDetOptions:
    """What a case says of a checkpoint that its names and shapes can't tell."""
    fields = ("backbone_style", "channel_order", "fpn_extra_levels")
    options: dict[str, Any] = {}
    for field in fields:
        options |= wording.read(f"side.{field}", spec[field]) if field in spec else {}
    return MMDetOptions(**options)


def distillation_methods(case: dict[str, Any]) -> list[MethodConfig]:
    """Parity settings: statistics over the batch, and FCOS's normalizer floor of the reference."""
    settings = case["distillation"]
    said = {name: wording.read(f"distillation.{name}", settings[name]) for name in TERMS if name in settings}
    terms = dict.fromkeys(TERMS, 0.0) | {name: meaning["weight"] for name, meaning in said.items()}
    crosskd = CrossKD(
        terms=terms,
        cut=settings["cross_head_index"],
        beta=said["cls"]["beta"],
        temperature=said["reg"].get("temperature"),
        statistics="batch",
        normalizer_floor=REFERENCE_FLOOR if case["teacher"]["architecture"] == "fcos" else 1.0,
    )
    return [crosskd, *pkd_of(settings)]


def pkd_of(settings: dict[str, Any]) -> list[MethodConfig]:
    """PKD, if the case has it."""
    return [PKD(weight=float(settings["pkd"]["weight"]), statistics="batch")] if "pkd" in settings else []


def check_kind(distiller: Distiller, settings: dict[str, Any]) -> None:
    """The teacher's rows are what the case says of its boxes' distance."""
    kind, said = distiller.pair.teacher.kind, wording.read("distillation.reg", settings["reg"])["kind"]
    if kind != said:
        raise wording.UnknownWordingError(f"{settings['reg']!r} is of rows of kind {said!r}; the teacher has {kind!r}.")


class Case:
    """A golden case set up: seeded student, teacher and batch."""

    def __init__(self, case: dict[str, Any]):
        self.case = case
        self.student = load_model(case["student"], case["seed"]["student"]).train()
        self.teacher = load_model(case["teacher"], case["seed"]["teacher"]).eval()
        self.distiller = Distiller(self.student, self.teacher, distillation_methods(case))
        check_kind(self.distiller, case["distillation"])
        self.shapes = [tuple(shape) for shape in case["batch"]["image_shapes"]]
        pad = tuple(case["batch"]["pad_shape"])
        pixels = on_device(seeded_images([len(self.shapes), 3, *pad], self.shapes, case["seed"]["inputs"]))
        self.pixels = pixels.flip(1) if options_of(case["student"]).bgr else pixels
        targets = on_device(
            seeded_targets(self.shapes, case["num_classes"], case["seed"]["inputs"], case["batch"]["boxes_per_image"])
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
        """Losses and gradients of a training step, outputs and detections of a prediction, and some more steps."""
        expected = self.case["expected"]
        total, losses = self.losses()
        total.backward()
        figures = {"losses": _numbers(total, losses)} | self._gradients()
        figures["student_outputs"], figures["teacher_outputs"] = self._maps(self.student), self._maps(self.teacher)
        if "detections" in expected:
            figures["detections"] = self._detections(expected["detections"])
        if "trajectory" in expected:
            figures["trajectory"] = {"steps": self._trajectory(expected["trajectory"])}
        return figures

    def _gradients(self) -> Figures:
        names = rename(self.case["student"]["checkpoint_shapes"], self.student.config)
        parameters = dict(self.student.named_parameters())
        gradients = {theirs: parameters[ours].grad for theirs, ours in names.items() if ours in parameters}
        reached = [gradient for gradient in gradients.values() if gradient is not None]
        return {
            "grad_norms": {name: 0.0 if g is None else g.norm().item() for name, g in gradients.items()},
            "total_grad_norm": nn.utils.get_total_norm(reached).item(),
        }

    @torch.no_grad()
    def _maps(self, model: DenseDetector) -> dict[str, list[Tensor]]:
        """Raw outputs as the reference has them: (B, C, H_l, W_l) maps of all anchors of a place."""
        outputs = model.eval()(self.pixels, cut=0, output_features=True)
        predictions, features = outputs.predictions, outputs.features
        rows = {"cls_logits": predictions.logits, "bbox_pred": predictions.regression}
        if model.head.regression_kind == "distance":  # the reference lists distances, not their logarithms
            rows["bbox_pred"] = predictions.regression.exp()
        if predictions.centerness is not None:
            rows["centerness"] = predictions.centerness[..., None]
        lengths = outputs.level_lengths[0].tolist()
        maps: dict[str, list[Tensor]] = {}
        for name, tensor in rows.items():
            levels = zip(tensor.split(lengths, 1), features, strict=True)
            maps[name] = [
                level.reshape(len(self.pixels), *feature.shape[-2:], -1).permute(0, 3, 1, 2)
                for level, feature in levels
            ]
        return maps

    @torch.no_grad()
    def _detections(self, expected: list[dict[str, Any]]) -> list[Figures]:
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
        return [in_order(listed, result) for listed, result in zip(expected, results, strict=True)]

    def _trajectory(self, expected: dict[str, Any]) -> list[Figures]:
        settings = wording.read("trajectory.optimizer", expected["optimizer"])
        parameters = [p for p in self.student.train().parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(
            parameters, expected["lr"], momentum=settings["momentum"], weight_decay=settings["weight_decay"]
        )
        steps = []
        for _ in expected["steps"]:
            optimizer.zero_grad()
            total, losses = self.losses()
            steps.append(_numbers(total, losses))
            total.backward()
            if "clip_grad_norm" in settings:
                nn.utils.clip_grad_norm_(parameters, settings["clip_grad_norm"])
            optimizer.step()
        return steps


def _numbers(total: Tensor, losses: dict[str, Tensor]) -> dict[str, float]:
    return {key: value.item() for key, value in losses.items()} | {"total": total.item()}
