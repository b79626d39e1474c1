"""The supervised loss of DETR-type models: against transformers, spread over batches and processes, beside others."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from accelerate import PartialState, debug_launcher
from torch import Tensor, distributed
from transformers import (
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessor,
    DetrImageProcessor,
    RTDetrImageProcessor,
    Trainer,
    TrainingArguments,
)
from transformers.loss import loss_d_fine, loss_for_object_detection, loss_rt_detr

from crosskd_hf.data import TrainTransform
from crosskd_hf.distillation import Distiller
from crosskd_hf.distillation.detectors.detr_families import FAMILIES
from crosskd_hf.models.losses import LossPart, divide
from crosskd_hf.training import upstream
from crosskd_hf.training.detr_loss import DetrLoss, is_taken_over, proposal_parts, take_over
from crosskd_hf.training.loss_parts import add_up, balanced, folded
from crosskd_hf.training.supervision import WHOLE, prepare, supervised_parts
from crosskd_hf.training.trainer import CrossKDTrainer
from crosskd_hf.training.upstream import LOSSES, UpstreamError
from tests.distillation.detr_zoo import MODELS, batch, build
from tests.parity import parity_detr
from tests.tiny_backbone import as_if_loaded
from tests.tiny_run import load_data, make_data, make_deformable_detr, make_pair, settings

Batch = dict[str, Any]
DENOISING = [name for name, (_, options) in MODELS.items() if "num_denoising" in options]
GOLDEN = Path(__file__).parents[1] / "golden" / "deformable_detr_r18_from_r50.json"
# Which of four images have objects: one process has all of them; each has some; one image alone.
SPREADS = {"one-sided": (1, 1, 0, 0), "even": (1, 0, 1, 0), "single": (1, 0, 0, 0)}


def student(name: str, **changes: Any) -> Any:
    """A student in training mode without chance: no noise on denoising queries, no dropout, fixed batch norm."""
    quiet = {"label_noise_ratio": 0.0, "box_noise_scale": 0.0} if name in DENOISING else {}
    model = build(name, auxiliary_loss=True, **(quiet | changes)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
        for option in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, option, None), float):
                setattr(module, option, 0.0)
    return model


def four_images(spread: tuple[int, ...], padded: bool = False) -> Batch:
    inputs = batch(4)
    if not padded:
        inputs["pixel_mask"] = torch.ones_like(inputs["pixel_mask"])
    some, none = inputs["labels"][:2]
    return inputs | {"labels": [some if has else none for has in spread]}


def part_of(inputs: Batch, start: int, stop: int) -> Batch:
    return {key: value[start:stop] for key, value in inputs.items()}


def parts_of(model: Any, inputs: Batch) -> dict[str, LossPart]:
    return supervised_parts(model, model(**inputs), inputs)


def divided(micro_batches: list[dict[str, LossPart]]) -> dict[str, Tensor]:
    """The loss terms of an update of several micro-batches, as the trainer makes them."""
    sums = add_up(micro_batches)
    each = [
        balanced(divide(parts, sums.normalizers, len(micro_batches)), parts, sums.normalizers)
        for parts in micro_batches
    ]
    return {name: torch.stack([one[name] for one in each]).mean() for name in each[0]}


def total(terms: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


def gradients(model: Any, loss: Tensor) -> Tensor:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    rows = [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]
    return torch.cat([row.flatten() for row in rows])


# ---- Against transformers ----


@pytest.mark.parametrize("name", MODELS)
def test_sum_and_gradients_are_those_of_transformers(name: str) -> None:
    """Up to the class weight of Deformable DETR, which is the published one, and its proposals."""
    model, inputs = student(name), four_images((1, 1, 1, 1))
    theirs = model(**inputs)
    expected = theirs.loss
    if model.config.model_type == "deformable_detr":
        expected = expected + theirs.loss_dict["loss_ce"] + theirs.loss_dict["loss_ce_0"]
    slope = gradients(model, expected)
    assert take_over(model)
    ours = model(**inputs)
    torch.testing.assert_close(ours.loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(model, ours.loss), slope, rtol=1e-3, atol=1e-4 * float(slope.abs().max()))
    torch.testing.assert_close(
        total(divided([model(**inputs).loss_dict])), expected, rtol=1e-5, atol=1e-5
    )  # the trainer's way to the same number


@torch.no_grad()
def test_terms_are_those_of_transformers() -> None:
    model, inputs = student("deformable_detr box-refine"), batch()
    theirs = model(**inputs).loss_dict
    take_over(model)
    ours = divide(model(**inputs).loss_dict)
    weights = {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0}
    assert list(ours) == [*weights, *(f"d0.{term}" for term in weights)]
    for term, weight in weights.items():
        torch.testing.assert_close(ours[term], weight * theirs[term])
        torch.testing.assert_close(ours[f"d0.{term}"], weight * theirs[f"{term}_0"])


def test_proposals_train_the_first_stage() -> None:
    model, inputs = student("deformable_detr two-stage"), batch()
    take_over(model)
    outputs = model(**inputs)
    first_stage = [*model.model.enc_output.parameters(), *model.class_embed[-1].parameters()]
    missing = torch.autograd.grad(outputs.loss, first_stage, allow_unused=True, retain_graph=True)
    assert missing == (None,) * len(first_stage)
    parts = proposal_parts(model, outputs, inputs["labels"])
    assert set(parts) == {"enc_loss_ce", "enc_loss_bbox", "enc_loss_giou"}
    total(divide(parts)).backward()
    assert all(parameter.grad.any() for parameter in first_stage)


@pytest.mark.parametrize("name", ["deformable_detr box-refine", "rt_detr_v2"])
@torch.no_grad()
def test_other_models_have_no_proposals_to_add(name: str) -> None:
    model, inputs = student(name), batch()
    take_over(model)
    assert proposal_parts(model, model(**inputs), inputs["labels"]) == {}


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_without_objects_is_finite_and_has_the_same_terms(name: str) -> None:
    model = student(name)
    take_over(model)
    full, empty = (parts_of(model, part_of(four_images((1, 1, 0, 0)), start, start + 2)) for start in (0, 2))
    assert list(empty) == list(full)
    assert all(float(part.normalizer) == 0 for term, part in empty.items() if "bbox" in term)
    terms = divide(empty)
    total(terms).backward()
    assert all(torch.isfinite(loss) for loss in terms.values())
    assert all(float(loss.detach()) == 0 for term, loss in terms.items() if "bbox" in term or "dn_" in term)


@pytest.mark.parametrize("name", DENOISING)
@torch.no_grad()
def test_queries_that_fill_up_an_image_have_no_denoising_loss(name: str) -> None:
    """Transformers lets the queries of an image without objects learn "no class", as many as its neighbours need."""
    model = student(name)
    mixed, alone = (four_images((1, 0, 0, 0)), part_of(four_images((1, 0, 0, 0)), 0, 1))
    theirs = {term: loss for term, loss in model(**alone).loss_dict.items() if "_dn_" in term}
    take_over(model)
    ours = {term: loss for term, loss in divided([parts_of(model, mixed)]).items() if "dn_" in term}
    assert float(total(ours)) == pytest.approx(float(total(theirs)), rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_float32_under_autocast(name: str) -> None:
    model, inputs = student(name), batch()
    if not FAMILIES[model.config.model_type].reads_mask:
        inputs["pixel_mask"] = torch.ones_like(inputs["pixel_mask"])
    take_over(model)
    with torch.autocast("cpu", torch.bfloat16):
        parts = parts_of(model, inputs)
    assert {part.total.dtype for part in parts.values()} == {torch.float32}
    assert all(torch.isfinite(part.total) for part in parts.values())


# ---- Spread over micro-batches and processes ----


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("name", MODELS)
def test_two_micro_batches_are_one_batch(name: str, spread: str) -> None:
    model, inputs = student(name), four_images(SPREADS[spread])
    take_over(model)
    whole = divided([parts_of(model, inputs)])
    halves = divided([parts_of(model, part_of(inputs, start, start + 2)) for start in (0, 2)])
    assert list(halves) == list(whole)
    for term, loss in whole.items():
        torch.testing.assert_close(halves[term], loss, rtol=1e-5, atol=1e-6, msg=lambda text, t=term: f"{t}: {text}")
    slope = gradients(model, total(whole))
    difference = gradients(model, total(halves)) - slope
    assert float(difference.norm()) < 1e-5 * float(slope.norm())


def all_losses(name: str, start: int, stop: int) -> dict[str, Tensor]:
    """What a student is trained on: the terms of its labels, and of a teacher of its family."""
    model, teacher = student(name), build(name, seed=1)
    prepare(model, None)
    inputs = part_of(four_images(SPREADS["one-sided"]), start, stop)
    with Distiller(model, teacher, ["crosskd", "pkd"]) as distiller:
        outputs = model(**inputs)
        parts = supervised_parts(model, outputs, inputs) | distiller(outputs, inputs)
    sums = add_up([parts])
    return {
        key: loss.detach() for key, loss in balanced(divide(parts, sums.normalizers), parts, sums.normalizers).items()
    }


def _share(folder: str) -> None:
    """One of two processes: the losses of its two images of every model, averaged over both."""
    torch.set_num_threads(1)
    PartialState._reset_state()
    rank = PartialState(cpu=True).process_index
    results = {}
    for name in MODELS:
        torch.manual_seed(0)
        terms = all_losses(name, 2 * rank, 2 * rank + 2)
        values = torch.stack(list(terms.values()))
        distributed.all_reduce(values)
        results[name] = dict(zip(terms, (values / 2).tolist(), strict=True))
    if rank == 0:
        torch.save(results, f"{folder}/losses.pt")


@pytest.mark.distributed
def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    """Half of the images have no object, and the second process no other images."""
    debug_launcher(_share, (str(tmp_path),), num_processes=2)
    for name, shared in torch.load(tmp_path / "losses.pt").items():
        torch.manual_seed(0)
        for key, loss in all_losses(name, 0, 4).items():
            assert shared[key] == pytest.approx(float(loss), rel=1e-4, abs=1e-5), (name, key)


# ---- Nothing else changes ----


def _state_of_transformers() -> dict[str, Any]:
    """Everything in the modules of losses, and in their classes."""
    modules = {name: vars(module) for name, module in sys.modules.items() if name.startswith("transformers.loss")}
    found = {f"{name}.{key}": value for name, content in modules.items() for key, value in content.items()}
    for name, value in list(found.items()):
        if inspect.isclass(value) and value.__module__.startswith("transformers.loss"):
            found |= {f"{name}.{key}": inner for key, inner in vars(value).items()}
    return found


def test_an_ordinary_trainer_beside_ours_is_unchanged(tmp_path: Path) -> None:
    make_data(tmp_path)
    train, val = load_data(tmp_path)
    plain, (ours, _, images) = make_deformable_detr(2), make_pair("deformable_detr")
    arguments = TrainingArguments(str(tmp_path / "plain"), use_cpu=True, report_to="none")
    ordinary = Trainer(plain, arguments, train_dataset=train.dataset)
    before = _state_of_transformers()
    trainer = CrossKDTrainer(ours, settings(tmp_path, schedule=None), train.dataset, val.dataset, images)
    inputs = trainer.data_collator([train.dataset[0], train.dataset[1]])
    expected = make_deformable_detr(2).train()(**inputs)
    trainer.compute_loss(trainer.model.train(), inputs)
    after = _state_of_transformers()
    assert before.keys() == after.keys()
    assert all(before[name] is value for name, value in after.items())
    assert not is_taken_over(plain)
    loss, outputs = ordinary.compute_loss(plain.train(), inputs, return_outputs=True)
    assert torch.equal(loss, expected.loss)
    assert outputs.loss_dict.keys() == expected.loss_dict.keys()
    assert is_taken_over(trainer.model)
    assert isinstance(outputs.loss_dict["loss_ce"], Tensor)


def test_a_loss_function_of_the_users_own_is_left_alone() -> None:
    def mine(*args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor], None]:
        return torch.tensor(3.0, requires_grad=True), {"loss_mine": torch.tensor(3.0)}, None

    model, inputs = student("deformable_detr"), batch()
    model.loss_function = mine
    prepare(model, None)
    assert model.loss_function is mine
    parts = parts_of(model, inputs)
    assert set(parts) == {WHOLE}
    assert float(divide(parts)[WHOLE].detach()) == 3


def test_taking_over_twice_changes_nothing() -> None:
    model = student("rt_detr")
    take_over(model)
    first = model.loss_function
    assert take_over(model)
    assert model.loss_function is first


def test_a_taken_over_model_is_copied_pickled_and_saved(tmp_path: Path) -> None:
    model, inputs = student("deformable_detr").eval(), batch()
    take_over(model)
    expected = model(**inputs).loss
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**inputs).loss, expected)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert not is_taken_over(again)
    assert "loss" not in json.loads((tmp_path / "config.json").read_text())


# ---- A release that differs is refused ----


def _release(function: Any, **names: Any) -> FunctionType:
    """A loss function as it would be with other names around it."""
    return FunctionType(function.__code__, function.__globals__ | names, function.__name__, function.__defaults__)


def test_every_family_has_a_loss_in_the_table() -> None:
    found = {type(model := build(name)).__name__: model.loss_function.__name__ for name in MODELS}
    assert set(found.values()) == set(LOSSES)
    assert {build(name).config.model_type for name in MODELS} == set(FAMILIES)


def test_an_unknown_loss_of_a_known_family_is_refused() -> None:
    def other(*args: Any) -> None: ...

    other.__module__ = "transformers.loss.loss_next"
    model = student("rt_detr")
    model.loss_function = other
    with pytest.raises(UpstreamError, match=r"the loss of 'rt_detr' is other.*tried with transformers"):
        prepare(model, None)


def test_a_loss_that_makes_another_criterion_is_refused() -> None:
    original = loss_rt_detr.RTDetrForObjectDetectionLoss
    with pytest.raises(UpstreamError, match="doesn't make a RTDetrLoss any more"):
        upstream.criterion_of(_release(original, RTDetrLoss=None))
    renamed = FunctionType((lambda config: None).__code__, original.__globals__, original.__name__)
    with pytest.raises(UpstreamError, match="doesn't make a RTDetrLoss any more"):
        DetrLoss(renamed)


def test_a_criterion_that_computes_its_terms_another_way_is_refused() -> None:
    class Renamed(loss_d_fine.DFineLoss):
        def get_loss(self, loss: str, outputs: Any, targets: Any, indices: Any) -> Any: ...

    with pytest.raises(UpstreamError, match=r"get_loss takes \(loss outputs targets indices\)"):
        DetrLoss(_release(loss_d_fine.DFineForObjectDetectionLoss, DFineLoss=Renamed))

    class Unused(torch.nn.Module):
        def get_loss(self, loss: str, outputs: Any, targets: Any, indices: Any, num_boxes: Any) -> Any: ...

    with pytest.raises(UpstreamError, match="or nobody calls it"):
        DetrLoss(_release(loss_for_object_detection.ForObjectDetectionLoss, ImageLoss=Unused))


# ---- Through the trainer ----


def test_the_log_adds_up_layers() -> None:
    terms = dict.fromkeys(("loss_ce", "d0.loss_ce", "d1.loss_ce", "d0.dn_loss_vfl", "enc_loss_ce"), torch.tensor(1.0))
    terms |= {"d0.loss_ddf_matched": torch.tensor(0.5), "d0.loss_ddf_unmatched": torch.tensor(0.25)}
    expected = {"loss_ce": 1, "aux_loss_ce": 2, "dn_loss_vfl": 1, "enc_loss_ce": 1, "aux_loss_ddf": 0.75}
    assert {name: float(value) for name, value in folded(terms).items()} == expected


def test_terms_of_labels_add_up_to_the_loss_in_the_log(tmp_path: Path) -> None:
    make_data(tmp_path)
    train, val = load_data(tmp_path)
    model, _, images = make_pair("deformable_detr")
    options = {"schedule": None, "learning_rate": 1e-4, "max_steps": 1}
    trainer = CrossKDTrainer(model, settings(tmp_path, **options), train.dataset, val.dataset, images)
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    terms = {f"{prefix}loss_{term}" for prefix in ("", "aux_") for term in ("ce", "bbox", "giou")}
    assert terms == {name for name in entry if "loss_" in name}
    assert sum(entry[name] for name in terms) == pytest.approx(entry["loss"], rel=1e-5)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_images_with_fewer_locations_than_queries_are_told(tmp_path: Path, role: str) -> None:
    make_data(tmp_path)
    train, val = load_data(tmp_path)
    student, _, images = make_pair("deformable_detr")
    config = copy.deepcopy(student.config)
    config.two_stage = config.with_box_refine = True
    config.two_stage_num_proposals = config.num_queries = 500
    greedy = as_if_loaded(DeformableDetrForObjectDetection(config))
    pair = (greedy, None) if role == "student" else (student, greedy)
    options = {"schedule": None, "max_steps": 1, "methods": ["fitnets"]}
    trainer = CrossKDTrainer(
        pair[0], settings(tmp_path, **options), train.dataset, val.dataset, images, teacher_model=pair[1]
    )
    for run in (trainer.train, *[trainer.evaluate] * (role == "student")):
        with pytest.raises(ValueError, match="fewer locations than a two-stage detector chooses its queries from"):
            run()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compute_loss_is_the_authors_loss(tmp_path: Path) -> None:
    """Loss terms, their sum and the gradient norms of all parameters, through `CrossKDTrainer.compute_loss`."""
    case = json.loads(GOLDEN.read_text())
    expected = case["expected"]
    model, teacher = (parity_detr.build(case, role) for role in ("student", "teacher"))
    inputs, labels = parity_detr.batch(case)
    config = parity_detr.distillations(case)[""]
    arguments = settings(tmp_path, schedule=None, methods=[config], check_first_step=False)
    images = DeformableDetrImageProcessor()
    trainer = CrossKDTrainer(model, arguments, processing_class=images, teacher_model=teacher)
    for one in (model, teacher):
        one.to(parity_detr.TRAINING)
        assert one.config.tie_word_embeddings
        assert one.class_embed[-1].bias is one.model.decoder.class_embed[-1].bias
    inputs["pixel_values"] = inputs["pixel_values"].to(parity_detr.TRAINING)
    inputs["labels"] = [label | {"boxes": label["boxes"].to(parity_detr.TRAINING)} for label in labels]
    loss = trainer.compute_loss(model.train(), inputs)
    assert float(loss.detach()) == pytest.approx(expected["losses"]["total"], rel=1e-5)
    found = parity_detr._gradients(model, loss, case["student"]["checkpoint_shapes"])
    norms = {name: float(gradient.norm()) for name, gradient in found.items()}
    assert norms.keys() >= expected["grad_norms"].keys()
    for name, norm in expected["grad_norms"].items():
        assert norms[name] == pytest.approx(norm, rel=1e-3, abs=1e-6), name


# ---- Padding ----


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
