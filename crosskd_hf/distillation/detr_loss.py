"""The supervised loss of DETR-type students: what transformers leaves out, and what depends on the number of processes.

- :func:`fix_num_boxes_reduction` makes the losses of transformers independent of how a batch is spread over processes.
- :func:`proposal_loss_parts` supervises the encoder's proposals of a two-stage Deformable DETR. The loss of
  transformers has no such term, so the first stage of a student trained from scratch would stay as it was drawn.
- :func:`deformable_detr_loss_parts` is the whole loss by MMDetection's definitions, with its weights.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import accelerate
import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torchvision.ops import sigmoid_focal_loss
from transformers import DeformableDetrForObjectDetection, PreTrainedModel
from transformers.loss import loss_d_fine, loss_deimv2, loss_for_object_detection, loss_rt_detr
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher
from transformers.utils import ModelOutput

from crosskd_hf.models.boxes import aligned_iou, to_absolute
from crosskd_hf.models.losses import LossPart

# Loss weights and matching costs of MMDetection's configs/deformable_detr (class, L1, GIoU).
WEIGHTS = {"loss_cls": 2.0, "loss_bbox": 5.0, "loss_iou": 2.0}
COSTS = {"class_cost": 2.0, "bbox_cost": 5.0, "giou_cost": 2.0}


def deformable_detr_loss_parts(
    outputs: ModelOutput, labels: Sequence[Mapping[str, Tensor]], sizes: Tensor
) -> dict[str, LossPart]:
    """MMDetection's loss of Deformable DETR: focal, L1 and GIoU in every decoder layer and, if two-stage, on proposals.

    Args:
        outputs: Of `DeformableDetrForObjectDetection` with `labels` and `auxiliary_loss`, so that it holds every layer.
        labels: Per image `class_labels` (n,) and `boxes` (n, 4), cxcywh relative to the unpadded image; n may be 0.
        sizes: (B, 2) height and width of each image without its padding, pixels.

    Returns:
        Weighted parts `loss_cls`, `loss_bbox`, `loss_iou` of the last layer, `d<l>.loss_*` of the earlier ones and
        `enc_loss_*` of the proposals, all divided by the number of boxes.
    """
    if outputs.get("auxiliary_outputs") is None:
        raise ValueError("The outputs hold the last decoder layer alone: pass labels and set config.auxiliary_loss.")
    layers = [(layer["logits"], layer["pred_boxes"]) for layer in outputs["auxiliary_outputs"]]
    parts = _set_loss(outputs["logits"], outputs["pred_boxes"], labels, sizes)
    for index, (logits, boxes) in enumerate(layers):
        parts |= {f"d{index}.{key}": part for key, part in _set_loss(logits, boxes, labels, sizes).items()}
    return parts | _proposal_parts(outputs, labels, sizes)


def proposal_loss_parts(
    model: PreTrainedModel, outputs: ModelOutput, labels: Sequence[Mapping[str, Tensor]], sizes: Tensor
) -> dict[str, LossPart]:
    """What to add to the loss of transformers so that a two-stage Deformable DETR learns its first stage.

    Returns:
        `enc_loss_cls`, `enc_loss_bbox`, `enc_loss_iou`, or nothing for every other model: their proposals are
        supervised by transformers already, or they have none.
    """
    if isinstance(model, DeformableDetrForObjectDetection) and model.config.two_stage:
        return _proposal_parts(outputs, labels, sizes)
    return {}


def _proposal_parts(outputs: ModelOutput, labels: Sequence[Mapping[str, Tensor]], sizes: Tensor) -> dict[str, LossPart]:
    """Proposals know one class, foreground, on the first channel: the one by which they are ranked."""
    if outputs.get("enc_outputs_class") is None:
        return {}
    foreground = [{**label, "class_labels": torch.zeros_like(label["class_labels"])} for label in labels]
    boxes = outputs["enc_outputs_coord_logits"].float().sigmoid()
    parts = _set_loss(outputs["enc_outputs_class"], boxes, foreground, sizes)
    return {f"enc_{key}": part for key, part in parts.items()}


def _set_loss(
    logits: Tensor, boxes: Tensor, labels: Sequence[Mapping[str, Tensor]], sizes: Tensor
) -> dict[str, LossPart]:
    """Hungarian matching and the three losses of one set of predictions: logits (B, Q, K), boxes (B, Q, 4)."""
    logits, boxes = logits.float(), boxes.float()
    labels = [{**label, "boxes": label["boxes"].float()} for label in labels]
    matches = DeformableDetrHungarianMatcher(**COSTS)({"logits": logits, "pred_boxes": boxes}, labels)
    image = torch.cat([torch.full_like(query, index) for index, (query, _) in enumerate(matches)])
    query = torch.cat([query for query, _ in matches])
    classes = torch.cat([label["class_labels"][box] for label, (_, box) in zip(labels, matches, strict=True)])
    target = torch.cat([label["boxes"][box] for label, (_, box) in zip(labels, matches, strict=True)])  # (n, 4)

    one_hot = torch.zeros_like(logits)
    one_hot[image, query, classes] = 1
    matched = boxes[image, query]
    size = sizes[image]
    iou = aligned_iou(to_absolute(matched[:, None], size), to_absolute(target[:, None], size), generalized=True)
    totals = {
        "loss_cls": sigmoid_focal_loss(logits, one_hot, alpha=0.25, gamma=2, reduction="sum"),
        "loss_bbox": F.l1_loss(matched, target, reduction="sum"),
        "loss_iou": (1 - iou).sum(),
    }
    count = logits.new_tensor(sum(len(label["class_labels"]) for label in labels))
    return {key: LossPart(WEIGHTS[key] * total, count) for key, total in totals.items()}


def fix_num_boxes_reduction() -> None:
    """Make the DETR-type losses of transformers independent of the number of processes. Call once; repeating is safe.

    transformers 5.23 averages the number of boxes over processes and divides by the number of processes once more
    (DETR, Deformable, Conditional, DAB: the loss grows with the number of processes), or uses each process's own
    number (RT-DETR, RT-DETRv2, D-FINE, DEIMv2). Afterwards all of them divide by the mean number of boxes over
    processes, as LW-DETR and RF-DETR do already. Two terms stay local: D-FINE's distillation between its own layers,
    and the number of matches in DEIMv2's dense one-to-one matching.
    """
    if isinstance(loss_for_object_detection.reduce, functools.partial):
        return
    loss_for_object_detection.reduce = functools.partial(accelerate.utils.reduce, reduction="sum")
    for loss in (loss_rt_detr.RTDetrLoss, loss_deimv2.Deimv2Loss):
        loss.forward = _with_mean_num_boxes(loss.forward)
    for loss in (loss_rt_detr.RTDetrLoss, loss_d_fine.DFineLoss, loss_deimv2.Deimv2Loss):
        loss.get_loss = _with_scaled_num_boxes(loss.get_loss)


def _with_mean_num_boxes(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(self: Any, outputs: dict[str, Any], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        self.num_boxes_scale = 1.0
        if distributed.is_available() and distributed.is_initialized():
            local = torch.tensor(float(sum(len(target["class_labels"]) for target in targets)))
            total = local.to(outputs["logits"].device, copy=True)
            distributed.all_reduce(total)
            mean = total.item() / distributed.get_world_size()
            self.num_boxes_scale = max(mean, 1.0) / max(local.item(), 1.0)
        return forward(self, outputs, targets)

    return wrapper


def _with_scaled_num_boxes(get_loss: Any) -> Any:
    @functools.wraps(get_loss)
    def wrapper(self: Any, loss: str, outputs: Any, targets: Any, indices: Any, num_boxes: float) -> dict[str, Tensor]:
        return get_loss(self, loss, outputs, targets, indices, num_boxes * self.num_boxes_scale)

    return wrapper
