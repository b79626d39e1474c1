"""The part "speed" of `on_gpu.py`: steps, predictions and the loader, the most telling figures first."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from crosskd_hf import create_detector
from crosskd_hf.data import load_coco
from crosskd_hf.data.collators import DetectionCollator
from crosskd_hf.data.shapes import make_shapes
from crosskd_hf.data.transforms import TrainTransform
from crosskd_hf.distillation import Distiller
from crosskd_hf.inference.speed import to_channels_last
from crosskd_hf.models.losses import divide
from crosskd_hf.training import supervision

NAMES = [f"class {number}" for number in range(80)]
WARM_UP = 3


@dataclass(frozen=True)
class Setting:
    """One way of taking a step.

    Args:
        student, teacher: As of `create_detector`.
        batch: Images.
        kind: "float32", "bf16", "fast" (bf16, channels last, folded teacher), "compiled" (that, compiled) or "graphs"
            (that, the teacher's pass as a CUDA graph).
    """

    student: str
    teacher: str
    batch: int
    kind: str

    def __str__(self) -> str:
        return f"{self.student} from {self.teacher}, {self.batch} images, {self.kind}"


def settings(small: bool) -> Iterator[Setting]:
    """What is measured, the most telling first; `small` for a rehearsal on the CPU."""
    nets = ("test_resnet",) * 3 if small else ("resnet18", "resnet50", "resnet101")
    few, many = (1, 2) if small else (2, 16)
    first = f"gfl:{nets[0]}", f"gfl:{nets[1]}"
    for kind in ("float32", "bf16", "fast"):
        yield Setting(*first, few, kind)
    yield Setting(*first, many, "fast")
    yield Setting(f"gfl:{nets[1]}", f"gfl:{nets[2]}", few, "fast")
    for family in ("faster_rcnn", "deformable_detr"):
        yield Setting(f"{family}:{nets[0]}", f"{family}:{nets[1]}", few, "fast")
    yield Setting(*first, many, "float32")
    yield Setting(f"gfl:{nets[1]}", f"gfl:{nets[2]}", many, "fast")
    for family in ("faster_rcnn", "deformable_detr"):
        yield Setting(f"{family}:{nets[0]}", f"{family}:{nets[1]}", few, "float32")
        yield Setting(f"{family}:{nets[0]}", f"{family}:{nets[1]}", many, "fast")
    for kind in ("graphs", "compiled"):  # whose compilation takes a minute
        yield Setting(*first, few, kind)


class Step:
    """A step of a distilled student as the trainer takes it, on one batch."""

    def __init__(self, setting: Setting, device: str, size: tuple[int, int]) -> None:
        torch.manual_seed(0)
        self.setting, self.device = setting, device
        self.bf16 = setting.kind != "float32"
        fast = setting.kind not in ("float32", "bf16")
        small = min(size) < 200
        fields: dict[str, Any] = {"backbone_weights": None, "width": 64 if small else 256}
        # Frozen batch norms, as of a pretrained backbone. One that starts from random weights has GroupNorm, whose maps
        # of 400 x 672 locations take torch's kernel 85 % of a step on an H200.
        if "detr" not in setting.student:
            fields |= {"frozen_stages": 1, "norm_eval": True, "backbone_arguments": {}}
        if small and "detr" in setting.student:
            fields["num_queries"] = 30  # no more than there are cells
        self.student, self.teacher = (
            create_detector(name, NAMES, **fields).model.to(device) for name in (setting.student, setting.teacher)
        )
        for model in (self.student, self.teacher) if fast else ():
            to_channels_last(model)
        supervision.prepare(self.student.train(), None)
        dtype = torch.bfloat16 if self.bf16 else None
        self.distiller = Distiller(self.student, self.teacher, ["crosskd"], fast_teacher=fast, dtype=dtype).to(device)
        self._compile()
        parameters = [*self.student.parameters(), *self.distiller.parameters()]
        self.optimizer = torch.optim.SGD([p for p in parameters if p.requires_grad], 1e-5, momentum=0.9)
        self.inputs = batch(setting.batch, size, device)

    def _compile(self) -> None:
        if self.setting.kind not in ("compiled", "graphs"):
            return
        torch.compiler.reset()
        backend = {} if self.device == "cuda" else {"backend": "aot_eager"}
        mode = {"mode": "reduce-overhead"} if self.setting.kind == "graphs" and self.device == "cuda" else {}
        self.distiller.pair.teacher.model.compile(**backend, **mode)
        if self.setting.kind == "compiled":
            self.student.compile(**backend)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            request = dict(self.distiller.student_request)
            if supervision.returns_loss_parts(self.student):
                request["output_loss"] = False
            outputs = self.student(**self.inputs, **request)
            parts = supervision.supervised_parts(self.student, outputs, self.inputs)
            losses = divide(parts | self.distiller(outputs, self.inputs))
        torch.stack(list(losses.values())).sum().backward()
        self.optimizer.step()


def batch(images: int, size: tuple[int, int], device: str, boxes: int = 10) -> dict[str, Any]:
    """Noise with labels."""
    extents = [torch.rand(boxes, 2) * 0.4 + 0.05 for _ in range(images)]
    labels = [
        {
            "class_labels": torch.randint(0, len(NAMES), (boxes,), device=device),
            "boxes": torch.cat([extent / 2 + torch.rand(boxes, 2) * (1 - extent), extent], 1).to(device),
        }
        for extent in extents
    ]
    mask = torch.ones(images, *size, dtype=torch.long, device=device)
    return {"pixel_values": torch.randn(images, 3, *size, device=device), "pixel_mask": mask, "labels": labels}


def seconds_of(task: Callable[[], None], device: str, rounds: int) -> dict[str, float]:
    """Median and least seconds."""
    for _ in range(WARM_UP):
        task()
    found = []
    for _ in range(rounds):
        _wait(device)
        start = time.perf_counter()
        task()
        _wait(device)
        found.append(time.perf_counter() - start)
    return {"median_seconds": round(statistics.median(found), 5), "least_seconds": round(min(found), 5)}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure_step(setting: Setting, device: str, size: tuple[int, int], rounds: int, peak: float) -> dict[str, Any]:
    """Figures of a setting.

    Args:
        setting, device: What runs where.
        size: Height and width of the images, px.
        rounds: Timed steps.
        peak: Operations a second of the device in bfloat16.
    """
    step = Step(setting, device, size)
    figures: dict[str, Any] = {"ok": True, **seconds_of(step, device, rounds)}
    figures["images_per_second"] = round(setting.batch / figures["median_seconds"], 2)
    if setting.kind not in ("compiled", "graphs"):  # whose operations the counter doesn't see
        with FlopCounterMode(display=False) as counter:
            step()
        figures["teraflop"] = round(counter.get_total_flops() / 1e12, 4)
        figures["share_of_peak"] = round(counter.get_total_flops() / figures["median_seconds"] / peak, 4)
    if device == "cuda":
        figures |= _on_cuda(step)
    return figures


def _on_cuda(step: Callable[[], None]) -> dict[str, Any]:
    """Peak memory, waits of the host and kernels of a step."""
    torch.cuda.reset_peak_memory_stats()
    step()
    found: dict[str, Any] = {"peak_megabytes": round(torch.cuda.max_memory_allocated() / 2**20)}
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [each for each in caught if "synchroniz" in str(each.message)]
    found |= {"waits": len(waits), "waits_at": sorted({_place(each.filename, each.lineno) for each in waits})}
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    found["kernels"] = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
    return found


def _place(file: str, line: int) -> str:
    """A line of code, by the last folders of its path."""
    return f"{'/'.join(Path(file).parts[-2:])}:{line}"


def peak_of(device: str) -> float:
    """Operations a second in bfloat16, of a product of two big matrices: what the device reaches at best."""
    edge = 8192 if device == "cuda" else 256
    left, right = (torch.randn(edge, edge, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * edge**3 / seconds_of(lambda: left @ right, device, 10)["least_seconds"]  # type: ignore[arg-type,return-value]


def peers(kind: str, device: str, size: tuple[int, int], rounds: int, small: bool) -> dict[str, Any]:
    """torchvision's detector and its twin, in bfloat16 with channels last; ratios of the least seconds."""
    from benchmarks.step_time import Bench, Peer

    options = argparse.Namespace(
        student="retinanet:resnet18" if small else "retinanet:resnet50", teacher="retinanet:resnet18",
        height=size[0], width=size[1], batch=2, boxes=10, dtype="bfloat16", channels_last=True, compile=False,
        fast=False,
    )  # fmt: skip
    peer = Peer(Bench(options), kind)
    tasks = {
        "step": (peer.our_step, peer.their_step),
        "predict": (peer.our_prediction, peer.their_prediction),
    }
    found: dict[str, Any] = {"ok": True}
    for name, pair in tasks.items():
        ours, theirs = (seconds_of(task, device, rounds)["least_seconds"] for task in pair)
        found |= {f"{name}_seconds": ours, f"{name}_over_torchvision": round(ours / theirs, 3)}
    return found


def loader(workers: int, size: tuple[int, int], images: int) -> dict[str, Any]:
    """Images a second that the training's data loader makes of files."""
    with tempfile.TemporaryDirectory() as folder:
        paths = make_shapes(Path(folder), images, 1, size[0])
        dataset = load_coco(paths.train_annotations, paths.train_images).dataset
        processor = create_detector("gfl:test_resnet", NAMES, backbone_weights=None).processor
        collator = DetectionCollator(processor, TrainTransform())
        start = time.perf_counter()
        for _ in DataLoader(dataset, 8, num_workers=workers, collate_fn=collator):  # type: ignore[arg-type]
            pass
        return {"ok": True, "images_per_second": round(images / (time.perf_counter() - start), 1)}


def speed(report: Any, device: str, data: str | None) -> None:
    """Measure all of it; `report` writes each figure down."""
    small = device == "cpu"
    size, rounds = ((64, 96), 2) if small else ((800, 1344), 10)
    peak = peak_of(device)
    report.run("peak of bf16", lambda: {"ok": True, "teraflop_per_second": round(peak / 1e12, 2)})
    known = list(settings(small))
    for setting in known[:4]:
        report.run(str(setting), lambda setting=setting: measure_step(setting, device, size, rounds, peak))
    for kind in ("retinanet", "fcos"):
        report.run(f"{kind} beside torchvision's", lambda kind=kind: peers(kind, device, size, rounds, small))
    for setting in known[4:]:
        if setting.kind == "graphs":
            for workers in (0, 2) if small else (0, 8):
                report.run(f"loader, {workers} workers", lambda w=workers: loader(w, size, 16 if small else 48))
        report.run(str(setting), lambda setting=setting: measure_step(setting, device, size, rounds, peak))
        if device == "cuda":
            torch.cuda.empty_cache()
