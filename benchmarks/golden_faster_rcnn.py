"""Run a golden case of Faster R-CNN through the code that the trainer runs.

Besides losses, gradients and detections a case lists intermediate results, from proposals and samples to the RoI heads'
outputs for given regions; all of them are compared. About 15 seconds on one CPU core.
"""

from typing import Any

import torch
from golden import _map_error as map_error
from golden import _match as match_detections
from golden import relative_error
from seeded import seeded_images, seeded_state_dict, seeded_targets
from torch import Tensor, nn
from torchvision.ops import box_iou

from crosskd_hf.convert.mmdet import MMDetOptions, convert_mmdet, rename
from crosskd_hf.distillation import DistillationConfig, make_distiller
from crosskd_hf.distillation.pkd import PearsonKD
from crosskd_hf.models import DetectionImageProcessor, FasterRCNNConfig, FasterRCNNForObjectDetection, FasterRCNNOutput
from crosskd_hf.models.assigners import Targets
from crosskd_hf.models.boxes import to_relative
from crosskd_hf.models.losses import divide
from crosskd_hf.models.roi_head import RoIPredictions, RoIs
from crosskd_hf.models.rpn import Proposals, count_rows

# With this divisor every anchor takes part in the loss, as in a batch whose images are all padded alike.
WHOLE_BATCH = 2**16
KD_LOSSES = ("loss_cls_kd", "loss_reg_kd")


def run(case: dict[str, Any]) -> dict[str, float]:
    """Compare everything the case holds: the largest error of each kind of figure."""
    return FasterRCNNCase(case).run()


def load_model(case: dict[str, Any], role: str) -> FasterRCNNForObjectDetection:
    """The seeded model of one side of a case; the teacher's settings are the student's."""
    spec = case[role]
    options = MMDetOptions(
        caffe_style="caffe" in spec.get("backbone_style", ""), bgr=spec.get("channel_order") == "BGR"
    )
    state = seeded_state_dict(spec["checkpoint_shapes"], case["seed"][role])
    config, converted = convert_mmdet(state, options)
    assert isinstance(config, FasterRCNNConfig)
    for phase, limits in case["student"]["proposals"].items():
        setattr(config, f"{phase}_proposals_per_level", limits["before_nms_per_level"])
        setattr(config, f"{phase}_proposals", limits["kept_per_image"])
    config.proposal_nms = case["student"]["proposals"]["train"]["nms_iou"]
    config.min_proposal_size = case["student"]["proposals"]["train"]["min_size"]
    config.rpn_samples = config.roi_samples = None
    config.size_divisor = WHOLE_BATCH
    model = FasterRCNNForObjectDetection(config)
    model.load_state_dict(converted, strict=True)
    return model.eval()


class FasterRCNNCase:
    """A golden case set up: seeded student, teacher and batch."""

    def __init__(self, case: dict[str, Any]):
        self.case, self.expected = case, case["expected"]
        self.student = load_model(case, "student").train()
        self.teacher = load_model(case, "teacher")
        self.distiller = make_distiller(self.student, self.teacher, DistillationConfig())
        seed, batch = case["seed"]["inputs"], case["batch"]
        self.shapes = [tuple(shape) for shape in batch["image_shapes"]]
        self.sizes = torch.tensor(self.shapes, dtype=torch.float32)
        pixels = seeded_images([len(self.shapes), 3, *batch["pad_shape"]], self.shapes, seed)
        if case["student"].get("channel_order") == "BGR":
            pixels = pixels.flip(1)
        mask = torch.zeros(len(self.shapes), *batch["pad_shape"], dtype=torch.long)
        for image, (height, width) in zip(mask, self.shapes, strict=True):
            image[:height, :width] = 1
        labels = []
        truth = seeded_targets(self.shapes, case["num_classes"], seed, batch["boxes_per_image"])
        for size, target in zip(self.sizes, truth, strict=True):
            boxes = to_relative(target["boxes"][None], size[None])[0]
            labels.append({"class_labels": target["labels"], "boxes": boxes})
        self.inputs: dict[str, Any] = {"pixel_values": pixels, "pixel_mask": mask, "labels": labels}
        self.targets = Targets.from_labels(labels, self.sizes)

    def run(self) -> dict[str, float]:
        """Compare everything the case holds."""
        expected = self.expected
        outputs = self.student(**self.inputs, **self.distiller.student_request)
        losses = divide({**outputs.loss_parts, **self.distiller(outputs, self.inputs)})
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        errors = {
            "losses": self._loss_error(outputs, losses, expected["losses"], expected["samples"]),
            "gradients": self._gradient_error(expected["grad_norms"], expected["total_grad_norm"]),
        }
        errors |= self._own_padding() if "with_own_pad_shape" in expected else {}
        self.student.eval()
        fixed = [self._fixed_error(expected[key]) for key in ("fixed_rois", "fixed_rois_random") if key in expected]
        errors["fixed_rois"] = max(fixed, default=0.0)
        if "feature_imitation_extra" in expected:
            errors["pkd"] = self._pkd_error(expected["feature_imitation_extra"])
        sides = [self._side_errors(role) for role in ("student", "teacher")]
        errors |= {name: max(side[name] for side in sides) for name in sides[0]}
        errors["iou_gap"] = max(errors["iou_gap"], self._proposal_gap())
        if "student_is_teacher" in self.case.get("checks", {}):
            errors["identity"] = self._identity()
        return errors

    def _loss_error(
        self, outputs: FasterRCNNOutput, losses: dict[str, Tensor], expected: dict[str, Any], samples: dict[str, Any]
    ) -> float:
        """Largest relative error of the losses, infinite if a sample has another size."""
        got: dict[str, Any] = {key: value.item() for key, value in losses.items()}
        got["total"] = sum(got.values())
        assert outputs.rois is not None
        assert outputs.predictions is not None
        got["acc"] = accuracy(outputs.predictions, outputs.rois)
        per_level, counts = self._sample()
        got |= per_level
        rois = outputs.rois
        counts["rois"], counts["rois_total"] = rois.mask.sum(1).tolist(), int(rois.mask.sum())
        counts["roi_positives"] = rois.positive.sum(1).tolist()
        if any(counts[name] != number for name, number in samples.items()):
            return float("inf")
        return max(figure_error(got[name], value) for name, value in expected.items())

    @torch.no_grad()
    def _sample(self) -> tuple[dict[str, list[float]], dict[str, Any]]:
        """The RPN's losses per level, and the sizes of its samples."""
        rpn, config = self.student.rpn, self.student.config
        features = self.student.pyramid(self.inputs["pixel_values"])
        proposed, anchors = rpn(features), rpn.anchors(features)
        sizes = (self.sizes / config.size_divisor).ceil() * config.size_divisor
        rows = rpn.loss_rows(proposed, anchors, anchors.inside(sizes), self.targets)
        limits = config.train_proposals_per_level, config.train_proposals
        proposals = rpn.propose(proposed, anchors, self.sizes, *limits)
        per_level = {
            f"loss_rpn_{name}_per_level": [
                (level.sum() / rows.number).item() for level in values.split(anchors.level_lengths, 1)
            ]
            for name, values in (("cls", rows.cls), ("bbox", rows.bbox))
        }
        counts = {
            "rpn_positives": rows.positive.sum(1).tolist(),
            "rpn_negatives": rows.negative.sum(1).tolist(),
            "proposals": proposals.mask.sum(1).tolist(),
        }
        return per_level, counts

    def _own_padding(self) -> dict[str, float]:
        """Each image with its own padded size, as MMDetection's training pipeline has it."""
        self.student.config.size_divisor = 32
        outputs = self.student(**self.inputs, **self.distiller.student_request)
        losses = divide({**outputs.loss_parts, **self.distiller(outputs, self.inputs)})
        own = self.expected["with_own_pad_shape"]
        error = self._loss_error(outputs, losses, own["losses"], own["samples"])
        self.student.config.size_divisor = WHOLE_BATCH
        return {"own_padding": error}

    def _gradient_error(self, expected: dict[str, float], expected_total: float) -> float:
        """Of the gradients that the student's parameters hold."""
        parameters = dict(self.student.named_parameters())
        names = rename(self.case["student"]["checkpoint_shapes"], self.student.config)
        got = {theirs: parameters[ours].grad for theirs, ours in names.items() if ours in parameters}
        norms = {name: 0.0 if grad is None else grad.norm().item() for name, grad in got.items()}
        smallest = 1e-6 * max(expected.values())
        errors = [relative_error(norms[name], value, smallest) for name, value in expected.items()]
        total = nn.utils.get_total_norm([grad for grad in got.values() if grad is not None])
        return max(*errors, relative_error(total.item(), expected_total))

    def _fixed_error(self, expected: dict[str, Any]) -> float:
        """Everything that the three passes over given regions produce."""
        rois = self._fixed_rois(expected)
        self.student.zero_grad()
        student = self.student.pyramid(self.inputs["pixel_values"])
        teacher = self.teacher.pyramid(self.inputs["pixel_values"])
        own = self.student.roi_head(student, rois.boxes)
        outputs = FasterRCNNOutput(features=student, rois=rois, predictions=own)
        parts = self.student.roi_head.loss(own, rois)
        distilled = self.distiller(outputs, self.inputs)
        losses = divide({**parts, **distilled})
        got = {name: value.item() for name, value in losses.items()} | {"acc": accuracy(own, rois)}
        errors = [figure_error(got[name], value) for name, value in expected["losses"].items()]
        number = count_rows(rois.positive, rois.mask & ~rois.positive)
        errors.append(figure_error(number.item(), expected["avg_factor"]))
        if "kd_grad_norms" in expected:
            torch.stack([losses[name] for name in KD_LOSSES]).sum().backward()
            # 5e-3 is as good for a gradient as 1e-3 for a loss.
            errors.append(self._gradient_error(expected["kd_grad_norms"], expected["kd_total_grad_norm"]) / 5)
        passes = {
            "student": (student, self.student),
            "teacher": (teacher, self.teacher),
            "cross": (student, self.teacher),
        }
        for name, (features, model) in passes.items():
            if name in expected:
                errors.append(self._pass_error(features, model, rois, expected[name]))
        if "teacher_best_foreground" in expected:
            errors.append(self._best_error(teacher, rois, expected["teacher_best_foreground"]))
        if "levels" in expected and self.student.roi_head.levels(rois.boxes)[rois.mask].tolist() != expected["levels"]:
            return float("inf")
        return max(errors)

    def _fixed_rois(self, expected: dict[str, Any]) -> RoIs:
        rows = nn.utils.rnn.pad_sequence([torch.tensor(boxes) for boxes in expected["boxes"]], batch_first=True)
        counts = torch.tensor([len(boxes) for boxes in expected["boxes"]])
        mask = torch.arange(rows.shape[1]) < counts[:, None]
        rois = self.student.roi_head.assign(Proposals(rows, mask), self.targets)
        positives = [image.nonzero()[:, 0].tolist() for image in rois.positive]
        assert positives == expected["positive_indices"], positives
        for image, indices in enumerate(expected["positive_gt_indices"]):
            matched = self.targets.boxes[image, indices]
            assert torch.equal(rois.targets[image][rois.positive[image]], matched)
        return rois

    @torch.no_grad()
    def _pass_error(
        self, features: list[Tensor], model: FasterRCNNForObjectDetection, rois: RoIs, expected: dict[str, Any]
    ) -> float:
        head = model.roi_head
        predictions = head(features, rois.boxes)
        rows = {
            "roi_features": head.pool(features, rois.boxes).unflatten(0, rois.mask.shape),
            "cls_score": predictions.logits,
            "bbox_pred": predictions.deltas.flatten(2),
        }
        return max(map_error(rows[name][rois.mask], figures) for name, figures in expected.items())

    @torch.no_grad()
    def _best_error(self, features: list[Tensor], rois: RoIs, expected: dict[str, Any]) -> float:
        logits = self.teacher.roi_head(features, rois.boxes).logits[rois.mask]
        score, label = logits.softmax(-1)[:, :-1].max(-1)
        if label.tolist() != expected["label"]:
            return float("inf")
        return figure_error(score.tolist(), expected["score"])

    @torch.no_grad()
    def _pkd_error(self, expected: dict[str, Any]) -> float:
        pyramids = [model.pyramid(self.inputs["pixel_values"]) for model in (self.student, self.teacher)]
        pearson = PearsonKD(pyramids[0][0].shape[1], pyramids[1][0].shape[1], 6.0, "batch")
        levels = [
            divide({"loss": pearson([student], [teacher])})["loss"].item()
            for student, teacher in zip(*pyramids, strict=True)
        ]
        whole = divide({"loss": pearson(*pyramids)})["loss"].item()
        return max(figure_error(levels, expected["per_level"]), figure_error(whole, expected["total"]))

    @torch.no_grad()
    def _side_errors(self, role: str) -> dict[str, float]:
        """Maps, proposals and detections of one model."""
        model = {"student": self.student, "teacher": self.teacher}[role]
        features = model.pyramid(self.inputs["pixel_values"])
        proposed, anchors = model.rpn(features), model.rpn.anchors(features)
        levels = zip(*(rows.split(anchors.level_lengths, 1) for rows in proposed), features, strict=True)
        maps: dict[str, list[Tensor]] = {"fpn": features, "rpn_cls_logits": [], "rpn_bbox_pred": []}
        for logits, deltas, feature in levels:
            shape = (len(feature), *feature.shape[-2:], -1)
            maps["rpn_cls_logits"].append(logits.reshape(shape).permute(0, 3, 1, 2))
            maps["rpn_bbox_pred"].append(deltas.reshape(shape).permute(0, 3, 1, 2))
        listed = self.expected[f"{role}_outputs"]
        outputs = max(
            map_error(got, figures)
            for name, rows in listed.items()
            for got, figures in zip(maps[name], rows, strict=True)
        )
        nms = self.case[role]["nms"]
        processor = DetectionImageProcessor(
            nms_threshold=nms["iou_threshold"],
            score_threshold=nms["score_threshold"],
            max_detections=nms["detections_per_image"],
        )
        found = model(self.inputs["pixel_values"], self.inputs["pixel_mask"])
        results = processor.post_process_object_detection(found, target_sizes=self.shapes)
        listed_detections = self.expected[f"{role}_detections"]
        gaps = [match_detections(*pair) for pair in zip(results, listed_detections, strict=True)]
        counts = [len(result["scores"]) for result in results]
        return {
            "outputs": outputs,
            "iou_gap": max(gap[0] for gap in gaps),
            "score_gap": max(gap[1] for gap in gaps),
            "miscounted": float(counts != [image["num"] for image in listed_detections]),
        }

    @torch.no_grad()
    def _proposal_gap(self) -> float:
        """Worst 1 - IoU of the listed proposals against the closest of ours."""
        config = self.student.config
        features = self.student.pyramid(self.inputs["pixel_values"])
        limits = config.train_proposals_per_level, config.train_proposals
        found = self.student.rpn.propose(
            self.student.rpn(features), self.student.rpn.anchors(features), self.sizes, *limits
        )
        gaps = [
            1 - box_iou(torch.tensor(listed["boxes"]), boxes).amax(1).min().item()
            for boxes, listed in zip(found.boxes, self.expected["proposals"], strict=True)
            if listed["boxes"]
        ]
        return max(gaps, default=0.0)

    def _identity(self) -> float:
        """Largest of the distillation losses and their gradient where the teacher is its own student: all are zero."""
        twin = load_model(self.case, "teacher").train()
        distiller = make_distiller(twin, self.teacher, DistillationConfig())
        losses = divide(distiller(twin(**self.inputs, **distiller.student_request), self.inputs))
        torch.stack(list(losses.values())).sum().backward()
        gradient = nn.utils.get_total_norm([p.grad for p in twin.parameters() if p.grad is not None])
        return max(gradient.item(), *(loss.item() for loss in losses.values()))


def accuracy(predictions: RoIPredictions, rois: RoIs) -> float:
    """Regions of which the classifier is right, in percent."""
    background = predictions.logits.shape[-1] - 1
    right = predictions.logits.argmax(-1) == torch.where(rois.positive, rois.labels, background)
    return 100 * right[rois.mask].float().mean().item()


def figure_error(got: Any, expected: Any) -> float:
    """Relative error of a number, or the largest one of a list, against the list's largest number."""
    if isinstance(expected, list):
        scale = max(abs(value) for value in expected) or 1.0
        return max(abs(a - b) for a, b in zip(got, expected, strict=True)) / scale
    return relative_error(got, expected)
