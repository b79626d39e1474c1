"""A view without a model, and passes of given maps, for methods that read features alone."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor, zeros

from crosskd_hf.distillation.method import Method, MethodConfig
from crosskd_hf.distillation.passes import Batch, DetectorView, FeatureMap, Needs, Pair, Pass

STRIDES = (8, 16, 32, 64, 128)


class MapsView(DetectorView):
    """Says how wide its maps are, and nothing else."""

    family = "maps"
    kind = "distribution"

    def __init__(self, channels: int, role: Any = "student", strides: tuple[int, ...] = STRIDES) -> None:
        super().__init__(SimpleNamespace(config=SimpleNamespace(model_type="maps")), role)
        self.strides, self.channels = strides, (channels,) * len(strides)

    def prepare(self, needs: Needs) -> dict[str, Any]:
        return {}

    def read(self, outputs: list[Tensor], batch: Batch) -> Pass:
        return maps_pass(outputs, self.strides)


def maps_pass(maps: list[Tensor], strides: tuple[int, ...] = STRIDES) -> Pass:
    """A pass that holds features alone."""
    return Pass([FeatureMap(stride, values) for stride, values in zip(strides, maps, strict=False)])


def build_method(config: MethodConfig, student: int, teacher: int, levels: int = 5) -> Method:
    """The method between maps of these widths, with all its numbers filled in."""
    pair = Pair(MapsView(student, "student", STRIDES[:levels]), MapsView(teacher, "teacher", STRIDES[:levels]))
    return config.method(config.published(pair), *pair)


def empty_batch(images: int) -> Batch:
    """So many images without objects."""
    return Batch(zeros(images, 3, 64, 64), None, [])
