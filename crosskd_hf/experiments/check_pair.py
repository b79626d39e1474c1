"""Before training: can this teacher teach this student, how, and what will it cost? Behind `crosskd-hf check-pair`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.class_names import are_placeholders, are_reordered, are_same, class_names, listing
from ..data.dataset import DetectionData
from ..distillation import Distiller, MethodConfig
from ..distillation.classes import match_classes
from ..distillation.pixels import PixelAdapter, PixelFormat
from ..inference.evaluation import detect_dataset
from ..inference.precision import widened
from ..models.losses import divide
from ..text import one_line

PROBE_EDGE = 256  # pixels; the step is measured on one such square and scaled by area
LOW_AP = 0.05


@dataclass(frozen=True)
class Cost:
    """What one training step costs, counted on a small image and scaled by area.

    Args:
        student_flops: Of a step without a teacher, forward and backward, for one image; 2 per multiply-add.
        flops: Of a step with distillation.
        student_bytes, bytes: Weights, their gradients and one momentum, and what a batch keeps for the backward pass,
            in float32; without and with distillation. Working memory of single operations comes on top.
        image_size: (height, width) in pixels that the numbers are for.
        batch_size: Images that the bytes are for.
    """

    student_flops: float
    flops: float
    student_bytes: float
    bytes: float
    image_size: tuple[int, int]
    batch_size: int


@dataclass(frozen=True)
class PairReport:
    """What is known about a student-teacher pair; `str()` is a short table.

    Args:
        student, teacher: What they are, in words.
        problem: Why the pair can't be distilled and what would work; None if it can.
        warnings: What is allowed, but probably not meant.
        distillation: `Distiller.describe()`; empty if there is a problem.
        classes: The class map in words.
        pixels: How the teacher gets the student's pixels, in words.
        teacher_ap: The teacher's COCO AP in [0, 1] on the images as it will see them; None if no data was given.
        teacher_images: So many images.
        cost: None if it was not measured.
    """

    student: str
    teacher: str
    problem: str | None = None
    warnings: tuple[str, ...] = ()
    distillation: dict[str, Any] = field(default_factory=dict)
    classes: str = ""
    pixels: str = ""
    teacher_ap: float | None = None
    teacher_images: int = 0
    cost: Cost | None = None

    @property
    def ok(self) -> bool:
        """Whether the pair can be distilled."""
        return self.problem is None

    def __str__(self) -> str:
        head = f"{'ok' if self.ok else 'problem'}: {self.student} learns from {self.teacher}"
        rows = [("problem", self.problem), *self._plan(), ("classes", self.classes), ("pixels", self.pixels)]
        if self.teacher_ap is not None:
            rows.append(("teacher AP", f"{100 * self.teacher_ap:.1f} on {self.teacher_images} images"))
        if self.cost is not None:
            rows += _cost_rows(self.cost)
        rows += [("warning", warning) for warning in self.warnings]
        text_rows = [f"  {name:<11} {one_line(text, None)}" for name, text in rows if text]
        return "\n".join([one_line(head, None), *text_rows])

    def _plan(self) -> list[tuple[str, str]]:
        if not self.distillation:
            return []
        plan = self.distillation
        modules = dict.fromkeys(name.rpartition(".")[0] for name in plan["adapters"])
        return [
            *(row for name, options in plan["methods"].items() for row in _method_rows(name, options)),
            ("adapters", ", ".join(modules) or "none needed"),
        ]


def _method_rows(name: str, options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The loss keys of a method with their weights, and its options."""
    losses = [f"{name}/{term} x {options['weight'] * weight:g}" for term, weight in options["terms"].items()]
    others = [f"{key} {value}" for key, value in options.items() if key not in ("weight", "terms")]
    return [("losses", ", ".join(losses)), (name, ", ".join(others))]


def check_pair(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    methods: Sequence[MethodConfig | str] = ("crosskd",),
    student_processor: BaseImageProcessor | None = None,
    teacher_processor: BaseImageProcessor | None = None,
    dataset: DetectionData | None = None,
    images: int = 100,
    measure: bool = True,
    image_size: tuple[int, int] = (800, 1344),
    batch_size: int = 2,
) -> PairReport:
    """Check a pair before training. Neither model is changed.

    Args:
        student, teacher: The models.
        methods: What shall be distilled. Default: CrossKD as published.
        student_processor, teacher_processor: Their image processors, for the conversion of pixels and the AP.
        dataset: With data, the teacher's AP is computed on images prepared as in training. Needs `student_processor`.
        images: At most so many images of it, the first ones.
        measure: Run one step on a small image: counts its cost, and finds losses that are not finite or reach layers
            that they must not.
        image_size: (height, width) in pixels of the padded training images, for the cost.
        batch_size: Images per step and device, for the memory.

    Returns:
        The report. A pair that can't be distilled is a report with a `problem`, not an error.

    Raises:
        ValueError: `dataset` without `student_processor`.
    """
    if dataset is not None and student_processor is None:
        raise ValueError("The teacher's AP needs student_processor: images are prepared with it, as in training.")
    names = describe_model(student), describe_model(teacher)
    with _left_as_found(student), _left_as_found(teacher):
        try:
            distiller = Distiller(student, teacher, methods, student_processor, teacher_processor)
            cost = _measure(student, distiller, image_size, batch_size) if measure else None
        except (ValueError, RuntimeError) as error:
            return PairReport(*names, problem=str(error))
        average_precision, count = None, 0
        if dataset is not None and student_processor is not None:
            part = dataset.dataset.select(range(min(images, len(dataset.dataset))))
            data = DetectionData(part, dataset.categories, dataset.report)
            average_precision = teacher_ap(teacher, data, student_processor, teacher_processor)
            count = len(part)
    return PairReport(
        *names,
        warnings=(
            *_warnings(student, teacher, student_processor, teacher_processor, average_precision),
            *(() if dataset is None else _class_warnings(student, dataset)),
        ),
        distillation=distiller.describe(),
        classes=_classes(student, teacher),
        pixels=_pixels(student_processor, teacher_processor),
        teacher_ap=average_precision,
        teacher_images=count,
        cost=cost,
    )


def teacher_ap(
    teacher: PreTrainedModel,
    data: DetectionData,
    processor: BaseImageProcessor,
    teacher_processor: BaseImageProcessor | None = None,
    batch_size: int = 4,
) -> float:
    """COCO AP in [0, 1] of a teacher on images resized by `processor`, the student's; classes are matched by name.

    Detections of classes that the data does not have are left out; classes that the teacher does not know count zero.

    Args:
        teacher_processor: If it normalises differently, pixels are converted as in training; its post-processing
            (score threshold, NMS) is used. Default: the student's.
        batch_size: Images at a time.
    """
    adapt = None
    if teacher_processor is not None:
        adapt = PixelAdapter(PixelFormat.of(processor), PixelFormat.of(teacher_processor))
    found = detect_dataset(
        teacher,
        processor,
        data.dataset,
        data.categories,
        batch_size=batch_size,
        threshold=0.05,
        reader=teacher_processor,
        adapt=adapt,
    )
    return found.compute()["map"]


def describe_model(model: PreTrainedModel) -> str:
    """Class, backbone, classes and parameters of a model in words."""
    name = type(model).__name__.removesuffix("ForObjectDetection")
    backbone = model.config.to_dict().get("backbone")
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    facts = [f"{model.config.num_labels} classes", f"{millions:.1f} M"]
    parts = [backbone, *facts] if isinstance(backbone, str) else facts
    return f"{name} ({', '.join(parts)})"


@contextmanager
def _left_as_found(model: PreTrainedModel) -> Iterator[None]:
    """Run in evaluation mode and float32; give back modes, types and the choice of trained parameters afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    try:
        with widened(model):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def _measure(student: PreTrainedModel, distiller: Distiller, image_size: tuple[int, int], batch_size: int) -> Cost:
    device = student.device
    distiller.to(device)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "pixel_values": torch.randn(1, 3, PROBE_EDGE, PROBE_EDGE, generator=generator).to(device),
        "pixel_mask": torch.ones(1, PROBE_EDGE, PROBE_EDGE, dtype=torch.int64, device=device),
        "labels": [
            {
                "class_labels": torch.zeros(1, dtype=torch.int64, device=device),
                "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.3]], device=device),
            }
        ],
    }
    alone = _step(student, None, inputs)
    whole = _step(student, distiller, inputs)
    area = image_size[0] * image_size[1] / PROBE_EDGE**2
    trained = sum(p.numel() * p.element_size() for p in student.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in student.parameters()) + 2 * trained
    added = sum(p.numel() * p.element_size() for p in distiller.teacher.parameters())
    added += 3 * sum(p.numel() * p.element_size() for p in distiller.parameters())
    return Cost(
        student_flops=alone[0] * area,
        flops=whole[0] * area,
        student_bytes=weights + alone[1] * area * batch_size,
        bytes=weights + added + whole[1] * area * batch_size,
        image_size=image_size,
        batch_size=batch_size,
    )


def _step(student: PreTrainedModel, distiller: Distiller | None, inputs: dict[str, Any]) -> tuple[int, int]:
    """FLOPs of a step on these inputs, and bytes it keeps for its backward pass, weights aside."""
    models = [student] if distiller is None else [student, distiller, distiller.teacher]
    weights = {p.untyped_storage().data_ptr() for m in models for p in (*m.parameters(), *m.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = student(**inputs, **({} if distiller is None else distiller.student_request))
            loss = outputs["loss"]
            if distiller is not None:
                losses = divide(distiller(outputs, inputs))
                loss = loss + torch.stack(list(losses.values())).sum()
        trained = [p for m in models for p in m.parameters() if p.requires_grad]
        torch.autograd.grad(loss, trained, retain_graph=distiller is not None, allow_unused=True)
    if distiller is not None:
        distiller.check_gradients(losses)
    return counter.get_total_flops(), sum(kept.values())


def _cost_rows(cost: Cost) -> list[tuple[str, str]]:
    height, width = cost.image_size
    step = f"{cost.student_flops / 1e9:.4g} GFLOP per image alone, {cost.flops / 1e9:.4g} with the teacher"
    memory = f"{cost.student_bytes / 2**30:.3g} GiB alone, {cost.bytes / 2**30:.3g} with the teacher"
    return [
        ("step", f"{step} (x {cost.flops / cost.student_flops:.2f}), {height} x {width}"),
        ("memory", f"about {memory}, {cost.batch_size} images in float32"),
    ]


def _classes(student: PreTrainedModel, teacher: PreTrainedModel) -> str:
    try:
        return str(match_classes(student.config, teacher.config))
    except ValueError:
        return "none shared by name"


def _pixels(student: BaseImageProcessor | None, teacher: BaseImageProcessor | None) -> str:
    if student is None or teacher is None:
        return "not compared: give both image processors"
    own, other = PixelFormat.of(student), PixelFormat.of(teacher)
    return "same normalisation" if own == other else f"converted from {_format(own)} to {_format(other)}"


def _format(pixels: PixelFormat) -> str:
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (pixels.mean, pixels.std))
    return f"{'BGR' if pixels.bgr else 'RGB'} mean ({mean}) std ({std}) x {pixels.rescale:.3g}"


def _class_warnings(student: PreTrainedModel, dataset: DetectionData) -> Iterator[str]:
    own, names = class_names(student.config), dataset.categories.names
    if are_reordered(names, own):
        yield "the data has the student's classes in another order: train on data.for_model(student.config)"
    elif not are_same(names, own):
        yield f"the student can't be trained on this data, it has {listing(own, 5)}; the data has {listing(names, 5)}"


def _warnings(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    student_processor: BaseImageProcessor | None,
    teacher_processor: BaseImageProcessor | None,
    average_precision: float | None,
) -> Iterator[str]:
    if student_processor is not None and teacher_processor is not None:
        sizes = [dict(processor.size) for processor in (student_processor, teacher_processor)]
        if sizes[0] != sizes[1]:
            yield f"the teacher will see images of size {sizes[0]}, its own processor makes {sizes[1]}"
    elif student_processor is not None or teacher_processor is not None:
        yield "only one image processor is known: the teacher will see pixels normalised for the student"
    if are_placeholders(class_names(student.config)):
        yield "the classes have placeholder names (LABEL_0, ...) and are matched by these: set id2label in both models"
    if average_precision is not None and not average_precision >= LOW_AP:
        yield "the teacher hardly detects anything on these images: check its weights, class names and image size"
    if sum(p.numel() for p in student.parameters()) > sum(p.numel() for p in teacher.parameters()):
        yield "the student is larger than its teacher"
