"""The one dense detector: backbone, pyramid, a head of two towers. Children define priors, assignment and loss."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .assigners import Assignment, Priors, Targets
from .bounds import Range
from .boxes import decode_delta, decode_distance, image_sizes, to_relative
from .layers import Conv, Scale, Tower, prior_bias
from .losses import LossPart, integral
from .pyramid import DetectorOutput, PyramidDetector, PyramidDetectorConfig

RegressionKind = Literal["distribution", "delta", "distance"]


class DenseDetectorConfig(PyramidDetectorConfig):
    """Configuration shared by the dense detectors; see :class:`PyramidDetectorConfig` for backbone and pyramid.

    Args:
        head_channels: Width of the towers.
        num_convs: Convolutions of each tower.
        norm_groups: Groups of the towers' GroupNorm, `None` for no norm.
        conv_bias: Whether the towers' convolutions have a bias; `None` = only without a norm.
        stretch_cells: Cells divide the padded image evenly in whole pixels, as in torchvision's detectors, instead of
            lying a stride apart. The same where the image is a multiple of the coarsest stride.
        reg_max: Largest bin of a distance distribution; `None` for a head that regresses numbers.
        prior_probability: Initial score of every class.

    Raises:
        ValueError: A value out of range.
    """

    head_channels: int = 256
    num_convs: int = 4
    norm_groups: int | None = 32
    conv_bias: bool | None = None
    stretch_cells: bool = False
    reg_max: int | None = None
    prior_probability: float = 0.01

    ranges: ClassVar[dict[str, Range]] = {
        "head_channels": (1, 8192),
        "num_convs": (0, 64),
        "norm_groups": (1, 8192),
        "reg_max": (1, 1024),
        "prior_probability": (1e-6, 1 - 1e-6),
    }

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.norm_groups is not None and self.head_channels % self.norm_groups:
            raise ValueError(
                f"head_channels={self.head_channels} cannot be split into norm_groups={self.norm_groups}: "
                f"choose a divisor, or None for no norm."
            )


class Taps(NamedTuple):
    """Features of both towers at a cut, one (B, C, H_l, W_l) map per level."""

    cls: list[Tensor]
    reg: list[Tensor]


class Predictions(NamedTuple):
    """Raw output of a head as rows, level after level, row by row, prior by prior.

    Args:
        logits: (B, N, K).
        regression: (B, N, 4) or (B, N, 4 * M), after the level's scale.
        centerness: (B, N) logits, or None.
    """

    logits: Tensor
    regression: Tensor
    centerness: Tensor | None = None


def maps_to_rows(maps: list[Tensor], width: int) -> Tensor:
    """One (B, A * width, H_l, W_l) map per level to (B, N, width) in float32."""
    batch = maps[0].shape[0]
    return torch.cat([m.permute(0, 2, 3, 1).reshape(batch, -1, width) for m in maps], 1).float()


class DenseHead(nn.Module):
    """Two towers of convolutions and their predictors, shared by all levels.

    `forward(x)` is `finish(tap(x, cut), cut)` for every cut: the student's own path and the path of a student's
    features through a teacher's head are the same code.
    """

    has_scales: ClassVar[bool] = True
    has_centerness: ClassVar[bool] = False
    delta_std: ClassVar[tuple[float, ...]] = (1.0, 1.0, 1.0, 1.0)
    numbers_kind: ClassVar[RegressionKind] = "delta"  # of the regression rows, where they aren't distributions

    def __init__(self, config: DenseDetectorConfig):
        super().__init__()
        self.config = config
        self.weights: dict[str, float] = dict(config.loss_weights or {})
        self.num_labels, self.num_convs = config.num_labels, config.num_convs
        width, anchors = config.head_channels, self.priors_per_location
        tower = config.fpn_channels, width, config.num_convs, config.norm_groups, config.conv_bias
        self.cls_tower, self.reg_tower = Tower(*tower), Tower(*tower)
        feature_width = width if config.num_convs else config.fpn_channels
        bias = prior_bias(config.prior_probability)
        self.regression_width = 4 if config.reg_max is None else 4 * (config.reg_max + 1)
        self.classifier = Conv(feature_width, anchors * self.num_labels, 3, bias_value=bias)
        self.regressor = Conv(feature_width, anchors * self.regression_width, 3)
        self.centerness = Conv(feature_width, anchors, 3) if self.has_centerness else None
        self.scales = nn.ModuleList(Scale() for _ in config.strides) if self.has_scales else None

    # What a child defines.

    @property
    def priors_per_location(self) -> int:
        """Priors at each location of a map, A."""
        return 1

    @property
    def regression_kind(self) -> RegressionKind:
        """What the regression rows mean, by which a distance between two of them is chosen."""
        return self.numbers_kind if self.config.reg_max is None else "distribution"

    def prior_boxes(self, stride: int) -> Tensor:
        """(A, 4) boxes of the location at the origin, xyxy pixels."""
        raise NotImplementedError

    def assign(self, priors: Priors, valid: Tensor, targets: Targets) -> Assignment:
        """Ground truth of each prior; `valid` (B, N) leaves the padding out."""
        raise NotImplementedError

    def loss(
        self, predictions: Predictions, boxes: Tensor, priors: Priors, assignment: Assignment
    ) -> dict[str, LossPart]:
        """Weighted parts of the supervised loss; `boxes` (B, N, 4) are the decoded predictions in pixels."""
        raise NotImplementedError

    @property
    def assignment_rule(self) -> tuple[object, ...]:
        """Equal for two heads exactly if they assign the same ground truth to the same priors."""
        raise NotImplementedError

    def normalizer(self, priors: Priors, assignment: Assignment) -> Tensor:
        """What the sums over the head's rows are divided by: positives, where an image without any counts as one."""
        return assignment.count_positives()

    # The path from features to predictions, whole or in two halves.

    def forward(self, features: list[Tensor]) -> Predictions:
        """Pyramid maps (B, C, H_l, W_l) to predictions."""
        return self.finish(self.tap(features, 0), 0)

    def tap(self, features: list[Tensor], cut: int) -> Taps:
        """Run both towers up to convolution `cut` (0 = the pyramid itself, `num_convs` = the predictors' input)."""
        self.check_cut(cut)
        return Taps(
            [self.cls_tower(feature, stop=cut) for feature in features],
            [self.reg_tower(feature, stop=cut) for feature in features],
        )

    def finish(self, taps: Taps, cut: int) -> Predictions:
        """Run the head from convolution `cut` to its predictions."""
        cls_maps = [self.cls_tower(feature, start=cut) for feature in taps.cls]
        reg_maps = [self.reg_tower(feature, start=cut) for feature in taps.reg]
        regression = [self.regressor(feature) for feature in reg_maps]
        if self.scales is not None:
            regression = [scale(feature) for scale, feature in zip(self.scales, regression, strict=True)]
        centerness = None
        if self.centerness is not None:
            source = reg_maps if self.centerness_on_reg else cls_maps
            centerness = maps_to_rows([self.centerness(feature) for feature in source], 1)[..., 0]
        logits = maps_to_rows([self.classifier(feature) for feature in cls_maps], self.num_labels)
        return Predictions(logits, maps_to_rows(regression, self.regression_width), centerness)

    @property
    def centerness_on_reg(self) -> bool:
        """Whether centerness is predicted from the regression tower."""
        return True

    def check_cut(self, cut: int) -> None:
        """Raises ValueError if the towers cannot be cut at `cut`."""
        if not 0 <= cut <= self.num_convs:
            raise ValueError(
                f"cut={cut}, but the towers have {self.num_convs} convolutions: choose 0 to {self.num_convs}."
            )

    def tap_width(self, cut: int) -> int:
        """Channels of the taps at `cut`."""
        return self.config.fpn_channels if cut == 0 else self.config.head_channels

    def parameters_from(self, cut: int) -> list[nn.Parameter]:
        """Parameters that :meth:`finish` uses from `cut` on."""
        before = {
            id(p) for tower in (self.cls_tower, self.reg_tower) for conv in list(tower)[:cut] for p in conv.parameters()
        }
        return [parameter for parameter in self.parameters() if id(parameter) not in before]

    # Geometry.

    @property
    def grid(self) -> tuple[object, ...]:
        """Equal for two heads exactly if the cells of all their levels lie at the same locations."""
        return (*self.config.strides, self.config.stretch_cells)

    def priors(self, shapes: list[tuple[int, int]], device: torch.device) -> Priors:
        """Priors of maps with these (height, width), in float32 whatever the model's dtype."""
        strides = self.config.strides
        steps = [(stride, stride) for stride in strides]
        if self.config.stretch_cells:
            image = [edge * strides[0] for edge in shapes[0]]
            steps = [(image[0] // height, image[1] // width) for height, width in shapes]
        return Priors.on_grid(shapes, strides, steps, [self.prior_boxes(stride).to(device) for stride in strides])

    def decode(self, regression: Tensor, priors: Priors) -> Tensor:
        """Regression rows (B, N, 4 [* M]) to boxes (B, N, 4), xyxy pixels. Differentiable and finite."""
        if self.regression_kind == "distribution":
            distances = integral(regression.unflatten(-1, (4, -1)))
            return decode_distance(priors.centers, distances * priors.strides[:, None])
        if self.regression_kind == "delta":
            return decode_delta(priors.boxes, regression, self.delta_std)
        return decode_distance(priors.centers, self.distances(regression, priors))

    def distances(self, regression: Tensor, priors: Priors) -> Tensor:
        """Distances in pixels of a head of kind "distance"."""
        raise NotImplementedError


@dataclass
class DenseDetectorOutput(DetectorOutput):
    """Output of a dense detector: `logits` are (B, N, K), `pred_boxes` (B, N, 4); the rest is as in the base class.

    Args:
        centerness: (B, N) logits, where the detector has them.
        level_lengths: (B, L) number of rows of each level.
        taps: Features of both towers at the cut, on request.
        predictions, priors, targets, assignment: Raw rows and what they were trained on, with the taps.
    """

    centerness: Tensor | None = None
    level_lengths: Tensor | None = None
    taps: Taps | None = None
    predictions: Predictions | None = None
    priors: Priors | None = None
    targets: Targets | None = None
    assignment: Assignment | None = None


class DenseDetector(PyramidDetector):
    """Backbone, feature pyramid and dense head. Children set `config_class` and `head_class`."""

    config: DenseDetectorConfig
    config_class: ClassVar[type[PreTrainedConfig]] = DenseDetectorConfig
    head_class: ClassVar[type[DenseHead]] = DenseHead

    def __init__(self, config: DenseDetectorConfig):
        super().__init__(config)
        self.head = self.head_class(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        if isinstance(module, Scale):
            nn.init.ones_(module.scale)
        else:
            super()._init_weights(module)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        cut: int | None = None,
        output_features: bool = False,
    ) -> DenseDetectorOutput:
        """Detect objects.

        Args:
            pixel_values: (B, 3, H, W) normalised pixels, padded on the right and at the bottom.
            pixel_mask: (B, H, W), 1 inside each image, 0 in its padding. Default: no padding.
            labels: Per image `class_labels` (n,) and `boxes` (n, 4), cxcywh relative to the unpadded image.
            cut: Also return the features of both towers at this cut and everything that belongs to them.
            output_features: Also return the pyramid.

        Raises:
            ValueError: `cut` out of range, or class labels outside the model's classes.
        """
        features = self.pyramid(pixel_values)
        taps = self.head.tap(features, cut or 0)
        predictions = self.head.finish(taps, cut or 0)
        priors = self.head.priors([(f.shape[-2], f.shape[-1]) for f in features], pixel_values.device)
        boxes = self.head.decode(predictions.regression, priors)
        sizes = image_sizes(pixel_values, pixel_mask)
        output = DenseDetectorOutput(
            logits=predictions.logits,
            pred_boxes=to_relative(boxes, sizes),
            centerness=predictions.centerness,
            level_lengths=torch.tensor(priors.level_lengths, device=boxes.device).expand(len(boxes), -1),
            features=features if output_features else None,
        )
        if labels is not None:
            targets = Targets.from_labels(labels, sizes)
            assignment = self.head.assign(priors, priors.inside(sizes), targets)
            output.set_loss(self.head.loss(predictions, boxes, priors, assignment))
        if cut is not None:
            output["taps"], output["predictions"], output["priors"] = taps, predictions, priors
            if labels is not None:
                output["targets"], output["assignment"] = targets, assignment
        return output
