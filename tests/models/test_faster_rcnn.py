"""Faster R-CNN: the contract of a detector, and MMDetection's definitions of proposals, samples and losses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.ops import batched_nms, box_convert, box_iou, nms, roi_align
from transformers import AutoConfig, AutoModelForObjectDetection, pipeline

from crosskd_hf.models import DetectionImageProcessor, FasterRCNNConfig, FasterRCNNForObjectDetection
from crosskd_hf.models.assigners import Targets
from crosskd_hf.models.boxes import image_sizes, to_absolute
from crosskd_hf.models.losses import divide
from crosskd_hf.models.roi_head import class_logits, select_boxes
from crosskd_hf.models.rpn import Proposals, RPNPredictions, count_rows
from crosskd_hf.models.sampling import sample
from tests.saved_models import check_remote_code, same_outputs, same_state
from tests.tiny_dense import make_batch
from tests.tiny_faster_rcnn import make_faster_rcnn

LOSSES = {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox"}


def targets_of(batch: dict[str, Any]) -> Targets:
    return Targets.from_labels(batch["labels"], image_sizes(batch["pixel_values"], batch["pixel_mask"]))


class TestContract:
    @pytest.mark.parametrize("net", ["test_resnet", "test_efficientnet", "test_convnext"])
    def test_forward_and_loss(self, net: str) -> None:
        model, batch = make_faster_rcnn(backbone=net).train(), make_batch()
        outputs = model(**batch)
        regions = outputs.logits.shape[1]
        assert outputs.logits.shape == (2, regions, 3)
        assert outputs.pred_boxes.shape == (2, regions, 3, 4)
        assert set(outputs.loss_dict) == LOSSES
        assert all(loss.isfinite() and loss > 0 for loss in outputs.loss_dict.values())
        torch.testing.assert_close(outputs.loss, sum(outputs.loss_dict.values()))
        outputs.loss.backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)

    def test_save_and_load_are_bit_equal(self, tmp_path: Path) -> None:
        model = make_faster_rcnn()
        model.save_pretrained(tmp_path)
        loaded = AutoModelForObjectDetection.from_pretrained(tmp_path)
        assert type(loaded) is FasterRCNNForObjectDetection
        assert same_state(model, loaded)
        assert same_outputs(model, loaded, make_batch()["pixel_values"])

    def test_configuration_round_trip(self, tmp_path: Path) -> None:
        config = FasterRCNNConfig(id2label={0: "a", 1: "b"}, category_ids=[3, 9], roi_samples=None, rpn_samples=8)
        config.save_pretrained(tmp_path)
        loaded = AutoConfig.from_pretrained(tmp_path)
        assert type(loaded) is FasterRCNNConfig
        for field in ("id2label", "category_ids", "num_labels", "roi_samples", "rpn_samples", "loss_weights"):
            assert getattr(loaded, field) == getattr(config, field)

    def test_another_number_of_classes_starts_afresh(self, tmp_path: Path) -> None:
        make_faster_rcnn().save_pretrained(tmp_path)
        loaded = AutoModelForObjectDetection.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
        assert loaded.roi_head.classifier.weight.shape == (6, 24)
        assert loaded.roi_head.regressor.weight.std().item() == pytest.approx(0.001, rel=0.2)
        assert loaded.roi_head.regressor.bias.eq(0).all()

    def test_bfloat16(self) -> None:
        model, batch = make_faster_rcnn().to(torch.bfloat16).eval(), make_batch()
        outputs = model(batch["pixel_values"].bfloat16(), batch["pixel_mask"])
        assert outputs.pred_boxes.dtype == torch.float32
        assert outputs.logits.isfinite().all()

    def test_pipeline_in_batches_finds_the_same(self, tmp_path: Path) -> None:
        model = make_faster_rcnn()
        model.save_pretrained(tmp_path)
        DetectionImageProcessor(size={"height": 64, "width": 64}, nms_threshold=0.5).save_pretrained(tmp_path)
        pixels = [np.random.randint(0, 256, (*shape, 3), dtype=np.uint8) for shape in ((60, 50), (50, 90))]
        images = [Image.fromarray(array) for array in pixels]
        detect = pipeline("object-detection", model=str(tmp_path))
        together, alone = (detect(images, batch_size=size, threshold=0.1) for size in (2, 1))
        for found, other in zip(together, alone, strict=True):
            assert [row["label"] for row in found] == [row["label"] for row in other]
            scores, others = (torch.tensor([row["score"] for row in rows]) for rows in (found, other))
            torch.testing.assert_close(scores, others, rtol=1e-4, atol=1e-5)
        assert any(together)
        assert {row["label"] for found in together for row in found} <= set(model.config.id2label.values())

    @pytest.mark.slow
    def test_runs_as_remote_code_without_the_package(self, tmp_path: Path) -> None:
        check_remote_code(make_faster_rcnn(), tmp_path)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"rpn_negative_iou": 0.8}, "must not be above"),
            ({"roi_samples": 0}, r"roi_samples=0 must lie in \[1, "),
            ({"proposal_nms": 1.5}, r"proposal_nms=1.5 must lie in \[0, 1\]"),
            ({"strides": (4, 8, 32)}, "must be the first of"),
            ({"loss_weights": {"loss_dfl": 1.0}}, "this detector has"),
        ],
    )
    def test_refuses_settings_out_of_range(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            FasterRCNNConfig(**settings)


class TestImagesWithoutBoxes:
    @pytest.mark.parametrize("counts", [(0, 0), (0, 2)])
    def test_losses_and_gradients_are_finite(self, counts: tuple[int, int]) -> None:
        model = make_faster_rcnn().train()
        outputs = model(**make_batch(counts=counts), output_features=True)
        assert not outputs.rois.positive[0].any()
        assert (outputs.loss_dict["loss_bbox"] == 0) == (counts == (0, 0))
        outputs.loss.backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)

    def test_no_proposal_at_all(self) -> None:
        model, batch = make_faster_rcnn(min_proposal_size=1e6).train(), make_batch(counts=(0, 0))
        outputs = model(**batch)
        assert outputs.loss.isfinite()
        outputs.loss.backward()
        found = model.eval()(batch["pixel_values"])
        results = DetectionImageProcessor().post_process_object_detection(found, 0.0, [(64, 64)] * 2)
        assert [len(result["scores"]) for result in results] == [0, 0]


class TestProposals:
    def test_are_those_of_plain_steps(self) -> None:
        """Per level the best, decoded, clipped, NMS within the level, then the best of all levels."""
        model, batch = make_faster_rcnn().eval(), make_batch()
        sizes = image_sizes(batch["pixel_values"], batch["pixel_mask"])
        with torch.no_grad():
            features = model.pyramid(batch["pixel_values"])
            predictions, anchors = model.rpn(features), model.rpn.anchors(features)
            # Scores as a trained model has them: the best are of several levels.
            predictions = RPNPredictions(
                torch.randn_like(predictions.logits), 0.3 * torch.randn_like(predictions.deltas)
            )
            found = model.rpn.propose(predictions, anchors, sizes, 50, 30)
        assert found.mask.sum(1).max() == found.boxes.shape[1] <= 30
        for image in range(2):
            kept_boxes, kept_scores = [], []
            for logits, deltas, priors in zip(
                predictions.logits[image].split(anchors.level_lengths),
                predictions.deltas[image].split(anchors.level_lengths),
                anchors.boxes.split(anchors.level_lengths),
                strict=True,
            ):
                order = logits.argsort(descending=True)[:50]
                center = (priors[order, :2] + priors[order, 2:]) / 2
                extent = priors[order, 2:] - priors[order, :2]
                center = center + deltas[order, :2] * extent
                extent = extent * deltas[order, 2:].exp()
                boxes = torch.cat([center - extent / 2, center + extent / 2], 1).clamp(min=0)
                boxes = torch.minimum(boxes, sizes[image].flip(0).repeat(2))
                solid = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)
                boxes, scores = boxes[solid], logits[order][solid].sigmoid()
                kept = nms(boxes, scores, 0.7)
                kept_boxes.append(boxes[kept])
                kept_scores.append(scores[kept])
            best = torch.cat(kept_scores).argsort(descending=True)[:30]
            levels = torch.cat([torch.full((len(rows),), number) for number, rows in enumerate(kept_scores)])
            assert len(levels[best].unique()) > 2
            torch.testing.assert_close(found.boxes[image][found.mask[image]], torch.cat(kept_boxes)[best])

    def test_anchors_of_a_location(self) -> None:
        model = make_faster_rcnn(anchor_scale=8.0)
        anchors = model.rpn.anchors([torch.zeros(1, 16, 64 // stride, 64 // stride) for stride in (4, 8, 16, 32, 64)])
        assert anchors.level_lengths == (768, 192, 48, 12, 3)
        half = 16 * 0.5**0.5
        expected = [[-2 * half, -half, 2 * half, half], [-16, -16, 16, 16], [-half, -2 * half, half, 2 * half]]
        torch.testing.assert_close(anchors.boxes[:3], torch.tensor(expected))  # height / width of 1/2, 1, 2
        torch.testing.assert_close(anchors.boxes[3:6], torch.tensor(expected) + torch.tensor([4.0, 0, 4, 0]))
        assert anchors.centers[3].tolist() == [4, 0]

    def test_anchors_behind_the_own_padding_do_not_count(self) -> None:
        """How many anchors take part does not depend on what an image is batched with."""
        model = make_faster_rcnn(rpn_samples=None, roi_samples=None, size_divisor=32).eval()
        batch = make_batch(((64, 64), (32, 32)), (2, 2))
        small = {
            "pixel_values": batch["pixel_values"][1:],
            "pixel_mask": batch["pixel_mask"][1:],
            "labels": batch["labels"][1:],
        }
        larger = {key: value for key, value in small.items() if key != "labels"}
        larger = {key: F.pad(value, (0, 64, 0, 64)) for key, value in larger.items()} | {"labels": small["labels"]}
        rows = [model(**inputs, output_features=True) for inputs in (small, larger)]
        for key in ("loss_rpn_cls", "loss_rpn_bbox"):
            assert rows[0].loss_parts[key].normalizer == rows[1].loss_parts[key].normalizer


class TestSampling:
    def test_counts(self) -> None:
        positive = torch.zeros(2, 100, dtype=torch.bool)
        positive[0, :40], positive[1, :3] = True, True
        chosen = sample(positive, ~positive, 20, 0.25)
        assert (chosen & positive).sum(1).tolist() == [5, 3]
        assert (chosen & ~positive).sum(1).tolist() == [15, 17]

    def test_none_takes_all_and_small_sets_are_taken_whole(self) -> None:
        positive = torch.tensor([[True, False, False, True]])
        negative = torch.tensor([[False, True, False, False]])
        expected = [[True, True, False, True]]
        assert sample(positive, negative, None, 0.5).tolist() == expected
        assert sample(positive, negative, 100, 0.5).tolist() == expected

    def test_follows_the_seed(self) -> None:
        positive = torch.rand(1, 200) > 0.5
        draws = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            draws.append(sample(positive, ~positive, 20, 0.5))
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])

    def test_every_row_is_drawn_equally_often(self) -> None:
        positive = torch.ones(4000, 5, dtype=torch.bool)
        drawn = sample(positive, ~positive, 4, 0.5).float().mean(0)
        torch.testing.assert_close(drawn, torch.full((5,), 0.4), rtol=0.1, atol=0)

    def test_ground_truth_comes_first(self) -> None:
        model, batch = make_faster_rcnn(roi_samples=None), make_batch(counts=(3, 1))
        targets = targets_of(batch)
        proposals = Proposals(torch.tensor([[[0.0, 0, 9, 9]], [[50.0, 50, 52, 52]]]), torch.tensor([[True], [False]]))
        rois = model.roi_head.sample(proposals, targets)
        assert rois.mask.sum(1).tolist() == [4, 1]
        assert rois.positive.sum(1).tolist()[1] == 1
        torch.testing.assert_close(rois.boxes[0, :3], targets.boxes[0])
        assert rois.labels[0, :3].tolist() == targets.labels[0].tolist()

    def test_assignment_is_the_box_of_highest_iou(self) -> None:
        model, batch = make_faster_rcnn(), make_batch(((64, 64),), (4,))
        targets = targets_of(batch)
        jitter = targets.boxes[0].repeat(20, 1) + torch.randn(80, 4) * 6
        boxes = torch.cat([torch.minimum(jitter[:, :2], jitter[:, 2:] - 1), jitter[:, 2:]], 1)
        rois = model.roi_head.assign(Proposals(boxes[None], torch.ones(1, 80, dtype=torch.bool)), targets)
        iou, index = box_iou(boxes, targets.boxes[0]).max(1)
        assert torch.equal(rois.positive[0], iou >= 0.5)
        assert 0 < rois.positive.sum() < 80
        assert torch.equal(rois.targets[0][iou >= 0.5], targets.boxes[0][index[iou >= 0.5]])


class TestRPNLoss:
    def test_against_plain_steps(self) -> None:
        model, batch = make_faster_rcnn(rpn_samples=None).eval(), make_batch()
        targets = targets_of(batch)
        with torch.no_grad():
            features = model.pyramid(batch["pixel_values"])
            predictions, anchors = model.rpn(features), model.rpn.anchors(features)
        valid = torch.ones(predictions.logits.shape, dtype=torch.bool)
        losses = divide(model.rpn.loss(predictions, anchors, valid, targets))
        cls = number = 0.0
        for image in range(2):
            iou = box_iou(anchors.boxes, targets.boxes[image][targets.mask[image]])
            label = torch.full((len(iou),), -1.0)
            label[iou.amax(1) < 0.3] = 0
            label[iou.amax(1) >= 0.7] = 1
            for column in iou.T:
                if column.max() >= 0.3:
                    label[column == column.max()] = 1
            rows = label >= 0
            cls += F.binary_cross_entropy_with_logits(predictions.logits[image][rows], label[rows], reduction="sum")
            number += rows.sum()
        torch.testing.assert_close(losses["loss_rpn_cls"], cls / number)

    def test_images_without_positives_count_one_too_many(self) -> None:
        positive = torch.tensor([[True, True, False], [False, False, False]])
        assert count_rows(positive, ~positive).item() == 2 + 1 + 1 + 3


class TestRoIHead:
    def test_levels(self) -> None:
        sides = torch.tensor([0.0, 10, 111, 112, 223, 224, 447, 448, 5000])
        boxes = torch.stack([torch.zeros(9), torch.zeros(9), sides, sides], -1)
        assert make_faster_rcnn().roi_head.levels(boxes).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]

    def test_pools_each_box_from_its_level(self) -> None:
        head = make_faster_rcnn(finest_scale=8).roi_head
        features = [torch.randn(2, 16, 64 // stride, 64 // stride) for stride in (4, 8, 16, 32, 64)]
        boxes = torch.tensor([[[1.0, 2, 9, 11], [0, 0, 60, 60]], [[3.0, 3, 30, 20], [20, 20, 33, 60]]])
        pooled = head.pool(features, boxes).unflatten(0, (2, 2))
        for image in range(2):
            for row in range(2):
                level = int(head.levels(boxes[image, row]))
                alone = roi_align(
                    features[level][image : image + 1], [boxes[image, row][None]], 3, 1 / 2 ** (level + 2), aligned=True
                )
                torch.testing.assert_close(pooled[image, row], alone[0])

    def test_selects_the_four_columns_of_a_class(self) -> None:
        deltas = torch.arange(24.0).reshape(1, 2, 3, 4)  # as the regressor's 12 columns, class by class
        assert select_boxes(deltas, torch.tensor([[2, 0]])).tolist() == [[[8, 9, 10, 11], [12, 13, 14, 15]]]
        agnostic = deltas[:, :, :1]
        assert torch.equal(select_boxes(agnostic, torch.tensor([[2, 0]])), agnostic[:, :, 0])

    def test_loss_is_a_mean_over_regions(self) -> None:
        model, batch = make_faster_rcnn(roi_samples=16).train(), make_batch(counts=(3, 0))
        outputs = model(**batch, output_features=True)
        rois, predictions = outputs.rois, outputs.predictions
        assert rois.mask.sum() == 32
        labels = torch.where(rois.positive, rois.labels, 3)
        expected = F.cross_entropy(predictions.logits.flatten(0, 1), labels.flatten())
        torch.testing.assert_close(outputs.loss_dict["loss_cls"], expected)
        target = box_convert(rois.targets, "xyxy", "cxcywh")
        box = box_convert(rois.boxes, "xyxy", "cxcywh")
        deltas = torch.cat([(target - box)[..., :2] / box[..., 2:] / 0.1, (target / box)[..., 2:].log() / 0.2], -1)
        rows = predictions.deltas.gather(2, rois.labels[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]
        expected = (rows - deltas).abs()[rois.positive].sum() / 32
        torch.testing.assert_close(outputs.loss_dict["loss_bbox"], expected)

    def test_class_agnostic(self) -> None:
        model, batch = make_faster_rcnn(class_agnostic=True).train(), make_batch()
        assert model.roi_head.regressor.out_features == 4
        assert model(**batch).loss.isfinite()
        boxes = model.eval()(batch["pixel_values"]).pred_boxes
        assert boxes.shape[2] == 3
        assert torch.equal(boxes[:, :, 0], boxes[:, :, 2])


class TestDetections:
    def test_are_those_of_plain_steps(self) -> None:
        model, batch = make_faster_rcnn().eval(), make_batch()
        sizes = image_sizes(batch["pixel_values"], batch["pixel_mask"])
        processor = DetectionImageProcessor(score_threshold=0.05, nms_threshold=0.5, max_detections=20)
        with torch.no_grad():
            outputs = model(batch["pixel_values"], batch["pixel_mask"])
            results = processor.post_process_object_detection(outputs, target_sizes=sizes)
            features = model.pyramid(batch["pixel_values"])
            regions = model.rpn.propose(model.rpn(features), model.rpn.anchors(features), sizes, 1000, 40)
            predictions = model.roi_head(features, regions.boxes)
        for image, result in enumerate(results):
            rows = regions.mask[image]
            scores = predictions.logits[image][rows].softmax(-1)[:, :3]
            row, label = (scores > 0.05).nonzero(as_tuple=True)
            boxes = model.roi_head.decode(predictions, regions.boxes)[image][rows][row, label].clamp(min=0)
            boxes = torch.minimum(boxes, sizes[image].flip(0).repeat(2))
            solid = ((boxes[:, 2:] - boxes[:, :2]) > 1e-4).all(1)
            score, label, boxes = scores[row, label][solid], label[solid], boxes[solid]
            kept = batched_nms(boxes, score, label, 0.5)[:20]
            torch.testing.assert_close(result["scores"], score[kept])
            assert torch.equal(result["labels"], label[kept])
            torch.testing.assert_close(result["boxes"], boxes[kept], rtol=1e-4, atol=1e-3)

    def test_class_logits_are_logits_of_softmax_scores(self) -> None:
        logits = torch.randn(2, 5, 4) * 3
        torch.testing.assert_close(class_logits(logits).sigmoid(), logits.softmax(-1)[..., :-1])
        assert class_logits(torch.tensor([[90.0, -90, -90]])).isfinite().all()

    def test_labels_do_not_change_the_detections_in_evaluation(self) -> None:
        model, batch = make_faster_rcnn().eval(), make_batch()
        with torch.no_grad():
            outputs = [model(**batch), model(batch["pixel_values"], batch["pixel_mask"])]
        assert torch.equal(outputs[0].logits, outputs[1].logits)
        assert torch.equal(outputs[0].pred_boxes, outputs[1].pred_boxes)
        assert outputs[0].loss.isfinite()

    def test_shorter_images_are_filled_up_with_nothing(self) -> None:
        model, batch = make_faster_rcnn(proposal_nms=0.3, test_proposals=200).eval(), make_batch(((64, 64), (24, 24)))
        with torch.no_grad():
            outputs = model(batch["pixel_values"], batch["pixel_mask"])
        empty = outputs.logits.sigmoid().amax(-1) == 0
        assert empty[1].any()
        assert not empty[0].any()
        boxes = to_absolute(outputs.pred_boxes.flatten(1, 2), image_sizes(batch["pixel_values"], batch["pixel_mask"]))
        assert boxes.unflatten(1, (-1, 3))[empty].eq(0).all()
