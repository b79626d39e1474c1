"""Deformable DETR against the authors' figures: one golden case, computed by this library.

Called by `benchmarks/parity.py`. A case stores figures, not weights: `tests/golden/seeded.py` draws the same weights
and images here. About 40 seconds on one CPU core for the case in the repository.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert
from transformers import DeformableDetrForObjectDetection, DeformableDetrImageProcessor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "golden"))
from seeded import seeded_images, seeded_state_dict, seeded_targets

from crosskd_hf.convert.deformable_detr import convert_deformable_detr, names_in_transformers
from crosskd_hf.distillation.config import DistillationConfig
from crosskd_hf.distillation.detr import DetrDistiller
from crosskd_hf.distillation.detr_families import Prediction, Trace
from crosskd_hf.distillation.detr_loss import deformable_detr_loss_parts
from crosskd_hf.models.losses import LossPart, divide

# Gradients are taken in float64. A sampling point that rounding moves over the border of a cell changes the gradient
# norm of its offsets by some 0.3 %, and in float32 every run has a few of them. (Predictions are float32: the position
# embedding of padding divides by 1e-6 and has no figures in common between the two precisions.)
TRAINING = torch.float64

Figures = dict[str, Any]
Gradients = dict[str, Tensor]

# The case's own distillation and the variants it stores figures of.
DISTILLATIONS: dict[str, DistillationConfig] = {
    "": DistillationConfig(),
    "student_queries": DistillationConfig(queries="student"),
    "teacher_queries_l1_giou": DistillationConfig(box_loss="l1_giou"),
    "teacher_queries_giou_only": DistillationConfig(box_loss="giou"),
    "teacher_queries_l1_giou_beta1": DistillationConfig(box_loss="l1_giou", beta=1.0),
}


def run(case: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Every figure of a `deformable_detr` golden case and ours.

    Args:
        case: The parsed JSON file.

    Returns:
        By name what the authors' code gave and what this library gives: a number, or a flat list of numbers or words.
        Detections of ours are put in the order of the expected ones, since equal scores have none.
    """
    expected = case["expected"]
    student, teacher = (build(case, role).eval() for role in ("student", "teacher"))
    inputs, labels = batch(case)
    got: Figures = {}
    for role, model in (("student", student), ("teacher", teacher)):
        figures, detections = _forward_figures(model, inputs, case)
        got[f"{role}_outputs"] = figures
        got[f"{role}_detections"] = [
            _in_order(expected, found)
            for expected, found in zip(expected[f"{role}_detections"], detections, strict=True)
        ]
    for model in (student, teacher):
        model.to(TRAINING)
    inputs["pixel_values"] = inputs["pixel_values"].to(TRAINING)
    labels = [label | {"boxes": label["boxes"].to(TRAINING)} for label in labels]
    trained = _train_figures(student, teacher, inputs, labels, case["student"]["checkpoint_shapes"], expected)
    return _pairs(expected, got | trained)


def build(case: Mapping[str, Any], role: str) -> Any:
    """The seeded student or teacher, converted."""
    settings = case[role] if role == "student" else case["student"] | case[role]
    checkpoint = seeded_state_dict(case[role]["checkpoint_shapes"], case["seed"][role])
    config, state = convert_deformable_detr(
        checkpoint, heads=settings["heads"], num_queries=settings["num_queries"], dropout=0.0
    )
    model = DeformableDetrForObjectDetection.from_pretrained(None, config=config, state_dict=state)
    for name, parameter in model.model.backbone.named_parameters():  # stem and stage 1 are frozen
        parameter.requires_grad_(any(stage in name for stage in ("layer2", "layer3", "layer4")))
    return model


def batch(case: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Model inputs and Hugging Face labels: cxcywh relative to the unpadded image."""
    batch, seed = case["batch"], case["seed"]["inputs"]
    shapes = batch["image_shapes"]
    pixels = seeded_images([len(shapes), 3, *batch["pad_shape"]], shapes, seed)
    mask = torch.zeros(len(shapes), *batch["pad_shape"], dtype=torch.long)
    labels = []
    targets = seeded_targets(shapes, case["num_classes"], seed, batch["boxes_per_image"])
    for image, (height, width), target in zip(mask, shapes, targets, strict=True):
        image[:height, :width] = 1
        boxes = box_convert(target["boxes"], "xyxy", "cxcywh") / torch.tensor([width, height, width, height])
        labels.append({"class_labels": target["labels"], "boxes": boxes})
    return {"pixel_values": pixels, "pixel_mask": mask}, labels


# ---------------------------------------------------------------------------------------------------------- prediction


@torch.no_grad()
def _forward_figures(model: Any, inputs: dict[str, Tensor], case: Mapping[str, Any]) -> tuple[Figures, list[Figures]]:
    neck: list[Tensor] = []
    encoder: dict[str, Any] = {}
    handles = [level.register_forward_hook(lambda *call: neck.append(call[2])) for level in model.model.input_proj]
    handles.append(
        model.model.encoder.register_forward_pre_hook(lambda m, args, kw: encoder.update(kw), with_kwargs=True)
    )
    no_box = {"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)}
    outputs = model(**inputs, labels=[no_box] * len(inputs["pixel_values"]))
    for handle in handles:
        handle.remove()
    shapes = encoder["spatial_shapes_list"]
    memory = outputs.encoder_last_hidden_state
    layers = [*outputs.auxiliary_outputs, {"logits": outputs.logits, "pred_boxes": outputs.pred_boxes}]
    best = outputs.enc_outputs_class[..., 0].topk(8)
    figures = {
        "neck": [_figures(level) for level in neck],
        "level_shapes": [list(shape) for shape in shapes],
        "valid_ratios": encoder["valid_ratios"].tolist(),
        "position_embedding": _figures(encoder["spatial_position_embeddings"]),
        "encoder_memory": _figures(memory),
        "encoder_memory_per_level": [_figures(level) for level in memory.split([h * w for h, w in shapes], 1)],
        "two_stage": {
            "top8_scores": best.values.tolist(),
            "top8_flat_indices": best.indices.tolist(),
            "initial_references": _figures(outputs.init_reference_points),
        },
        "decoder": [
            {"cls_logits": _figures(layer["logits"]), "boxes": _figures(layer["pred_boxes"])} for layer in layers
        ],
    }
    return figures, _detections(outputs, case["batch"]["image_shapes"])


def _detections(outputs: Any, shapes: list[list[int]]) -> list[Figures]:
    found = DeformableDetrImageProcessor().post_process_object_detection(
        outputs, threshold=-1.0, target_sizes=[tuple(shape) for shape in shapes], top_k=100
    )
    detections = []
    for image, (height, width) in zip(found, shapes, strict=True):
        boxes = image["boxes"].clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        detections.append({"boxes": boxes, "scores": image["scores"], "labels": image["labels"]})
    return detections


def _in_order(expected: Mapping[str, Any], found: Figures) -> Figures:
    """Our detections in the order of the expected ones: for each the closest of its label that is not taken yet."""
    taken: list[int] = []
    for box, score, label in zip(expected["boxes"], expected["scores"], expected["labels"], strict=True):
        distance = (found["boxes"] - torch.tensor(box)).abs().amax(1) + 100 * (found["scores"] - score).abs()
        distance[found["labels"] != label] = torch.inf
        distance[taken] = torch.inf
        taken.append(int(distance.argmin()))
    return {"num": len(found["scores"])} | {key: tensor[taken].tolist() for key, tensor in found.items()}


# ------------------------------------------------------------------------------------------------------------ training


def _train_figures(
    student: Any,
    teacher: Any,
    inputs: dict[str, Tensor],
    labels: list[dict[str, Tensor]],
    names: Mapping[str, Any],
    expected: Mapping[str, Any],
) -> Figures:
    """Losses and gradients of the case and its variants, from one forward pass of the student."""
    wanted = {key: config for key, config in DISTILLATIONS.items() if not key or key in expected.get("variants", {})}
    distillers = {key: DetrDistiller(student, teacher, config) for key, config in wanted.items()}
    outputs = student.train()(**inputs, labels=labels)
    sizes = inputs["pixel_mask"].amax(2).sum(1), inputs["pixel_mask"].amax(1).sum(1)
    truth = divide(deformable_detr_loss_parts(outputs, labels, torch.stack(sizes, -1).float()))
    truth_gradients = _gradients(student, torch.stack(list(truth.values())).sum(), names)
    results: dict[str, Figures] = {}
    for key, distiller in distillers.items():
        trace = distiller._taps[0]._latest
        assert trace is not None
        parts = distiller(outputs, inputs)
        results[key] = _distilled_figures(student, parts, truth, truth_gradients, names)
        results[key]["kd_forward"] = _cross_figures(distiller, trace, inputs)
        distiller.remove_hooks()
    main = results.pop("")
    return main | {"variants": results}


def _distilled_figures(
    student: Any, parts: dict[str, LossPart], truth: dict[str, Tensor], truth_gradients: Gradients, names: Any
) -> Figures:
    losses = divide(parts)
    kd_loss = torch.stack(list(losses.values())).sum()
    kd_gradients = _gradients(student, kd_loss, names)
    total = {name: truth_gradients[name] + gradient for name, gradient in kd_gradients.items()}
    layers = max(int(key[1 : key.index(".")]) for key in losses) + 1
    numbers = {key: float(loss.detach()) for key, loss in (truth | losses).items()}
    numbers["total"] = float((torch.stack(list(truth.values())).sum() + kd_loss).detach())
    sums: Figures = {}
    for key in ("loss_cls_kd", "loss_reg_kd", "loss_iou_kd"):
        per_layer = [numbers.setdefault(f"d{layer}.{key}", 0.0) for layer in range(layers)]
        sums |= {key: sum(per_layer), f"{key}_per_layer": per_layer}
    return {
        "losses": numbers | sums,
        "grad_norms": {name: float(gradient.norm()) for name, gradient in total.items()},
        "total_grad_norm": _total_norm(total),
        "kd_total_grad_norm": _total_norm(kd_gradients),
        "kd_grad_norms": {name: float(gradient.norm()) for name, gradient in kd_gradients.items()},
        "parameters_with_kd_grad": sorted({name.split(".")[0] for name, g in kd_gradients.items() if g.any()}),
    }


def _gradients(student: Any, loss: Tensor, names: Mapping[str, Any]) -> Gradients:
    """Gradient of `loss` by mmdet name; query, key and value are one matrix there."""
    trained = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    ours = torch.autograd.grad(loss, list(trained.values()), retain_graph=True, allow_unused=True)
    by_name = {
        _head_name(name): torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(trained.items(), ours, strict=True)
    }
    parts = {name: names_in_transformers(name) for name in names if not name.endswith("num_batches_tracked")}
    return {
        name: torch.cat([by_name[part] for part in found])
        for name, found in parts.items()
        if all(part in by_name for part in found)  # frozen stages and batch norm are left out
    }


def _head_name(name: str) -> str:
    """The decoder holds the heads too; which of the two names a shared parameter is listed under doesn't matter."""
    for head in ("class_embed.", "bbox_embed."):
        name = name.replace(f"model.decoder.{head}", head)
    return name


def _total_norm(gradients: Gradients) -> float:
    return float(torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm())


@torch.no_grad()
def _cross_figures(distiller: DetrDistiller, student: Trace, inputs: dict[str, Tensor]) -> Figures:
    teacher = distiller._run_teacher(inputs["pixel_values"], inputs["pixel_mask"])
    pairs = list(distiller.predictions(student.memory, student, teacher))
    output: Any = teacher.output
    references = [teacher.arguments["reference_points"], *output.intermediate_reference_points.unbind(1)]
    return {
        "cross": [_prediction_figures(cross) for cross, _ in pairs],
        "target": [_prediction_figures(target) for _, target in pairs],
        "target_confidence_sum_per_layer": [float(target.logits.sigmoid().amax(-1).sum()) for _, target in pairs],
        "references": [_figures(reference) for reference in references],
    }


# ------------------------------------------------------------------------------------------------------------- figures


def _prediction_figures(prediction: Prediction) -> Figures:
    return {"cls_logits": _figures(prediction.logits), "boxes": _figures(prediction.boxes)}


def _figures(tensor: Tensor) -> Figures:
    flat = tensor.detach().flatten().float()
    samples = flat[torch.linspace(0, len(flat) - 1, 8).long()]
    return {
        "shape": list(tensor.shape),
        "mean": float(flat.mean()),
        "std": float(flat.std()),
        "samples": samples.tolist(),
    }


def _pairs(expected: Any, got: Any) -> dict[str, tuple[Any, Any]]:
    return dict(_walk(expected, got, ""))


def _walk(expected: Any, got: Any, name: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Leaves of the expected figures beside ours; nested lists are flattened, figures about the case are left out."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            if key in got:
                yield from _walk(value, got[key], f"{name}.{key}" if name else key)
            elif key not in NOT_OURS:
                raise KeyError(f"The case expects '{name}.{key}', which this library doesn't compute.")
    elif isinstance(expected, list) and expected and isinstance(expected[0], dict | list):
        for index, (value, ours) in enumerate(zip(expected, got, strict=True)):
            yield from _walk(value, ours, f"{name}.{index}")
    else:
        yield name, (expected, got)


# Figures that describe how a case was chosen, or what the authors' code would give if it were different.
NOT_OURS = (
    "invalid_positions_per_image",
    "smallest_gap_between_ranked_scores",
    "gap_at_the_cut",
    "kd_total_grad_norm_if_the_target_were_detached",
)
