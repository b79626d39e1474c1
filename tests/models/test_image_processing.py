"""The detectors' image processor: pixels and labels in, detections out."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_convert
from torchvision.transforms.v2 import functional as tvf
from transformers import AutoImageProcessor, DeformableDetrImageProcessor, PreTrainedConfig, PreTrainedModel, pipeline
from transformers.utils import ModelOutput

from crosskd_hf.data import DetectionCollator
from crosskd_hf.models.image_processing import Candidates, DetectionImageProcessor, _highest_pairs
from crosskd_hf.models.normalization import Normalizer


@dataclass
class Outputs(ModelOutput):
    """What the post-processing reads of a dense detector's output."""

    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    centerness: Tensor | None = None
    level_lengths: Tensor | None = None


def make_outputs(lengths: list[list[int]], classes: int = 5, centerness: bool = False, spread: float = 2.0) -> Outputs:
    """Random outputs for images of the same number of priors, with some boxes that reach over the edge."""
    batch, priors = len(lengths), sum(lengths[0])
    return Outputs(
        logits=torch.randn(batch, priors, classes) * spread - 2,
        pred_boxes=torch.rand(batch, priors, 4) * torch.tensor([1.2, 1.2, 0.5, 0.5])
        - torch.tensor([0.1, 0.1, 0.0, 0.0]),
        centerness=torch.randn(batch, priors) if centerness else None,
        level_lengths=torch.tensor(lengths),
    )


def one_image(scores: list[list[float]], boxes: list[list[float]], **more: Tensor) -> Outputs:
    """Outputs of one image from scores (N, K) and relative xyxy boxes (N, 4)."""
    return Outputs(
        logits=torch.logit(torch.tensor([scores])),
        pred_boxes=box_convert(torch.tensor([boxes]), "xyxy", "cxcywh"),
        **more,
    )


def plain_post_process(outputs: Outputs, index: int, size: tuple[int, int], per_level: int, keep: int) -> list[Tensor]:
    """The rules once more, for one image, level by level: MMDetection's dense test pipeline in plain steps."""
    scores, labels, boxes = [], [], []
    ends = outputs.level_lengths[index].cumsum(0).tolist()
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        level = outputs.logits[index, start:end].sigmoid()
        prior, label = (level > 0.05).nonzero(as_tuple=True)
        score, order = level[prior, label].sort(descending=True)
        score, prior, label = score[:per_level], prior[order[:per_level]] + start, label[order[:per_level]]
        if outputs.centerness is not None:
            score = score * outputs.centerness[index, prior].sigmoid()
        xyxy = box_convert(outputs.pred_boxes[index, prior], "cxcywh", "xyxy").clamp(0, 1)
        scores.append(score)
        labels.append(label)
        boxes.append(xyxy * torch.tensor([size[1], size[0], size[1], size[0]]))
    score, label, box = torch.cat(scores), torch.cat(labels), torch.cat(boxes)
    solid = (box[:, 2] > box[:, 0]) & (box[:, 3] > box[:, 1])
    score, label, box = score[solid], label[solid], box[solid]
    kept = batched_nms(box, score, label, 0.6)[:keep]
    return [score[kept], label[kept], box[kept]]


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.randint(0, 256, (height, width, 3), dtype=np.uint8))


def annotation(image_id: int, *boxes: list[float]) -> dict[str, object]:
    records = [{"bbox": box, "category_id": 2, "area": box[2] * box[3], "iscrowd": 0} for box in boxes]
    return {"image_id": image_id, "annotations": records}


class TestPreprocess:
    processor = DetectionImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}, size_divisor=16)

    def test_pads_to_the_multiple_and_masks_the_padding(self) -> None:
        batch = self.processor(images=[picture(50, 70), picture(90, 40)], return_tensors="pt")
        assert batch["pixel_values"].shape == (2, 3, 96, 96)
        assert batch["pixel_mask"].sum((1, 2)).tolist() == [64 * 90, 96 * 43]
        assert batch["pixel_mask"].dtype == torch.int64
        assert batch["pixel_values"][0, :, 64:].abs().max() == 0
        assert batch["pixel_values"][1, :, :, 43:].abs().max() == 0

    def test_labels_refer_to_the_unpadded_image(self) -> None:
        whole = [annotation(7, [0, 0, 70, 50]), annotation(8, [10, 30, 20, 30])]
        batch = self.processor(images=[picture(50, 70), picture(90, 40)], annotations=whole, return_tensors="pt")
        first, second = batch["labels"]
        torch.testing.assert_close(first["boxes"], torch.tensor([[0.5, 0.5, 1.0, 1.0]]))
        torch.testing.assert_close(second["boxes"], torch.tensor([[0.5, 0.5, 0.5, 1 / 3]]))
        assert first["class_labels"].tolist() == [2]
        assert [label["size"].tolist() for label in (first, second)] == [[64, 90], [96, 43]]
        assert [label["orig_size"].tolist() for label in (first, second)] == [[50, 70], [90, 40]]

    def test_labels_do_not_depend_on_the_rest_of_the_batch(self) -> None:
        image, target = picture(50, 70), annotation(7, [5, 5, 20, 20])
        alone = self.processor(images=image, annotations=target, return_tensors="pt")
        beside = self.processor(
            images=[image, picture(90, 40)], annotations=[target, annotation(8)], return_tensors="pt"
        )
        torch.testing.assert_close(alone["labels"][0]["boxes"], beside["labels"][0]["boxes"], rtol=0, atol=0)
        assert beside["labels"][1]["boxes"].shape == (0, 4)

    def test_pil_numpy_and_tensor_are_the_same_image(self) -> None:
        image = picture(50, 70)
        array = np.array(image)
        kinds = [image, array, torch.from_numpy(array).permute(2, 0, 1)]
        first, *others = (self.processor(images=kind, return_tensors="pt")["pixel_values"] for kind in kinds)
        for other in others:
            torch.testing.assert_close(other, first, rtol=0, atol=0)

    @pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
    def test_every_mode_becomes_three_channels(self, mode: str) -> None:
        image = picture(64, 96).convert(mode)
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"]
        expected = self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, 64, 96)
        torch.testing.assert_close(pixels, expected, rtol=0, atol=0)

    def test_resizes_bilinearly_with_antialias_and_normalises(self) -> None:
        image = picture(128, 160)
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        resized = tvf.resize(tvf.pil_to_tensor(image), [64, 80], antialias=True)
        mean, std = torch.tensor(self.processor.image_mean), torch.tensor(self.processor.image_std)
        torch.testing.assert_close(pixels, (resized / 255 - mean[:, None, None]) / std[:, None, None])

    def test_pixels_that_are_left_as_they_are_are_floats(self) -> None:
        """A detector takes uint8 for pixels that still have to be normalised: `predict` refused such a processor."""
        processor = DetectionImageProcessor(do_rescale=False, do_normalize=False, do_resize=False)
        image = Image.new("RGB", (32, 32), (1, 128, 255))
        pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
        assert pixels.dtype == torch.float32
        assert pixels[0, :, 0, 0].tolist() == [1, 128, 255]
        objects: dict[str, Any] = {key: [] for key in ("id", "bbox", "category", "area", "iscrowd")}
        example = {"image": image, "image_id": 1, "width": 32, "height": 32, "objects": objects}
        batch = DetectionCollator(processor, compact=True)([example])
        assert batch["pixel_values"].dtype == torch.uint8
        assert torch.equal(Normalizer(processor)(batch)["pixel_values"], pixels)

    def test_fixed_size(self) -> None:
        processor = DetectionImageProcessor(size={"height": 64, "width": 80})
        batch = processor(images=picture(50, 70), annotations=annotation(1, [0, 0, 35, 25]), return_tensors="pt")
        assert batch["pixel_values"].shape == (1, 3, 64, 96)
        torch.testing.assert_close(batch["labels"][0]["boxes"], torch.tensor([[0.25, 0.25, 0.5, 0.5]]))

    def test_the_longest_edge_is_reached_and_not_passed(self) -> None:
        """The nearest whole sizes of the exact scale; where both edges bind, neither is off by one."""

        def size(processor: DetectionImageProcessor, height: int, width: int) -> tuple[int, int]:
            image = Image.new("L", (width, height))
            mask = processor(images=image, return_tensors="pt")["pixel_mask"][0]
            return int(mask[:, 0].sum()), int(mask[0].sum())

        equal = DetectionImageProcessor(size={"shortest_edge": 640, "longest_edge": 640})
        assert size(equal, 653, 958) == (436, 640)
        small = DetectionImageProcessor(size={"shortest_edge": 48, "longest_edge": 80})
        for height, width in np.random.default_rng(0).integers(8, 300, (60, 2)).tolist():
            scale = min(48 / min(width, height), 80 / max(width, height))
            made = size(small, height, width)
            assert max(made) <= 80
            assert made == pytest.approx((height * scale, width * scale), abs=1)

    def test_bgr_turns_the_channels_before_normalising(self) -> None:
        plain = {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0], "do_resize": False}
        image = picture(32, 32)
        rgb = DetectionImageProcessor(**plain)(images=image, return_tensors="pt")["pixel_values"]
        bgr = DetectionImageProcessor(channel_order="bgr", **plain)(images=image, return_tensors="pt")["pixel_values"]
        shifted = DetectionImageProcessor(channel_order="bgr", **{**plain, "image_mean": [0.5, 0.0, 0.0]})
        torch.testing.assert_close(bgr, rgb.flip(1), rtol=0, atol=0)
        pixels = shifted(images=image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(pixels[:, 0], rgb[:, 2] - 0.5)  # the mean is in the order of the weights

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_every_image_of_a_batch_is_padded_to_the_multiple(self, order: tuple[int, int]) -> None:
        images = [picture(50, 70), picture(40, 40)]
        batch = self.processor(images=[images[i] for i in order], return_tensors="pt", do_resize=False, size_divisor=32)
        assert batch["pixel_values"].shape == (2, 3, 64, 96)
        assert batch["pixel_mask"].sum((1, 2)).tolist() == [[3500, 1600][i] for i in order]

    def test_pad_size_and_no_padding(self) -> None:
        images = [picture(30, 40), picture(30, 40)]
        fixed = self.processor(
            images=images, return_tensors="pt", do_resize=False, pad_size={"height": 50, "width": 20}
        )
        assert fixed["pixel_values"].shape == (2, 3, 64, 48)  # at least pad_size, and room for the image
        bare = self.processor(images=images, return_tensors="pt", do_resize=False, do_pad=False)
        assert {name: value.shape for name, value in bare.items()} == {"pixel_values": (2, 3, 30, 40)}

    def test_pixels_and_labels_as_of_the_base_class_but_for_the_padding(self) -> None:
        image, target = picture(50, 75), annotation(7, [5, 5, 20, 20], [0, 10, 75, 40])
        size = {"shortest_edge": 64, "longest_edge": 96}
        ours = self.processor(images=image, annotations=target, return_tensors="pt")
        base = DeformableDetrImageProcessor(size=size)(images=image, annotations=target, return_tensors="pt")
        torch.testing.assert_close(ours["pixel_values"], base["pixel_values"], rtol=0, atol=0)
        assert ours["labels"][0].keys() == base["labels"][0].keys()
        for name, value in base["labels"][0].items():
            torch.testing.assert_close(ours["labels"][0][name], value, rtol=0, atol=0)

    def test_boxes_in_pixels(self) -> None:
        batch = self.processor(
            images=picture(32, 48),
            annotations=annotation(1, [6, 8, 10, 12]),
            do_convert_annotations=False,
            return_tensors="pt",
        )
        torch.testing.assert_close(batch["labels"][0]["boxes"], torch.tensor([[12.0, 16.0, 32.0, 40.0]]))

    @pytest.mark.parametrize("left_out", [("area",), ("iscrowd",), ("id",), ("area", "iscrowd", "id")])
    def test_what_annotations_may_leave_out(self, left_out: tuple[str, ...]) -> None:
        """Guides of transformers leave out some of it; `area` is then that of the box."""

        def labels(without: tuple[str, ...]) -> Any:
            record = {"id": 1, "bbox": [6, 8, 10, 12], "category_id": 2, "area": 120, "iscrowd": 0}
            rest = {name: value for name, value in record.items() if name not in without}
            given = {"image_id": 1, "annotations": [rest]}
            return self.processor(images=picture(32, 48), annotations=given, return_tensors="pt")["labels"][0]

        expected, found = labels(()), labels(left_out)
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], value) for name, value in expected.items())

    @pytest.mark.parametrize("left_out", ["bbox", "category_id"])
    def test_what_annotations_must_have(self, left_out: str) -> None:
        record: dict[str, Any] = {"bbox": [6, 8, 10, 12], "category_id": 2}
        record.pop(left_out)
        with pytest.raises(ValueError, match=rf"An object of image 7 has .*{left_out}=None"):
            self.processor(images=picture(32, 48), annotations={"image_id": 7, "annotations": [record]})

    def test_wrong_annotations_are_refused(self) -> None:
        images = [picture(32, 32), picture(32, 32)]
        with pytest.raises(ValueError, match="1 annotations were given for 2 images"):
            self.processor(images=images, annotations=[annotation(1)])
        with pytest.raises(ValueError, match="Invalid COCO detection annotations"):
            self.processor(images=images, annotations=[{"boxes": []}, {"boxes": []}])
        with pytest.raises(ValueError, match="boxes only"):
            self.processor(images=images, annotations=[annotation(1), annotation(2)], return_segmentation_masks=True)


class TestSettings:
    @pytest.mark.parametrize(
        ("setting", "value"),
        [
            ("channel_order", "gbr"),
            ("size_divisor", 0),
            ("candidates_per_level", 0),
            ("max_detections", -1),
            ("score_threshold", 1.5),
            ("nms_threshold", -0.1),
        ],
    )
    def test_out_of_range_is_refused(self, setting: str, value: object) -> None:
        with pytest.raises(ValueError, match=rf"{setting} is .*{value}.*; give"):
            DetectionImageProcessor(**{setting: value})

    def test_all_settings_are_saved(self, tmp_path: Path) -> None:
        settings = {
            "size": {"shortest_edge": 64, "longest_edge": 96},
            "channel_order": "bgr",
            "size_divisor": 16,
            "score_threshold": 0.1,
            "candidates_per_level": 7,
            "nms_threshold": 0.5,
            "max_detections": 3,
        }
        DetectionImageProcessor(**settings).save_pretrained(tmp_path)
        loaded = DetectionImageProcessor.from_pretrained(tmp_path).to_dict()
        assert {name: loaded[name] for name in settings} == settings


class TestPostProcess:
    processor = DetectionImageProcessor()

    @pytest.mark.parametrize("centerness", [False, True])
    @pytest.mark.parametrize("per_level", [10, 1000])
    def test_equals_the_plain_rules(self, centerness: bool, per_level: int) -> None:
        outputs = make_outputs([[90, 40, 10], [100, 30, 10], [70, 35, 35]], centerness=centerness)
        sizes = [(60, 90), (100, 50), (480, 640)]
        results = self.processor.post_process_object_detection(
            outputs, target_sizes=sizes, candidates_per_level=per_level, max_detections=50
        )
        for index, result in enumerate(results):
            scores, labels, boxes = plain_post_process(outputs, index, sizes[index], per_level, keep=50)
            assert len(scores) > 10
            torch.testing.assert_close(result["scores"], scores)
            assert result["labels"].tolist() == labels.tolist()
            torch.testing.assert_close(result["boxes"], boxes)

    @pytest.mark.parametrize("scores", ["young", "equal", "few values", "saturated", "some not a number"])
    def test_candidates_of_a_young_model(self, scores: str) -> None:
        """Where nearly all pairs are above the threshold, the highest scores are taken, the first of equals."""
        outputs = make_outputs([[90, 40, 10], [100, 30, 10]], classes=20)
        logits = torch.randn(2, 140, 20)
        changes = {
            "young": logits * 0.01 - 2.9,
            "equal": torch.full_like(logits, -2.0),
            "few values": (logits - 1).bfloat16().float(),
            "saturated": logits * 30,
            "some not a number": torch.where(logits > 2, torch.nan, logits),
        }
        outputs["logits"] = changes[scores]
        got = self.processor.candidates(outputs, 0.05, 25)
        expected = []
        for image, lengths in enumerate(outputs.level_lengths.tolist()):
            for level in torch.arange(140).split(lengths):
                pairs = outputs.logits[image, level].sigmoid().nan_to_num(0).flatten()
                order = pairs.argsort(descending=True, stable=True)[:25]
                order = order[pairs[order] > 0.05]
                expected += [(image, int(level[row // 20]), row % 20) for row in order.tolist()]
        found = [(i, int((outputs.pred_boxes[i] == box).all(1).nonzero()), label) for i, label, box in
                 zip(got.image.tolist(), got.label.tolist(), got.box, strict=True)]  # fmt: skip
        assert found == expected
        assert len(found) > 100

    def test_an_image_does_not_change_its_neighbours(self) -> None:
        outputs = make_outputs([[60, 20], [60, 20]])
        together = self.processor.post_process_object_detection(outputs)
        for index in range(2):
            alone = Outputs(**{name: value[index : index + 1] for name, value in outputs.items()})
            result = self.processor.post_process_object_detection(alone)[0]
            for name, value in result.items():
                torch.testing.assert_close(value, together[index][name])

    def test_threshold_only_drops_what_lies_below(self) -> None:
        outputs = make_outputs([[300, 80]], centerness=True)
        everything = self.processor.post_process_object_detection(outputs, 0.0, max_detections=10_000)[0]
        some = self.processor.post_process_object_detection(outputs, 0.3, max_detections=10_000)[0]
        sure = everything["scores"] > 0.3
        assert 0 < sure.sum() < len(sure)
        for name, value in some.items():
            torch.testing.assert_close(value, everything[name][sure])

    def test_score_threshold_and_level_limit_go_before_the_centerness(self) -> None:
        boxes = [[0.0, 0.0, 0.2, 0.2], [0.3, 0.3, 0.5, 0.5], [0.6, 0.6, 0.9, 0.9]]
        centerness = torch.logit(torch.tensor([[0.1, 0.9, 0.9]]))
        outputs = one_image([[0.40], [0.30], [0.04]], boxes, centerness=centerness)
        result = self.processor.post_process_object_detection(outputs)[0]
        torch.testing.assert_close(result["scores"], torch.tensor([0.27, 0.04]))
        best = self.processor.post_process_object_detection(outputs, candidates_per_level=1)[0]
        torch.testing.assert_close(best["scores"], torch.tensor([0.04]))

    def test_limit_is_per_level(self) -> None:
        boxes = [[0.0, 0.0, 0.2, 0.2], [0.3, 0.3, 0.5, 0.5], [0.6, 0.6, 0.9, 0.9]]
        outputs = one_image([[0.9, 0.8], [0.7, 0.6], [0.2, 0.1]], boxes)
        one_level = self.processor.post_process_object_detection(outputs, candidates_per_level=2)[0]
        torch.testing.assert_close(one_level["scores"], torch.tensor([0.9, 0.8]))
        outputs = one_image([[0.9, 0.8], [0.7, 0.6], [0.2, 0.1]], boxes, level_lengths=torch.tensor([[2, 1]]))
        two_levels = self.processor.post_process_object_detection(outputs, candidates_per_level=1)[0]
        torch.testing.assert_close(two_levels["scores"], torch.tensor([0.9, 0.2]))
        assert two_levels["labels"].tolist() == [0, 0]

    def test_nms_works_within_a_class(self) -> None:
        boxes = [[0.1, 0.1, 0.5, 0.5], [0.1, 0.1, 0.5, 0.52]]
        outputs = one_image([[0.9, 0.3], [0.8, 0.01]], boxes)
        result = self.processor.post_process_object_detection(outputs)[0]
        torch.testing.assert_close(result["scores"], torch.tensor([0.9, 0.3]))
        assert result["labels"].tolist() == [0, 1]
        both = self.processor.post_process_object_detection(outputs, nms_threshold=1.0)[0]
        assert len(both["scores"]) == 3

    def test_clips_and_drops_boxes_without_area(self) -> None:
        boxes = [[-0.2, 0.1, 0.5, 1.3], [1.1, 0.2, 1.4, 0.3], [0.4, 0.4, 0.4, 0.6]]
        result = self.processor.post_process_object_detection(
            one_image([[0.9], [0.8], [0.7]], boxes), 0.5, [(100, 200)]
        )[0]
        torch.testing.assert_close(result["boxes"], torch.tensor([[0.0, 10.0, 100.0, 100.0]]))

    @pytest.mark.parametrize("logit", [-9.0, float("nan"), -float("inf")])
    def test_nothing_found_keeps_shapes_and_types(self, logit: float) -> None:
        outputs = Outputs(logits=torch.full((2, 4, 3), logit), pred_boxes=torch.rand(2, 4, 4))
        for result in self.processor.post_process_object_detection(outputs, target_sizes=[(4, 4), (4, 4)]):
            assert {name: tuple(value.shape) for name, value in result.items()} == {
                "scores": (0,),
                "labels": (0,),
                "boxes": (0, 4),
            }
            assert result["labels"].dtype == torch.int64

    def test_boxes_that_are_not_finite_are_dropped(self) -> None:
        outputs = one_image([[0.9], [0.8]], [[0.1, 0.1, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9]])
        outputs.pred_boxes[0, 0, 2] = float("nan")
        result = self.processor.post_process_object_detection(outputs)[0]
        torch.testing.assert_close(result["scores"], torch.tensor([0.8]))

    def test_score_threshold_of_zero_and_one(self) -> None:
        outputs = make_outputs([[8]], classes=2)
        loose = {"score_threshold": 0.0, "nms_threshold": 1.0}
        outputs.pred_boxes[:] = torch.tensor([0.5, 0.5, 0.2, 0.2])
        assert len(self.processor.post_process_object_detection(outputs, **loose)[0]["scores"]) == 16
        assert len(self.processor.post_process_object_detection(outputs, score_threshold=1.0)[0]["scores"]) == 0

    def test_target_sizes(self) -> None:
        outputs = make_outputs([[30, 10], [30, 10]])
        relative = self.processor.post_process_object_detection(outputs)
        sizes = torch.tensor([[60, 90], [100, 50]])
        for given in (sizes, [(60, 90), (100, 50)], list(sizes)):
            results = self.processor.post_process_object_detection(outputs, target_sizes=given)
            for result, base, (height, width) in zip(results, relative, sizes.tolist(), strict=True):
                torch.testing.assert_close(result["boxes"], base["boxes"] * torch.tensor([width, height] * 2))
        with pytest.raises(ValueError, match="target_sizes holds 1 sizes for 2 images"):
            self.processor.post_process_object_detection(outputs, target_sizes=[(60, 90)])

    def test_half_precision_outputs(self) -> None:
        outputs = make_outputs([[30, 10]], centerness=True)
        half = Outputs(**{k: v.bfloat16() if v.is_floating_point() else v for k, v in outputs.items()})
        rounded = Outputs(**{k: v.float() if v.is_floating_point() else v for k, v in half.items()})
        for name, value in self.processor.post_process_object_detection(half)[0].items():
            torch.testing.assert_close(value, self.processor.post_process_object_detection(rounded)[0][name])

    def test_other_detectors_bring_their_own_candidates(self) -> None:
        class FinalScores(DetectionImageProcessor):
            """Of a detector whose `logits` are probabilities already."""

            def candidates(self, outputs: Outputs, score_threshold: float, candidates_per_level: int) -> Candidates:
                image, row, label = (outputs.logits > score_threshold).nonzero(as_tuple=True)
                return Candidates(image, label, outputs.logits[image, row, label], outputs.pred_boxes[image, row])

        outputs = one_image([[0.9, 0.3], [0.8, 0.01]], [[0.1, 0.1, 0.5, 0.5], [0.1, 0.1, 0.5, 0.52]])
        expected = self.processor.post_process_object_detection(outputs, 0.05)[0]
        final = Outputs(logits=outputs.logits.sigmoid(), pred_boxes=outputs.pred_boxes)
        result = FinalScores().post_process_object_detection(final, 0.05)[0]
        for name, value in result.items():
            torch.testing.assert_close(value, expected[name])


class ToyConfig(PreTrainedConfig):
    model_type = "toy_detector_of_image_processing"


class ToyForObjectDetection(PreTrainedModel):
    """Sees one object everywhere: the left half of the image, with its red as the score."""

    config: ToyConfig
    main_input_name = "pixel_values"

    def __init__(self, config: ToyConfig):
        super().__init__(config)
        self.gain = nn.Parameter(torch.ones(1))
        self.post_init()

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> Outputs:
        logits = self.gain * pixel_values[:, :1, 0, 0, None]  # (B, 1, 1)
        boxes = torch.tensor([0.25, 0.5, 0.5, 1.0]).expand(len(logits), 1, 4)
        return Outputs(logits, boxes, None, torch.ones(len(logits), 1, dtype=torch.int64))


@pytest.fixture
def toy_dir(tmp_path: Path) -> Path:
    AutoImageProcessor.register(
        ToyConfig, image_processor_classes={"torchvision": DetectionImageProcessor}, exist_ok=True
    )
    ToyForObjectDetection(ToyConfig(id2label={0: "thing"})).save_pretrained(tmp_path)
    DetectionImageProcessor(size={"height": 32, "width": 32}, nms_threshold=0.4).save_pretrained(tmp_path)
    return tmp_path


def test_auto_image_processor(toy_dir: Path) -> None:
    loaded = AutoImageProcessor.from_pretrained(toy_dir)
    assert type(loaded) is DetectionImageProcessor
    assert loaded.nms_threshold == 0.4


@pytest.mark.parametrize("batch_size", [1, 2])
def test_pipeline(toy_dir: Path, batch_size: int) -> None:
    detect = pipeline(
        "object-detection",
        model=ToyForObjectDetection.from_pretrained(toy_dir),
        image_processor=AutoImageProcessor.from_pretrained(toy_dir),
        batch_size=batch_size,
    )
    red, black = Image.new("RGB", (80, 40), "red"), Image.new("RGB", (80, 40))
    found = detect([red, black, red], threshold=0.5)
    assert [len(image) for image in found] == [1, 0, 1]
    assert found[0][0]["label"] == "thing"
    assert found[0][0]["box"] == {"xmin": 0, "ymin": 0, "xmax": 40, "ymax": 40}


def test_candidates_are_fields_of_one_length() -> None:
    outputs = make_outputs([[30, 10], [20, 20]])
    found = DetectionImageProcessor().candidates(outputs, 0.05, 1000)
    assert {len(getattr(found, field.name)) for field in dataclasses.fields(found)} == {len(found.image)}
    assert found.image.diff().min() >= 0


@pytest.mark.parametrize("kind", ["all equal", "few values", "equal at the end"])
def test_of_equal_scores_the_first_ones_are_candidates(kind: str) -> None:
    logits = torch.zeros(2, 300, 7)
    if kind != "all equal":
        logits = torch.randint(3 if kind == "few values" else 40, logits.shape) - 1.0
    found = _highest_pairs(logits, [[250, 50]] * 2, -5.0, 60)
    expected = []
    for image in range(2):
        for start, stop in ((0, 250), (250, 300)):
            best = logits[image, start:stop].flatten().sigmoid().argsort(descending=True, stable=True)[:60]
            expected += [(image, start + pair // 7, pair % 7) for pair in best.tolist()]
    assert list(zip(*(column.tolist() for column in found), strict=True)) == expected
