"""What a new detector is made of."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from ..models import DetectionImageProcessor, image_processor
from ..models.processors import CAFFE_PIXELS


class ImageSize(NamedTuple):
    """Images are resized to this shorter side in px, unless the longer side would exceed the other."""

    shortest_edge: int = 800
    longest_edge: int = 1333

    @classmethod
    def of(cls, shortest_edge: int | None, longest_edge: int | None) -> "ImageSize | None":
        """From what was given of the two; None if nothing was. A limit below 800 alone is the shorter side too."""
        if shortest_edge is None and longest_edge is None:
            return None
        longest = max(1333, shortest_edge or 0) if longest_edge is None else longest_edge
        return cls(min(800, longest) if shortest_edge is None else shortest_edge, longest)

    def as_size(self) -> dict[str, int]:
        """The `size` of an image processor."""
        return self._asdict()


@dataclass(frozen=True)
class DetectorSpec:
    """What a new detector is made of.

    Args:
        architecture: One of `crosskd_hf.create.ARCHITECTURES`, such as "gfl", or of `TRANSFORMERS`, such as
            "deformable_detr".
        backbone: timm model name, e.g. "resnet50". "lw_detr" and "rf_detr" have one of their own: "".
        backbone_weights: "timm" for timm's own weights, which come from the Hub, or "TAG" of them, or for dense
            detectors and Faster R-CNN a file, see `load_backbone_file`. `None` starts from random weights: then nothing
            is frozen, and ResNets of these get GroupNorm, because BatchNorm with frozen statistics cannot be trained
            from scratch.
        width: Channels of pyramid and towers, or of the transformer.
        fields: Further fields of the configuration.
    """

    architecture: str = "gfl"
    backbone: str = "resnet50"
    backbone_weights: str | None = None
    width: int = 256
    fields: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, text: str, **others: Any) -> "DetectorSpec":
        """From "architecture:backbone", e.g. "gfl:resnet18", or "architecture" alone."""
        architecture, colon, backbone = text.partition(":")
        if not colon and architecture not in ("lw_detr", "rf_detr"):
            backbone = "resnet50"
        return cls(architecture, backbone, **others)

    def image_processor(self, **settings: Any) -> DetectionImageProcessor:
        """The image processor of this package for it; `settings` win over what architecture and weights need."""
        pixels = CAFFE_PIXELS if dict(self.fields).get("caffe_stride") else {}
        return image_processor(self.architecture, **pixels | settings)
