"""Figures of feature imitation over regions: the rows of LD's comparison, fine-grained imitation and DeFeat."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from crosskd_hf.distillation import GID, DeFeat, FineGrained, FitNets, InsideGT, MainRegion, MethodConfig
from crosskd_hf.distillation.method import Method
from crosskd_hf.distillation.methods.gid import Instances
from crosskd_hf.distillation.passes import Batch, Pass
from crosskd_hf.distillation.regions import positives
from tests.golden.methods import seeded_methods as sm
from tests.parity import wording
from tests.parity.drawn import (
    DrawnView,
    build,
    by_level,
    drawn_batch,
    drawn_pass,
    gradient_figures,
    region_figures,
    weighted,
)
from tests.tiny_dense import make_detector

IMITATIONS: dict[str, MethodConfig] = {
    "fine_grained": FineGrained(preset="ld", positive_levels=True),
    "inside_gt_box": InsideGT(positive_levels=True),
    "main_region": MainRegion(),
    "fitnets_whole_map": FitNets(preset="ld"),
    "decouple": DeFeat(preset="ld", positive_levels=True),
    "gi": GID(preset="ld", positive_levels=True, statistics="batch", mask_padding=False),
    "gi_per_image": GID(preset="ld", positive_levels=True, mask_padding=False),
    "gi_per_image_valid_only": GID(preset="ld", positive_levels=True),
}
# The instances' rows stand under names of their own.
INSTANCES = {
    "gi": "gi_rows_batch_flattened (row = image*H*W + y*W + x, best first)",
    "gi_per_image": "gi_rows_per_image (composition: the same selection run on each image alone)",
    "gi_per_image_valid_only": "gi_rows_per_image_valid_only (composition: each image alone, padding anchors left out)",
}


def features_of(found: Pass) -> list[Tensor]:
    return [feature.values for feature in found.features]


def figures_of(method: Method, student: Pass, teacher: Pass, batch: Batch) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sum of a method's terms, with one figure for each level, and the gradient of the student's maps."""
    total = torch.stack(list(weighted(method, student, teacher, batch).values())).sum()
    levels = [sum(terms) for terms in zip(*by_level(method, student, teacher, batch).values(), strict=True)]
    return {"total": total.item(), "per_level": levels}, {
        "student_features": gradient_figures(total, features_of(student)),
        "student_cls_logits": "none",
        "student_dist_logits": "zero",
    }


def ld_imitation(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Feature imitation as LD compares it: weight 2, no adapter, on a GFL student's locations."""
    case = document["case"]
    batch, head = drawn_batch(case), make_detector("gfl", num_labels=12).head
    maps = [values.requires_grad_() for values in sm.seeded_features(case, "student", 256)]
    outputs = {
        who: {"logits": sm.seeded_logits(case, who, "cls", 12), "regression": sm.seeded_logits(case, who, "dist", 68)}
        for who in ("student", "teacher")
    }
    student = drawn_pass(batch, maps, head, outputs["student"])
    teacher = drawn_pass(batch, sm.seeded_features(case, "teacher", 256), head, outputs["teacher"])
    found: dict[str, Any] = {"losses": {}, "gradients": {}, "regions": {}}
    found["level_has_positive_anchor"] = [positives(feature, student).any().item() for feature in student.features]
    for name in document["expected"]["losses"]:
        short = wording.read("imitation", name)["rows"]
        method = imitation(IMITATIONS[short])
        found["losses"][name], found["gradients"][name] = figures_of(method, student, teacher, batch)
        if short in INSTANCES:
            rows = [instance_rows(each) for each in method.locations(student, teacher, batch)]
            found["regions"][INSTANCES[short]] = [level[0] for level in rows] if short == "gi" else rows
            continue
        if short in ("fine_grained", "inside_gt_box"):  # in the file they have the levels without positives too
            method = imitation(replace(IMITATIONS[short], positive_levels=False))
        regions = method.regions(student, teacher, batch)
        found["regions"][short] = [region_figures(region) for region in regions if region is not None]
    return {"": found}


def imitation(config: MethodConfig) -> Any:
    """The method between maps of 256 channels."""
    return build(config, DrawnView(256), DrawnView(256, "teacher"))


def instance_rows(found: Instances) -> list[list[int]]:
    """Of each image, the best first."""
    return [rows[mask].tolist() for rows, mask in zip(found.rows, found.mask, strict=True)]


def draw_parameters(module: nn.Module, names: dict[str, str], seed: int) -> dict[str, nn.Parameter]:
    """Fill a module's parameters with drawn values, by the names that the file draws them by."""
    drawn = {names[key]: parameter for key, parameter in module.named_parameters()}
    with torch.no_grad():
        for key, parameter in drawn.items():
            parameter.copy_(sm.seeded_parameter(key, parameter.shape, seed))
    return drawn


def norms(loss: Tensor, drawn: dict[str, nn.Parameter]) -> dict[str, float]:
    """The gradient norm of each parameter."""
    gradients = torch.autograd.grad(loss, list(drawn.values()), retain_graph=True, allow_unused=True)
    return {key: 0.0 if g is None else g.double().norm().item() for key, g in zip(drawn, gradients, strict=True)}


def fine_grained(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The authors' form on one map, with the classic anchors of the file."""
    case, found = document["case"], {}
    batch = drawn_batch(case, 1)
    for name, said in wording.variants(document).items():
        stride = int(said["stride"])
        views = (DrawnView(24, strides=(stride,)), DrawnView(32, "teacher", strides=(stride,)))
        method: Any = build(FineGrained(start=0), *views)
        names = {"0.0.weight": "fine_grained.0.weight", "0.0.bias": "fine_grained.0.bias"}
        drawn = draw_parameters(method.adapters, names, case["seed"])
        maps = [values.requires_grad_() for values in sm.seeded_features(case, "student", 24, (stride,))]
        anchors = torch.tensor(document["variants"][name]["anchors_at_cell_0"])
        student = drawn_pass(batch, maps, strides=(stride,), anchors=[anchors])
        teacher = drawn_pass(batch, sm.seeded_features(case, "teacher", 32, (stride,)), strides=(stride,))
        loss = weighted(method, student, teacher, batch)["features"]
        (mask,) = method.regions(student, teacher, batch)
        parameters = {key.removeprefix("fine_grained."): value for key, value in norms(loss, drawn).items()}
        found[name] = {
            "losses": {"imitation": {"total": loss.item()}},
            "mask": region_figures(mask),
            "sum_mask": mask.sum().item(),
            "gradients": {
                "imitation": {
                    "student_features": gradient_figures(loss, maps),
                    "adapter": {"norm_per_parameter": parameters},
                }
            },
        }
    return found


def defeat(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """DeFeat, and under a key of its own the fine-grained form for pyramids of the same code."""
    case, found = document["case"], {}
    batch = drawn_batch(case, 1)
    for name, variant in document["variants"].items():
        strides = tuple(variant["strides"])
        maps = [values.requires_grad_() for values in sm.seeded_features(case, "student", 24, strides)]
        square = torch.tensor([0.5, 1.0, 2.0]).sqrt()
        sides = [torch.stack([8 * stride / square, 8 * stride * square], -1) / 2 for stride in strides]
        anchors = [torch.cat([-side, side], -1) for side in sides]
        student = drawn_pass(batch, maps, strides=strides, anchors=anchors)
        teacher = drawn_pass(batch, sm.seeded_features(case, "teacher", 32, strides), strides=strides)
        found[name] = decoupled(case, student, teacher, batch, strides)
        found[name]["fine_grained_fpn_port"] = ported(case, student, teacher, batch, strides)
    return found


def seeded_method(config: MethodConfig, case: dict[str, Any], strides: tuple[int, ...]) -> tuple[Any, dict[str, Any]]:
    """A method whose adapters are those that DeFeat's file draws, and these by their names."""
    method: Any = build(config, DrawnView(24, strides=strides), DrawnView(32, "teacher", strides=strides))
    names = {f"{i}.0.{kind}": f"defeat.{i}.{kind}" for i in range(len(strides)) for kind in ("weight", "bias")}
    return method, draw_parameters(method.adapters, names, case["seed"])


def decoupled(
    case: dict[str, Any], student: Pass, teacher: Pass, batch: Batch, strides: tuple[int, ...]
) -> dict[str, Any]:
    """Both terms, and their sum."""
    method, drawn = seeded_method(DeFeat(single_cell=True), case, strides)
    terms = weighted(method, student, teacher, batch)
    levels = by_level(method, student, teacher, batch)
    losses = {name: {"total": loss.item(), "per_level": levels[name]} for name, loss in terms.items()}
    whole = [sum(both) for both in zip(*levels.values(), strict=True)]
    losses["total"] = {"total": sum(terms.values()).item(), "per_level": whole}  # type: ignore[union-attr]
    gradients = {
        name: {
            "student_features": gradient_figures(loss, features_of(student)),
            "adapters": {"norm_per_parameter": norms(loss, drawn)},
        }
        for name, loss in terms.items()
    }
    masks = [region_figures(region) for region in method.regions(student, teacher, batch)]
    return {"losses": losses, "gradients": gradients, "mask": masks}


def ported(
    case: dict[str, Any], student: Pass, teacher: Pass, batch: Batch, strides: tuple[int, ...]
) -> dict[str, Any]:
    """Fine-grained imitation for pyramids."""
    method, _ = seeded_method(FineGrained(preset="fpn"), case, strides)
    loss = weighted(method, student, teacher, batch)["features"]
    return {
        "losses": {
            "imitation": {"total": loss.item(), "per_level": by_level(method, student, teacher, batch)["features"]}
        },
        "gradients": {"imitation": {"student_features": gradient_figures(loss, features_of(student))}},
        "mask": [region_figures(region) for region in method.regions(student, teacher, batch)],
    }
