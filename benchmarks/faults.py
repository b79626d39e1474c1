"""The faults that `benchmarks/mutants.py` tries: mistakes that people make in such code, one line each.

A fault is named by module and qualified name below `crosskd_hf`; it is found by its text inside of that function,
wherever that stands. Tests are those of the area, below `tests`.
"""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """One fault.

    Args:
        what: In words.
        where: `module:qualified name` below `crosskd_hf`.
        old, new: What is replaced by what.
        tests: Files or node ids below `tests`.
        survives: Why no test can see it, if none does.
    """

    what: str
    where: str
    old: str
    new: str
    tests: tuple[str, ...]
    survives: str = ""


BOXES = ("models/test_boxes.py",)
ASSIGNERS = ("models/test_assigners.py",)
LOSSES = ("models/test_losses.py",)
NMS = ("models/test_nms.py",)
CODERS = ("models/test_box_coders.py",)
DENSE = (
    "models/test_dense.py::test_padding_is_no_part_of_the_loss",
    "models/test_dense.py::test_boxes_are_relative_to_the_unpadded_image",
    "models/test_dense.py::test_no_objects_anywhere",
    "distillation/detectors/test_dense.py::test_images_without_objects",
)
QUALITY = ("models/test_dense.py::test_quality_targets_of_gfl_are_constant",)
GOLDEN = ("parity/test_parity.py::test_the_authors_figures[gfl_r18_from_r50_pkd]",)
GOLDEN_RETINANET = ("parity/test_parity.py::test_the_authors_figures[retinanet_r18_from_r50]",)
FASTER_RCNN = ("models/test_faster_rcnn.py", "distillation/detectors/test_faster_rcnn.py")
TOOD = ("models/test_tood.py",)
PROCESSOR = ("models/test_image_processing.py",)
BACKBONE = ("models/test_backbone.py",)
CROSSKD = ("distillation/methods/test_crosskd.py", "parity/test_methods.py")
CUTS = ("distillation/detectors/test_dense.py", *CROSSKD)
KD = ("distillation/methods/test_kd.py",)
PKD = ("distillation/methods/test_pkd.py", "parity/test_methods.py")
IMITATION = ("distillation/methods/test_imitation.py", "parity/test_methods.py")
DISTILLER = ("distillation/detectors/test_dense.py", "distillation/test_own_method.py")
CONTRACT = ("distillation/test_contract.py",)
DETR = ("distillation/detectors/test_detr.py",)
TRAINER = ("training/test_trainer.py",)
RESUMPTION = ("training/test_trainer.py", "training/test_resumption.py")
SCHEDULES = ("training/test_schedules.py",)
CHECKPOINTS = ("training/test_checkpoints.py",)
GUARD = ("training/test_guard.py",)
EMA = ("training/test_ema.py",)
DETR_LOSS = ("training/test_detr_loss.py",)
DATA = ("data/test_data.py",)
TRANSFORMS = ("data/test_transforms.py",)
CHECKS = ("data/test_check_data.py",)
EVALUATOR = ("inference/test_coco_evaluator.py",)

MODELS = (
    Fault("width and height swapped", "models.boxes:_scale", "sizes.flip(-1)", "sizes", BOXES),
    Fault(
        "width and height of an image swapped",
        "models.boxes:image_sizes",
        "pixel_mask[:, :, 0], pixel_mask[:, 0, :]",
        "pixel_mask[:, 0, :], pixel_mask[:, :, 0]",
        DENSE,
    ),
    Fault(
        "GIoU by the overlap instead of the union",
        "models.boxes:_generalized",
        "(enclosing - union) / enclosing",
        "(enclosing - iou * union) / enclosing",
        BOXES,
    ),
    Fault("union counts the overlap twice", "models.boxes:pairwise_iou", ".sub_(overlap)", "", BOXES),
    Fault(
        "sizes of decoded boxes unbounded",
        "models.boxes:decode_delta",
        ".clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)",
        "",
        BOXES,
    ),
    Fault("deltas not divided by their deviation", "models.boxes:encode_delta", "/ row_of(std, priors)", "", CODERS),
    Fault(
        "one cell of the padding counts",
        "models.assigners:Priors.inside",
        "self.cells < sizes",
        "self.cells <= sizes",
        ASSIGNERS,
    ),
    Fault(
        "steps of rows and columns swapped",
        "models.assigners:Priors.on_grid",
        "dtype=torch.float32) * step[0]",
        "dtype=torch.float32) * step[1]",
        ("convert/test_torchvision.py",),
    ),
    Fault(
        "images without objects divide by nothing",
        "models.assigners:Assignment.count_positives",
        ".clamp(min=1)",
        "",
        ASSIGNERS + DENSE,
    ),
    Fault(
        "forced matches stay ignored",
        "models.assigners:assign_max_iou",
        "valid & ~(ignored & (forced == 0))",
        "valid & ~ignored",
        ASSIGNERS,
    ),
    Fault(
        "a box forces a match at any overlap",
        "models.assigners:assign_max_iou",
        " & (best_of_box >= forced_iou)",
        "",
        ASSIGNERS + FASTER_RCNN,
    ),
    Fault(
        "anchors in the padding may be positive",
        "models.assigners:assign_max_iou",
        "torch.where(valid[..., None], priors.boxes, 0)",
        "priors.boxes.expand(*valid.shape, 4)",
        ASSIGNERS,
    ),
    Fault(
        "positives outside of their box", "models.assigners:assign_atss", " & (sides.amin(-1) > 0.01)", "", ASSIGNERS
    ),
    Fault("biased deviation", "models.assigners:mean_plus_std", "(count - 1).clamp", "count.clamp", ASSIGNERS),
    Fault(
        "a prior goes to the lower IoU",
        "models.assigners:highest_iou_wins",
        'flat, claim, "amax")',
        'flat, claim, "amin")',
        ASSIGNERS,
    ),
    Fault(
        "a point goes to the largest box",
        "models.assigners:assign_points",
        "torch.where(eligible, area(boxes), torch.inf)",
        "torch.where(eligible, -area(boxes), torch.inf)",
        ASSIGNERS,
    ),
    Fault("points in the padding are positive", "models.assigners:assign_points", " & valid[:, None]", "", ASSIGNERS),
    Fault(
        "losses not scaled by the number of processes",
        "models.losses:divide",
        "averaged / normalizers.maximum",
        "1 / normalizers.maximum",
        LOSSES,
    ),
    Fault("ignored rows count", "models.losses:focal_loss", " * assignment.weight", "", LOSSES),
    Fault(
        "the modulating factor is detached",
        "models.losses:quality_focal",
        "difference.pow(beta)\n    line",
        "difference.detach().pow(beta)\n    line",
        LOSSES,
    ),
    Fault(
        "bins swapped",
        "models.losses:distribution_focal",
        "-(1 - right_weight) * at_left - right_weight * at_right",
        "-(1 - right_weight) * at_right - right_weight * at_left",
        LOSSES,
    ),
    Fault(
        "temperature instead of its square",
        "models.losses:distribution_kl",
        "temperature**2 *",
        "temperature *",
        LOSSES,
    ),
    Fault("the target gets a gradient", "models.losses:distribution_kl", ".detach()", "", LOSSES),
    Fault("positions in a part taken for rows", "models.nms:nms_by_class", "first[kept[:most]]", "kept[:most]", NMS),
    Fault("boxes of other classes suppress", "models.nms:_side_by_side", " + apart[:, None]", "", NMS),
    Fault(
        "the last bin cut off",
        "models.box_coders:DistributionCoder.encode",
        "self.reg_max - 0.1",
        "self.reg_max - 1",
        CODERS,
    ),
    Fault("negative distances", "models.box_coders:DistanceCoder.distances", ".clamp(min=0)", "", CODERS),
    Fault(
        "the weight of a positive isn't detached",
        "models.gfl:GFLHead.loss",
        "predictions.logits.detach().sigmoid()",
        "predictions.logits.sigmoid()",
        GOLDEN,
    ),
    Fault("quality targets aren't detached", "models.gfl:GFLHead.loss", "iou.detach()", "iou", QUALITY),
    Fault(
        "GIoU divided by the count",
        "models.gfl:GFLHead.loss",
        "distance.sum(), total",
        "distance.sum(), assignment.count_positives()",
        GOLDEN,
    ),
    Fault(
        "boxes of negatives in the loss",
        "models.retinanet:RetinaNetHead.loss",
        "torch.where(assignment.positive, rows, 0).sum()",
        "rows.sum()",
        GOLDEN_RETINANET,
    ),
    Fault(
        "centerness without the root",
        "models.centerness:centerness_targets",
        ".sqrt()",
        "",
        ("models/test_centerness.py",),
    ),
    Fault(
        "centerness from the other tower",
        "models.two_towers:TwoTowerHead.finish",
        "reg_maps if self.centerness_on_reg else cls_maps",
        "cls_maps if self.centerness_on_reg else reg_maps",
        ("models/test_centerness.py",),
    ),
    Fault("too few negatives", "models.sampling:sample", "count - chosen.sum(1)", "count - limit", FASTER_RCNN),
    Fault("proposals clipped to height x width", "models.rpn:RPN.propose", "sizes.flip(-1)", "sizes", FASTER_RCNN),
    Fault(
        "rows counted from their level's begin",
        "models.rpn:RPN._best_of_levels",
        "best.indices + start",
        "best.indices",
        FASTER_RCNN,
    ),
    Fault("regions one level too coarse", "models.roi_head:RoIHead.levels", ".floor()", ".ceil()", FASTER_RCNN),
    Fault(
        "padded regions in the loss", "models.roi_head:RoIHead.loss", "(cls * rois.mask.flatten())", "cls", FASTER_RCNN
    ),
    Fault(
        "ignored temperature of alignment",
        "models.tood:assign_by_alignment",
        "score.pow(score_exponent) * iou.pow(iou_exponent)",
        "score * iou",
        TOOD,
    ),
    Fault(
        "width and height of the picture swapped",
        "models.image_processing:DetectionImageProcessor.post_process_object_detection",
        "sizes.flip(1)",
        "sizes",
        PROCESSOR,
    ),
    Fault(
        "the padding is marked as image",
        "models.image_processing:_pad_and_stack",
        "mask[index, :rows, :columns] = 1",
        "mask[index] = 1",
        PROCESSOR,
    ),
    Fault(
        "another NMS threshold",
        "models.image_processing:DetectionImageProcessor",
        "nms_threshold = 0.6",
        "nms_threshold = 0.5",
        PROCESSOR,
    ),
    Fault(
        "score without centerness",
        "models.image_processing:DetectionImageProcessor.candidates",
        "score * centerness[image, prior].float().sigmoid()",
        "score",
        PROCESSOR,
    ),
)

DISTILLATION = (
    Fault(
        "rows in the padding count",
        "distillation.distances:mimic",
        "(class_distance(pair, beta, temperature) * weight).sum()",
        "class_distance(pair, beta, temperature).sum()",
        ("distillation/detectors/test_dense.py::TestMimic", "distillation/methods/test_crosskd.py"),
    ),
    Fault(
        "boxes of rows in the padding count",
        "distillation.distances:_box_parts",
        " * pair.weight",
        "",
        ("distillation/detectors/test_dense.py::TestMimic", "distillation/methods/test_crosskd.py"),
    ),
    Fault(
        "distributions divided by four more",
        "distillation.distances:_box_parts",
        '1 if pair.kind == "distribution" else 4',
        "4",
        ("distillation/detectors/test_dense.py::TestMimic", "distillation/methods/test_crosskd.py"),
    ),
    Fault(
        "IoU for GIoU",
        "distillation.distances:box_distances",
        'return {"reg": 1 - aligned_iou(boxes, wanted, generalized=True)}',
        'return {"reg": 1 - aligned_iou(boxes, wanted)}',
        ("distillation/detectors/test_dense.py::TestMimic", "distillation/methods/test_crosskd.py"),
    ),
    Fault(
        "scores with the background",
        "distillation.distances:class_scores",
        "[..., :-1]",
        "",
        ("distillation/detectors/test_faster_rcnn.py", "distillation/detectors/test_detr.py::TestLosses"),
    ),
    Fault(
        "the mean of the teacher left out",
        "distillation.statistics:align",
        "mean, deviation, AXES",
        "0 * mean, deviation, AXES",
        CROSSKD,
    ),
    Fault(
        "biased deviation",
        "distillation.statistics:_standardised",
        "rows.std(axes, keepdim=True)",
        "rows.std(axes, keepdim=True, correction=0)",
        CROSSKD + PKD,
    ),
    Fault(
        "negative taps",
        "distillation.methods.crosskd:CrossKDMethod._adapted",
        "F.relu(feature) if cut.index else feature",
        "feature",
        CROSSKD,
    ),
    Fault(
        "positives and negatives swapped",
        "distillation.methods.crosskd:CrossKDMethod._counted",
        'self.config.region == "P"',
        'self.config.region == "N"',
        CROSSKD,
    ),
    Fault(
        "another published weight",
        "distillation.methods.crosskd:PUBLISHED",
        '"cls": 1.0, "reg": 4.0, "centerness": 1.0',
        '"cls": 1.0, "reg": 1.0, "centerness": 1.0',
        ("parity/test_published.py", "distillation/methods/test_crosskd.py"),
    ),
    Fault(
        "another published cut",
        "distillation.methods.crosskd:PUBLISHED",
        '"cut": 2',
        '"cut": 3',
        (
            "distillation/methods/test_crosskd.py",
            "parity/test_parity.py::test_the_authors_figures[gfl_r18_from_r50_pkd]",
            "experiments/test_presets.py",
        ),
    ),
    Fault(
        "no layer is spared",
        "distillation.methods.crosskd:CrossKDMethod.unreached",
        "return behind",
        "return []",
        (
            "distillation/methods/test_crosskd.py::TestCut",
            "distillation/test_contract.py::TestEveryMethodKeepsItsOwnChecks",
        ),
    ),
    Fault(
        "the teacher's cut isn't the student's",
        "distillation.methods.crosskd:CrossKD.defaults",
        'known["cut"] if self.cut is None else self.cut',
        'known["cut"]',
        ("distillation/methods/test_crosskd.py",),
    ),
    Fault("twice the distance", "distillation.methods.pkd:PKDMethod._distance", " / 2", "", PKD),
    Fault(
        "mean over images for their sum",
        "distillation.methods.pkd:PKDMethod.forward",
        "LossPart(images * total,",
        "LossPart(total,",
        PKD,
    ),
    Fault(
        "maps are not resized to the teacher's",
        "distillation.passes:same_size",
        "if feature.shape[-2:] == target.shape[-2:]:",
        "if feature.shape[1] == target.shape[1]:",
        PKD,
    ),
    Fault(
        "points on the edge are inside",
        "distillation.regions:inside_boxes",
        "points > boxes[..., :2]",
        "points >= boxes[..., :2]",
        IMITATION,
    ),
    Fault(
        "scores without centerness",
        "distillation.mapping:row_targets",
        "scores = scores * prediction.centerness.sigmoid()[..., None]",
        "pass",
        KD,
    ),
    Fault(
        "all anchors learn the box",
        "distillation.mapping:_spread",
        "scores.amax(-1) * best",
        "scores.amax(-1) * weight",
        KD,
    ),
    Fault("distances without the entropy of the target", "distillation.mapping:two_bin_kl", " - entropy", "", KD),
    Fault(
        "the teacher isn't frozen",
        "distillation.distiller:Distiller.__init__",
        "teacher.requires_grad_(False).eval()",
        "teacher.eval()",
        ("distillation/methods/test_crosskd.py::test_the_teacher_is_no_part_of_the_distiller",),
    ),
    Fault(
        "the teacher is in training mode",
        "distillation.distiller:Distiller.__init__",
        "teacher.requires_grad_(False).eval()",
        "teacher.requires_grad_(False).train()",
        (
            "distillation/detectors/test_dense.py::test_any_teacher_for_any_student",
            "distillation/methods/test_crosskd.py",
        ),
    ),
    Fault(
        "weights of terms ignored",
        "distillation.distiller:Distiller.forward",
        "weights[term] * part.total",
        "part.total",
        ("distillation/detectors/test_faster_rcnn.py::test_weights_and_temperature", "distillation/methods/test_kd.py"),
    ),
    Fault(
        "the weight of a method ignored",
        "distillation.distiller:Distiller.forward",
        "method.config.weight * weight",
        "weight",
        ("distillation/test_contract.py::test_the_weight_of_a_method_multiplies_its_terms",),
    ),
    Fault(
        "leaks go unnoticed",
        "distillation.distiller:_check_gradient",
        "if leaked:",
        "if False:",
        ("distillation/test_contract.py::TestEveryMethodKeepsItsOwnChecks",),
    ),
    Fault(
        "classes of teacher and student swapped",
        "distillation.classes:match_classes",
        "teacher=[match for _, match in shared]",
        "teacher=[index for index, _ in shared]",
        ("distillation/test_classes.py",),
    ),
    Fault(
        "mean of the student's pixels not rescaled",
        "distillation.pixels:PixelAdapter.__init__",
        "(mean * ratio - target_mean)",
        "(mean - target_mean)",
        ("distillation/test_pixels.py",),
    ),
    Fault(
        "the padding gets a colour",
        "distillation.pixels:PixelAdapter.__call__",
        "pixels if pixel_mask is None else pixels * pixel_mask[:, None].to(pixels)",
        "pixels",
        ("distillation/test_pixels.py",),
    ),
    Fault(
        "the background lost",
        "distillation.detectors.faster_rcnn:_select",
        "[*classes, background]",
        "[*classes, 0]",
        FASTER_RCNN,
    ),
    Fault(
        "boxes of the student's best class",
        "distillation.detectors.faster_rcnn:FasterRCNNView._comparison",
        "best = target.logits",
        "best = prediction.logits",
        FASTER_RCNN,
    ),
    Fault(
        "the cross pass reads the teacher's own memory",
        "distillation.detectors.detr:DetrView.cross",
        '"encoder_hidden_states": memory',
        '"encoder_hidden_states": trace.memory + 0 * memory',
        ("distillation/detectors/test_detr.py::TestEveryFamily",),
    ),
    Fault(
        "references of the student carry gradient",
        "distillation.detectors.detr:DetrView._query_arguments",
        'taken["reference_points"] = taken["reference_points"].detach()',
        "pass",
        ("distillation/detectors/test_detr.py::test_references_of_a_students_queries_carry_no_gradient",),
    ),
    Fault(
        "an option of another pair is taken",
        "distillation.method:MethodConfig.published",
        "elif entry.name not in known:",
        "elif False:",
        ("distillation/methods/test_crosskd.py",),
    ),
)

TRAINING = (
    Fault(
        "adapters left out of clipping",
        "training.update_trainer:UpdateTrainer._clip_grad_norm",
        "[*model.parameters(), *self._adapters()]",
        "[*model.parameters()]",
        ("training/test_trainer.py::test_student_and_adapters_are_clipped_together",),
    ),
    Fault(
        "adapters without an optimiser",
        "training.trainer:CrossKDTrainer.create_optimizer",
        "optimizer.add_param_group(group)",
        "pass",
        ("training/test_trainer.py::test_adapters_learn_and_the_teacher_does_not",),
    ),
    Fault(
        "the gradients of adapters pile up",
        "training.update_trainer:UpdateTrainer._after_optimizer_step",
        "parameter.grad = None",
        "pass",
        (
            "training/test_trainer.py::test_gradients_of_adapters_are_those_of_their_update",
            "training/test_trainer.py::test_accumulation_is_one_big_batch",
        ),
    ),
    Fault(
        "accumulated losses not scaled",
        "training.update_trainer:UpdateTrainer.get_batch_samples",
        "self.args.world_size * len(batches)",
        "self.args.world_size",
        ("training/test_trainer.py::test_accumulation_is_one_big_batch",),
    ),
    Fault(
        "normalizers of one micro-batch",
        "training.update_trainer:UpdateTrainer.get_batch_samples",
        "if len(batches) > 1 and",
        "if len(batches) > 9 and",
        ("training/test_trainer.py::test_accumulation_is_one_big_batch",),
    ),
    Fault(
        "a skipped update keeps its gradients",
        "training.update_trainer:UpdateTrainer._before_optimizer_step",
        "parameter.grad = None",
        "pass",
        (
            "training/test_trainer.py::test_a_skipped_update_moves_neither_student_nor_adapters",
            "training/test_trainer.py::test_a_part_that_is_not_finite_is_skipped_and_counted",
        ),
    ),
    Fault(
        "logged parts summed over micro-batches",
        "training.update_trainer:UpdateTrainer._note",
        "value = value / self._micro_batches",
        "pass",
        (
            "training/test_trainer.py::test_accumulation_is_one_big_batch",
            "training/test_trainer.py::test_every_part_is_logged_and_their_sum_is_the_loss",
        ),
    ),
    Fault(
        "the student is prepared again on resume",
        "training.trainer:CrossKDTrainer._begin_training",
        "self._resumed is None and self._prepared",
        "self._prepared",
        ("distillation/test_own_method.py::test_prepares_the_student_once_and_not_on_resume",),
    ),
    Fault(
        "adapters of a checkpoint not loaded",
        "training.trainer:CrossKDTrainer._load_from_checkpoint",
        "adapters.load(self.distiller, Path(resume_from_checkpoint))",
        "pass",
        ("training/test_trainer.py::test_resume_repeats_the_run",),
    ),
    Fault(
        "statistics move in the normalizer pass",
        "training.loss_parts:normalizer_pass",
        "buffer.copy_(before)",
        "pass",
        ("training/test_trainer.py::test_normalizer_pass_leaves_no_trace",),
    ),
    Fault(
        "a repeated image's normalizer counts",
        "training.loss_parts:weighted",
        "part.normalizer * weight",
        "part.normalizer",
        ("training/test_trainer.py::test_images_that_fill_up_the_last_batches_do_not_count",),
    ),
    Fault(
        "the rate falls one update late",
        "training.schedules:step_factor",
        "update >= decay for",
        "update > decay for",
        SCHEDULES,
    ),
    Fault(
        "warm-up from zero",
        "training.schedules:step_factor",
        "start + (1 - start) * update / last if",
        "update / last if",
        SCHEDULES,
    ),
    Fault(
        "the rate falls an epoch late",
        "training.schedules:decay_updates",
        "updates * epoch /",
        "updates * (epoch + 1) /",
        SCHEDULES,
    ),
    Fault(
        "biases of norms count as biases",
        "training.schedules:_plain_biases",
        "if not isinstance(module, normalisations):",
        "if True:",
        SCHEDULES,
    ),
    Fault(
        "decay and rest swapped",
        "training.ema:WeightAverage.update",
        "_wide(tensor), 1 - decay",
        "_wide(tensor), decay",
        EMA,
    ),
    Fault(
        "no warm-up of the average",
        "training.ema:WeightAverage.update",
        "min(self.decay, (1 + self.updates) / (10 + self.updates))",
        "self.decay",
        EMA,
    ),
    Fault(
        "a resumed average begins anew",
        "training.checkpointing_trainer:CheckpointingTrainer._begin_training",
        "self.args.ema_decay, self.state.global_step)",
        "self.args.ema_decay, 0)",
        (
            "training/test_trainer.py::test_resume_repeats_the_run",
            "training/test_trainer.py::test_the_average_is_what_is_evaluated_saved_and_kept",
        ),
    ),
    Fault(
        "one checkpoint too many",
        "training.checkpoints:rotate",
        "len(whole) - limit)",
        "len(whole) - limit - 1)",
        CHECKPOINTS,
    ),
    Fault(
        "the best checkpoint is deleted",
        "training.checkpoints:rotate",
        "{Path(best)} if best else set()",
        "set()",
        CHECKPOINTS,
    ),
    Fault(
        "checksums aren't compared",
        "training.checkpoints:_file_fault",
        "if checksum is not None and _checksum(path) != checksum:",
        "if False:",
        CHECKPOINTS,
    ),
    Fault(
        "an infinite gradient passes",
        "training.guard:NonFiniteGuard.triggered",
        "~torch.isfinite(norm)",
        "torch.isnan(norm)",
        GUARD,
    ),
    Fault(
        "every epoch has the same order",
        "training.reproducible:RandomOrder.__iter__",
        "self.seed + self.epoch",
        "self.seed",
        ("training/test_resumption.py::test_a_resumed_epoch_has_its_own_order",),
    ),
    Fault(
        "every epoch has the order and the augmentation of the first",
        "training.coco_trainer:CocoTrainer._set_epoch",
        "part.set_epoch(epoch)",
        "part.set_epoch(0)",
        (
            "training/test_resumption.py::test_every_epoch_has_its_own_augmentation",
            "training/test_trainer.py::test_resume_repeats_the_run",
            "training/test_trainer.py::test_augmentation_depends_on_image_and_epoch_alone",
        ),
    ),
    Fault(
        "other data on resume goes unnoticed",
        "training.resumption:check_run",
        'if then.get("data", run["data"]) != run["data"]:',
        "if False:",
        ("training/test_resumption.py::test_other_data_are_refused",),
    ),
    Fault(
        "a batch of another size on resume skips images",
        "training.resumption:check_update",
        "if differing:",
        "if False:",
        ("training/test_resumption.py::test_what_does_not_fit_is_refused_by_name",),
    ),
    Fault(
        "a new rate on resume is ignored",
        "training.resumption:adopt_settings",
        'group["initial_lr"] = now["lr"]',
        "pass",
        ("training/test_resumption.py::test_a_new_learning_rate_is_taken_and_told",),
    ),
    Fault(
        "detections of the last evaluation stay",
        "training.evaluating_trainer:EvaluatingTrainer.evaluation_loop",
        "evaluator.reset()",
        "pass",
        (
            "training/test_trainer.py::test_an_evaluation_forgets_the_one_before",
            "training/test_trainer.py::test_evaluate_is_coco_ap_of_every_image",
        ),
    ),
    Fault(
        "queries without object don't count",
        "training.detr_loss:_Recording.get_loss",
        "matched + self.eos_coef * (queries - matched)",
        "float(matched)",
        ("training/test_detr_loss.py::test_two_micro_batches_are_one_batch",),
    ),
)

DATA_FAULTS = (
    Fault("sizes taken for corners", "data.collators:make_record", "boxes[:, 2:] += boxes[:, :2]", "pass", DATA),
    Fault(
        "boxes relative to height x width",
        "data.collators:_labels",
        "[width, height, width, height]",
        "[height, width, height, width]",
        DATA,
    ),
    Fault(
        "width and height of the original swapped",
        "data.collators:_labels",
        '[example["height"], example["width"]]',
        '[example["width"], example["height"]]',
        DATA,
    ),
    Fault(
        "crowd regions are learned",
        "data.collators:is_trained_on",
        "(crowd == 0)",
        "(crowd >= 0)",
        DATA,
    ),
    Fault(
        "flipped images with unflipped boxes",
        "data.transforms:TrainTransform.__call__",
        'F.horizontal_flip(record["boxes"])',
        'record["boxes"]',
        TRANSFORMS,
    ),
    Fault(
        "areas of the original size",
        "data.transforms:resize",
        " * (size[0] * size[1] / (height * width))",
        "",
        TRANSFORMS,
    ),
    Fault(
        "the longer side is exceeded",
        "models.image_processing:resized_size",
        "min(scale, longest",
        "max(scale, longest",
        TRANSFORMS,
    ),
    Fault(
        "labels of dropped boxes stay",
        "data.transforms:select_objects",
        '"labels": record["labels"][keep]',
        '"labels": record["labels"]',
        TRANSFORMS,
    ),
    Fault(
        "category ids off by one",
        "data.categories:CategoryMap.to_raw",
        "return self.raw_ids[index]",
        "return self.raw_ids[index - 1]",
        DATA + EVALUATOR,
    ),
    Fault(
        "every epoch has the same order of batches",
        "data.sampling:AspectRatioSampler.__iter__",
        "self.seed + self.epoch",
        "self.seed",
        DATA,
    ),
    Fault(
        "squares mixed with portraits",
        "data.sampling:AspectRatioSampler.__init__",
        "list(heights[:])) > torch.tensor(",
        "list(heights[:])) < torch.tensor(",
        DATA,
    ),
    Fault("corners read as sizes", "data.box_formats:to_xywh", "boxes[:, 2:] - boxes[:, :2]", "boxes[:, 2:]", DATA),
    Fault(
        "an id that isn't there is found",
        "data.coco_json:positions",
        "(found >= 0) & (keys[where] == queries)",
        "found >= 0",
        DATA + CHECKS,
    ),
    Fault(
        "boxes in [0, 1] pass", "data.check_boxes:JudgedBoxes._wrong_as_a_whole", "(boxes <= 1)", "(boxes <= 0)", CHECKS
    ),
)

EVALUATION = (
    Fault(
        "corners for sizes",
        "inference.coco_evaluator:CocoEvaluator._row",
        "boxes[:, 2:] - boxes[:, :2]",
        "boxes[:, 2:]",
        EVALUATOR,
    ),
    Fault(
        "contiguous classes for raw ids",
        "inference.coco_evaluator:CocoEvaluator._detections",
        "self.categories.to_raw(int(row[5]))",
        "int(row[5])",
        EVALUATOR,
    ),
    Fault(
        "AP of a class from small objects",
        "inference.coco_library:figures",
        "[..., 0, -1]",
        "[..., 1, -1]",
        EVALUATOR,
    ),
    Fault(
        "AP of a class from one detection",
        "inference.coco_library:figures",
        "[..., 0, -1]",
        "[..., 0, 0]",
        EVALUATOR,
    ),
    Fault(
        "repeated images replace the first",
        "inference.coco_evaluator:CocoEvaluator.merge",
        "{**rows, **self.rows}",
        "{**self.rows, **rows}",
        EVALUATOR,
    ),
    Fault(
        "crowd regions count as objects",
        "inference.coco_truth:Truth.of",
        'crowds=flat["iscrowd"]',
        'crowds=0 * flat["iscrowd"]',
        EVALUATOR,
    ),
    Fault("an object of id 0 is never found", "inference.coco_truth:Truth.of", " or (ids == 0).any()", "", EVALUATOR),
    Fault(
        "filled up images are kept",
        "training.predictions:KeptPredictions.gathered",
        "images -= count",
        "pass",
        ("training/test_arguments.py::test_batches_of_all_processes_in_the_order_of_the_data",),
    ),
    Fault(
        "images that were not evaluated pass",
        "inference.coco_evaluator:CocoEvaluator._ordered_rows",
        "if missing:",
        "if False:",
        EVALUATOR,
    ),
    Fault(
        "boxes reach over the edge of their image",
        "inference.detection:detections",
        ".clamp(min=0).minimum(size.flip(0)",
        ".clamp(min=0).maximum(size.flip(0)",
        ("inference/test_detection.py",),
    ),
    Fault(
        "an image keeps the padding of its neighbours",
        "inference.detection:parts_of_one_canvas",
        "[..., : canvas[0], : canvas[1]]",
        "",
        ("inference/test_batch_size.py",),
    ),
    Fault(
        "the model's numbers of classes for those of the data",
        "inference.evaluation:_renamed",
        'to_data[result["labels"].cpu()]',
        'result["labels"].cpu()',
        ("inference/test_detection.py", "cli/test_inference.py::test_evaluate_finds_classes_by_name"),
    ),
    Fault(
        "the resized size for that of the original",
        "inference.detection:detect",
        "[[image.height, image.width]]",
        '[[*inputs["pixel_values"].shape[-2:]]]',
        ("inference/test_detection.py",),
    ),
)

FAULTS = (*MODELS, *DISTILLATION, *TRAINING, *DATA_FAULTS, *EVALUATION)
