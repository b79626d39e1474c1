"""Deformable DETR against the authors' figures: one golden case, computed by this library.

Called by `tests/parity/steps.py`. A case stores figures, not weights: `tests/golden/seeded.py` draws the same weights
and images here. About 40 seconds on one CPU core for the case in the repository.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert
from transformers import DeformableDetrForObjectDetection, DeformableDetrImageProcessor

from crosskd_hf.convert.deformable_detr import convert_deformable_detr, names_in_transformers
from crosskd_hf.distillation import CrossKD, Distiller
from crosskd_hf.distillation.passes import Batch, Prediction
from crosskd_hf.models.losses import LossPart, divide
from crosskd_hf.training import supervision
from tests.golden.seeded import seeded_images, seeded_state_dict, seeded_targets
from tests.parity import wording
from tests.parity.figures import Figures, in_order, on_device
from tests.parity.golden import LOSS_NAMES

# Gradients are taken in float64. A sampling point that rounding moves over the border of a cell changes the gradient
# norm of its offsets by some 0.3 %, and in float32 every run has a few of them. (Predictions are float32: the position
# embedding of padding divides by 1e-6 and has no figures in common between the two precisions.)
TRAINING = torch.float64

Gradients = dict[str, Tensor]
KD_LOSSES = ("loss_cls_kd", "loss_reg_kd", "loss_iou_kd")
# The variants of a case by their names.
VARIANTS = {
    f"{queries}_queries{boxes}{beta}": {"queries": queries, "box_loss": box_loss, "beta": exponent}
    for queries in ("teacher", "student")
    for boxes, box_loss in {"": "l1_pixel", "_l1_giou": "l1+giou", "_giou_only": "giou"}.items()
    for beta, exponent in {"": None, "_beta0": 0.0, "_beta1": 1.0}.items()
}
MMDET_NAMES = {"loss_ce": "loss_cls", "loss_giou": "loss_iou"}  # of terms that transformers calls otherwise


def run(case: Mapping[str, Any]) -> Figures:
    """Our figures of a `deformable_detr` golden case, under the names of its expected ones.

    Args:
        case: The parsed JSON file.
    """
    expected = case["expected"]
    student, teacher = (build(case, role).eval() for role in ("student", "teacher"))
    inputs, labels = batch(case)
    got: Figures = {}
    for role, model in (("student", student), ("teacher", teacher)):
        figures, detections = _forward_figures(model, inputs, case)
        got[f"{role}_outputs"] = figures
        if f"{role}_detections" in expected:
            pairs = zip(expected[f"{role}_detections"], detections, strict=True)
            got[f"{role}_detections"] = [in_order(listed, found) for listed, found in pairs]
    for model in (student, teacher):
        model.to(TRAINING)
    inputs["pixel_values"] = inputs["pixel_values"].to(TRAINING)
    labels = [label | {"boxes": label["boxes"].to(TRAINING)} for label in labels]
    got |= _train_figures(student, teacher, inputs, labels, case)
    if "student_is_teacher" in expected:
        got["student_is_teacher"] = _identity(case, teacher, inputs)
    return got


def distillations(case: Mapping[str, Any]) -> dict[str, CrossKD]:
    """The case's own distillation under "", and the variants that it stores figures of, by their names."""
    settings = case["distillation"]
    said = {name: wording.read(f"distillation.{name}", settings[name]) for name in ("cls", "reg")}
    variant = settings.get("variant")
    main = CrossKD(
        queries="teacher" if variant is None else wording.read("distillation.variant", variant)["queries"],
        box_loss=said["reg"]["box_loss"],
        beta=said["cls"]["beta"],
        terms={name: meaning["weight"] for name, meaning in said.items()},
    )
    stored = case["expected"].get("variants", {})  # figures of one that isn't known are named as not computed
    return {"": main} | {name: CrossKD(**VARIANTS[name]) for name in stored if name in VARIANTS}


def build(case: Mapping[str, Any], role: str) -> Any:
    """The seeded student or teacher, converted."""
    settings = case["student"] | case[role]
    checkpoint = seeded_state_dict(case[role]["checkpoint_shapes"], case["seed"][role])
    config, state = convert_deformable_detr(
        checkpoint,
        heads=settings.get("heads", 8),
        num_queries=settings.get("num_queries"),
        dropout=0.0,
        with_box_refine=settings.get("with_box_refine"),
    )
    model, loading = DeformableDetrForObjectDetection.from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True
    )
    assert not any(loading.values()), loading
    for name, parameter in model.model.backbone.named_parameters():  # stem and stage 1 are frozen
        parameter.requires_grad_(any(stage in name for stage in ("layer2", "layer3", "layer4")))
    return model


def batch(case: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Model inputs and Hugging Face labels: cxcywh relative to the unpadded image."""
    batch, seed = case["batch"], case["seed"]["inputs"]
    shapes = batch["image_shapes"]
    pixels = on_device(seeded_images([len(shapes), 3, *batch["pad_shape"]], shapes, seed))
    mask = torch.zeros(len(shapes), *batch["pad_shape"], dtype=torch.long)
    labels = []
    targets = on_device(seeded_targets(shapes, case["num_classes"], seed, batch["boxes_per_image"]))
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
    figures: Figures = {
        "neck": neck,
        "level_shapes": [list(shape) for shape in shapes],
        "valid_ratios": encoder["valid_ratios"].tolist(),
        "position_embedding": encoder["spatial_position_embeddings"],
        "encoder_memory": memory,
        "encoder_memory_per_level": list(memory.split([h * w for h, w in shapes], 1)),
        "decoder": [{"cls_logits": layer["logits"], "boxes": layer["pred_boxes"]} for layer in layers],
    }
    if outputs.enc_outputs_class is not None:
        best = outputs.enc_outputs_class[..., 0].topk(8)
        figures["two_stage"] = {
            "top8_scores": best.values.tolist(),
            "top8_flat_indices": best.indices.tolist(),
            "initial_references": outputs.init_reference_points,
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


# ------------------------------------------------------------------------------------------------------------ training


def _train_figures(
    student: Any, teacher: Any, inputs: dict[str, Tensor], labels: list[dict[str, Tensor]], case: Mapping[str, Any]
) -> Figures:
    """Losses and gradients of the case and its variants, from one forward pass of the student."""
    names = case["student"]["checkpoint_shapes"]
    distillers = {key: Distiller(student, teacher, [config]) for key, config in distillations(case).items()}
    supervision.prepare(student, None)
    outputs = student.train()(**inputs, labels=labels)
    truth = in_mmdet_names(divide(supervision.supervised_parts(student, outputs, inputs | {"labels": labels})))
    truth_gradients = _gradients(student, torch.stack(list(truth.values())).sum(), names)
    results: dict[str, Figures] = {}
    for key, distiller in distillers.items():
        trace = distiller.pair.student.tap._latest
        assert trace is not None
        parts = distiller(outputs, inputs)
        results[key] = _distilled_figures(student, parts, truth, truth_gradients, names)
        distiller.pair.student.tap._latest = trace
        results[key]["kd_forward"] = _cross_figures(distiller, inputs)
        distiller.close()
    main = results.pop("")
    return main | {"variants": results}


def in_mmdet_names(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Terms of the trainer's loss under the names that the case has for them."""
    renamed = {}
    for name, loss in losses.items():
        for ours, theirs in MMDET_NAMES.items():
            name = name.replace(ours, theirs)
        renamed[name] = loss
    return renamed


def _identity(case: Mapping[str, Any], teacher: Any, inputs: dict[str, Tensor]) -> Figures:
    """The distillation where the teacher is its own student: all of it is zero but the entropy of soft targets."""
    twin = build(case, "teacher").to(TRAINING).train()
    configs = {beta: CrossKD(box_loss="l1+giou", beta=float(beta)) for beta in (0, 1)}
    distillers = {beta: Distiller(twin, teacher, [config]) for beta, config in configs.items()}
    outputs = twin(**inputs)
    trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    figures: Figures = {"kd_total_grad_norm_below": 0.0}
    for beta, distiller in distillers.items():
        losses = divide(distiller(outputs, inputs))
        total = torch.stack(list(losses.values())).sum()
        gradients = torch.autograd.grad(total, trained, retain_graph=True, allow_unused=True)
        norm = float(torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None]))
        figures["kd_total_grad_norm_below"] = max(norm, figures["kd_total_grad_norm_below"])
        sums = {LOSS_NAMES[name]: loss.item() for name, loss in losses.items()}
        figures[f"loss_cls_kd_beta{beta}"] = sums["loss_cls_kd"]
        figures |= {key: sums[key] for key in ("loss_reg_kd", "loss_iou_kd")}
    return figures


def _distilled_figures(
    student: Any, parts: dict[str, LossPart], truth: dict[str, Tensor], truth_gradients: Gradients, names: Any
) -> Figures:
    kd_loss = torch.stack(list(divide(parts).values())).sum()
    layers = parts["crosskd/cls"].total.numel()
    losses = {
        f"d{layer}.{LOSS_NAMES[key]}": loss
        for key, part in parts.items()
        for layer, loss in enumerate(part.total / part.normalizer.clamp(min=part.floor))
    }
    kd_gradients = _gradients(student, kd_loss, names)
    total = {name: truth_gradients[name] + gradient for name, gradient in kd_gradients.items()}
    numbers = {key: float(loss.detach()) for key, loss in (truth | losses).items()}
    numbers["total"] = float((torch.stack(list(truth.values())).sum() + kd_loss).detach())
    sums: Figures = {}
    for key in KD_LOSSES:
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
def _cross_figures(distiller: Distiller, inputs: dict[str, Tensor]) -> Figures:
    given = Batch(inputs["pixel_values"], inputs["pixel_mask"], [])
    student, teacher = distiller.pair.student.read(None, given), distiller.pair.teacher.teacher_pass(given)
    pairs = list(distiller.named_methods["crosskd"].comparisons(student, teacher))
    trace = teacher.head
    references = [trace.arguments["reference_points"], *trace.output.intermediate_reference_points.unbind(1)]
    return {
        "cross": [_prediction_figures(pair.prediction) for pair in pairs],
        "target": [_prediction_figures(pair.target) for pair in pairs],
        "target_confidence_sum_per_layer": [float(pair.target.logits.sigmoid().amax(-1).sum()) for pair in pairs],
        "references": references,
    }


def _prediction_figures(prediction: Prediction) -> Figures:
    return {"cls_logits": prediction.logits, "boxes": prediction.regression}
