"""MMDetection's files end to end: options from the config text, channel order, names of classes, and refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from crosskd_hf.convert import CheckpointError, convert_mmdet_checkpoint
from crosskd_hf.convert.class_names import COCO_IDS, COCO_NAMES
from crosskd_hf.convert.mmdet_config import UNKNOWN, parse_config, read_config, read_settings
from crosskd_hf.data.categories import CategoryMap
from tests.golden.seeded import seeded_state_dict
from tests.pictures import noise

GOLDEN = Path(__file__).parents[1] / "golden"


RGB = "data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True)"
BGR = "data_preprocessor=dict(mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], bgr_to_rgb=False)"
GFL_HEAD = (
    "bbox_head=dict(type='GFLHead', anchor_generator=dict(octave_base_scale=8, scales_per_octave=1, ratios=[1.0]))"
)
PLAIN = f"model = dict(type='GFL', {RGB}, {GFL_HEAD})"


def small_state(case: str = "gfl_r18_from_r50", width: int = 32, classes: int | None = None) -> dict[str, Tensor]:
    """Seeded weights of a case's student with a narrow pyramid and head, in MMDetection's names."""
    listed = json.loads((GOLDEN / f"{case}.json").read_text())["student"]["checkpoint_shapes"]
    shapes = {}
    for name, shape in listed.items():
        changed = list(shape)
        if not name.startswith("backbone"):
            first_only = name.startswith("neck.lateral")
            changed = [width if edge == 256 and (i == 0 or not first_only) else edge for i, edge in enumerate(shape)]
            if classes and "_cls." in name:
                changed[0] = classes
        shapes[name] = changed
    return seeded_state_dict(shapes, 1)


def save(path: Path, state: dict[str, Tensor], config: str | None = PLAIN, **meta: Any) -> Path:
    torch.save({"meta": {"cfg": config, **meta}, "state_dict": state}, path / "epoch.pth")
    return path / "epoch.pth"


class TestWholeFiles:
    def test_folder_loads_bit_equal(self, tmp_path: Path) -> None:
        conversion = convert_mmdet_checkpoint(save(tmp_path, small_state()))
        folder = conversion.save(tmp_path / "out")
        model = AutoModelForObjectDetection.from_pretrained(folder).eval()
        processor = AutoImageProcessor.from_pretrained(folder)
        pixels = torch.rand(1, 3, 160, 192)
        with torch.no_grad():
            pairs = zip(model(pixels).values(), conversion.model(pixels).values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert model.config.id2label == dict(enumerate(COCO_NAMES))
        assert CategoryMap.from_config(model.config).raw_ids == COCO_IDS
        assert processor.nms_threshold == 0.6
        assert dict(processor.size) == {"shortest_edge": 800, "longest_edge": 1333}
        assert json.loads((folder / "conversion.json").read_text()) == conversion.recognised
        assert "resnet18" in str(conversion)

    def test_caffe_bgr_becomes_ordinary_rgb(self, tmp_path: Path) -> None:
        state = small_state("fcos_r50_from_r50_caffe")
        config = f"model = dict(backbone=dict(style='caffe'), neck=dict(relu_before_extra_convs=True), {BGR})"
        conversion = convert_mmdet_checkpoint(save(tmp_path, state, config))
        image = noise((64, 64), 80).convert("RGB")
        image = Image.merge("RGB", [image.getchannel(0).point(lambda v, k=k: v // k) for k in (1, 2, 3)])
        size = {"height": 64, "width": 64}
        ours = conversion.processor(images=[image], size=size, return_tensors="pt")["pixel_values"]
        rgb = torch.from_numpy(np.array(image)).float().reshape(1, 64, 64, 3).permute(0, 3, 1, 2)
        theirs = rgb.flip(1) - torch.tensor([102.9801, 115.9465, 122.7717])[:, None, None]
        conv = conversion.model.backbone.net.conv1
        expected = torch.nn.functional.conv2d(theirs, state["backbone.conv1.weight"], stride=2, padding=3)
        torch.testing.assert_close(conv(ours), expected, rtol=1e-4, atol=1e-2)
        assert conversion.processor.channel_order == "rgb"
        assert conversion.processor.nms_threshold == 0.5
        assert conversion.processor.image_mean == pytest.approx([0.4815, 0.4547, 0.4038], abs=1e-4)
        assert conversion.processor.image_std == pytest.approx([1 / 255] * 3)
        config = conversion.model.config
        assert (config.caffe_stride, config.freeze_norm, config.fpn_extra_relu) == (True, True, True)

    def test_options_of_the_config_text(self, tmp_path: Path) -> None:
        config = f"""
_base_size = 256
model = dict(type='FCOS', {RGB},
    neck=dict(relu_before_extra_convs=True),
    bbox_head=dict(type='FCOSHead', norm_on_bbox=True, centerness_on_reg=True, center_sampling=True,
        center_sample_radius=2.5, regress_ranges=((-1, 32), (32, 64), (64, 128), (128, _base_size), (256, 1e8))),
    test_cfg=dict(nms_pre=500, score_thr=0.1, nms=dict(type='nms', iou_threshold=0.65), max_per_img=50))
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(640, 480), keep_ratio=True)]
"""
        state = small_state("fcos_r50_from_r50_caffe")
        for name in [name for name in state if ".gn." in name and "_convs." in name]:
            bias = name.replace(".gn.", ".conv.").replace("weight", "bias")
            state[bias] = torch.rand(32)  # conv_bias=True
        conversion = convert_mmdet_checkpoint(save(tmp_path, state, config))
        ours = conversion.model.config
        assert (ours.norm_on_bbox, ours.centerness_on_reg, ours.center_radius) == (True, True, 2.5)
        assert (ours.fpn_extra_relu, ours.caffe_stride, ours.conv_bias) == (True, False, True)
        assert list(ours.regress_limits) == [32, 64, 128, 256]
        processor = conversion.processor
        assert (processor.candidates_per_level, processor.score_threshold) == (500, 0.1)
        assert (processor.nms_threshold, processor.max_detections) == (0.65, 50)
        assert dict(processor.size) == {"shortest_edge": 480, "longest_edge": 640}

    def test_config_of_mmdetection_2(self, tmp_path: Path) -> None:
        config = "img_norm_cfg = dict(mean=[103.53, 116.28, 123.675], std=[1, 1, 1], to_rgb=False)\n" + (
            "model = dict(bbox_head=dict(type='RetinaHead', anchor_generator=dict(octave_base_scale=2)))\n"
            "test_pipeline = [dict(type='MultiScaleFlipAug', img_scale=(512, 512))]"
        )
        state = small_state("retinanet_r18_from_r50", classes=18)
        path = tmp_path / "old.pth"
        torch.save({"meta": {"config": config, "CLASSES": ("cat", "dog")}, "state_dict": state}, path)
        conversion = convert_mmdet_checkpoint(path)
        assert conversion.model.config.anchor_scale == 2
        assert conversion.model.config.id2label == {0: "cat", 1: "dog"}
        assert conversion.model.config.category_ids is None
        assert conversion.processor.image_mean[0] == pytest.approx(123.675 / 255)
        assert conversion.processor.nms_threshold == 0.5

    def test_second_set_of_weights_is_left_out(self, tmp_path: Path) -> None:
        state = small_state()
        extra = {"ema_backbone_conv1_weight": torch.zeros(1), "data_preprocessor.mean": torch.zeros(3)}
        conversion = convert_mmdet_checkpoint(save(tmp_path, {**state, **extra}))
        assert torch.equal(conversion.model.backbone.net.conv1.weight, state["backbone.conv1.weight"])

    @pytest.mark.parametrize(
        ("case", "detector", "head"),
        [
            ("faster_rcnn_r18_from_r50", "FasterRCNNForObjectDetection", "rpn_head=dict(type='RPNHead')"),
            ("deformable_detr_r18_from_r50", "DeformableDetrForObjectDetection", "num_queries=50"),
        ],
    )
    def test_other_families(self, tmp_path: Path, case: str, detector: str, head: str) -> None:
        if not (GOLDEN / f"{case}.json").is_file():
            pytest.skip(f"{case}.json is not here")
        shapes = json.loads((GOLDEN / f"{case}.json").read_text())["student"]["checkpoint_shapes"]
        conversion = convert_mmdet_checkpoint(
            save(tmp_path, seeded_state_dict(shapes, 1), f"model = dict({RGB}, {head})")
        )
        assert type(conversion.model).__name__ == detector
        assert conversion.model.config.category_ids == list(COCO_IDS)
        outputs = conversion.processor(
            images=[Image.new("RGB", (64, 64))], return_tensors="pt", size={"height": 64, "width": 64}
        )
        assert outputs["pixel_values"].shape == (1, 3, 64, 64)


class TestRefusals:
    def test_no_config(self, tmp_path: Path) -> None:
        path = save(tmp_path, small_state(), config=None)
        with pytest.raises(CheckpointError, match=r"epoch\.pth holds no config.*--config"):
            convert_mmdet_checkpoint(path)
        (tmp_path / "gfl.py").write_text(PLAIN)
        conversion = convert_mmdet_checkpoint(path, tmp_path / "gfl.py")
        assert conversion.model.config.num_labels == 80

    def test_no_normalisation(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="doesn't say how pixels are normalised"):
            convert_mmdet_checkpoint(save(tmp_path, small_state(), "model = dict(type='GFL')"))

    def test_missing_and_unknown_tensors_are_named(self, tmp_path: Path) -> None:
        state = small_state()
        kept = {name: value for name, value in state.items() if name != "bbox_head.cls_convs.1.gn.bias"}
        with pytest.raises(CheckpointError, match=r"1 missing: \['head\.cls_tower\.1\.norm\.bias'\]"):
            convert_mmdet_checkpoint(save(tmp_path, kept))
        with pytest.raises(ValueError, match=r"1 tensors have no place .*'bbox_head\.new\.weight'"):
            convert_mmdet_checkpoint(save(tmp_path, {**state, "bbox_head.new.weight": torch.zeros(1)}))

    def test_unknown_detector(self, tmp_path: Path) -> None:
        state = {name.replace("gfl_", "vfnet_"): value for name, value in small_state().items()}
        with pytest.raises(ValueError, match="No known detector.*Faster R-CNN can be converted"):
            convert_mmdet_checkpoint(save(tmp_path, state))

    def test_head_of_another_class_with_the_same_names(self, tmp_path: Path) -> None:
        config = PLAIN.replace("'GFLHead'", "'SomeOtherHead'")
        with pytest.raises(CheckpointError, match="head is SomeOtherHead, which predicts otherwise.*GFLHead"):
            convert_mmdet_checkpoint(save(tmp_path, small_state(), config))

    def test_options_that_are_built_in(self, tmp_path: Path) -> None:
        config = PLAIN.replace("ratios=[1.0]", "ratios=[0.5, 1.0]")
        with pytest.raises(CheckpointError, match=r"aspect_ratios=\[0\.5, 1\.0\].*\[1\.0\] built in"):
            convert_mmdet_checkpoint(save(tmp_path, small_state(), config))

    def test_classes(self, tmp_path: Path) -> None:
        path = save(tmp_path, small_state(classes=3))
        with pytest.raises(CheckpointError, match="predicts 3 classes and doesn't name them"):
            convert_mmdet_checkpoint(path)
        assert convert_mmdet_checkpoint(path, labels=["a", "b", "c"]).model.config.id2label == {0: "a", 1: "b", 2: "c"}
        path = save(tmp_path, small_state(classes=3), dataset_meta={"classes": ("a", "b")})
        with pytest.raises(CheckpointError, match="2 class names stand in the checkpoint"):
            convert_mmdet_checkpoint(path)


class TestConfigText:
    def test_literals_names_and_sums(self) -> None:
        text = "a = 4\nb = dict(x=[a, -a, 2 * a], y=(1e8, None, True), **dict(z='s'))\nc = {'k': a / 8}\nd: int = 3\n"
        assert parse_config(text) == {
            "a": 4,
            "b": {"x": [4, -4, 8], "y": (1e8, None, True), "z": "s"},
            "c": {"k": 0.5},
        }

    def test_nothing_is_executed(self, tmp_path: Path) -> None:
        mark = tmp_path / "mark"
        text = (
            f"import os\nos.mkdir({str(mark)!r})\na = open({str(mark)!r}, 'w')\nb = [os.mkdir({str(mark)!r}), 1]\n"
            f"def f(x=os.mkdir({str(mark)!r})): pass\nc = (lambda: os.mkdir({str(mark)!r}))()\nd = 'x' * 10**9\n"
        )
        config = parse_config(text)
        assert not mark.exists()
        assert config["a"] is config["c"] is config["d"] is UNKNOWN
        assert config["b"] == [UNKNOWN, 1]

    def test_numbers_that_would_fill_the_memory(self) -> None:
        config = parse_config("a = 10\n" + "a = a * a\n" * 64 + "b = 10**9\nc = " + "9" * 400 + " / 3\nd = 1e999 * 2")
        assert config["a"] is config["b"] is config["c"] is config["d"] is UNKNOWN

    @pytest.mark.parametrize("text", ["model = dict(", "a = " + "(" * 500, "a = " + "1+" * 20000 + "1", "\0"])
    def test_not_python(self, text: str) -> None:
        with pytest.raises(CheckpointError, match="can't be read as Python"):
            parse_config(text)

    def test_bases_are_merged(self, tmp_path: Path) -> None:
        (tmp_path / "base.py").write_text("model = dict(backbone=dict(depth=50, style='caffe'), neck=dict(a=1))\nx = 1")
        (tmp_path / "schedule.py").write_text("lr = 0.1")
        (tmp_path / "top.py").write_text(
            "_base_ = ['base.py', './schedule.py']\n"
            "model = dict(backbone=dict(depth=18), neck=dict(_delete_=True, b=2))"
        )
        assert read_config(tmp_path / "top.py") == {
            "model": {"backbone": {"depth": 18, "style": "caffe"}, "neck": {"b": 2}},
            "x": 1,
            "lr": 0.1,
        }

    def test_bases_that_are_not_there(self, tmp_path: Path) -> None:
        (tmp_path / "a.py").write_text("_base_ = 'b.py'")
        with pytest.raises(FileNotFoundError, match=r"no config .*b\.py"):
            read_config(tmp_path / "a.py")
        (tmp_path / "b.py").write_text("_base_ = 'a.py'")
        with pytest.raises(CheckpointError, match="circle"):
            read_config(tmp_path / "a.py")

    def test_an_option_that_is_no_literal(self) -> None:
        text = f"model = dict(backbone=dict(style=choose()), {RGB})"
        with pytest.raises(CheckpointError, match=r"'model\.backbone\.style' of the config is no literal"):
            read_settings(parse_config(text))
