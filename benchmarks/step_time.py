"""How long does a distillation step take? Prints JSON: median and least of several rounds, all in turn in one run.

    python benchmarks/step_time.py --student gfl:resnet18 --teacher gfl:resnet50 --height 416 --width 544 --batch 2 \\
        --boxes 10 --dtype float32 [--channels_last] [--compile] [--fast] [--peer torchvision]

`crosskd` is forward, losses, backward and SGD of the distilled student, `plain` the same without a teacher, `teacher`
the teacher's forward pass, `predict` the student's prediction with post-processing. `--peer torchvision` adds
torchvision's RetinaNet and FCOS beside twins of equal heads, weights, thresholds and candidates for NMS.
Costs about a minute on two cores.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from crosskd_hf.convert import convert_torchvision
from crosskd_hf.create import DetectorSpec, build_detector
from crosskd_hf.data.categories import CategoryMap
from crosskd_hf.distillation import Distiller
from crosskd_hf.inference.precision import widen_outputs
from crosskd_hf.models import DetectionImageProcessor
from crosskd_hf.models.losses import divide

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.setting import print_result

CLASSES = CategoryMap(tuple(range(80)), tuple(f"class {index}" for index in range(80)))


class Bench:
    """Models, one batch, and the things to be timed."""

    def __init__(self, options: argparse.Namespace):
        torch.manual_seed(0)
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = getattr(torch, options.dtype)
        self.student = self._model(options.student).train()
        self.teacher = self._model(options.teacher).eval()
        how = {"fast_teacher": options.fast, "dtype": None if self.dtype == torch.float32 else self.dtype}
        self.distiller = Distiller(self.student, self.teacher, ["crosskd"], **how).to(self.device)
        self.optimizer = torch.optim.SGD([p for p in self.student.parameters() if p.requires_grad], 1e-4, momentum=0.9)
        self.processor = DetectionImageProcessor()
        pixels = torch.randn(options.batch, 3, options.height, options.width, device=self.device)
        self.pixels = pixels.to(memory_format=torch.channels_last) if options.channels_last else pixels
        self.labels = [self._label() for _ in range(options.batch)]
        self.step_function = torch.compile(self._loss) if options.compile else self._loss

    def _model(self, text: str) -> Any:
        spec = DetectorSpec.parse(text, fields=(("frozen_stages", 1), ("norm_eval", True), ("backbone_arguments", {})))
        model = build_detector(spec, CLASSES).to(self.device)
        return model.to(memory_format=torch.channels_last) if self.options.channels_last else model

    def _label(self) -> dict[str, torch.Tensor]:
        count = self.options.boxes
        extent = torch.rand(count, 2) * 0.4 + 0.05
        boxes = torch.cat([extent / 2 + torch.rand(count, 2) * (1 - extent), extent], 1)
        label = {"class_labels": torch.randint(0, len(CLASSES), (count,)), "boxes": boxes}
        return {key: value.to(self.device) for key, value in label.items()}

    def _loss(self, distil: bool) -> torch.Tensor:
        inputs = {"pixel_values": self.pixels, "labels": self.labels}
        request = self.distiller.student_request if distil else {}
        outputs = self.student(**inputs, **request, output_loss=False)
        parts = dict(outputs.loss_parts)
        if distil:
            parts |= self.distiller(outputs, inputs)
        return torch.stack(list(divide(parts).values())).sum()

    def autocast(self) -> torch.autocast:
        """Mixed precision, as accelerate does it."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _step(self, distil: bool) -> None:
        self.optimizer.zero_grad()
        with self.autocast():
            loss = self.step_function(distil)
        loss.backward()
        self.optimizer.step()

    def plain(self) -> None:
        """A training step of the baseline."""
        self._step(False)

    def crosskd(self) -> None:
        """A training step of the distilled student."""
        self._step(True)

    @torch.no_grad()
    def teacher_pass(self) -> None:
        """The teacher's forward pass."""
        with self.autocast():
            self.teacher(self.pixels)

    @torch.no_grad()
    def predict(self) -> None:
        """Prediction and post-processing."""
        self.student.eval()
        outputs = predicted(self.student, self)
        sizes = [(self.options.height, self.options.width)] * self.options.batch
        self.processor.post_process_object_detection(outputs, target_sizes=sizes)
        self.student.train()


class Peer:
    """torchvision's RetinaNet or FCOS and its twin of this package: equal heads, weights, thresholds and data.

    Every score is above the threshold, so that both have 1000 candidates of each level for NMS.
    """

    def __init__(self, bench: Bench, kind: str):
        options = bench.options
        backbone = options.student.split(":")[1]
        resnet = getattr(torchvision.models, backbone)(weights=None, norm_layer=torchvision.ops.FrozenBatchNorm2d)
        extractor = _resnet_fpn_extractor(resnet, 3, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))
        build = torchvision.models.detection.RetinaNet if kind == "retinanet" else torchvision.models.detection.FCOS
        settings = {"score_thresh": 0.0, "nms_thresh": 0.6, "topk_candidates": 1000, "detections_per_img": 100}
        size = {"min_size": options.height, "max_size": max(options.height, options.width), "_skip_resize": True}
        theirs = build(extractor, len(CLASSES), **size, **settings)
        conversion = convert_torchvision(theirs, list(CLASSES.names))
        models = [theirs.train(), conversion.model.train()]
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        self.theirs, self.ours = (model.to(bench.device, memory_format=layout) for model in models)
        self.bench, self.processor = bench, conversion.processor
        self.images = list(bench.pixels.sigmoid())
        scale = torch.tensor([options.width, options.height] * 2, device=bench.device)
        self.targets = [
            {
                "boxes": torchvision.ops.box_convert(label["boxes"], "cxcywh", "xyxy") * scale,
                "labels": label["class_labels"],
            }
            for label in bench.labels
        ]
        self.optimizers = [
            torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-4, momentum=0.9)
            for model in (self.theirs, self.ours)
        ]

    def their_step(self) -> None:
        """A training step of torchvision's."""
        self.optimizers[0].zero_grad()
        with self.bench.autocast():
            losses = self.theirs(self.images, self.targets)
        torch.stack(list(losses.values())).sum().backward()
        self.optimizers[0].step()

    def our_step(self) -> None:
        """A training step of the twin."""
        self.optimizers[1].zero_grad()
        with self.bench.autocast():
            loss = self.ours(pixel_values=self.bench.pixels, labels=self.bench.labels).loss
        loss.backward()
        self.optimizers[1].step()

    @torch.no_grad()
    def their_prediction(self) -> None:
        """Prediction and post-processing of torchvision's."""
        self.theirs.eval()
        with self.bench.autocast():
            self.theirs(self.images)
        self.theirs.train()

    @torch.no_grad()
    def our_prediction(self) -> None:
        """Prediction and post-processing of the twin."""
        self.ours.eval()
        outputs = predicted(self.ours, self.bench)
        sizes = [(self.bench.options.height, self.bench.options.width)] * self.bench.options.batch
        self.processor.post_process_object_detection(outputs, target_sizes=sizes)
        self.ours.train()


def predicted(model: nn.Module, bench: Bench) -> Any:
    """Outputs in float32, as `evaluate` and `predict` have them."""
    with bench.autocast():
        outputs = model(bench.pixels)
    return widen_outputs(outputs)


def measured(tasks: dict[str, Callable[[], None]], rounds: int, limit: float) -> dict[str, dict[str, float]]:
    """Median and least seconds of each task; every round runs all of them in turn.

    After the first, no round begins when `limit` seconds are over.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    end = time.monotonic() + limit
    for number in range(rounds + 1):
        if number > 1 and time.monotonic() > end:
            break
        for name, task in tasks.items():
            _wait()
            start = time.perf_counter()
            task()
            _wait()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {"median": round(statistics.median(values), 4), "least": round(min(values), 4)}
        for name, values in seconds.items()
    }


def ratio(result: dict[str, dict[str, float]], over: str, *under: str) -> dict[str, float]:
    """Of the medians and of the least times."""
    return {
        kind: round(result[over][kind] / sum(result[name][kind] for name in under), 3) for kind in ("median", "least")
    }


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory(options: argparse.Namespace, task: str, result: Any) -> None:
    """Put the megabytes that models and two steps of `task` need at most; runs in a process of its own."""
    torch.set_num_threads(options.threads or torch.get_num_threads())
    if torch.cuda.is_available():
        bench = Bench(options)
        if task == "plain":
            bench.teacher.cpu()
        torch.cuda.reset_peak_memory_stats()
    else:
        before = _resident("VmRSS")
        bench = Bench(options)
        if task == "plain":
            del bench.distiller, bench.teacher
    for _ in range(2):
        getattr(bench, task)()
    used = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else _resident("VmHWM") - before
    result.put(round(used))


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def measure_memory(options: argparse.Namespace) -> dict[str, int]:
    """Peak memory of both kinds of step, each in a fresh process."""
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for task in ("plain", "crosskd"):
        result = context.Queue()
        process = context.Process(target=peak_memory, args=(options, task, result))
        process.start()
        peaks[task] = result.get()
        process.join()
    return peaks


def weights_in_megabytes(model: nn.Module) -> float:
    """Size of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 2**20


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="gfl:resnet18")
    parser.add_argument("--teacher", default="gfl:resnet50")
    parser.add_argument("--height", type=int, default=416)
    parser.add_argument("--width", type=int, default=544)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--boxes", type=int, default=10, help="ground-truth boxes of each image")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--channels_last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--fast", action="store_true", help="bfloat16, channels last and a folded teacher")
    parser.add_argument("--memory", action="store_true", help="also the peak of both kinds of step")
    parser.add_argument("--peer", choices=("torchvision",))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", dest="limit", type=float, default=200.0, help="begin no further round after so long"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; default: torch's")
    options = parser.parse_args()
    if options.fast:
        options.dtype, options.channels_last = "bfloat16", True
    if options.threads:
        torch.set_num_threads(options.threads)
    bench = Bench(options)
    tasks = {
        "crosskd": bench.crosskd,
        "plain": bench.plain,
        "teacher": bench.teacher_pass,
        "predict": bench.predict,
    }
    for kind in ("retinanet", "fcos") if options.peer else ():
        peer = Peer(bench, kind)
        tasks |= {
            f"{kind}_step": peer.our_step,
            f"torchvision_{kind}_step": peer.their_step,
            f"{kind}_predict": peer.our_prediction,
            f"torchvision_{kind}_predict": peer.their_prediction,
        }
    seconds = measured(tasks, options.rounds, options.limit)
    ratios = {"crosskd over plain and teacher": ratio(seconds, "crosskd", "plain", "teacher")}
    for name in tasks:
        if f"torchvision_{name}" in tasks:
            ratios[f"{name} over torchvision's"] = ratio(seconds, name, f"torchvision_{name}")
    result: dict[str, Any] = {"seconds": seconds, "ratios": ratios}
    if options.memory:
        peaks, teacher_weights = measure_memory(options), weights_in_megabytes(bench.teacher)
        result["memory"] = {
            "peak_megabytes_plain": peaks["plain"],
            "peak_megabytes_crosskd": peaks["crosskd"],
            "teacher_weights_megabytes": round(teacher_weights),
            "peak_ratio": round((peaks["crosskd"] - teacher_weights) / peaks["plain"], 3),
        }
    print_result(result, options)


if __name__ == "__main__":
    main()
