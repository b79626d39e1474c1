"""Dense detectors of a few thousand weights, and batches for them."""

from typing import Any

import torch
from torch import Tensor, nn

from crosskd_hf.models import (
    DETECTORS,
    ATSSConfig,
    DenseDetector,
    DenseDetectorConfig,
    FCOSConfig,
    GFLConfig,
    RetinaNetConfig,
    TOODConfig,
)
from crosskd_hf.models.backbone import weights_follow
from tests.tiny_backbone import as_if_loaded

CONFIGS: dict[str, type[DenseDetectorConfig]] = {
    "gfl": GFLConfig,
    "retinanet": RetinaNetConfig,
    "fcos": FCOSConfig,
    "atss": ATSSConfig,
    "tood": TOODConfig,
}
KINDS = list(CONFIGS)


def make_config(kind: str, **changes: Any) -> DenseDetectorConfig:
    """A tiny configuration of one of the detectors with three classes."""
    settings: dict[str, Any] = {
        "backbone": "test_resnet",
        "num_labels": 3,
        "fpn_channels": 16,
        "head_channels": 16,
        "norm_groups": None if kind == "retinanet" else 4,
    }
    return CONFIGS[kind](**settings | changes)


def make_detector(kind: str, seed: int = 0, spread: bool = True, **changes: Any) -> DenseDetector:
    """A tiny detector. With `spread`, predictions differ from place to place, as those of a trained model do."""
    torch.manual_seed(seed)
    config = make_config(kind, **changes)
    with weights_follow():
        model = as_if_loaded(DETECTORS[type(config)](config))
    if spread:
        with torch.no_grad():
            for module in model.head.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.normal_(module.weight, std=(2 / module.weight[0].numel()) ** 0.5)
            model.head.classifier.bias.fill_(-1.0)
    return model


def make_batch(
    sizes: tuple[tuple[int, int], ...] = ((64, 64), (48, 56)),
    counts: tuple[int, ...] = (3, 2),
    num_labels: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
    """A batch of noise: images of these (height, width) padded to 64 x 64 at least, with so many boxes each."""
    generator = torch.Generator().manual_seed(seed)
    height, width = (max(64, *(size[axis] for size in sizes)) for axis in (0, 1))
    values = torch.zeros(len(sizes), 3, height, width)
    mask = torch.zeros(len(sizes), height, width, dtype=torch.long)
    for image, inside, (rows, columns) in zip(values, mask, sizes, strict=True):
        image[:, :rows, :columns] = torch.randn(3, rows, columns, generator=generator)
        inside[:rows, :columns] = 1
    labels = [
        {
            "class_labels": torch.randint(num_labels, (count,), generator=generator),
            "boxes": random_boxes(count, generator),
        }
        for count in counts
    ]
    return {"pixel_values": values, "pixel_mask": mask, "labels": labels}


def random_boxes(count: int, generator: torch.Generator) -> Tensor:
    """(count, 4) relative cxcywh boxes inside the image, sides from .15 to .9 of it."""
    extent = torch.rand(count, 2, generator=generator) * 0.75 + 0.15
    corner = torch.rand(count, 2, generator=generator) * (1 - extent)
    return torch.cat([corner + extent / 2, extent], 1)
