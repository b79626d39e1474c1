"""How many kernels a distilled step launches, and how often it copies from the host, counted without a GPU.

    python benchmarks/step_kernels.py [--student gfl:resnet18] [--teacher gfl:resnet50] [--methods crosskd] [--compiled]

Every operator that torch dispatches and that is no view is one kernel here; a GPU launches a few more or less. "cpu"
counts the whole step, "cuda" the forward passes with fake tensors on a GPU that needn't be there. Whatever asks for a
value raises, since fake tensors have none. A copy between host and device waits for the device. `--compiled` compiles
the step for the CPU and counts the calls of what was made: with `test_resnet` for both backbones about five minutes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from crosskd_hf.create import ARCHITECTURES
from crosskd_hf.distillation import Distiller
from crosskd_hf.models import DETECTORS
from crosskd_hf.models.losses import divide

PACKAGE = "/crosskd_hf/"
_CALL = re.compile(r"^\s+(?:\w+ = )?(cpp_fused\w*|extern_kernels\.\w+|torch\.ops\.[\w.]+|aten\.[\w.]+)\(", re.MULTILINE)


class KernelCount(TorchDispatchMode):
    """Counts operators inside the context.

    Attributes:
        packages: Parts of the paths of the files whose functions are named.
        kernels: How often each operator ran that is no view.
        places: The same by the innermost function of the package, as "file:function"; "?" in the backward pass.
        copies: Functions in which a tensor went from one device to another.
    """

    packages = (PACKAGE,)

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.places: Counter[str] = Counter()
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "prim":
            return result
        given = {t.device.type for t in _tensors([*args, *(kwargs or {}).values()])}
        made = {t.device.type for t in _tensors([result])}
        if given and made and given != made:
            self.copies.append(self._place())
        if not any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns):
            self.kernels[str(func)] += 1
            self.places[self._place()] += 1
        return result

    def _place(self) -> str:
        frame = sys._getframe(2)
        while frame is not None:
            name = frame.f_code.co_filename
            for package in self.packages:
                if package in name:
                    return f"{name.rsplit(package, 1)[1]}:{frame.f_code.co_qualname}"
            frame = frame.f_back  # type: ignore[assignment]
        return "?"


class WaitCount(KernelCount):
    """Counts with fake tensors where the host waits, transformers' functions included: who asks for a value gets 1.

    Attributes:
        values: Functions that asked for a value on the device.
    """

    packages = (PACKAGE, "/transformers/")

    def __init__(self) -> None:
        super().__init__()
        self.values: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._local_scalar_dense.default:
            return super().__torch_dispatch__(func, types, args, kwargs)
        if args[0].device.type != "cpu":
            self.values.append(self._place())
        return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    flat = [item for value in values for item in (value if isinstance(value, (list, tuple)) else [value])]
    return [item for item in flat if isinstance(item, Tensor)]


def faked(model: nn.Module, device: str) -> nn.Module:
    """A model whose weights have shapes, types and a device, but no values; inside a `FakeTensorMode`."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                empty = torch.empty(value.shape, dtype=value.dtype, device=device)
                module._parameters[name] = nn.Parameter(empty, requires_grad=value.requires_grad)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=device)
    return model


def batch(device: str, height: int, width: int, images: int = 2, boxes: int = 7) -> dict[str, Any]:
    """Padded images with labels, without values; inside a `FakeTensorMode`."""
    return {
        "pixel_values": torch.empty(images, 3, height, width, device=device),
        "pixel_mask": torch.empty(images, height, width, device=device, dtype=torch.long),
        "labels": [
            {
                "class_labels": torch.empty(boxes, device=device, dtype=torch.long),
                "boxes": torch.empty(boxes, 4, device=device),
            }
            for _ in range(images)
        ],
    }


def count_step(
    student: nn.Module,
    teacher: nn.Module,
    methods: Sequence[Any],
    device: str,
    height: int = 800,
    width: int = 1344,
    fast_teacher: bool = False,
) -> dict[str, KernelCount]:
    """Count the second step of a pair with batches of one size, for the first fills the caches.

    Args:
        student, teacher: Detectors, on the device "meta" or any other.
        methods: As of :class:`Distiller`.
        height, width: Of the images, px.
        fast_teacher: As of :class:`Distiller`, and as `fast=True` has it.
        device: "cpu", or "cuda" without the backward pass, which needs a real GPU.

    Returns:
        The counts of "forward" (of the student), "distillation" (with the teacher's pass, and the division of all
        losses, as the trainer does it) and "backward".
    """
    distiller = Distiller(student.train(), teacher, methods, fast_teacher=fast_teacher)  # type: ignore[arg-type]
    models = student, distiller.pair.teacher.model, distiller
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in models:
            faked(module, device)
        inputs = batch(device, height, width)
        for _ in range(2):
            counts = {part: KernelCount() for part in ("forward", "distillation", "backward")}
            with counts["forward"]:
                outputs = student(**inputs, **distiller.student_request, output_loss=False)
            with counts["distillation"]:
                parts = divide(outputs.loss_parts | distiller(outputs, inputs))
                loss = torch.stack(list(parts.values())).sum()
            if device == "cpu":
                with counts["backward"]:
                    loss.backward()
    return counts


def count_compiled(student: nn.Module, teacher: nn.Module, methods: Sequence[Any]) -> dict[str, int]:
    """Calls of generated functions and of operators in the code that inductor makes of a small step, with its graphs.

    What runs between graphs is not counted.
    """
    distiller = Distiller(student.train(), teacher.eval(), methods)  # type: ignore[arg-type]
    inputs = batch("cpu", 64, 96)
    for value in (inputs["pixel_values"], *(label["boxes"] for label in inputs["labels"])):
        value.uniform_(0.2, 0.5)
    inputs["pixel_mask"].fill_(1)
    for label in inputs["labels"]:
        label["class_labels"].fill_(1)

    def step() -> None:
        outputs = student(**inputs, **distiller.student_request, output_loss=False)
        torch.stack(list(divide(outputs.loss_parts | distiller(outputs, inputs)).values())).sum().backward()

    step()  # what is made once
    _, codes = run_and_get_code(torch.compile(step))
    calls = Counter(name for code in codes for name in _CALL.findall(code.split("def call(")[-1]))
    generated = sum(number for name, number in calls.items() if name.startswith("cpp_fused"))
    return {"graphs": len(codes), "generated": generated, "operators": sum(calls.values()) - generated}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Print and return the counts of one pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="gfl:resnet18")
    parser.add_argument("--teacher", default="gfl:resnet50")
    parser.add_argument("--methods", nargs="+", default=["crosskd"])
    parser.add_argument("--top", type=int, default=0, help="also print so many functions with most kernels")
    parser.add_argument("--fast", action="store_true", help="the teacher's batch norms are folded")
    parser.add_argument("--compiled", action="store_true", help="also compile a small step")
    args = parser.parse_args(argv)
    found: dict[str, Any] = {}
    for device in ("cpu", "cuda"):
        counts = count_step(build(args.student), build(args.teacher), args.methods, device, fast_teacher=args.fast)
        found[device] = {name: sum(count.kernels.values()) for name, count in counts.items() if count.kernels}
        if device == "cpu":
            found["kernels"] = sum(found["cpu"].values())
            places = sum((count.places for count in counts.values()), Counter())
        else:
            found["copies"] = [place for count in counts.values() for place in count.copies]
    if args.compiled:
        pair = build(args.student, "cpu"), build(args.teacher, "cpu")
        found["compiled"] = count_compiled(*pair, args.methods)
    print(json.dumps(found))
    for place, number in places.most_common(args.top):
        print(f"{number:6} {place}")
    return found


def build(name: str, device: str = "meta") -> nn.Module:
    """A detector of 80 classes, without values on "meta", from ARCHITECTURE:BACKBONE."""
    architecture, backbone = name.split(":")
    config = ARCHITECTURES[architecture](backbone=backbone, num_labels=80)
    with torch.device(device):
        return DETECTORS[type(config)](config)


if __name__ == "__main__":
    main()
