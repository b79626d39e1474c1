"""Students of transformers whose random backbone would stay random."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForObjectDetection, ResNetConfig, RTDetrResNetConfig

from crosskd_hf.training.trained_backbone import demand_trained_backbone
from tests.distillation import detr_zoo
from tests.tiny_backbone import as_if_loaded
from tests.tiny_run import load_data, make_data, settings

STAGES: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}


def build(family: str, **changes: Any) -> Any:
    prefix, sizes = detr_zoo.MODELS[family]
    config = getattr(transformers, f"{prefix}Config")(**copy.deepcopy(sizes | changes))
    return getattr(transformers, f"{prefix}ForObjectDetection")(config)


CONVOLUTIONAL = [name for name in detr_zoo.MODELS if " " not in name and name not in ("lw_detr", "rf_detr")]


@pytest.mark.parametrize("family", CONVOLUTIONAL)
def test_blocks_that_are_switched_off_for_good(family: str) -> None:
    """timm lets each residual block begin with 0, and transformers freezes that."""
    model = build(family)
    with pytest.raises(ValueError, match="backbone is random: its 15 frozen norms .* 4 of them multiply by 0"):
        demand_trained_backbone(model)
    demand_trained_backbone(as_if_loaded(model))


def test_convolutions_that_stay_random() -> None:
    model = build("detr", use_timm_backbone=False, backbone_config=ResNetConfig(**STAGES, out_indices=[1, 2, 3, 4]))
    with pytest.raises(ValueError, match=r"\d+ weights without gradient would stay so, such as model.backbone"):
        demand_trained_backbone(model)
    demand_trained_backbone(as_if_loaded(model))


def test_live_norms_of_a_backbone_without_gradient() -> None:
    stages = RTDetrResNetConfig(**STAGES, layer_type="basic", out_indices=[2, 3, 4])
    sizes = {"encoder_in_channels": [16, 16, 16], "freeze_backbone_batch_norms": False}
    model = build("rt_detr", backbone_config=stages, **sizes)
    demand_trained_backbone(model)
    model.model.freeze_backbone()
    with pytest.raises(ValueError, match=r"weights without gradient .*model.requires_grad_\(True\)"):
        demand_trained_backbone(model)


@pytest.mark.parametrize("family", ["lw_detr", "rf_detr"])
def test_a_vision_transformer_without_gradient(family: str) -> None:
    model = build(family)
    model.model.backbone.requires_grad_(False)
    with pytest.raises(ValueError, match="weights without gradient would stay so, such as model.backbone"):
        demand_trained_backbone(model)
    with torch.no_grad():
        for module in model.model.backbone.modules():
            if isinstance(module, nn.LayerNorm):
                module.bias += torch.rand_like(module.bias)
    demand_trained_backbone(model)


def test_norms_that_do_nothing_are_told(caplog: pytest.LogCaptureFixture) -> None:
    stages = RTDetrResNetConfig(**STAGES, layer_type="basic", out_indices=[2, 3, 4])
    model = build("rt_detr", backbone_config=stages, encoder_in_channels=[16, 16, 16])
    with caplog.at_level(logging.WARNING):
        demand_trained_backbone(model)
    assert "frozen norms are as they were built, so it is trained as a net without norms. Load weights" in caplog.text
    caplog.clear()
    for family in ("lw_detr", "rf_detr"):
        demand_trained_backbone(build(family))
    assert caplog.text == ""


def test_the_ways_out_are_ways_out(tmp_path_factory: pytest.TempPathFactory) -> None:
    import timm

    from crosskd_hf.training.trainer import CrossKDTrainer

    folder = tmp_path_factory.mktemp("random")
    make_data(folder)
    train, _ = load_data(folder)
    images = transformers.DeformableDetrImageProcessor(size={"height": 64, "width": 64})
    args = settings(folder, max_steps=1, schedule=None)

    def train_once(model: Any) -> None:
        model.config.id2label = train.categories.id2label
        CrossKDTrainer(model, args, train.dataset, processing_class=images).train()

    model = build("deformable_detr", num_labels=4)
    with pytest.raises(ValueError, match="The student's backbone is random"):
        train_once(model)
    net = timm.create_model("test_resnet", features_only=True, pretrained=False, out_indices=(2, 3, 4))
    with torch.no_grad():
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean += 0.1 * torch.rand_like(norm.running_mean)
    model.model.backbone.model.load_state_dict(net.state_dict())  # as pretrained=True, which downloads, gives it
    train_once(model)
    model = build("deformable_detr", num_labels=4)
    for module in model.modules():
        if "FrozenBatchNorm" in type(module).__name__:
            module.weight.fill_(1)
    train_once(model)
    model.save_pretrained(folder / "saved")
    train_once(AutoModelForObjectDetection.from_pretrained(folder / "saved"))
