"""MMDetection's Deformable DETR checkpoints: names, shapes, and the authors' figures on them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeformableDetrForObjectDetection

from crosskd_hf.convert.deformable_detr import convert_deformable_detr, names_in_transformers
from crosskd_hf.distillation import Distiller
from tests.parity import parity_detr
from tests.parity.golden import LOSS_NAMES

GOLDEN = Path(__file__).parents[1] / "golden" / "deformable_detr_r18_from_r50.json"


@pytest.fixture(scope="module")
def case() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def shapes(case: dict[str, Any]) -> dict[str, list[int]]:
    return case["student"]["checkpoint_shapes"]


def zeros(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """A checkpoint of zeros, but for the box heads: every layer's differ."""
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for layer in range(7):
        state[f"bbox_head.reg_branches.{layer}.0.weight"] += layer
    return state


def test_config_is_read_from_the_shapes(shapes: dict[str, list[int]]) -> None:
    config, _ = convert_deformable_detr(zeros(shapes), num_queries=50, dropout=0.0)
    assert config.backbone_config.backbone == "resnet18"
    assert (config.two_stage, config.with_box_refine, config.two_stage_num_proposals) == (True, True, 50)
    assert (config.encoder_layers, config.decoder_layers, config.d_model, config.num_labels) == (6, 6, 256, 80)
    assert (config.num_feature_levels, config.encoder_n_points, config.decoder_n_points) == (4, 4, 4)
    assert (config.encoder_ffn_dim, config.encoder_attention_heads, config.dropout) == (1024, 8, 0.0)


def test_backbone_of_the_teacher(case: dict[str, Any]) -> None:
    config, _ = convert_deformable_detr(zeros(case["teacher"]["checkpoint_shapes"]))
    assert config.backbone_config.backbone == "resnet50"
    assert config.two_stage_num_proposals == 300


def test_every_parameter_of_the_model_is_converted(shapes: dict[str, list[int]]) -> None:
    config, state = convert_deformable_detr(zeros(shapes))
    with torch.device("meta"):
        model = DeformableDetrForObjectDetection(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in state.items()} == expected


def test_query_key_and_value_are_taken_apart() -> None:
    names = names_in_transformers("decoder.layers.3.self_attn.attn.in_proj_bias")
    assert names == tuple(f"model.decoder.layers.3.self_attn.{part}_proj.bias" for part in "qkv")


def test_plain_variant_shares_its_heads(shapes: dict[str, list[int]]) -> None:
    state = {name: tensor for name, tensor in zeros(shapes).items() if "_trans_" not in name and ".6." not in name}
    state |= {"query_embedding.weight": torch.zeros(30, 512), "reference_points_fc.weight": torch.zeros(2, 256)}
    state["reference_points_fc.bias"] = torch.zeros(2)
    for layer in range(6):
        state[f"bbox_head.reg_branches.{layer}.0.weight"].zero_()
    config, converted = convert_deformable_detr(state)
    assert (config.two_stage, config.with_box_refine, config.num_queries) == (False, False, 30)
    model = DeformableDetrForObjectDetection.from_pretrained(None, config=config, state_dict=converted)
    assert model.class_embed[0].weight is model.class_embed[5].weight
    state["bbox_head.reg_branches.5.0.weight"] += 1
    state["bbox_head.cls_branches.5.bias"] += 2
    _, converted = convert_deformable_detr(state, with_box_refine=False)  # mmdet's loading leaves the last one
    assert all((converted[f"bbox_embed.{layer}.layers.0.weight"] == 1).all() for layer in range(6))
    assert all((converted[f"class_embed.{layer}.bias"] == 2).all() for layer in range(6))
    state["bbox_head.reg_branches.1.0.weight"] += 1
    assert convert_deformable_detr(state)[0].with_box_refine
    with pytest.raises(ValueError, match=r"num_queries=40, but .* 30 queries: leave it out"):
        convert_deformable_detr(state, num_queries=40)


class TestRefusals:
    def test_unknown_name(self, shapes: dict[str, list[int]]) -> None:
        with pytest.raises(ValueError, match=r"'transformer.encoder' is no parameter .* upgrade"):
            convert_deformable_detr(zeros(shapes) | {"transformer.encoder": torch.zeros(1)})

    def test_another_detector(self) -> None:
        with pytest.raises(ValueError, match=r"no 'encoder.*state_dict"):
            convert_deformable_detr({"bbox_head.gfl_cls.weight": torch.zeros(1)})

    def test_another_backbone(self, shapes: dict[str, list[int]]) -> None:
        state = {name: tensor for name, tensor in zeros(shapes).items() if "layer4.1" not in name}
        with pytest.raises(ValueError, match=r"\(2, 2, 2, 1\).*resnet18"):
            convert_deformable_detr(state)

    def test_wrong_number_of_heads(self, shapes: dict[str, list[int]]) -> None:
        with pytest.raises(ValueError, match="pass the right `heads`"):
            convert_deformable_detr(zeros(shapes), heads=6)

    def test_two_stages_with_one_shared_head(self, shapes: dict[str, list[int]]) -> None:
        state = zeros(shapes)
        for layer in range(7):
            state[f"bbox_head.reg_branches.{layer}.0.weight"].zero_()
        with pytest.raises(ValueError, match=r"with_box_refine=False.*can't be converted"):
            convert_deformable_detr(state)

    def test_wrong_number_of_class_names(self, shapes: dict[str, list[int]]) -> None:
        with pytest.raises(ValueError, match="1 classes, the checkpoint predicts 80"):
            convert_deformable_detr(zeros(shapes), id2label={0: "person"})


@torch.no_grad()
def test_distillation_losses_are_the_authors(case: dict[str, Any]) -> None:
    student, teacher = (parity_detr.build(case, role).eval() for role in ("student", "teacher"))
    inputs, _ = parity_detr.batch(case)
    distillers = {
        "": Distiller(student, teacher, ["crosskd"]),
        "student_queries": Distiller(student, teacher, ["crosskd:queries=student"]),
        "teacher_queries_l1_giou_beta1": Distiller(student, teacher, ["crosskd:box_loss=l1+giou,beta=1"]),
    }
    outputs = student.train()(**inputs)  # all its dropout is 0
    for variant, distiller in distillers.items():
        expected = (case["expected"]["variants"][variant] if variant else case["expected"])["losses"]
        for key, part in distiller(outputs, inputs).items():
            for layer, loss in enumerate(part.total / part.normalizer):
                name = f"d{layer}.{LOSS_NAMES[key]}"
                assert float(loss) == pytest.approx(expected[name], rel=1e-4), (variant, name)
