"""FGD: features weighted by objects and attention, and the relations between their pixels (CVPR 2022)."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.boxes import row_of
from ...models.losses import LossPart
from ..adapters import adapter
from ..classes import class_names
from ..method import Method, MethodConfig, Paper, option
from ..passes import Batch, DetectorView, FeatureMap, Pair, Pass, same_size

AUTHORS = "configurations of the authors' code (yzd-v/FGD)"

# By the student's kind of detector; of others nothing is published.
_DENSE = {
    "temperature": 0.5,
    "terms": {"foreground": 1e-3, "background": 5e-4, "attention": 5e-4, "relation": 5e-6},
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "dense": _DENSE,
    "crosskd_fcos": {
        "temperature": 0.8,
        "terms": {"foreground": 1.6e-3, "background": 8e-4, "attention": 8e-4, "relation": 8e-6},
    },
    "crosskd_faster_rcnn": {
        "temperature": 0.5,
        "levels": 4,
        "terms": {"foreground": 5e-5, "background": 2.5e-5, "attention": 5e-5, "relation": 5e-7},
    },
}


class ContextBlock(nn.Module):
    """A map plus what a bottleneck makes of its attention-pooled pixels (GCNet, ICCV workshops 2019); at first the map.

    Args:
        channels: Of the map.
    """

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(channels // 2, 1)
        self.mask = nn.Conv2d(channels, 1, 1)
        nn.init.kaiming_normal_(self.mask.weight, mode="fan_in")
        last = nn.Conv2d(hidden, channels, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.transform = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.LayerNorm([hidden, 1, 1]), nn.ReLU(inplace=True), last
        )

    def forward(self, values: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        attention = self.mask(values).flatten(2).softmax(-1)  # (B, 1, H * W)
        context = (values.flatten(2) @ attention.mT)[..., None]  # (B, C, 1, 1)
        return values + self.transform(context)  # type: ignore[no-any-return]


class FGDMethod(Method):
    """See :class:`FGD`."""

    name = "fgd"
    terms = ("foreground", "background", "attention", "relation")
    paper = Paper(
        "Focal and Global Knowledge Distillation for Detectors", "CVPR 2022", "https://arxiv.org/abs/2111.11837"
    )
    families = "all, also student and teacher of different families"

    def __init__(self, config: "FGD", student: DetectorView, teacher: DetectorView):
        super().__init__(config, student, teacher)
        pairs = list(zip(student.channels, teacher.channels, strict=True))[: config.levels]
        self.adapters = nn.ModuleList(adapter(*pair) for pair in pairs)
        blocks = pairs if self.wants("relation") else []
        self.student_blocks = nn.ModuleList(ContextBlock(channels) for _, channels in blocks)
        self.teacher_blocks = nn.ModuleList(ContextBlock(channels) for _, channels in blocks)
        if config.inherit:
            _check_heir(Pair(student, teacher))

    def prepare_student(self, student: DetectorView, teacher: DetectorView) -> None:
        """With `inherit` the student begins with the teacher's neck and head."""
        if self.config.inherit:
            _inherit(student, teacher)

    def forward(self, student: Pass, teacher: Pass, batch: Batch) -> dict[str, LossPart]:
        """Sums over each level's elements, divided by the number of images."""
        found: dict[str, list[Tensor]] = {}
        for level, layer in enumerate(self.adapters):
            target = teacher.features[level]._replace(values=teacher.features[level].values.detach().float())
            own = layer(same_size(student.features[level].values, target.values)).float()
            for name, total in self._level(level, own, target, batch).items():
                found.setdefault(name, []).append(total)
        images = torch.full_like(found[next(iter(found))][0].detach(), float(len(batch.pixel_values)))
        return {name: LossPart(torch.stack(totals), images.expand(len(totals))) for name, totals in found.items()}

    def _level(self, level: int, own: Tensor, target: FeatureMap, batch: Batch) -> dict[str, Tensor]:
        wanted = target.values
        (places, channels), (own_places, own_channels) = (self.attention(values) for values in (wanted, own))
        found: dict[str, Tensor] = {}
        if self.wants("foreground") or self.wants("background"):
            distance = ((own - wanted).square() * channels[..., None, None]).sum(1) * places  # (B, H, W)
            masks = dict(zip(self.terms, self.masks(target, batch), strict=False))
            found = {name: (distance * mask).sum() for name, mask in masks.items() if self.wants(name)}
        if self.wants("attention"):
            found["attention"] = F.l1_loss(own_places, places, reduction="sum") + F.l1_loss(
                own_channels, channels, reduction="sum"
            )
        if self.wants("relation"):
            relations = self.student_blocks[level](own), self.teacher_blocks[level](wanted)
            found["relation"] = F.mse_loss(*relations, reduction="sum")
        return found

    def attention(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Of a map, that of its places (B, H, W), which adds up to H * W, and of its channels (B, C), to C."""
        size, temperature = values.abs(), self.config.temperature or 1.0
        places = size.mean(1).flatten(1).div(temperature).softmax(1) * values[0, 0].numel()
        channels = size.mean((2, 3)).div(temperature).softmax(1) * values.shape[1]
        return places.unflatten(1, values.shape[-2:]), channels

    @torch.no_grad()
    def masks(self, feature: FeatureMap, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, H, W) of objects, where each counts as one and the smaller wins, and of the rest, which counts as one."""
        height, width = feature.values.shape[-2:]
        grid = row_of((width, height), batch.targets.boxes)
        pad = row_of((batch.pixel_values.shape[-1], batch.pixel_values.shape[-2]), grid)
        sizes = pad if self.config.box_scale == "padded" else batch.sizes.flip(-1)[:, None]
        first, last = (corners * grid / sizes for corners in batch.targets.boxes.chunk(2, -1))  # (B, G, 2) x, y
        first, last = first.floor(), last.ceil()
        inside = []
        for axis, size in ((1, height), (0, width)):
            cell = torch.arange(size, device=first.device)
            inside.append((cell >= first[..., axis, None]) & (cell <= last[..., axis, None]))
        share = batch.targets.mask / (last - first + 1).prod(-1)  # (B, G)
        objects = (inside[0][..., None] & inside[1][..., None, :]) * share[..., None, None]
        foreground = objects.amax(1)  # (B, H, W)
        background = (foreground == 0).float()
        return foreground, background / background.sum((1, 2), keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class FGD(MethodConfig):
    """Focal and global distillation. Terms: `foreground` and `background` between features, weighted by the teacher's
    attention, `attention` between both attentions, `relation` between what two trainable context blocks make of the
    maps. None stands for what was published for the student's kind of detector.

    Args:
        temperature: Of the attentions.
        levels: So many of the finest maps; the authors take 4 of a two-stage detector's. None: all.
        inherit: The student begins with the neck and the head of the teacher, where their shapes agree.
        box_scale: Boxes lie on the map of the "padded" batch. With "image", as in the authors' code, a box is
            stretched by the padding of its image.

    Raises:
        ValueError:
            "can't inherit": Heads or classes of student and teacher differ.
    """

    method = FGDMethod
    published_numbers = {name.removeprefix("crosskd_"): numbers for name, numbers in PUBLISHED.items()}

    temperature: float | None = option(None, "Of the attentions.", AUTHORS, least=1e-6)
    levels: int | None = option(None, "So many of the finest maps.", AUTHORS, least=1)
    inherit: bool = option(False, "Begin with the teacher's neck and head.", "README of the authors' code")
    box_scale: Literal["padded", "image"] = option("padded", "Size that boxes are relative to.", AUTHORS)

    def defaults(self, pair: Pair) -> dict[str, Any]:
        """By the student's kind of detector."""
        known = {"levels": None} | PUBLISHED.get(pair.student.name, _DENSE)
        weights = known["terms"] | (self.terms or {})
        if not any(weight for name, weight in weights.items() if name != "relation"):
            known.pop("temperature")
        return known


def _check_heir(pair: Pair) -> None:
    """Raises ValueError if the student can't begin with the teacher's head."""
    classes = [class_names(view.model.config) for view in pair]
    heads = [_shapes(view.model, view.head_modules) for view in pair]
    if not pair.student.head_modules or heads[0] != heads[1] or classes[0] != classes[1]:
        raise ValueError(
            f"{pair} can't inherit: heads and classes must be equal. Leave inherit=False, or build the student with "
            "the teacher's head and classes."
        )


@torch.no_grad()
def _inherit(student: DetectorView, teacher: DetectorView) -> None:
    """Begin with the teacher's head, and with those parts of its neck that have the same shapes."""
    names = (*student.head_modules, "neck")
    given = {name: value for name, value in teacher.model.state_dict().items() if name.split(".")[0] in names}
    for name, value in student.model.state_dict().items():
        if name in given and given[name].shape == value.shape:
            value.copy_(given[name])


def _shapes(model: nn.Module, modules: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of these children."""
    weights = model.state_dict().items()
    return {name: tuple(value.shape) for name, value in weights if name.split(".")[0] in modules}
