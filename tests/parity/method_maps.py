"""Figures of methods that compare whole maps: FGD and SKD."""

from typing import Any, Literal

import torch
from torch import Tensor

from crosskd_hf.distillation import FGD, SKD
from crosskd_hf.distillation.methods.skd import window_size
from tests.golden.methods import seeded_methods as sm
from tests.parity import wording
from tests.parity.drawn import DrawnView, build, by_level, drawn_batch, drawn_pass, gradient_figures, weighted

SHORT = {"foreground": "fg", "background": "bg"}


def fgd_parameters(method: Any, seed: int) -> dict[str, torch.nn.Parameter]:
    """A method's parameters by the names of the released module, filled with drawn values."""
    words = {"adapters": "align", "mask": "conv_mask", "transform": "channel_add_conv"}
    found = {}
    for key, parameter in method.named_parameters():
        module, level, *rest = key.split(".")
        if module == "adapters":
            name = ".".join([words[module], *rest])
        else:
            name = ".".join([f"{words[rest[0]]}_{module[0]}", *rest[1:]])
        found[f"fgd.{level}.{name}"] = parameter
        with torch.no_grad():
            parameter.copy_(sm.seeded_parameter(f"fgd.{level}.{name}", parameter.shape, seed))
    return found


def fgd(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The four terms and their sum, by the presets of the student's kind."""
    return {
        name: fgd_variant(document["case"], document["variants"][name]["settings"], **said)
        for name, said in wording.variants(document).items()
    }


def fgd_variant(
    case: dict[str, Any], settings: dict[str, Any], model_type: str, box_scale: Literal["image", "padded"]
) -> dict[str, Any]:
    """One variant: the presets of a kind of model, with boxes scaled by the size of the image or of the batch."""
    batch = drawn_batch(case, 1)
    strides, widths = tuple(settings["strides"]), (settings["sc"], settings["tc"])
    views = [
        DrawnView(width, role, strides=strides) for width, role in zip(widths, ("student", "teacher"), strict=True)
    ]
    views[0].model.config.model_type = model_type
    method: Any = build(FGD(box_scale=box_scale), *views)
    parameters = fgd_parameters(method, case["seed"])
    maps = [values.requires_grad_() for values in sm.seeded_features(case, "student", widths[0], strides)]
    student = drawn_pass(batch, maps, strides=strides)
    teacher = drawn_pass(batch, sm.seeded_features(case, "teacher", widths[1], strides), strides=strides)
    terms = {SHORT.get(key, key): loss for key, loss in weighted(method, student, teacher, batch).items()}
    levels = {SHORT.get(key, key): each for key, each in by_level(method, student, teacher, batch).items()}
    terms["total"] = torch.stack(list(terms.values())).sum()
    levels["total"] = [sum(each) for each in zip(*levels.values(), strict=True)]
    gradients = {key: {"student_features": gradient_figures(loss, maps)} for key, loss in terms.items()}
    found = torch.autograd.grad(terms["total"], list(parameters.values()), retain_graph=True)
    gradients["total"]["parameters"] = {
        key: gradient.double().norm().item() for key, gradient in zip(parameters, found, strict=True)
    }
    return {
        "losses": {key: {"total": loss.item(), "per_level": levels[key]} for key, loss in terms.items()},
        "gradients": gradients,
        "mask_per_level_and_image": [mask_figures(*method.masks(feature, batch)) for feature in teacher.features],
    }


def mask_figures(foreground: Tensor, background: Tensor) -> dict[str, Any]:
    """Cells that count of each image, and what they add up to."""
    found: dict[str, Any] = {}
    for name, mask in (("fg", foreground), ("bg", background)):
        found[f"{name}_nonzero"] = (mask > 0).sum((1, 2)).tolist()
        found[f"{name}_sum"] = mask.double().sum((1, 2)).tolist()
    return found


def skd(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Structural similarity, with and without gradient through the range of a map."""
    case, found = document["case"], {}
    batch = drawn_batch(case)
    for name, said in wording.variants(document).items():
        maps = [values.requires_grad_() for values in sm.seeded_features(case, "student", 32)]
        student, teacher = drawn_pass(batch, maps), drawn_pass(batch, sm.seeded_features(case, "teacher", 32))
        method = build(SKD(**said), DrawnView(32), DrawnView(32, "teacher"))
        loss = weighted(method, student, teacher, batch)["features"]
        windows = [window_size(*values.shape[-2:]) for values in maps]
        found[name] = {
            "losses": {
                "skd": {"total": loss.item(), "per_level": by_level(method, student, teacher, batch)["features"]}
            },
            "gradients": {"skd": {"student_features": gradient_figures(loss, maps)}},
            "window_per_level": [window if window >= 3 else "mse" for window in windows],
        }
    return found
