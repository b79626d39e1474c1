"""The contract that every dense detector meets on every kind of backbone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForObjectDetection, pipeline

from crosskd_hf.models import DETECTORS, DetectionImageProcessor, GFLConfig, GFLForObjectDetection
from crosskd_hf.models.boxes import image_sizes, to_absolute
from crosskd_hf.models.layers import Neck, maps_to_rows
from crosskd_hf.models.pyramid import valid_priors
from tests.saved_models import check_remote_code, same_outputs, same_state
from tests.tiny_dense import CONFIGS, KINDS, make_batch, make_config, make_detector

SWIN = {
    "backbone": "swin_tiny_patch4_window7_224",
    "backbone_arguments": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4},
}
NETS: dict[str, dict[str, Any]] = {
    "resnet": {"backbone": "test_resnet"},
    "efficientnet": {"backbone": "test_efficientnet"},
    "convnext": {"backbone": "test_convnext"},
    "swin": SWIN,
}
SHORT = {"layers": [1, 1, 1, 1]}
FAMILIES: dict[str, dict[str, Any]] = {
    "resnet": {"backbone": "resnet18"},
    "resnext": {"backbone": "resnext50_32x4d", "backbone_arguments": SHORT | {"cardinality": 4, "base_width": 2}},
    "regnet": {"backbone": "regnetx_002"},
    "efficientnet": {"backbone": "efficientnet_b0"},
    "mobilenetv2": {"backbone": "mobilenetv2_035"},
    "mobilenetv3": {"backbone": "mobilenetv3_small_050"},
    "mobilenetv4": {"backbone": "mobilenetv4_conv_small"},
    "convnext": {"backbone": "convnext_atto"},
    "swin": SWIN,
    "pvt": {"backbone": "pvt_v2_b0"},
    "hgnet": {"backbone": "hgnetv2_b0"},
    "repvit": {"backbone": "repvit_m0_9"},
    "cspnet": {"backbone": "cspresnet50"},
    "edgenext": {"backbone": "edgenext_xx_small"},
}
FAST_FAMILIES = ("mobilenetv2", "mobilenetv4", "swin")

each_detector = pytest.mark.parametrize("kind", KINDS)
each_net = pytest.mark.parametrize("net", NETS)


@each_net
@each_detector
def test_forward_and_loss(kind: str, net: str) -> None:
    model, batch = make_detector(kind, **NETS[net]).train(), make_batch()
    outputs = model(**batch)
    count = (64 + 16 + 4 + 1 + 1) * model.head.priors_per_location
    assert outputs.logits.shape == (2, count, 3)
    assert outputs.pred_boxes.shape == (2, count, 4)
    assert outputs.level_lengths.tolist() == [[n * model.head.priors_per_location for n in (64, 16, 4, 1, 1)]] * 2
    assert set(outputs.loss_dict) == set(model.config.loss_weights)
    assert all(loss.isfinite() and loss > 0 for loss in outputs.loss_dict.values())
    torch.testing.assert_close(outputs.loss, sum(outputs.loss_dict.values()))
    outputs.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.head.parameters())
    assert all(p.grad is not None for p in model.neck.parameters())
    assert "loss" not in model.eval()(batch["pixel_values"])


@each_net
@each_detector
def test_save_and_load_are_bit_equal(kind: str, net: str, tmp_path: Path) -> None:
    model, pixels = make_detector(kind, **NETS[net]), make_batch()["pixel_values"]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert same_state(model, loaded)
    assert same_outputs(model, loaded, pixels)


@each_detector
def test_bfloat16_is_bit_equal_too(kind: str, tmp_path: Path) -> None:
    model = make_detector(kind).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = DETECTORS[CONFIGS[kind]].from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert same_state(model, loaded)
    assert same_outputs(model, loaded, make_batch()["pixel_values"])
    outputs = loaded(make_batch()["pixel_values"].bfloat16())
    assert outputs.pred_boxes.dtype == torch.float32


@each_detector
def test_configuration_round_trip(kind: str, tmp_path: Path) -> None:
    config = make_config(kind, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}, category_ids=[3, 9])
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is CONFIGS[kind]
    assert loaded.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
    for field in ("id2label", "category_ids", "num_labels", "loss_weights", "head_channels", "num_convs"):
        assert getattr(loaded, field) == getattr(config, field)
    assert list(loaded.strides) == list(config.strides)
    assert loaded.to_dict().get("reg_max") == config.to_dict().get("reg_max")


@each_detector
def test_another_number_of_classes(kind: str, tmp_path: Path) -> None:
    model = make_detector(kind)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForObjectDetection.from_pretrained(tmp_path, num_labels=5)
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    new, bias = loaded.head.classifier, -torch.tensor(99.0).log()
    assert len(new.bias) == 5 * model.head.priors_per_location
    torch.testing.assert_close(new.bias, bias.expand_as(new.bias))
    assert new.weight.std().item() == pytest.approx(0.01, rel=0.2)
    old = {key: value for key, value in model.state_dict().items() if "classifier" not in key}
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in old.items())


@pytest.mark.parametrize(("backbone", "indices"), [("test_resnet", (2, 3, 4)), ("test_convnext", (1, 2, 3))])
def test_features_by_index_are_those_by_stride(backbone: str, indices: tuple[int, ...]) -> None:
    by_stride = make_detector("gfl", backbone=backbone)
    for chosen in (indices, (-3, -2, -1)):
        by_index = make_detector("gfl", backbone=backbone, out_indices=chosen)
        assert same_outputs(by_stride, by_index, make_batch()["pixel_values"])
    with pytest.raises(ValueError, match="Leave out_indices unset"):
        make_detector("gfl", backbone=backbone, out_indices=(0, 1, 2))


def test_a_stride_that_the_net_lacks() -> None:
    with pytest.raises(ValueError, match=r"none of stride \[64\]"):
        make_detector("gfl", backbone_strides=(8, 16, 32, 64))


class TestFreezing:
    @pytest.mark.parametrize("stages", range(5))
    def test_frozen_stages(self, stages: int) -> None:
        net = make_detector("gfl", frozen_stages=stages).backbone.net
        for name, parameter in net.named_parameters():
            stage = int(name[len("layer")]) if name.startswith("layer") else min(stages, 1)
            assert parameter.requires_grad == (stages == 0 or stage > stages), name

    @pytest.mark.parametrize("changes", [{"frozen_stages": 2}, {"frozen_stages": 0}, {"freeze_norm": True}], ids=str)
    def test_a_loaded_model_is_as_frozen(self, changes: dict[str, Any], tmp_path: Path) -> None:
        model = make_detector("gfl", **changes)
        model.save_pretrained(tmp_path)
        expected = {name: p.requires_grad for name, p in model.named_parameters()}
        loaded = AutoModelForObjectDetection.from_pretrained(tmp_path)
        assert {name: p.requires_grad for name, p in loaded.named_parameters()} == expected
        loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert {name: p.requires_grad for name, p in loaded.named_parameters()} == expected
        assert not report["missing_keys"]

    def test_too_many(self) -> None:
        with pytest.raises(ValueError, match="choose 0 to 4"):
            make_detector("gfl", frozen_stages=5)

    @pytest.mark.parametrize("norm_eval", [True, False])
    def test_norm_eval(self, norm_eval: bool) -> None:
        model = make_detector("gfl", norm_eval=norm_eval)
        for detector in (model, model.train()):  # from the start and after `train`
            norms = [m for m in detector.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
            assert norms
            assert all(norm.training != norm_eval for norm in norms)
        before = norms[0].running_mean.clone()
        model(make_batch()["pixel_values"])
        assert torch.equal(norms[0].running_mean, before) == norm_eval

    def test_freeze_norm(self) -> None:
        model = make_detector("gfl", frozen_stages=0, freeze_norm=True)
        trained = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
        norms = [n for n, m in model.backbone.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert trained
        assert not [name for name in trained if name.rsplit(".", 1)[0] in norms]


@each_detector
def test_pipeline(kind: str, tmp_path: Path) -> None:
    model = make_detector(kind)
    model.save_pretrained(tmp_path)
    DetectionImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    images = [Image.fromarray(np.random.randint(0, 256, (*shape, 3), dtype=np.uint8)) for shape in ((60, 50), (50, 90))]
    detect = pipeline("object-detection", model=str(tmp_path))
    results = detect(images, batch_size=2, threshold=0.1)
    assert [len(result) > 0 for result in results] == [True, True]
    for result, image in zip(results, images, strict=True):
        for found in result:
            assert found["label"] in model.config.id2label.values()
            box = found["box"]
            assert 0 <= box["xmin"] <= box["xmax"] <= image.width
            assert 0 <= box["ymin"] <= box["ymax"] <= image.height


HEAD_FILES = {config.model_type.removeprefix("crosskd_") + ".py" for config in DETECTORS}


@each_detector
def test_the_code_beside_the_weights_holds_no_other_head(kind: str, tmp_path: Path) -> None:
    make_detector(kind).save_pretrained(tmp_path)
    shipped = {path.name for path in tmp_path.glob("*.py")}
    assert shipped & HEAD_FILES == {f"{kind}.py"}
    assert {"dense.py", "backbone.py", "box_coders.py"} <= shipped


class LastLevels(Neck):
    """The last backbone feature, projected, once a level at half the size."""

    def __init__(self, in_channels: int, channels: int, levels: int):
        super().__init__()
        self.levels, self.project = levels, torch.nn.Conv2d(in_channels, channels, 1)

    @classmethod
    def from_config(cls, in_channels: list[int], config: Any) -> "LastLevels":
        return cls(in_channels[-1], config.fpn_channels, len(config.strides))

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        maps = [self.project(features[-1])]
        while len(maps) < self.levels:
            maps.append(torch.nn.functional.max_pool2d(maps[-1], 1, stride=2))
        return maps


class OtherNeckConfig(GFLConfig):
    model_type = "other_neck"


class OtherNeck(GFLForObjectDetection):
    config_class = OtherNeckConfig
    neck_class = LastLevels


def test_another_neck(tmp_path: Path) -> None:
    settings = make_config("gfl", backbone_strides=(32,), strides=(32, 64, 128)).to_dict()
    model, batch = OtherNeck(OtherNeckConfig(**settings)).train(), make_batch()
    model(**batch).loss.backward()
    assert model.neck.project.weight.grad.any()
    model.save_pretrained(tmp_path)
    assert same_outputs(model, OtherNeck.from_pretrained(tmp_path), batch["pixel_values"])


@pytest.mark.parametrize(
    "kind", [kind if kind == "fcos" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_runs_as_remote_code_without_the_package(kind: str, tmp_path: Path) -> None:
    check_remote_code(make_detector(kind), tmp_path)


@each_detector
def test_padding_is_no_part_of_the_loss(kind: str) -> None:
    """Whatever the head says in the padding, no loss changes."""
    model, batch = make_detector(kind, size_divisor=32).eval(), make_batch(((64, 64), (32, 24)), (2, 2))
    outputs = model(**batch, cut=0)
    sizes = image_sizes(batch["pixel_values"], batch["pixel_mask"])
    inside = valid_priors(model.config, outputs.priors, sizes)
    assert (~inside).any()
    noise = [
        rows if rows is None else torch.where(inside.reshape(inside.shape + (1,) * (rows.dim() - 2)), rows, 5.0)
        for rows in outputs.predictions
    ]
    predictions = type(outputs.predictions)(*noise)
    boxes = model.head.decode(predictions.regression, outputs.priors)
    parts = model.head.loss(predictions, boxes, outputs.priors, outputs.assignment)
    for key, part in outputs.loss_parts.items():
        torch.testing.assert_close(parts[key].total, part.total)
        torch.testing.assert_close(parts[key].normalizer, part.normalizer)


@each_detector
def test_boxes_are_relative_to_the_unpadded_image(kind: str) -> None:
    model, batch = make_detector(kind).eval(), make_batch(((64, 64), (32, 48)))
    outputs = model(batch["pixel_values"], batch["pixel_mask"], cut=0)
    sizes = image_sizes(batch["pixel_values"], batch["pixel_mask"])
    assert sizes.tolist() == [[64, 64], [32, 48]]
    decoded = model.head.decode(outputs.predictions.regression, outputs.priors)
    torch.testing.assert_close(to_absolute(outputs.pred_boxes, sizes), decoded, rtol=1e-4, atol=1e-2)


@each_detector
def test_no_images(kind: str) -> None:
    model = make_detector(kind).train()
    outputs = model(torch.zeros(0, 3, 64, 64), torch.zeros(0, 64, 64, dtype=torch.int64), labels=[])
    assert outputs.logits.shape[0] == len(outputs.pred_boxes) == 0
    assert outputs.loss == 0


def test_quality_targets_of_gfl_are_constant() -> None:
    """Classes learn how good a box is; the box doesn't learn from the classes."""
    model = make_detector("gfl").train()
    loss = model(**make_batch()).loss_parts["loss_cls"].total
    (gradient,) = torch.autograd.grad(loss, [model.head.regressor.weight], allow_unused=True)
    assert gradient is None


@each_detector
def test_no_objects_anywhere(kind: str) -> None:
    model = make_detector(kind).train()
    loss = model(**make_batch(counts=(0, 0))).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@each_detector
def test_under_bfloat16_autocast(kind: str) -> None:
    model, batch = make_detector(kind).train(), make_batch()
    plain = model(**batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain.item(), rel=0.1)


@pytest.mark.parametrize("value", [100.0, -100.0])
@each_detector
def test_extreme_predictions_are_finite(kind: str, value: float) -> None:
    model, batch = make_detector(kind).eval(), make_batch()
    outputs = model(**batch, cut=0)
    rows = [t if t is None else torch.full_like(t, value).detach().requires_grad_() for t in outputs.predictions]
    predictions = type(outputs.predictions)(*rows)
    boxes = model.head.decode(predictions.regression, outputs.priors)
    parts = model.head.loss(predictions, boxes, outputs.priors, outputs.assignment)
    torch.stack([part.total for part in parts.values()]).sum().backward()
    assert all(part.total.isfinite() for part in parts.values())
    assert all(t.grad is None or t.grad.isfinite().all() for t in rows if t is not None)


def test_rows_go_location_by_location_and_anchor_by_anchor() -> None:
    """The value of row (y, x, anchor) and column k of image n spells n, y, x, anchor, k."""
    anchors, width = 9, 3
    levels = []
    for level, (rows, columns) in enumerate(((3, 4), (2, 1))):
        n, a, k, y, x = torch.meshgrid(*map(torch.arange, (2, anchors, width, rows, columns)), indexing="ij")
        code = 100000 * level + 10000 * n + 1000 * y + 100 * x + 10 * a + k
        levels.append(code.reshape(2, anchors * width, rows, columns))
    expected = [
        [
            [100000 * level + 10000 * n + 1000 * y + 100 * x + 10 * a + k for k in range(width)]
            for level, (rows, columns) in enumerate(((3, 4), (2, 1)))
            for y in range(rows)
            for x in range(columns)
            for a in range(anchors)
        ]
        for n in range(2)
    ]
    assert torch.equal(maps_to_rows(levels, width), torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize(
    "family", [f if f in FAST_FAMILIES else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_backbone_families_train_and_reload(family: str, tmp_path: Path) -> None:
    model, batch = make_detector("gfl", frozen_stages=0, **FAMILIES[family]).train(), make_batch()
    before = {name: p.detach().clone() for name, p in model.backbone.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 35.0)
    optimizer.step()
    assert loss.isfinite()
    moved = [name for name, p in model.backbone.named_parameters() if not torch.equal(p, before[name])]
    assert moved
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path)
    assert same_state(model, loaded)
    assert same_outputs(model, loaded, batch["pixel_values"])


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"strides": (8, 16, 32, 65)}, "must double"),
            ({"backbone_strides": (4, 8)}, "must be the first of strides"),
            ({"norm_groups": 5}, "choose a divisor"),
            ({"prior_probability": 1.0}, "prior_probability=1.0 must lie in"),
            ({"loss_weights": {"loss_mask": 1.0}}, r"\['loss_mask'\]"),
            ({"reg_max": None}, "reg_max must be a number"),
            ({"reg_max": 0}, "must lie in"),
        ],
    )
    def test_configuration(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make_config("gfl", **changes)

    def test_class_labels_out_of_range(self) -> None:
        batch = make_batch()
        batch["labels"][0]["class_labels"][0] = 3
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            make_detector("gfl")(**batch)
