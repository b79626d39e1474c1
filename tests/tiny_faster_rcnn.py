"""Faster R-CNNs of a few thousand weights; batches are those of `tiny_dense`."""

from typing import Any

import torch
from torch import nn

from crosskd_hf.models import FasterRCNNConfig, FasterRCNNForObjectDetection
from crosskd_hf.models.backbone import weights_follow
from crosskd_hf.models.roi_head import Linear
from tests.tiny_backbone import as_if_loaded


def make_faster_rcnn(seed: int = 0, spread: bool = True, **changes: Any) -> FasterRCNNForObjectDetection:
    """A tiny detector of three classes. With `spread`, predictions differ from region to region."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "backbone": "test_resnet",
        "num_labels": 3,
        "fpn_channels": 16,
        "rpn_channels": 16,
        "roi_size": 3,
        "fc_channels": 24,
        "anchor_scale": 4.0,
        "train_proposals": 60,
        "test_proposals": 40,
    }
    if "id2label" in changes:
        del settings["num_labels"]
    with weights_follow():
        model = as_if_loaded(FasterRCNNForObjectDetection(FasterRCNNConfig(**settings | changes)))
    if spread:
        with torch.no_grad():
            for module in model.roi_head.modules():
                if isinstance(module, Linear):
                    nn.init.normal_(module.weight, std=(4 / module.in_features) ** 0.5)
            for conv in (model.rpn.conv, model.rpn.classifier, model.rpn.regressor):
                nn.init.normal_(conv.weight, std=(0.5 / conv.weight[0].numel()) ** 0.5)
    return model
