"""What detectors cost: parameters, multiply-adds of an image, images a second.

crosskd-hf cost gfl:resnet18 gfl:resnet50 student-folder
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torchvision  # noqa: F401  # registers its operators
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForObjectDetection, PreTrainedModel

from ..create import ARCHITECTURES, DetectorSpec
from ..data.categories import CategoryMap
from ..inference.downloads import check_download
from ..models import DETECTORS
from ..models.backbone import weights_follow
from .deformable_detr import freeze_stem, new_deformable_detr
from .presets import PRESETS

SIZE = (800, 1280)  # px: what LD's Table 3 counts for its 1333 x 800
COCO_CLASSES = CategoryMap(tuple(range(80)), tuple(f"class {number}" for number in range(80)))
MEASURED = 3


@dataclass(frozen=True)
class Cost:
    """Of one detector.

    Args:
        name: What was asked for.
        trained, parameters: Numbers of trained parameters, and of all.
        multiply_adds: Of convolutions and products of matrices in the forward pass of one image.
        speed: Images a second, one by one, without reading them and without NMS of dense detectors; None: not measured.
    """

    name: str
    trained: int
    parameters: int
    multiply_adds: int
    speed: float | None


def measure(name: str, size: tuple[int, int] = SIZE, device: str | None = None) -> Cost:
    """Build a detector and count.

    Args:
        name: A folder or Hub id, "ARCHITECTURE:BACKBONE", or a preset, whose student it is; with 80 classes.
        size: (height, width) of the image in px.
        device: Where speed is measured; None leaves it out.

    Raises:
        ValueError: Nothing of this name is known.
    """
    with torch.device("meta"):
        model = _build(name).eval()
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    operations = multiply_adds(model, size, name)
    speed = None if device is None else images_per_second(_built(name), size, device)
    return Cost(name, trained, sum(p.numel() for p in parameters), operations, speed)


def multiply_adds(model: nn.Module, size: tuple[int, int], name: str) -> int:
    """Of one image of (height, width) px, on the meta device; a model that chooses regions is run for real."""
    try:
        return _count(model, torch.empty(1, 3, *size, device="meta"))
    except (NotImplementedError, RuntimeError):  # numbers of regions depend on the pixels
        return _count(_built(name), torch.zeros(1, 3, *size))


def _count(model: nn.Module, pixels: Tensor) -> int:
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.torchvision.deform_conv2d: _deform_conv})
    with torch.no_grad(), counter:
        model(pixel_values=pixels)
    return int(counter.get_total_flops()) // 2


def _deform_conv(input: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    """Operations of a deformable convolution: those of a plain one; sampling is left out, as in MMDetection."""
    return int(2 * out_shape[0] * prod(out_shape[2:]) * prod(weight))


@torch.no_grad()
def images_per_second(model: nn.Module, size: tuple[int, int], device: str) -> float:
    """Mean of three measurements after a warm-up, images of (height, width) px one by one."""
    model = model.to(device)
    pixels = torch.zeros(1, 3, *size, device=device)
    spans = []
    for _ in range(1 + MEASURED):
        start = time.perf_counter()
        model(pixel_values=pixels)
        if pixels.is_cuda:
            torch.cuda.synchronize()
        spans.append(time.perf_counter() - start)
    return MEASURED / sum(spans[1:])


def _built(name: str) -> nn.Module:
    """With real weights, random ones where none are saved."""
    with weights_follow():
        return _build(name).eval()


def _build(name: str) -> PreTrainedModel:
    if name in PRESETS:
        return _new(PRESETS[name].student)
    if name.partition(":")[0] in ARCHITECTURES and not Path(name).exists():
        return _new(DetectorSpec.parse(name))
    try:
        check_download(name)
        return AutoModelForObjectDetection.from_config(AutoConfig.from_pretrained(name))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name!r} is no model that can be measured: give a folder, a Hub id, a preset of docs/reproduce.md, or "
            f"ARCHITECTURE:BACKBONE with one of {', '.join(ARCHITECTURES)}. {error}"
        ) from error


def _new(spec: DetectorSpec) -> PreTrainedModel:
    """A new detector for 80 classes, of which as much is trained as of one with ImageNet weights."""
    if spec.architecture == "deformable_detr":
        model = new_deformable_detr(spec.backbone, COCO_CLASSES)
        freeze_stem(model.model.backbone.model)
        return model
    config_class = ARCHITECTURES[spec.architecture]
    return DETECTORS[config_class](config_class(backbone=spec.backbone, num_labels=80, **dict(spec.fields)))


def device_name(device: str) -> str:
    """The hardware behind a torch device, for people."""
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    model = next((line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")), "CPU")
    return f"{model}, {torch.get_num_threads()} threads"


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def table(costs: Iterable[Cost], size: tuple[int, int], device: str | None) -> str:
    """Costs side by side."""
    rows: list[tuple[str, ...]] = [("model", "trained M", "all M", "G multiply-adds", "images/s")]
    for cost in costs:
        millions = (f"{count / 1e6:.2f}" for count in (cost.trained, cost.parameters))
        speed = "" if cost.speed is None else f"{cost.speed:.2f}"
        rows.append((cost.name, *millions, f"{cost.multiply_adds / 1e9:.2f}", speed))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    where = "speed not measured" if device is None else f"images one by one on {device_name(device)}"
    return "\n".join([*lines, f"{size[1]} x {size[0]} px; {where}"])
