"""Figures of methods that read drawn features alone: PKD and FitNets."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from crosskd_hf.distillation import PKD, FitNets
from crosskd_hf.distillation.method import Method
from crosskd_hf.distillation.passes import same_size
from crosskd_hf.models.losses import divide
from tests.distillation.stubs import STRIDES, build_method, empty_batch, maps_pass
from tests.golden.methods import seeded_methods as sm
from tests.parity import wording
from tests.parity.drawn import gradient_figures


def loss_of(method: Method, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The method's loss of maps, with its weight."""
    parts = method(maps_pass(list(student)), maps_pass(list(teacher)), empty_batch(len(student[0])))
    return method.config.weight * divide(parts)["features"]


def of_maps(name: str, method: Method, student: list[Tensor], teacher: list[Tensor]) -> dict[str, Any]:
    """Total, one figure for each level, and the gradient of the student's maps."""
    loss = loss_of(method, student[: len(teacher)], teacher)
    pairs = zip(student, teacher, strict=False)  # a variant may leave out the last levels
    levels = [one_level(method, level, *pair) for level, pair in enumerate(pairs)]
    return {
        "losses": {name: {"total": loss.item(), "per_level": levels}},
        "gradients": {name: {"student_features": gradient_figures(loss, student)}},
    }


def one_level(method: Method, level: int, student: Tensor, teacher: Tensor) -> float:
    """The loss of one level; a method with an adapter for each level uses that level's."""
    adapters = method.adapters
    if isinstance(adapters, torch.nn.ModuleList):
        method.adapters = torch.nn.ModuleList([adapters[level]])
    value = loss_of(method, [student], [teacher]).item()
    method.adapters = adapters
    return value


def pkd(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """PKD of drawn pyramids, of other sizes, of single elements and of affine maps."""
    case = document["case"]
    return {name: pkd_variant(case, **said) for name, said in wording.variants(document).items()}


def pkd_variant(
    case: dict[str, Any],
    weight: float = 6.0,
    levels: int | None = None,
    strides: tuple[tuple[int, ...], tuple[int, ...]] = (STRIDES, STRIDES),
    resize: str = "student",
    images: int | None = None,
    affine: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """One variant.

    Args:
        case: Seed and sizes.
        weight: Of the method.
        levels: How many levels of the teacher are compared; None: all.
        strides: Of the student's maps and of the teacher's.
        resize: Whose maps take the size of the other's.
        images: If given, how many images with one map of 1x1 there are.
        affine: If given, factor and offset that make the student's maps of the teacher's.
    """
    config = PKD(weight=weight, statistics="batch")
    student = sm.seeded_features(case, "student", 32, strides[0])
    teacher = sm.seeded_features(case, "teacher", 32, strides[1])
    if images is not None:
        student, teacher = ([maps[-1][:images, :, :1, :1]] for maps in (student, teacher))
    if affine is not None:
        student = [affine[0] * values + affine[1] for values in teacher]
    student = [values.requires_grad_() for values in student]
    targets = teacher[:levels]
    if resize == "teacher":  # the other direction is the method's own
        targets = [same_size(target, own) for target, own in zip(targets, student, strict=True)]
    return of_maps("pkd", build_method(config, 32, 32, len(targets)), student, targets)


def fitnets(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """FitNets of drawn pyramids, with drawn adapters and without."""
    case, found = document["case"], {}
    for name, said in wording.variants(document).items():
        width = int(said["width"])
        method = build_method(FitNets(adapter=width != 32), width, 32)
        drawn = {f"fitnets.{key}": value for key, value in method.adapters.named_parameters()}
        with torch.no_grad():
            for key, parameter in drawn.items():
                parameter.copy_(sm.seeded_parameter(key, parameter.shape, case["seed"]))
        student = [values.requires_grad_() for values in sm.seeded_features(case, "student", width)]
        teacher = sm.seeded_features(case, "teacher", 32)
        found[name] = of_maps("fitnets", method, student, teacher)
        gradients = torch.autograd.grad(loss_of(method, student, teacher), list(drawn.values())) if drawn else ()
        norms = {key: g.double().norm().item() for key, g in zip(drawn, gradients, strict=True)}
        found[name]["gradients"]["fitnets"]["adapters"] = {"norm_per_parameter": norms}
    return found
