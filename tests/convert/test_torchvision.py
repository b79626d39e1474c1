"""torchvision's own models and their conversions give the same logits and boxes."""

from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet, RetinaNet_ResNet50_FPN_Weights, ssdlite320_mobilenet_v3_large
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from crosskd_hf.convert import CheckpointError, Conversion, convert_torchvision, load_torchvision
from crosskd_hf.convert.class_names import COCO_IDS, COCO_NAMES
from crosskd_hf.convert.torchvision import ARCHITECTURES
from crosskd_hf.data.categories import CategoryMap
from crosskd_hf.models.boxes import to_absolute

SIZE = (96, 160)  # on the coarsest levels no whole number of strides


@torch.no_grad()
def seeded(model: nn.Module) -> nn.Module:
    """Weights under which logits and boxes vary, and no box change is clipped."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            module.running_var.uniform_(0.5, 2)
            module.running_mean.normal_(std=0.1)
            module.weight.uniform_(0.2, 0.4)
    nn.init.constant_(model.head.classification_head.cls_logits.bias, -3)
    model.head.regression_head.bbox_reg.weight.mul_(0.3)
    return model.eval()


@cache
def pair(architecture: str) -> tuple[nn.Module, Conversion]:
    model = seeded(torchvision.models.get_model(architecture, weights=None, weights_backbone=None))
    return model, convert_torchvision(model)


@torch.no_grad()
def raw_outputs(model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """What torchvision predicts at every anchor, with decoded boxes in pixels."""
    features = list(model.backbone(pixels).values())
    outputs = model.head(features)
    anchors = model.anchor_generator(ImageList(pixels, [SIZE] * len(pixels)), features)[0]
    regression = outputs["bbox_regression"][0]
    decode = model.box_coder.decode_single if isinstance(model, RetinaNet) else model.box_coder.decode
    return {**outputs, "boxes": decode(regression, anchors)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_same_outputs(architecture: str) -> None:
    model, conversion = pair(architecture)
    pixels = torch.rand(1, 3, *SIZE)
    theirs = raw_outputs(model, pixels)
    with torch.no_grad():
        ours = conversion.model(pixels)
    logits = theirs["cls_logits"][..., list(COCO_IDS)]
    assert logits.std() > 0.1
    torch.testing.assert_close(ours.logits, logits, rtol=1e-4, atol=1e-4)
    boxes = to_absolute(ours.pred_boxes, torch.tensor([SIZE], dtype=torch.float32))[0]
    assert (boxes[:, 2:] - boxes[:, :2]).std() > 1
    torch.testing.assert_close(boxes, theirs["boxes"], rtol=1e-4, atol=1e-4)
    if "bbox_ctrness" in theirs:
        torch.testing.assert_close(ours.centerness, theirs["bbox_ctrness"][..., 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES[1:])
def test_same_detections(architecture: str) -> None:
    """RetinaNet's detections are the same too; FCOS reports the square root of its scores."""
    model, conversion = pair(architecture)
    pixels = torch.rand(1, 3, *SIZE)
    processor = conversion.processor
    model.transform.min_size, model.transform.max_size = (SIZE[0],), SIZE[1]
    theirs = model(pixels[:1])[0]
    mean, std = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    with torch.no_grad():
        ours = processor.post_process_object_detection(conversion.model((pixels - mean) / std), target_sizes=[SIZE])[0]
    real = torch.isin(theirs["labels"], torch.tensor(COCO_IDS))
    count = min(20, int(real.sum()))
    assert count > 5
    scores = theirs["scores"][real][:count]
    torch.testing.assert_close(ours["scores"][:count], scores, rtol=1e-4, atol=1e-5)


def test_classes_and_processor() -> None:
    _, conversion = pair("fcos_resnet50_fpn")
    categories = CategoryMap.from_config(conversion.model.config)
    assert (categories.raw_ids, categories.names) == (COCO_IDS, COCO_NAMES)
    processor = conversion.processor
    assert dict(processor.size) == {"shortest_edge": 800, "longest_edge": 1333}
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]
    assert (processor.nms_threshold, processor.max_detections) == (0.6, 100)
    assert processor.score_threshold == pytest.approx(0.04)
    assert "80 of 91 outputs" in str(conversion)


def small(num_classes: int = 3, frozen: bool = False, **arguments: object) -> nn.Module:
    """A RetinaNet on ResNet-18."""
    norm = FrozenBatchNorm2d if frozen else nn.BatchNorm2d
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        norm_layer=norm,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    return seeded(RetinaNet(backbone, num_classes, **arguments))


def test_background_is_left_out_unless_it_is_named() -> None:
    model = small()
    assert convert_torchvision(model, ["cat", "dog"]).model.config.id2label == {0: "cat", 1: "dog"}
    assert convert_torchvision(model, ["nothing", "cat", "dog"]).model.config.num_labels == 3
    with pytest.raises(CheckpointError, match="predicts 2 classes and doesn't name them"):
        convert_torchvision(model)
    with pytest.raises(CheckpointError, match="4 class names were given"):
        convert_torchvision(model, list("abcd"))


def test_other_epsilon_of_frozen_batch_norm() -> None:
    """torchvision sets it to 0 for its RetinaNet weights; here it becomes part of the variance."""
    model = small(frozen=True)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = 0.0
            module.running_var.mul_(1e-4)
            module.weight.mul_(1e-2)
    conversion = convert_torchvision(model, ["cat", "dog"])
    pixels = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        ours = conversion.model(pixels).logits
    torch.testing.assert_close(ours, raw_outputs(model, pixels)["cls_logits"][..., 1:], rtol=1e-4, atol=1e-4)
    assert conversion.model.config.freeze_norm


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (partial(ssdlite320_mobilenet_v3_large, weights=None, weights_backbone=None), "SSD can't be converted"),
        (
            partial(small, score_thresh=0.1, anchor_generator=AnchorGenerator(((16,) * 9,) * 5, ((1.0,),) * 5)),
            "anchors",
        ),
        (lambda: RetinaNet(resnet_fpn_backbone(backbone_name="resnet18", weights=None), 3), "LastLevelMaxPool"),
    ],
)
def test_refused(model: partial[nn.Module], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert_torchvision(model(), ["cat", "dog"])


class TestFiles:
    def test_state_dict(self, tmp_path: Path) -> None:
        model = seeded(
            torchvision.models.get_model(ARCHITECTURES[0], weights=None, weights_backbone=None, num_classes=3)
        )
        torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "a.pth")
        loaded = load_torchvision(ARCHITECTURES[0], tmp_path / "a.pth")
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
        assert convert_torchvision(loaded, ["cat", "dog"]).model.config.num_labels == 2

    def test_torchvisions_own_file_is_known_by_its_name(self, tmp_path: Path) -> None:
        model = torchvision.models.get_model(ARCHITECTURES[1], weights=None, weights_backbone=None, num_classes=2)
        path = tmp_path / Path(RetinaNet_ResNet50_FPN_Weights.COCO_V1.url).name
        torch.save(model.state_dict(), path)
        norms = [m for m in load_torchvision(ARCHITECTURES[1], path).modules() if isinstance(m, nn.BatchNorm2d)]
        assert {norm.eps for norm in norms} == {0.0}

    def test_refused(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="'fasterrcnn_resnet50_fpn' can't be converted"):
            load_torchvision("fasterrcnn_resnet50_fpn", weights="COCO_V1")
        with pytest.raises(CheckpointError, match="either a checkpoint file or"):
            load_torchvision(ARCHITECTURES[0])
        torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
        with pytest.raises(CheckpointError, match="no fcos_resnet50_fpn of torchvision"):
            load_torchvision(ARCHITECTURES[0], tmp_path / "a.pth")
