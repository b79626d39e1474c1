"""A tiny student and teacher of every family that a view exists for."""

from typing import Any

from tests import tiny_dense, tiny_faster_rcnn
from tests.distillation import detr_zoo

FAMILIES = [*tiny_dense.KINDS, "faster_rcnn", *detr_zoo.MODELS]


def build(name: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny model in evaluation mode."""
    if name in tiny_dense.KINDS:
        return tiny_dense.make_detector(name, seed, **changes).eval()
    if name == "faster_rcnn":
        # every anchor and region counts, so that a pass does not depend on chance
        fixed = {"rpn_samples": None, "roi_samples": None, "train_proposals": 20}
        return tiny_faster_rcnn.make_faster_rcnn(seed, **fixed | changes).eval()
    return detr_zoo.build(name, seed, **changes)


def batch(name: str, images: int = 2) -> dict[str, Any]:
    """A padded batch with labels."""
    if name in detr_zoo.MODELS:
        return detr_zoo.batch(images)
    return tiny_dense.make_batch(((64, 64), (48, 56))[:images], (3, 2)[:images])
