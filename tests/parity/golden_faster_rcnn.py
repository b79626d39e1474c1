"""Run a golden case of Faster R-CNN through the code that the trainer runs.

Besides losses, gradients and detections a case lists intermediate results, from proposals and samples to the RoI heads'
outputs for given regions; all of them are compared. About 15 seconds on one CPU core.
"""

from typing import Any

import torch
from torch import Tensor, nn

from crosskd_hf.convert.mmdet import convert_mmdet, rename
from crosskd_hf.distillation import PKD, CrossKD, Distiller, MethodConfig
from crosskd_hf.distillation.passes import Batch, FeatureMap, Pass
from crosskd_hf.models import DetectionImageProcessor, FasterRCNNConfig, FasterRCNNForObjectDetection, FasterRCNNOutput
from crosskd_hf.models.assigners import Targets
from crosskd_hf.models.boxes import to_relative
from crosskd_hf.models.losses import divide
from crosskd_hf.models.roi_head import RoIPredictions, RoIs
from crosskd_hf.models.rpn import Proposals, count_rows
from tests.distillation.step import distilled_losses
from tests.golden.seeded import seeded_images, seeded_state_dict, seeded_targets
from tests.parity import wording
from tests.parity.figures import Figures, in_order, on_device
from tests.parity.golden import LOSS_NAMES, check_kind, options_of, pkd_of

# With this divisor every anchor takes part in the loss, as in a batch whose images are all padded alike.
WHOLE_BATCH = 2**16
KD_LOSSES = ("crosskd/cls", "crosskd/reg")


def run(case: dict[str, Any]) -> Figures:
    """Our figures of a case, under the names of its expected ones."""
    return FasterRCNNCase(case).run()


def load_model(case: dict[str, Any], role: str) -> FasterRCNNForObjectDetection:
    """The seeded model of one side of a case; the teacher's settings are the student's."""
    spec = case[role]
    state = seeded_state_dict(spec["checkpoint_shapes"], case["seed"][role])
    config, converted = convert_mmdet(state, options_of(spec))
    assert isinstance(config, FasterRCNNConfig)
    proposals = case["student"]["proposals"]
    for phase, limits in proposals.items():
        setattr(config, f"{phase}_proposals_per_level", limits["before_nms_per_level"])
        setattr(config, f"{phase}_proposals", limits["kept_per_image"])
    filters = {(limits["nms_iou"], limits["min_size"]) for limits in proposals.values()}
    if len(filters) > 1:
        raise ValueError(f"Training and test filter proposals differently, {proposals}: there is one setting here.")
    ((config.proposal_nms, config.min_proposal_size),) = filters
    config.rpn_samples = config.roi_samples = None
    config.size_divisor = WHOLE_BATCH
    model = FasterRCNNForObjectDetection(config)
    model.load_state_dict(converted, strict=True)
    return model.eval()


def distillation_methods(case: dict[str, Any]) -> list[MethodConfig]:
    """What the case's words say of weights, temperature and methods."""
    settings = case["distillation"]
    said = {name: wording.read(f"distillation.{name}", settings[name]) for name in ("cls", "reg")}
    terms = {name: meaning["weight"] for name, meaning in said.items()}
    crosskd = CrossKD(terms=terms, temperature=said["cls"]["temperature"])
    return [crosskd, *pkd_of(settings)]


class FasterRCNNCase:
    """A golden case set up: seeded student, teacher and batch."""

    def __init__(self, case: dict[str, Any]):
        self.case, self.expected = case, case["expected"]
        self.student = load_model(case, "student").train()
        self.teacher = load_model(case, "teacher")
        self.distiller = Distiller(self.student, self.teacher, distillation_methods(case))
        check_kind(self.distiller, case["distillation"])
        seed, batch = case["seed"]["inputs"], case["batch"]
        self.shapes = [tuple(shape) for shape in batch["image_shapes"]]
        self.sizes = torch.tensor(self.shapes, dtype=torch.float32)
        pixels = on_device(seeded_images([len(self.shapes), 3, *batch["pad_shape"]], self.shapes, seed))
        if options_of(case["student"]).bgr:
            pixels = pixels.flip(1)
        mask = torch.zeros(len(self.shapes), *batch["pad_shape"], dtype=torch.long)
        for image, (height, width) in zip(mask, self.shapes, strict=True):
            image[:height, :width] = 1
        labels = []
        truth = on_device(seeded_targets(self.shapes, case["num_classes"], seed, batch["boxes_per_image"]))
        for size, target in zip(self.sizes, truth, strict=True):
            boxes = to_relative(target["boxes"][None], size[None])[0]
            labels.append({"class_labels": target["labels"], "boxes": boxes})
        self.inputs: dict[str, Any] = {"pixel_values": pixels, "pixel_mask": mask, "labels": labels}
        self.targets = Targets.from_labels(labels, self.sizes)

    def run(self) -> Figures:
        """Everything that the case holds and that can be computed."""
        expected = self.expected
        figures, total = self._step()
        total.backward()
        figures |= self._gradients()
        if "with_own_pad_shape" in expected:
            figures["with_own_pad_shape"] = self._with_own_padding()
        self.student.eval()
        for key in ("fixed_rois", "fixed_rois_random"):
            if key in expected:
                figures[key] = self._fixed(expected[key])
        if "feature_imitation_extra" in expected:
            figures["feature_imitation_extra"] = self._pkd(expected["feature_imitation_extra"].get("note"))
        if "proposals" in expected:
            figures["proposals"] = self._proposals(expected["proposals"])
        for role, model in (("student", self.student), ("teacher", self.teacher)):
            figures[f"{role}_outputs"] = self._maps(model)
            if f"{role}_detections" in expected:
                figures[f"{role}_detections"] = self._detections(role, model, expected[f"{role}_detections"])
        if "student_is_teacher" in expected:
            figures["student_is_teacher"] = self._identity()
        return figures

    def _step(self) -> tuple[Figures, Tensor]:
        """Losses and sizes of the samples of a training step, and the total with its graph."""
        outputs: FasterRCNNOutput = self.student(**self.inputs, **self.distiller.student_request)
        rois = outputs.rois
        assert rois is not None
        assert outputs.predictions is not None
        losses = divide({**outputs.loss_parts, **self.distiller(outputs, self.inputs)})
        total = torch.stack(list(losses.values())).sum()
        numbers: Figures = {LOSS_NAMES.get(key, key): value.item() for key, value in losses.items()}
        numbers |= {"total": total.item(), "acc": accuracy(outputs.predictions, rois)}
        per_level, samples = self._rpn_rows()
        samples |= {"rois": rois.mask.sum(1).tolist(), "rois_total": int(rois.mask.sum())}
        samples["roi_positives"] = rois.positive.sum(1).tolist()
        return {"losses": numbers | per_level, "samples": samples}, total

    @torch.no_grad()
    def _rpn_rows(self) -> tuple[Figures, Figures]:
        """The RPN's losses per level, and the sizes of its samples."""
        rpn, config = self.student.rpn, self.student.config
        features = self.student.pyramid(self.inputs["pixel_values"])
        proposed, anchors = rpn(features), rpn.anchors(features)
        rows = rpn.loss_rows(proposed, anchors, anchors.inside(self._padded_sizes()), self.targets)
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

    def _padded_sizes(self) -> Tensor:
        divisor = self.student.config.size_divisor
        return (self.sizes / divisor).ceil() * divisor

    def _with_own_padding(self) -> Figures:
        """Each image with its own padded size, as MMDetection's training pipeline has it."""
        self.student.config.size_divisor = 32
        figures, _ = self._step()
        figures["pad_shapes"] = self._padded_sizes().int().tolist()
        self.student.config.size_divisor = WHOLE_BATCH
        return figures

    def _gradients(self, prefix: str = "") -> Figures:
        """Norms of the gradients that the student's parameters hold."""
        parameters = dict(self.student.named_parameters())
        names = rename(self.case["student"]["checkpoint_shapes"], self.student.config)
        got = {theirs: parameters[ours].grad for theirs, ours in names.items() if ours in parameters}
        reached = [gradient for gradient in got.values() if gradient is not None]
        return {
            f"{prefix}grad_norms": {name: 0.0 if g is None else g.norm().item() for name, g in got.items()},
            f"{prefix}total_grad_norm": nn.utils.get_total_norm(reached).item(),
        }

    # ---- Given regions ----

    def _fixed(self, expected: dict[str, Any]) -> Figures:
        """Everything that the three passes over given regions produce."""
        rois = self._fixed_rois(expected["boxes"])
        self.student.zero_grad()
        student = self.student.pyramid(self.inputs["pixel_values"])
        with torch.no_grad():
            teacher = self.teacher.pyramid(self.inputs["pixel_values"])
        own = self.student.roi_head(student, rois.boxes)
        outputs = FasterRCNNOutput(features=student, rois=rois, predictions=own)
        losses = divide({**self.student.roi_head.loss(own, rois), **self.distiller(outputs, self.inputs)})
        torch.stack([losses[name] for name in KD_LOSSES]).sum().backward()
        matched = (self.targets.boxes[:, None] == rois.targets[:, :, None]).all(-1)  # (B, R, G)
        rows = [image.nonzero()[:, 0] for image in rois.positive]
        score, label = self._best_foreground(teacher, rois)
        return {
            "boxes": expected["boxes"],  # an input
            "levels": self.student.roi_head.levels(rois.boxes)[rois.mask].tolist(),
            "student": self._pass(student, self.student, rois),
            "teacher": self._pass(teacher, self.teacher, rois),
            "cross": self._pass(student, self.teacher, rois),
            "teacher_best_foreground": {"score": score.tolist(), "label": label.tolist()},
            "roi_positives": [len(positive) for positive in rows],
            "positive_indices": [positive.tolist() for positive in rows],
            "positive_gt_indices": [
                found[positive].int().argmax(1).tolist() if len(positive) else []
                for found, positive in zip(matched, rows, strict=True)
            ],
            "avg_factor": count_rows(rois.positive, rois.mask & ~rois.positive).item(),
            "losses": {LOSS_NAMES.get(name, name): value.item() for name, value in losses.items()}
            | {"acc": accuracy(own, rois)},
            **self._gradients("kd_"),
        }

    def _fixed_rois(self, boxes: list[list[list[float]]]) -> RoIs:
        images = [torch.tensor(image).reshape(-1, 4) for image in boxes]
        rows = nn.utils.rnn.pad_sequence(images, batch_first=True)
        counts = torch.tensor([len(image) for image in images])
        mask = torch.arange(rows.shape[1]) < counts[:, None]
        return self.student.roi_head.assign(Proposals(rows, mask), self.targets)

    @torch.no_grad()
    def _pass(self, features: list[Tensor], model: FasterRCNNForObjectDetection, rois: RoIs) -> dict[str, Tensor]:
        head = model.roi_head
        predictions = head(features, rois.boxes)
        rows = {
            "roi_features": head.pool(features, rois.boxes).unflatten(0, rois.mask.shape),
            "cls_score": predictions.logits,
            "bbox_pred": predictions.deltas.flatten(2),
        }
        return {name: values[rois.mask] for name, values in rows.items()}

    @torch.no_grad()
    def _best_foreground(self, features: list[Tensor], rois: RoIs) -> tuple[Tensor, Tensor]:
        logits = self.teacher.roi_head(features, rois.boxes).logits[rois.mask]
        score, label = logits.softmax(-1)[:, :-1].max(-1)
        return score, label

    @torch.no_grad()
    def _pkd(self, note: str | None) -> Figures:
        pkd = Distiller(self.student, self.teacher, [PKD(statistics="batch")]).named_methods["pkd"]
        said = {} if note is None else wording.read("feature_imitation_extra.note", note)
        weight = said.get("weight", pkd.config.weight)
        strides, pixels = self.student.config.strides, self.inputs["pixel_values"]
        levels = [
            [FeatureMap(stride, values) for stride, values in zip(strides, model.pyramid(pixels), strict=True)]
            for model in (self.student, self.teacher)
        ]

        def loss(chosen: slice) -> float:
            parts = pkd(*(Pass(maps[chosen]) for maps in levels), Batch(pixels, None, []))
            return weight * divide(parts)["features"].item()

        per_level = [loss(slice(level, level + 1)) for level in range(len(strides))]
        return {"per_level": per_level, "total": loss(slice(None))}

    # ---- Prediction ----

    @torch.no_grad()
    def _maps(self, model: FasterRCNNForObjectDetection) -> dict[str, list[Tensor]]:
        features = model.pyramid(self.inputs["pixel_values"])
        proposed, anchors = model.rpn(features), model.rpn.anchors(features)
        levels = zip(*(rows.split(anchors.level_lengths, 1) for rows in proposed), features, strict=True)
        maps: dict[str, list[Tensor]] = {"fpn": features, "rpn_cls_logits": [], "rpn_bbox_pred": []}
        for logits, deltas, feature in levels:
            shape = (len(feature), *feature.shape[-2:], -1)
            maps["rpn_cls_logits"].append(logits.reshape(shape).permute(0, 3, 1, 2))
            maps["rpn_bbox_pred"].append(deltas.reshape(shape).permute(0, 3, 1, 2))
        return maps

    @torch.no_grad()
    def _detections(
        self, role: str, model: FasterRCNNForObjectDetection, expected: list[dict[str, Any]]
    ) -> list[Figures]:
        nms = self.case[role]["nms"]
        processor = DetectionImageProcessor(
            nms_threshold=nms["iou_threshold"],
            score_threshold=nms["score_threshold"],
            max_detections=nms["detections_per_image"],
        )
        found = model(self.inputs["pixel_values"], self.inputs["pixel_mask"])
        results = processor.post_process_object_detection(found, target_sizes=self.shapes)
        return [in_order(listed, result) for listed, result in zip(expected, results, strict=True)]

    @torch.no_grad()
    def _proposals(self, expected: list[dict[str, Any]]) -> list[Figures]:
        """The student's in training, with the scores of the anchors that they come from."""
        config, rpn = self.student.config, self.student.rpn
        features = self.student.pyramid(self.inputs["pixel_values"])
        proposed, anchors = rpn(features), rpn.anchors(features)
        kept = rpn.propose(proposed, anchors, self.sizes, config.train_proposals_per_level, config.train_proposals)
        boxes, scores, _ = rpn._best_of_levels(proposed, anchors, config.train_proposals_per_level)
        boxes = torch.minimum(boxes.clamp(min=0), self.sizes.flip(-1).repeat(1, 2)[:, None])
        proposals = []
        for image, listed in enumerate(expected):
            found = kept.boxes[image][kept.mask[image]]
            source = torch.cdist(found, boxes[image]).argmin(1)
            proposals.append(in_order(listed, {"boxes": found, "scores": scores[image][source]}))
        return proposals

    def _identity(self) -> Figures:
        """The distillation where the teacher is its own student: all of it is zero."""
        twin = load_model(self.case, "teacher").train()
        distiller = Distiller(twin, self.teacher, distillation_methods(self.case))
        losses = distilled_losses(distiller, twin, self.inputs)
        torch.stack(list(losses.values())).sum().backward()
        gradient = nn.utils.get_total_norm([p.grad for p in twin.parameters() if p.grad is not None])
        return {
            "loss_cls_kd_below": losses["crosskd/cls"].item(),
            "loss_reg_kd": losses["crosskd/reg"].item(),
            "kd_total_grad_norm_below": gradient.item(),
        }


def accuracy(predictions: RoIPredictions, rois: RoIs) -> float:
    """Regions of which the classifier is right, in percent."""
    background = predictions.logits.shape[-1] - 1
    right = predictions.logits.argmax(-1) == torch.where(rois.positive, rois.labels, background)
    return 100 * right[rois.mask].float().mean().item()
