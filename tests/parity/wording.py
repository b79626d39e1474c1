"""What the English in golden cases means: every known sentence, in one place. Nothing else here reads English.

A number in braces may be another one in another case; all other words and numbers stand for what this library does, and
must be exactly these. A sentence or a field that isn't listed here is an error, since a case that means something else
would be compared with the wrong figures.
"""

from collections.abc import Iterator, Mapping
from typing import Any

Meaning = dict[str, Any]


class UnknownWordingError(ValueError):
    """A golden case says something that this harness doesn't know."""


SENTENCES: dict[str, dict[str, Meaning]] = {
    "distillation.cls": {
        "QFL beta {beta}, weight {weight}": {},
        (
            "soft binary cross entropy (QFL beta {beta}) against the sigmoid of the teacher logits, weight "
            "{weight}, summed over classes, divided by the number of queries of the batch, per decoder "
            "layer"
        ): {},
        (
            "KL of softmax over classes plus background, target from the teacher, T {temperature}, times T "
            "squared, summed over classes, weight {weight}, divided by the number of RoIs, where an image "
            "without any positive RoI counts one RoI too many (sum over images of max(1, positives) + "
            "max(1, negatives))"
        ): {},
    },
    "distillation.reg": {
        "KL of the distance distributions, T {temperature}, weight {weight}": {"kind": "distribution"},
        "GIoU of decoded boxes, weight {weight}": {"kind": "delta"},
        "IoU (-log) of decoded boxes, weight {weight}": {"kind": "distance"},
        (
            "L1 of the raw deltas of the class with the highest teacher foreground probability, weight "
            "{weight}, each RoI weighted by that probability (softmax over classes plus background), "
            "divided by 4 times the sum of these weights"
        ): {"kind": "regions"},
        (
            "L1 between xyxy boxes in pixels of the unpadded image, weight {weight}, each query weighted by "
            "the highest teacher class probability, divided by 4 times the sum of these weights, per "
            "decoder layer"
        ): {"kind": "queries", "box_loss": "l1_pixel"},
    },
    "distillation.centerness": {
        "BCE on positives, weight {weight}": {},
    },
    "distillation.pkd.where": {
        "every FPN level": {},
    },
    "distillation.method": {
        "crosskd": {},
    },
    "distillation.variant": {
        "teacher queries": {"queries": "teacher"},
        "student queries": {"queries": "student"},
    },
    "distillation.position": {
        (
            "in front of the whole RoI head: the teacher RoI head reads RoI features pooled from the "
            "student FPN; no alignment"
        ): {},
        "encoder memory: the teacher decoder reads the student memory; no alignment": {},
    },
    "distillation.rois": {
        "the sampled RoIs of the student, the same for all three passes": {},
    },
    "distillation.rpn": {
        "not distilled": {},
    },
    "distillation.queries": {
        (
            "the teacher queries evolve on the teacher memory with the teacher box refinement; layer l on "
            "the student memory starts from the same teacher query as layer l on the teacher memory"
        ): {},
    },
    "distillation.references": {
        "the same teacher references for both outputs, detached": {},
    },
    "distillation.total": {
        "sum over the {decoder_layers} decoder layers and all ground-truth losses": {},
    },
    "distillation_variants.student_queries": {
        (
            "layer l of the teacher decoder starts from the student query of layer l-1 with the student "
            "references and the student query position; the same query, detached, with the teacher memory "
            "gives the target; the query position is not detached on either side, and the box target and "
            "its weights are not detached in the L1 term"
        ): {},
    },
    "distillation_variants.teacher_queries_l1_giou": {
        (
            "as the main case, but L1 on normalised cxcywh (weight 1.0) plus GIoU of the pixel xyxy boxes "
            "(weight 1.0), both divided by 4 times the sum of the weights (the GIoU rows carry the weight "
            "once)"
        ): {},
    },
    "distillation_variants.teacher_queries_giou_only": {
        "as the l1_giou variant with L1 weight 0": {},
    },
    "distillation_variants.teacher_queries_l1_giou_beta1": {
        "as the l1_giou variant with QFL beta 1": {},
    },
    "ground_truth_losses.cls": {
        "sigmoid focal loss, gamma 2, alpha 0.25, weight 2, divided by max(1, matched boxes)": {},
    },
    "ground_truth_losses.bbox": {
        "L1 on normalised cxcywh, weight 5, divided by the number of matched boxes": {},
    },
    "ground_truth_losses.iou": {
        "GIoU on pixel xyxy boxes, weight 2, divided by the number of matched boxes": {},
    },
    "ground_truth_losses.matching": {
        "Hungarian with costs focal 2, L1 on cxcywh 5, GIoU 2": {},
    },
    "ground_truth_losses.layers": {
        (
            "loss_* is the last decoder layer, d0 to d{last} the earlier ones, enc_* the encoder proposals with "
            "every label set to 0 (one foreground class, the first channel)"
        ): {},
    },
    "ground_truth_losses.rpn_cls": {
        (
            "sigmoid binary cross entropy, weight 1, divided by the sum over images of max(1, positives) + "
            "max(1, negatives)"
        ): {},
    },
    "ground_truth_losses.rpn_bbox": {
        "L1 on encoded deltas of the positives, weight 1, same divisor": {},
    },
    "ground_truth_losses.roi_cls": {
        "softmax cross entropy over classes plus background, mean over RoIs": {},
    },
    "ground_truth_losses.roi_bbox": {
        ("L1 on the deltas of the matched class of positive RoIs, weight 1, divided by the number of all RoIs"): {},
    },
    "ground_truth_losses.box_decoding": {
        (
            "width and height factors clipped to exp of |log(16/1000)|, proposals and detections clipped to "
            "the unpadded image"
        ): {},
    },
    "side.backbone_style": {
        "caffe (stride on the first 1x1 conv of each bottleneck)": {"caffe_style": True},
    },
    "side.channel_order": {
        "BGR": {"bgr": True},
        "RGB": {"bgr": False},
    },
    "side.fpn_extra_levels": {
        "from the last output": {},
        "from the last output, with ReLU before": {"fpn_extra_relu": True},
        "from the last backbone stage": {},
        "P6 is a stride-2 max pooling of P5": {},
    },
    "side.head_norm": {
        "GN 32": {},
    },
    "side.settings": {
        "as the student": {},
    },
    "side.anchors": {
        "3 ratios 0.5 1 2, scale 8, strides 4 8 16 32 64, corner-aligned centre 0": {},
    },
    "side.rpn_box_coder": {
        "delta xywh, std 1 1 1 1": {},
    },
    "side.roi_align": {
        "output 7, sampling_ratio 0, aligned true, levels strides 4 8 16 32, finest scale 56": {},
    },
    "side.box_head": {
        ("2 shared fc {fc_channels}, class-specific regression, {num_classes} classes plus background last"): {},
    },
    "side.roi_box_coder": {
        "delta xywh, std 0.1 0.1 0.2 0.2": {},
    },
    "side.sampling": {
        (
            "deterministic: sampler num is 1000000 for RPN and RoI, so every positive and every negative "
            "candidate is used and ground truth boxes are added to the RoIs in front"
        ): {},
    },
    "side.rpn_assigner": {
        (
            "max IoU, positive at or above 0.7, negative below 0.3, low-quality matches from 0.3 allowed, "
            "anchors anywhere allowed"
        ): {},
    },
    "side.roi_assigner": {
        "max IoU, positive at or above 0.5, negative below 0.5, no low-quality matches": {},
    },
    "side.ffn_activation": {
        "relu": {},
    },
    "side.norm": {
        "LayerNorm after each sub-layer (post-norm)": {},
    },
    "side.backbone_levels": {
        "strides 8 16 32": {},
    },
    "side.neck": {
        (
            "1x1 conv + GroupNorm 32 per level, the fourth level is a stride-2 3x3 conv + GroupNorm 32 on "
            "the last backbone map"
        ): {},
    },
    "side.position_embedding": {
        "sine, 128 per axis, normalised, offset -0.5, temperature 10000": {},
    },
    "side.classification": {
        "sigmoid, {num_classes} classes, no background channel": {},
    },
    "side.dropout": {
        "0 in every module of the student, in training too; the teacher is in eval mode": {},
    },
    "side.detections": {
        "top 100 of the flattened query x class sigmoid scores of the last layer, no NMS": {},
    },
    "trajectory.optimizer": {
        "SGD momentum {momentum} weight_decay {weight_decay} clip_grad_norm {clip_grad_norm}": {},
        "SGD momentum {momentum} weight_decay {weight_decay}": {},
    },
    "feature_imitation_extra.note": {
        "PKD with weight {weight} on the five FPN maps, as a separate term; not part of losses.total": {},
    },
    # Names of the variants in a method's file.
    "variants.crosskd_strategies": {
        "a: D(cross, p_t) - CrossKD": {"strategy": "a"},
        "b: D(p_s, reverse cross), target detached": {"strategy": "b"},
        "c: D(p_s, cross), target detached": {"strategy": "c"},
        "d: D(reverse cross, p_t)": {"strategy": "d"},
        "plain: D(p_s, p_t)": {"strategy": None},
    },
    "variants.crosskd_regions": {
        "BCE, region P": {"beta": 0.0, "region": "P"},
        "BCE, region N": {"beta": 0.0, "region": "N"},
        "BCE, region P+N": {"beta": 0.0, "region": "P+N"},
        "QFL, region P": {"beta": 1.0, "region": "P"},
        "QFL, region N": {"beta": 1.0, "region": "N"},
        "QFL, region P+N": {"beta": 1.0, "region": "P+N"},
    },
    "variants.pkd_head": {
        "cls (third tower convolution)": {"location": "cls"},
        "reg (third tower convolution)": {"location": "reg"},
        "cls+reg": {"location": "cls+reg"},
        "neck": {"location": "neck"},
    },
    "variants.pkd": {
        "five levels, weight {weight} (mmrazor, tuple call level by level)": {},
        "five levels, weight {weight} (CrossKD repository)": {},
        "first four levels, weight {weight} (mmrazor retinanet/fcos config)": {"levels": 4},
        ("student strides 8..64, teacher strides 16..128 (student maps larger), resize_stu=True, weight {weight}"): {
            "strides": ((8, 16, 32, 64), (16, 32, 64, 128))
        },
        ("student strides 8..64, teacher strides 16..128 (student maps larger), resize_stu=False, weight {weight}"): {
            "strides": ((8, 16, 32, 64), (16, 32, 64, 128)),
            "resize": "teacher",
        },
        ("student strides 16..128, teacher strides 8..64 (student maps smaller), resize_stu=True, weight {weight}"): {
            "strides": ((16, 32, 64, 128), (8, 16, 32, 64))
        },
        ("student strides 16..128, teacher strides 8..64 (student maps smaller), resize_stu=False, weight {weight}"): {
            "strides": ((16, 32, 64, 128), (8, 16, 32, 64)),
            "resize": "teacher",
        },
        "one image, 1x1 map (released code: standard deviation of one element)": {"images": 1},
        "two images, 1x1 map": {"images": 2},
        "student = 2.5*teacher - 1 (tends to 0)": {"affine": (2.5, -1.0)},
        "student = -teacher (2*w*(n-1)/n per level, n = N*H*W)": {"affine": (-1.0, 0.0)},
    },
    "variants.fitnets": {
        "1x1 adapter {width} -> 32 per level": {},
        "no adapter, 32 channels": {"width": 32},
    },
    "variants.fgd": {
        "gfl_retinanet, boxes scaled by img_shape (released)": {"model_type": "maps", "box_scale": "image"},
        "gfl_retinanet, boxes scaled by pad_shape": {"model_type": "maps", "box_scale": "padded"},
        "fcos, boxes scaled by img_shape (released)": {"model_type": "crosskd_fcos", "box_scale": "image"},
        "two_stage, boxes scaled by img_shape (released)": {"model_type": "crosskd_faster_rcnn", "box_scale": "image"},
        "gfl_with_align_24_to_32, boxes scaled by img_shape (released)": {"model_type": "maps", "box_scale": "image"},
    },
    "variants.skd": {
        "lambda 4, detach_minmax=False": {"detach_minmax": False},
        "lambda 4, detach_minmax=True": {"detach_minmax": True},
    },
    "variants.gid": {
        "released YAMLs, smooth L1 (feature 5e-4, relation 40, cls 0.1, reg 1, beta 0.1)": {},
        "released YAML variant, plain L1 (beta 0)": {"smooth_l1": 0.0},
        "one GI per image (relation is 0 below three GIs in the batch)": {"count": 1},
        "no low-quality matches (NOT the released setting; free of ties)": {"low_quality": False},
    },
    "variants.fine_grained": {  # the anchors stand beside the figures
        "stride {stride}, anchor scales [8, 16, 32], ratios [0.5,1,2]": {},
        "stride {stride}, anchor scales [4, 8, 16, 32], ratios [0.5,1,2]": {},
        "stride {stride}, anchor scales [2, 4, 8], ratios [0.5,1,2]": {},
    },
    "variants.detrdistill": {
        "{student} student queries, {teacher} teacher queries (every query matched, as released)": {},
        "{student} student queries, {teacher} teacher queries": {},
        "{student} student queries, {teacher} teacher queries ({unmatched} unmatched)": {},
    },
    "imitation": {
        "fine_grained": {"rows": "fine_grained"},
        "inside_gt_box": {"rows": "inside_gt_box"},
        "gi": {"rows": "gi"},
        "gi_per_image_valid_only (composition)": {"rows": "gi_per_image_valid_only"},
        "gi_per_image (composition)": {"rows": "gi_per_image"},
        "main_region (composition)": {"rows": "main_region"},
        "fitnets_whole_map (composition, no gating by positives)": {"rows": "fitnets_whole_map"},
        "decouple (composition, background rows paired with background rows)": {"rows": "decouple"},
    },
}

# Words for people: names, sources and remarks.
TEXT = frozenset({
    "name", "about", "notes", "reference", "sensitivity", "checks.repeat", "side.architecture", "side.backbone",
})  # fmt: skip

# Numbers that the harness uses, or that the shapes of the weights tell too.
NUMBERS = frozenset({
    "num_classes", "seed.student", "seed.teacher", "seed.inputs", "seed.fixed_rois_random",
    "batch.pad_shape", "batch.image_shapes", "batch.boxes_per_image", "checks.student_is_teacher",
    "distillation.cross_head_index", "distillation.pkd.weight",
    "side.checkpoint_shapes", "side.nms.candidates_per_level", "side.nms.detections_per_image",
    "side.nms.iou_threshold", "side.nms.score_threshold",
    "side.proposals.train", "side.proposals.test",
    "side.num_queries", "side.encoder_layers", "side.decoder_layers", "side.d_model", "side.heads",
    "side.feature_levels", "side.sampling_points", "side.ffn_dim", "side.two_stage", "side.with_box_refine",
})  # fmt: skip


def read(field: str, text: str) -> Meaning:
    """What a sentence means: its own meaning, and the numbers in it by their names.

    Args:
        field: A key of :data:`SENTENCES`.
        text: The case's sentence.

    Raises:
        UnknownWordingError: The sentence isn't known in this field.
    """
    for sentence, meaning in SENTENCES.get(field, {}).items():
        numbers = _numbers(sentence.split(), text.split())
        if numbers is not None:
            return meaning | numbers
    known = "; ".join(map(repr, SENTENCES.get(field, {}))) or "none"
    raise UnknownWordingError(
        f"{field}={text!r} is not known. Known are: {known}. Add it to tests/parity/wording.py with what it means."
    )


def variants(document: Mapping[str, Any]) -> dict[str, Meaning]:
    """What the names of a file's variants mean, by these names.

    Raises:
        UnknownWordingError: As :func:`read`.
    """
    return {name: read(f"variants.{document['method']}", name) for name in document["variants"]}


def _numbers(sentence: list[str], words: list[str]) -> Meaning | None:
    """The numbers in the places of a sentence's braces; None if the words are others."""
    if len(sentence) != len(words):
        return None
    numbers: Meaning = {}
    for known, word in zip(sentence, words, strict=True):
        before, brace, rest = known.partition("{")
        name, _, after = rest.partition("}")
        if not brace:
            if known != word:
                return None
            continue
        inner = word.removeprefix(before).removesuffix(after)
        if word != f"{before}{inner}{after}" or not _is_number(inner):
            return None
        numbers[name] = float(inner)
    return numbers


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def check(case: Mapping[str, Any]) -> None:
    """Read everything that a case says, besides its expected figures, which are compared one by one.

    Raises:
        UnknownWordingError: It has a field or a sentence that isn't known, or a number in a sentence is not the one
            that the field of its name has.
    """
    for role in ("student", "teacher"):
        _check(case[role], "side", case | case["student"] | case[role])
    _check(
        {key: value for key, value in case.items() if key not in ("student", "teacher", "expected")},
        "",
        case | case["student"],
    )


def _check(values: Mapping[str, Any], prefix: str, facts: Mapping[str, Any]) -> None:
    for field, value in _fields(values, prefix):
        if field in TEXT or field in NUMBERS:
            continue
        if not isinstance(value, str):
            raise UnknownWordingError(
                f"The field {field}={value!r} is not known. Add it to tests/parity/wording.py, and what it means to "
                "the harness."
            )
        for name, number in read(field, value).items():
            if name in facts and facts[name] != number:
                raise UnknownWordingError(f"{field}={value!r} is at odds with {name}={facts[name]!r} of the same case.")


def _fields(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Fields by their paths; what is listed as text or numbers isn't looked into."""
    for key, value in values.items():
        field = f"{prefix}.{key}" if prefix else key
        if isinstance(value, Mapping) and field not in TEXT | NUMBERS:
            yield from _fields(value, field)
        else:
            yield field, value
