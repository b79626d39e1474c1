"""Box coders: what the numbers mean that a head regresses for each prior, and how they become a box."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from .assigners import Priors
from .boxes import decode_delta, decode_distance, encode_delta, encode_distance
from .losses import integral

RegressionKind = Literal["distribution", "delta", "distance"]
DistanceUnit = Literal["stride", "positive_stride", "log_pixel"]

# exp() of a raw distance is clipped here: 160,000 pixels are more than any image, and finite in every precision.
MAX_LOG_DISTANCE = 12.0


@dataclass(frozen=True)
class BoxCoder:
    """The base of the coders. Two coders are equal if the same numbers mean the same box to both."""

    kind: ClassVar[RegressionKind]

    @property
    def width(self) -> int:
        """Numbers that a head regresses for a box."""
        return 4

    def decode(self, regression: Tensor, priors: Priors) -> Tensor:
        """Rows (B, N, width) to boxes (B, N, 4), xyxy pixels, in float32. Differentiable and finite."""
        raise NotImplementedError


@dataclass(frozen=True)
class DeltaCoder(BoxCoder):
    """Shift and change of size against the prior's box (R-CNN, CVPR 2014, appendix C).

    Args:
        std: What dx, dy, dw and dh are divided by.
    """

    kind = "delta"
    std: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)

    def decode(self, regression: Tensor, priors: Priors) -> Tensor:
        """See :meth:`BoxCoder.decode`; a size changes by a factor of 62.5 at most."""
        return decode_delta(priors.boxes, regression, self.std)

    def encode(self, boxes: Tensor, priors: Priors) -> Tensor:
        """Boxes (B, N, 4), xyxy pixels, to rows (B, N, 4)."""
        return encode_delta(priors.boxes, boxes, self.std)


@dataclass(frozen=True)
class DistanceCoder(BoxCoder):
    """Distances (left, top, right, bottom) from the prior's centre to the sides of the box (FCOS, ICCV 2019, eq. 1).

    Args:
        unit: Of the raw numbers x. "stride": the distance is x strides and may be negative. "positive_stride":
            max(x, 0) strides. "log_pixel": exp(x) pixels.
    """

    kind = "distance"
    unit: DistanceUnit = "stride"

    def decode(self, regression: Tensor, priors: Priors) -> Tensor:
        """See :meth:`BoxCoder.decode`."""
        return decode_distance(priors.centers, self.distances(regression, priors))

    def distances(self, regression: Tensor, priors: Priors) -> Tensor:
        """Rows (B, N, 4) to distances (B, N, 4) in pixels (FCOS, ICCV 2019, section 3.1)."""
        if self.unit == "log_pixel":
            return regression.clamp(max=MAX_LOG_DISTANCE).exp()
        strides = priors.strides[:, None]
        return (regression if self.unit == "stride" else regression.clamp(min=0)) * strides


@dataclass(frozen=True)
class DistributionCoder(BoxCoder):
    """Distances as distributions over the bins 0, 1, ... `reg_max`, in strides (GFL, NeurIPS 2020, section 3.2).

    Args:
        reg_max: The last bin, and thereby the largest distance.
    """

    kind = "distribution"
    reg_max: int = 16

    @property
    def width(self) -> int:
        """Logits of the bins of all four sides."""
        return 4 * (self.reg_max + 1)

    def sides(self, regression: Tensor) -> Tensor:
        """Rows (B, N, width) to the logits of each side's bins, (B, N, 4, reg_max + 1)."""
        return regression.unflatten(-1, (4, -1))

    def decode(self, regression: Tensor, priors: Priors) -> Tensor:
        """See :meth:`BoxCoder.decode`; a distance is the mean of its distribution."""
        distances = integral(self.sides(regression)) * priors.strides[:, None]
        return decode_distance(priors.centers, distances)

    def encode(self, boxes: Tensor, priors: Priors) -> Tensor:
        """Boxes (B, N, 4), xyxy pixels, to distances (B, N, 4) in strides, within [0, reg_max - 0.1].

        The margin keeps a bin on the right of every distance, as in GFL's official code.
        """
        distances = encode_distance(priors.centers, boxes) / priors.strides[:, None]
        return distances.clamp(0, self.reg_max - 0.1)
