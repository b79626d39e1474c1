"""What `distill` is asked for, in Python and on a command line: student, teacher, how often."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import yaml
from transformers import set_seed

from ..create import Detector, ImageSize, chosen_weights, create_detector, is_new
from ..data.dataset import DetectionData
from ..sources import near
from ..training.config import CrossKDConfig, option
from .train import RunArguments

LARGER = "resnet50"  # backbone of a teacher that nobody named


@dataclass(frozen=True)
class Plan:
    """What `distill` was asked for, apart from data and settings.

    Args:
        student, teacher: As of `create_detector`; teacher None is a larger one of the student's kind.
        seeds: So many pairs of runs.
        train_teacher: Train a given teacher on the data first: one of other classes gets a head for these.
        backbone_weights, width, image_size, pixel_range, multi_scale, augment: As of `create_detector`, the image
            processor and `training_transform`.
        teacher_settings: Settings of the teacher's own training that differ from the students'.
    """

    student: str = "gfl:resnet18"
    teacher: str | None = None
    seeds: int = 1
    train_teacher: bool = False
    backbone_weights: str = "auto"
    width: int = 256
    image_size: ImageSize | None = None
    pixel_range: Sequence[float] | None = None
    multi_scale: Sequence[int] = ()
    augment: Sequence[str] = ()
    teacher_settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = [name for name in self.teacher_settings if name not in CrossKDConfig.__dataclass_fields__]
        if unknown:
            hint = near(unknown[0], CrossKDConfig.__dataclass_fields__) or "."
            raise ValueError(f"teacher_settings has an unknown option {unknown[0]!r}{hint}")
        if self.teacher_settings and not self.trains_teacher:
            raise ValueError("teacher_settings has no effect: the teacher is trained already (train_teacher=True).")
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds}: at least one run with and without a teacher is needed.")
        if self.teacher is None and not is_new(self.student):
            raise ValueError(
                f"The student {self.student!r} is a trained detector: name its teacher (teacher=..., --teacher), a "
                "trained one or a new one such as gfl:resnet50, which is trained first."
            )

    @property
    def teacher_source(self) -> str:
        """The teacher in a word."""
        return self.teacher or f"{self.student.partition(':')[0]}:{LARGER}"

    @property
    def trains_teacher(self) -> bool:
        """Whether the teacher has to learn first."""
        return self.train_teacher or is_new(self.teacher_source)

    def settled(self) -> Plan:
        """With one choice of pretrained backbones for all runs, whatever a network does meanwhile."""
        sources = [self.student, *([self.teacher_source] if self.trains_teacher else [])]
        return replace(self, backbone_weights=chosen_weights(sources, self.backbone_weights))

    def new_teacher(self, data: DetectionData, seed: int) -> Detector | None:
        """The teacher as it is before it learns on `data`; None if it is trained already."""
        if not self.trains_teacher:
            return None
        set_seed(seed)
        return self.detector(self.teacher_source, data)

    def detector(self, source: str, data: DetectionData) -> Detector:
        """A model that is to be trained on `data`."""
        made = create_detector(
            source,
            data,
            backbone_weights=self.backbone_weights,
            width=self.width,
            image_size=self.image_size,
        )
        if self.pixel_range is not None:
            made.processor.pixel_range = list(self.pixel_range)
        return made


@dataclass
class DistillArguments(RunArguments):
    """As of `crosskd-hf train`, and how often."""

    teacher: str | None = option(
        None,
        "Folder or Hub id of a trained teacher, or a new one as ARCHITECTURE:BACKBONE, which is trained first. "
        "Default: the student's architecture on a ResNet-50.",
    )
    seeds: int = option(1, "Pairs of runs, with and without a teacher; from two on the verdict has an interval.")
    train_teacher: bool = option(
        False, "Train a given teacher on the data first; one of other classes gets a head for these."
    )
    teacher_settings: list[str] = option(
        [], "Settings of the teacher's own training that differ from the students', as NAME=VALUE."
    )

    def plan(self) -> Plan:
        """What is asked for, apart from data and settings."""
        return Plan(
            self.student,
            self.teacher,
            self.seeds,
            self.train_teacher,
            self.backbone_weights,
            self.width,
            self.image_size,
            self.pixel_range,
            self.multi_scale,
            self.augment,
            dict(map(_setting, self.teacher_settings)),
        )


def _setting(text: str) -> tuple[str, Any]:
    """A setting from the command line, as of YAML, which takes 1e-4 for a text."""
    name, _, value = text.partition("=")
    read = yaml.safe_load(value)
    try:
        return name, float(read) if isinstance(read, str) else read
    except ValueError:
        return name, read
