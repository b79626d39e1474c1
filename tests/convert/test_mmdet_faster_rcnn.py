"""MMDetection's Faster R-CNN checkpoints: recognised by names and shapes, complete, and refused for a reason."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from crosskd_hf.convert.mmdet import MMDetOptions, convert_mmdet, rename
from crosskd_hf.models import FasterRCNNConfig, FasterRCNNForObjectDetection

GOLDEN = Path(__file__).parents[1] / "golden"
Shapes = dict[str, list[int]]


def state_of(shapes: Shapes) -> dict[str, Tensor]:
    """A checkpoint of random tensors."""
    return {name: torch.rand(shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def shapes() -> Shapes:
    """Of the student of the golden case, with narrow fully connected layers."""
    case = json.loads((GOLDEN / "faster_rcnn_r18_from_r50.json").read_text())
    wide: Shapes = case["student"]["checkpoint_shapes"]
    return {name: [16 if size == 1024 else size for size in shape] for name, shape in wide.items()}


def test_every_tensor_has_its_place(shapes: Shapes) -> None:
    state = state_of(shapes)
    config, converted = convert_mmdet(state)
    assert isinstance(config, FasterRCNNConfig)
    assert (config.backbone, config.num_labels, config.fc_channels, config.roi_size) == ("resnet18", 80, 16, 7)
    assert (config.num_fcs, config.rpn_channels, config.class_agnostic) == (2, 256, False)
    model = FasterRCNNForObjectDetection(config)
    model.load_state_dict(converted, strict=True)
    names = rename(shapes, config)
    assert len(names) == len(set(names.values())) == len(shapes)
    assert names["rpn_head.rpn_cls.bias"] == "rpn.classifier.bias"
    assert torch.equal(model.roi_head.shared[0].weight, state["roi_head.bbox_head.shared_fcs.0.weight"])


def test_class_agnostic_boxes_and_other_heads(shapes: Shapes) -> None:
    changed = shapes | {
        "roi_head.bbox_head.fc_reg.weight": [4, 16],
        "roi_head.bbox_head.fc_reg.bias": [4],
        "roi_head.bbox_head.fc_cls.weight": [4, 16],
        "roi_head.bbox_head.fc_cls.bias": [4],
    }
    config, converted = convert_mmdet(state_of(changed))
    assert config.class_agnostic
    assert config.num_labels == 3
    FasterRCNNForObjectDetection(config).load_state_dict(converted, strict=True)


def test_bgr_is_folded_into_the_first_convolution(shapes: Shapes) -> None:
    state = state_of(shapes)
    _, converted = convert_mmdet(state, MMDetOptions(bgr=True))
    assert torch.equal(converted["backbone.net.conv1.weight"], state["backbone.conv1.weight"].flip(1))


@pytest.mark.parametrize(
    ("missing", "message"),
    [("roi_head.bbox_head.fc_cls", "no roi_head.bbox_head.fc_cls.weight"), ("neck.fpn_convs.3", "3 output")],
)
def test_other_two_stage_detectors_are_refused(shapes: Shapes, missing: str, message: str) -> None:
    state = state_of({name: shape for name, shape in shapes.items() if not name.startswith(missing)})
    with pytest.raises(ValueError, match=message):
        convert_mmdet(state)


def test_a_mask_head_has_no_place(shapes: Shapes) -> None:
    state = state_of(shapes | {"roi_head.mask_head.convs.0.conv.bias": [256]})
    with pytest.raises(ValueError, match=r"no place in FasterRCNNConfig.*mask_head"):
        convert_mmdet(state)
