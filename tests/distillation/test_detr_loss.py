"""The supervised loss of DETR-type models: against transformers, for images without objects, over two processes."""

from typing import Any

import pytest
import torch
from accelerate import PartialState, debug_launcher
from torch import Tensor, distributed
from transformers import DetrImageProcessor, RTDetrImageProcessor

from crosskd_hf.data import TrainTransform
from crosskd_hf.distillation.config import DistillationConfig
from crosskd_hf.distillation.detr import DetrDistiller
from crosskd_hf.distillation.detr_families import FAMILIES
from crosskd_hf.distillation.detr_loss import (
    WEIGHTS,
    deformable_detr_loss_parts,
    fix_num_boxes_reduction,
    proposal_loss_parts,
)
from crosskd_hf.models.boxes import image_sizes
from crosskd_hf.models.losses import divide
from crosskd_hf.training.supervision import prepare, supervised_parts
from tests.distillation.detr_zoo import MODELS, batch, build


def loss_of(model: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    outputs = model(**inputs)
    sizes = image_sizes(inputs["pixel_values"], inputs["pixel_mask"])
    return outputs, divide(deformable_detr_loss_parts(outputs, inputs["labels"], sizes))


@torch.no_grad()
def test_equals_the_loss_of_transformers_up_to_the_weight_of_the_classes() -> None:
    model = build("deformable_detr box-refine", class_cost=2)
    outputs, losses = loss_of(model, batch())
    names = {"loss_cls": "loss_ce", "loss_bbox": "loss_bbox", "loss_iou": "loss_giou"}
    for ours, theirs in names.items():
        for prefix, suffix in (("", ""), ("d0.", "_0")):
            expected = WEIGHTS[ours] * outputs.loss_dict[theirs + suffix]
            torch.testing.assert_close(losses[prefix + ours], expected, rtol=1e-4, atol=1e-5)
    assert len(losses) == 6


def test_proposals_train_the_first_stage() -> None:
    model, inputs = build("deformable_detr two-stage"), batch()
    sizes = image_sizes(inputs["pixel_values"], inputs["pixel_mask"])
    outputs = model(**inputs)
    first_stage = [*model.model.enc_output.parameters(), *model.class_embed[-1].parameters()]
    missing = torch.autograd.grad(outputs.loss, first_stage, allow_unused=True, retain_graph=True)
    assert missing == (None,) * len(first_stage)
    parts = proposal_loss_parts(model, outputs, inputs["labels"], sizes)
    assert set(parts) == {"enc_loss_cls", "enc_loss_bbox", "enc_loss_iou"}
    torch.stack(list(divide(parts).values())).sum().backward()
    assert all(parameter.grad.any() for parameter in first_stage)


@pytest.mark.parametrize("name", ["deformable_detr box-refine", "rt_detr_v2"])
@torch.no_grad()
def test_other_models_have_no_proposals_to_add(name: str) -> None:
    model, inputs = build(name), batch()
    assert proposal_loss_parts(model, model(**inputs), inputs["labels"], torch.ones(2, 2)) == {}


def test_batch_without_objects_is_finite() -> None:
    model, inputs = build("deformable_detr two-stage"), batch()
    inputs["labels"] = [inputs["labels"][1]] * 2
    _, losses = loss_of(model, inputs)
    loss = torch.stack(list(losses.values())).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert float(losses["loss_bbox"].detach()) == 0


def test_without_inner_layers_it_says_what_to_set() -> None:
    model, inputs = build("deformable_detr", auxiliary_loss=False), batch()
    with pytest.raises(ValueError, match="auxiliary_loss"):
        loss_of(model, inputs)


def all_losses(name: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What a student is trained on, without what is drawn by chance (denoising queries, batch norm of a batch)."""
    _, settings = MODELS[name]
    changes = {"num_denoising": 0} if "num_denoising" in settings else {}
    student, teacher = build(name, auxiliary_loss=True, **changes), build(name, seed=1)
    if not FAMILIES[student.config.model_type].reads_mask:
        inputs = inputs | {"pixel_mask": torch.ones_like(inputs["pixel_mask"])}
    with DetrDistiller(student, teacher, DistillationConfig(methods=("crosskd", "pkd"))) as distiller:
        outputs = student(**inputs)
        parts = supervised_parts(student, outputs, inputs) | distiller(outputs, inputs)
    return {key: loss.detach() for key, loss in divide(parts).items()} | {"transformers": outputs.loss.detach()}


def _share(folder: str) -> None:
    """One of two processes: the losses of its two images of every model, averaged over both."""
    torch.set_num_threads(1)
    PartialState._reset_state()
    rank = PartialState(cpu=True).process_index
    fix_num_boxes_reduction()
    results = {}
    for name in MODELS:
        torch.manual_seed(0)
        losses = all_losses(name, {key: value[2 * rank : 2 * rank + 2] for key, value in batch(4).items()})
        values = torch.stack(list(losses.values()))
        distributed.all_reduce(values)
        results[name] = dict(zip(losses, (values / 2).tolist(), strict=True))
    if rank == 0:
        torch.save(results, f"{folder}/losses.pt")


@pytest.mark.distributed
def test_two_processes_give_the_losses_of_one(tmp_path: Any) -> None:
    """Only one of four images has objects, so that the processes have different numbers of boxes."""
    debug_launcher(_share, (str(tmp_path),), num_processes=2)
    for name, shared in torch.load(tmp_path / "losses.pt").items():
        torch.manual_seed(0)
        for key, loss in all_losses(name, batch(4)).items():
            of_detr = name == "detr" and key in ("loss_task", "transformers")  # its class term is a mean over queries
            assert shared[key] == pytest.approx(float(loss), rel=0.02 if of_detr else 1e-4, abs=1e-5), (name, key)


@pytest.mark.parametrize("name", MODELS)
def test_processors_that_pad_are_refused_where_the_model_does_not_know_of_padding(name: str) -> None:
    model, inputs = build(name), batch()
    with torch.no_grad():
        boxes, without = (model(pixel_values=inputs["pixel_values"], pixel_mask=mask).pred_boxes
                          for mask in (inputs["pixel_mask"], None))  # fmt: skip
    padding_counts = not torch.allclose(boxes, without, atol=1e-5)
    assert padding_counts == FAMILIES[model.config.model_type].reads_mask
    prepare(model, RTDetrImageProcessor(size={"height": 64, "width": 64}))
    prepare(model, None)
    padding = DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    if padding_counts:
        prepare(model, padding)
    else:
        with pytest.raises(ValueError, match=r"doesn't read pixel_mask.*DetrImageProcessor makes images of different"):
            prepare(model, padding)
        with pytest.raises(ValueError, match="But a TrainTransform with shortest_edges makes images of different"):
            prepare(model, RTDetrImageProcessor(size={"height": 64, "width": 64}), TrainTransform(shortest_edges=[48]))


def test_repeating_the_fix_changes_nothing() -> None:
    fix_num_boxes_reduction()
    torch.manual_seed(0)
    model, inputs = build("rt_detr"), batch()
    with torch.no_grad():
        once = model(**inputs).loss
        fix_num_boxes_reduction()
        assert torch.equal(model(**inputs).loss, once)
