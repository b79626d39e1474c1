"""Figures of CrossKD's strategies and regions and of PKD inside the head, for a GFL student with a GFL teacher."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosskd_hf.convert.mmdet import MMDetOptions, convert_mmdet, rename
from crosskd_hf.distillation import KD, PKD, CrossKD, Distiller, MethodConfig
from crosskd_hf.distillation.distances import mimic
from crosskd_hf.distillation.passes import Batch, Comparison, Pass
from crosskd_hf.models import DETECTORS, DenseDetector
from crosskd_hf.models.boxes import to_relative
from crosskd_hf.models.losses import LossPart, divide
from tests.golden.methods import seeded_methods as sm
from tests.golden.seeded import seeded_images, seeded_state_dict
from tests.parity import wording

PAIR = json.loads((Path(__file__).parents[1] / "golden" / "gfl_r18_from_r50.json").read_text())
NAMES = {"cls": "loss_cls_kd", "reg": "loss_reg_kd"}


class Case:
    """The seeded pair and batch of a file; a method's figures on them.

    Each image is valid inside its size rounded up to a multiple of 32, as MMDetection pads it.
    """

    def __init__(self, case: dict[str, Any]):
        self.student = self._model("student", case["seed"]).train()
        self.teacher = self._model("teacher", case["seed"] + 1)
        shapes = [tuple(shape) for shape in case["image_shapes"]]
        pixels = seeded_images([len(shapes), 3, *case["pad_shape"]], shapes, case["seed"])
        sizes = torch.tensor([[math.ceil(edge / 32) * 32 for edge in shape] for shape in shapes])
        mask = torch.zeros(len(shapes), *case["pad_shape"], dtype=torch.long)
        for image, (height, width) in zip(mask, sizes.tolist(), strict=True):
            image[:height, :width] = 1
        sizes = torch.minimum(sizes, torch.tensor(case["pad_shape"])).float()
        labels = [
            {"class_labels": target["labels"], "boxes": to_relative(target["boxes"][None], size[None])[0]}
            for target, size in zip(sm.seeded_boxes(case, 80), sizes, strict=True)
        ]
        self.inputs: dict[str, Any] = {"pixel_values": pixels, "pixel_mask": mask, "labels": labels}

    @staticmethod
    def _model(role: str, seed: int) -> DenseDetector:
        config, state = convert_mmdet(seeded_state_dict(PAIR[role]["checkpoint_shapes"], seed), MMDetOptions())
        model = DETECTORS[type(config)](config)
        model.load_state_dict(state)
        return model.eval()

    def figures(self, config: MethodConfig, names: dict[str, str]) -> dict[str, Any]:
        """Losses with their levels, and the gradient norm of each parameter, by the file's names of the losses."""
        distiller = Distiller(self.student, self.teacher, [config])
        outputs = self.student(**self.inputs, **distiller.student_request)
        losses = divide(distiller(outputs, self.inputs))
        levels = self._levels(distiller, outputs)
        found: dict[str, Any] = {"losses": {}, "gradients": {}}
        for key, loss in losses.items():
            term = key.rpartition("/")[2]
            name = names[term]
            found["losses"][name] = {"total": loss.item(), "per_level": levels[term]}
            found["gradients"][name] = {"student_parameters": {"norm_per_parameter": self._norms(loss)}}
        return found

    def _norms(self, loss: Tensor) -> dict[str, float | None]:
        """By the authors' names; None where no gradient arrives."""
        trained = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(loss, list(trained.values()), retain_graph=True, allow_unused=True)
        norms = {
            name: None if g is None or not g.any() else float(g.double().norm())
            for name, g in zip(trained, gradients, strict=True)
        }
        theirs = rename(PAIR["student"]["checkpoint_shapes"], self.student.config)
        return {name: norms.get(ours) for name, ours in theirs.items()}

    @torch.no_grad()
    def _levels(self, distiller: Distiller, outputs: Any) -> dict[str, list[float]]:
        (method,) = distiller.named_methods.values()
        batch = Batch(self.inputs["pixel_values"], self.inputs["pixel_mask"], self.inputs["labels"])
        student = distiller.pair.student.read(outputs, batch)
        teacher = distiller.pair.teacher.teacher_pass(batch)
        weights = {term: method.config.weight * weight for term, weight in method.config.terms.items()}
        if method.name == "pkd":
            count = len(self.student.config.strides)
            distances = torch.stack([method._distance(*maps) for maps in method._maps(student, teacher)])
            return {"features": (weights["features"] * distances.unflatten(0, (-1, count)).sum(0)).tolist()}
        return mimic_levels(method, pair_of(method, student, teacher, batch), teacher, weights)


def pair_of(method: Any, student: Pass, teacher: Pass, batch: Batch) -> Comparison:
    """What CrossKD or plain KD compares."""
    if method.name == "kd":
        return method.views[1].compare(student, teacher, method.classes)
    (pair,) = method.comparisons(student, teacher)
    return method._counted(pair, student, teacher, batch)


def mimic_levels(method: Any, pair: Comparison, teacher: Pass, weights: dict[str, float]) -> dict[str, list[float]]:
    """Each level's share of every term: its own sum over the divisor of all levels."""
    config = method.config
    options = weights, config.beta or 0.0, config.temperature or 1.0
    whole: dict[str, LossPart] = mimic([pair], *options)
    level = torch.repeat_interleave(
        torch.arange(len(teacher.priors.level_lengths)), torch.tensor(teacher.priors.level_lengths)
    )
    found: dict[str, list[float]] = {term: [] for term in whole}
    for index in range(len(teacher.priors.level_lengths)):
        here = (level == index).float()
        classes = None if pair.class_weight is None else pair.class_weight * here
        parts = mimic([pair._replace(weight=pair.weight * here, class_weight=classes)], *options)
        for term, part in parts.items():
            divisor = whole[term].normalizer.clamp(min=whole[term].floor)
            found[term].append((weights[term] * part.total / divisor).item())
    return found


def strategies(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Strategies (a) to (d), and plain mimicking."""
    case = Case(document["case"])
    found = {}
    for name, said in wording.variants(document).items():
        config = KD() if said["strategy"] is None else CrossKD(**said, statistics="batch")
        found[name] = case.figures(config, NAMES)
    return found


def regions(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Binary cross entropy and quality focal loss over positives, negatives and both."""
    case = Case(document["case"])
    found = {}
    for name, said in wording.variants(document).items():
        found[name] = case.figures(CrossKD(**said, statistics="batch", terms={"reg": 0}), NAMES)
    return found


def pkd_head(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """PKD on the third convolution of the towers, and on the neck."""
    case = Case(document["case"])
    weight = document["settings"]["weight"]
    found = {}
    for name, said in wording.variants(document).items():
        found[name] = case.figures(PKD(**said, weight=weight, statistics="batch"), {"features": "pkd"})
    return found
