"""The one dense detector: backbone, pyramid and a head. Children are told apart by their head."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .assigners import Assignment, Priors, SizeCache, Targets
from .box_coders import BoxCoder, RegressionKind
from .boxes import image_sizes, to_relative
from .configuration import DenseDetectorConfig
from .layers import Scale
from .losses import LossPart
from .pyramid import DetectorOutput, PyramidDetector, valid_priors


class Taps(NamedTuple):
    """Features at a cut, one (B, C, H_l, W_l) map per level, of each task: classes and boxes.

    In a head whose convolutions serve both tasks the two lists hold the same maps.
    """

    cls: list[Tensor]
    reg: list[Tensor]


class Predictions(NamedTuple):
    """Raw output of a head as rows, level after level, row by row, prior by prior.

    Args:
        logits: (B, N, K); their sigmoid is the score.
        regression: (B, N, 4) or wider: numbers that the head's coder makes boxes of.
        centerness: (B, N) logits, or None.
    """

    logits: Tensor
    regression: Tensor
    centerness: Tensor | None = None


class DenseHead(nn.Module):
    """A head that predicts classes and a box for each prior of a pyramid.

    `forward(x)` is `finish(tap(x, cut), cut)` for every cut: the student's own path and the path of a student's
    features through a teacher's head are the same code. A child defines this path (:meth:`tap`, :meth:`finish`,
    :meth:`tap_width`, :meth:`modules_before`), where its priors lie (:attr:`priors_per_location`, :meth:`prior_boxes`),
    what its rows mean (:meth:`box_coder`) and how it is trained (:meth:`assign`, :attr:`assignment_rule`,
    :meth:`loss`). :class:`TwoTowerHead` has the path of most detectors.

    Attributes:
        coder: Turns regression rows into boxes.
        centerness: The predictor of the centerness, where the head has one.
    """

    def __init__(self, config: DenseDetectorConfig):
        super().__init__()
        self.centerness: nn.Module | None = None
        self.config = config
        self.weights: dict[str, float] = dict(config.loss_weights or {})
        self.num_labels, self.num_convs = config.num_labels, config.num_convs
        self.coder = self.box_coder(config)
        self._known_priors = SizeCache()

    @classmethod
    def box_coder(cls, config: Any) -> BoxCoder:
        """The coder of a head of this configuration."""
        raise NotImplementedError

    # The path from features to predictions, whole or in two halves.

    def forward(self, features: list[Tensor]) -> Predictions:
        """Pyramid maps (B, C, H_l, W_l) to predictions."""
        return self.finish(self.tap(features, 0), 0)

    def tap(self, features: list[Tensor], cut: int, activated: bool = True) -> Taps:
        """Run the head up to convolution `cut` (0 = the pyramid itself, `num_convs` = the predictors' input).

        Without `activated` the activation of the last convolution is left out.

        Raises:
            ValueError: The head cannot be cut there.
        """
        raise NotImplementedError

    def finish(self, taps: Taps, cut: int) -> Predictions:
        """Run the head from convolution `cut` to its predictions."""
        raise NotImplementedError

    def check_cut(self, cut: int) -> None:
        """Raises ValueError if the head cannot be cut at `cut`."""
        if not 0 <= cut <= self.num_convs:
            raise ValueError(
                f"cut={cut}, but the towers have {self.num_convs} convolutions: choose 0 to {self.num_convs}."
            )

    def tap_width(self, cut: int) -> int:
        """Channels of the taps at `cut`."""
        raise NotImplementedError

    def modules_before(self, cut: int) -> list[nn.Module]:
        """The convolutions that run before `cut`."""
        raise NotImplementedError

    def parameters_from(self, cut: int) -> list[nn.Parameter]:
        """Parameters that :meth:`finish` uses from `cut` on."""
        before = {id(p) for module in self.modules_before(cut) for p in module.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in before]

    # Geometry.

    @property
    def priors_per_location(self) -> int:
        """Priors at each location of a map, A."""
        return 1

    def prior_boxes(self, stride: int) -> Tensor:
        """(A, 4) boxes of the location at the origin, xyxy pixels, float32; points are boxes of no size."""
        raise NotImplementedError

    @property
    def grid(self) -> tuple[object, ...]:
        """Equal for two heads exactly if the cells of all their levels lie at the same locations."""
        return (*self.config.strides, self.config.stretch_cells)

    def priors(self, shapes: list[tuple[int, int]], device: torch.device) -> Priors:
        """Priors of maps with these (height, width), in float32 whatever the model's dtype; not to be written to."""
        priors: Priors = self._known_priors.get((*shapes, device), lambda: self._make_priors(shapes, device))
        return priors

    def _make_priors(self, shapes: list[tuple[int, int]], device: torch.device) -> Priors:
        strides = self.config.strides
        steps = [(stride, stride) for stride in strides]
        if self.config.stretch_cells:
            image = [edge * strides[0] for edge in shapes[0]]
            steps = [(image[0] // height, image[1] // width) for height, width in shapes]
        return Priors.on_grid(shapes, strides, steps, [self.prior_boxes(stride).to(device) for stride in strides])

    def decode(self, regression: Tensor, priors: Priors) -> Tensor:
        """Regression rows to boxes (B, N, 4), xyxy pixels. Differentiable and finite."""
        return self.coder.decode(regression, priors)

    @property
    def regression_kind(self) -> RegressionKind:
        """What the regression rows mean, by which a distance between two of them is chosen."""
        return self.coder.kind

    @property
    def regression_width(self) -> int:
        """Numbers in a regression row."""
        return self.coder.width

    # Training.

    def set_epoch(self, epoch: float) -> None:
        """Told at the begin of every epoch, from 0, by who trains the head; most heads train alike in all of them."""

    def assign(
        self, priors: Priors, valid: Tensor, targets: Targets, predictions: Predictions, boxes: Tensor, /
    ) -> Assignment:
        """Ground truth of each prior, without gradient.

        Args:
            priors: Of the maps, N of them.
            valid: (B, N) bool, as of `valid_priors`.
            targets: The batch's ground truth.
            predictions: The head's own rows for the batch,
            boxes: and (B, N, 4) xyxy pixels decoded from them. Heads that assign by geometry take and ignore both.
        """
        raise NotImplementedError

    @property
    def assignment_rule(self) -> tuple[object, ...]:
        """Equal for two heads exactly if they assign the same ground truth to the same priors."""
        raise NotImplementedError

    def normalizer(self, priors: Priors, assignment: Assignment) -> Tensor:
        """What sums over the head's rows are divided by: positives, where an image without any counts as one."""
        return assignment.count_positives()

    def loss(
        self, predictions: Predictions, boxes: Tensor, priors: Priors, assignment: Assignment
    ) -> dict[str, LossPart]:
        """Parts of the supervised loss, each a weighted sum and what it is divided by.

        Args:
            predictions: Of a batch, with gradient.
            boxes: (B, N, 4) xyxy pixels, decoded from them.
            priors, assignment: What :meth:`priors` and :meth:`assign` returned for the batch.

        Returns:
            The keys of the configuration's `loss_weights`, by which the sums are weighted.
        """
        raise NotImplementedError


@dataclass
class DenseDetectorOutput(DetectorOutput):
    """Output of a dense detector: `logits` are (B, N, K), `pred_boxes` (B, N, 4); the rest is as in the base class.

    Args:
        centerness: (B, N) logits, where the detector has them.
        level_lengths: (B, L) number of rows of each level.
        taps: Features of the head at the cut, on request.
        predictions, boxes, priors: With the taps, raw rows, their boxes (B, N, 4) in xyxy pixels, if they were needed,
            and their priors.
        targets, valid, assignment: With taps and labels, what the rows were trained on.
    """

    centerness: Tensor | None = None
    level_lengths: Tensor | None = None
    taps: Taps | None = None
    predictions: Predictions | None = None
    boxes: Tensor | None = None
    priors: Priors | None = None
    targets: Targets | None = None
    valid: Tensor | None = None
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

    def set_epoch(self, epoch: float) -> None:
        """Tell the head which epoch of its training begins, from 0. Without it the head trains as in a late one."""
        self.head.set_epoch(epoch)

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
        output_boxes: bool = True,
        output_loss: bool = True,
    ) -> DenseDetectorOutput:
        """Detect objects.

        Args:
            pixel_values: (B, 3, H, W) normalised pixels, padded on the right and at the bottom.
            pixel_mask: (B, H, W), 1 inside each image, 0 in its padding. Default: no padding.
            labels: Per image `class_labels` (n,) and `boxes` (n, 4), cxcywh relative to the unpadded image.
            cut: Also return the head's features at this cut and everything that belongs to them.
            output_features: Also return the pyramid.
            output_boxes: Return `pred_boxes`. False saves what only detections need.
            output_loss: With labels, return `loss` and `loss_dict`. False, for a caller that divides `loss_parts`
                itself, saves the division and, of several processes, an all-reduce.

        Raises:
            ValueError: `cut` out of range, or class labels outside the model's classes.
        """
        features = self.pyramid(pixel_values)
        taps = self.head.tap(features, cut or 0)
        predictions = self.head.finish(taps, cut or 0)
        priors = self.head.priors([(f.shape[-2], f.shape[-1]) for f in features], pixel_values.device)
        sizes = image_sizes(pixel_values, pixel_mask)
        needed = output_boxes or labels is not None
        boxes = self.head.decode(predictions.regression, priors) if needed else None
        output = DenseDetectorOutput(
            logits=predictions.logits,
            pred_boxes=to_relative(boxes, sizes) if output_boxes and boxes is not None else None,
            centerness=predictions.centerness,
            level_lengths=None if priors.lengths is None else priors.lengths.expand(len(sizes), -1),
            features=features if output_features else None,
        )
        if labels is not None and boxes is not None:
            targets, valid = Targets.from_labels(labels, sizes), valid_priors(self.config, priors, sizes)
            assignment = self.head.assign(priors, valid, targets, predictions, boxes)
            output.set_loss(self.head.loss(predictions, boxes, priors, assignment), output_loss)
        if cut is not None:
            output["taps"], output["predictions"], output["boxes"], output["priors"] = taps, predictions, boxes, priors
            if labels is not None:
                output["targets"], output["valid"], output["assignment"] = targets, valid, assignment
        return output
