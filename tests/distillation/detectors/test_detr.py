"""CrossKD between DETR-type models: invariants of every family, the options, and what must be refused."""

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from crosskd_hf.distillation import CrossKD, Distiller, MethodConfig
from crosskd_hf.distillation.detectors import view
from crosskd_hf.distillation.detectors.decoder_tap import DecoderTap, Trace
from crosskd_hf.distillation.detectors.detr_families import FAMILIES
from crosskd_hf.distillation.passes import Batch, Comparison, Pass
from crosskd_hf.models.losses import LossPart, divide
from tests.distillation.detr_zoo import MODELS, SIZE, SMALL, batch, build


def pixels(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: inputs[name] for name in ("pixel_values", "pixel_mask")}


def distil(student: Any, teacher: Any, inputs: dict[str, Any], *methods: MethodConfig | str) -> dict[str, LossPart]:
    with Distiller(student, teacher, methods or ["crosskd"]) as distiller:
        return distiller(student(**pixels(inputs)), inputs)


def batch_of(inputs: dict[str, Any]) -> Batch:
    return Batch(inputs["pixel_values"], inputs["pixel_mask"], inputs["labels"])


def crossed(distiller: Distiller, student: Pass, teacher: Pass) -> list[Comparison]:
    """Cross prediction and target of every layer of the teacher's decoder."""
    (method,) = distiller.named_methods.values()
    return list(method.comparisons(student, teacher))


def reached_by_gradient(model: Any) -> set[str]:
    return {key for key, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}


def own_predictions(outputs: Any, trace: Trace) -> list[tuple[Tensor, Tensor]]:
    """Logits and boxes of each decoder layer, or of the last one, as the model itself gives them."""
    emitted: Any = trace.output
    if emitted.get("intermediate_predicted_corners") is not None:  # D-FINE: first what its first layer starts from
        return list(
            zip(
                emitted.intermediate_logits[:, 1:].unbind(1),
                emitted.intermediate_reference_points[:, 1:].unbind(1),
                strict=True,
            )
        )
    layers = (outputs.auxiliary_outputs or [])[: len(trace.layers) - 1]  # further ones are of proposals
    return [(layer["logits"], layer["pred_boxes"]) for layer in [*layers, outputs]]


def total(parts: dict[str, LossPart]) -> Tensor:
    return torch.stack(list(divide(parts).values())).sum()


def test_every_family_is_tested() -> None:
    assert {name.split()[0] for name in MODELS} == set(FAMILIES)


@pytest.mark.parametrize("name", MODELS)
class TestEveryFamily:
    @pytest.mark.parametrize("auxiliary_loss", [True, False])
    @torch.no_grad()
    def test_teacher_memory_through_the_cross_path_is_the_teachers_own_output(
        self, name: str, auxiliary_loss: bool
    ) -> None:
        teacher, inputs = build(name, auxiliary_loss=auxiliary_loss), batch()
        distiller = Distiller(build(name, seed=1), teacher, ["crosskd"])
        if name in ("d_fine", "deimv2"):
            teacher.model.decoder.training = True  # or they emit the last layer alone
        outputs = teacher(**inputs)
        passed = distiller.pair.teacher.read(outputs, batch_of(inputs))
        own = own_predictions(outputs, passed.head)
        pairs = crossed(distiller, passed, passed)
        assert len(pairs) == 2
        assert len(own) == (2 if auxiliary_loss or name in ("d_fine", "deimv2") else 1)
        for (logits, boxes), pair in zip(own, pairs[-len(own) :], strict=True):
            for prediction in (pair.prediction, pair.target):
                torch.testing.assert_close(prediction.logits, logits, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(prediction.regression, boxes, atol=1e-5, rtol=1e-5)

    def test_student_equal_to_the_teacher_has_no_loss(self, name: str) -> None:
        teacher = build(name)
        crosskd = CrossKD(beta=None if FAMILIES[name.split()[0]].softmax else 1.0)
        parts = distil(copy.deepcopy(teacher), teacher, batch(), crosskd, "pkd")
        assert float(total(parts).detach()) == pytest.approx(0, abs=1e-4)

    def test_gradient_reaches_trunk_and_encoder_only_and_a_step_leaves_the_teacher_as_it_was(self, name: str) -> None:
        student, teacher, inputs = build(name), build(name, seed=1), batch()
        before = copy.deepcopy(teacher.state_dict())
        distiller = Distiller(student, teacher, ["crosskd"])
        parts = distiller(student.train()(**inputs), inputs)
        distiller.check_gradients(divide(parts))
        total(parts).backward()
        reached = reached_by_gradient(student)
        assert any(key.startswith(("model.backbone", "model.conv_encoder")) for key in reached)
        assert any("encoder" in key for key in reached) or name in ("lw_detr", "rf_detr")  # theirs is the backbone
        assert not [key for key in reached if not key.startswith("model.") or key.startswith("model.decoder.")]
        assert all(parameter.grad is None for parameter in teacher.parameters())
        torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=0.1).step()
        assert all(torch.equal(tensor, before[key]) for key, tensor in teacher.state_dict().items())
        assert not teacher.training

    def test_twice_the_same_images_is_the_same_loss(self, name: str) -> None:
        student, teacher, once = build(name), build(name, seed=1), batch()
        twice = {key: torch.cat([tensor, tensor]) for key, tensor in pixels(once).items()}
        losses = [divide(distil(student, teacher, inputs)) for inputs in (once, twice)]
        for key, loss in losses[0].items():
            torch.testing.assert_close(loss, losses[1][key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if FAMILIES[name.split()[0]].student_queries])
def test_student_queries_reach_the_students_decoder_but_not_its_heads(name: str) -> None:
    changes = {"num_queries": 8, "two_stage_num_proposals": 8} if "deformable" in name else {"num_queries": 8}
    student, teacher, inputs = build(name, **changes).train(), build(name, seed=1), batch()
    distiller = Distiller(student, teacher, ["crosskd:queries=student"])
    parts = distiller(student(**inputs), inputs)  # in training, with denoising queries where there are any
    distiller.check_gradients(divide(parts))
    total(parts).backward()
    reached = reached_by_gradient(student)
    assert any(key.startswith("model.decoder.layers.0") for key in reached)
    assert not [key for key in reached if "class" in key or "bbox" in key]


def test_references_of_a_students_queries_carry_no_gradient() -> None:
    """In the teacher's decoder; with one stage the student's references are a layer's output."""
    student, teacher, inputs = build("deformable_detr").train(), build("deformable_detr", seed=1), batch()
    distiller = Distiller(student, teacher, ["crosskd:queries=student"])
    seen: list[bool] = []

    def look(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        memory = named.get("encoder_hidden_states")  # in the teacher's own pass a positional argument
        if memory is not None and memory.requires_grad:
            seen.append(named["reference_points"].requires_grad)

    outputs = student(**inputs)
    assert outputs.init_reference_points.requires_grad
    teacher.model.decoder.layers[0].register_forward_pre_hook(look, with_kwargs=True)
    distiller(outputs, inputs)
    assert seen == [False]


@pytest.mark.parametrize("name", ["rt_detr", "rt_detr_v2", "lw_detr", "rf_detr"])
@torch.no_grad()
def test_queries_that_exist_in_training_only_are_left_out(name: str) -> None:
    student, teacher, inputs = build(name).train(), build(name, seed=1), batch()
    distiller = Distiller(student, teacher, ["crosskd:queries=student"])
    outputs = student(**inputs)
    assert outputs.logits.shape[1] > student.config.num_queries
    seen, given = distiller.pair, batch_of(inputs)
    for pair in crossed(distiller, seen.student.read(outputs, given), seen.teacher.teacher_pass(given)):
        shapes = [prediction.regression.shape for prediction in pair[:2]]
        assert shapes == [(2, student.config.num_queries, 4)] * 2


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_predictions_of_a_pass_are_the_models_own_of_every_layer(name: str) -> None:
    model, inputs = build(name, auxiliary_loss=True), batch()
    seen = view(model, "teacher")
    request = seen.request(frozenset({"predictions"}))
    if name in ("d_fine", "deimv2"):
        model.model.decoder.training = True  # or they emit the last layer alone
    outputs = model(**inputs, **request)
    found = seen.read(outputs, batch_of(inputs))
    for (logits, boxes), prediction in zip(own_predictions(outputs, found.head), found.predictions, strict=True):
        torch.testing.assert_close(prediction.logits, logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(prediction.regression, boxes, atol=1e-5, rtol=1e-5)
    pixel_boxes = found.decode(found.predictions[-1].regression)
    sizes = torch.tensor([[[SIZE] * 4], [[*SMALL[::-1]] * 2]])
    centers = (pixel_boxes[..., :2] + pixel_boxes[..., 2:]) / 2
    torch.testing.assert_close(centers, found.predictions[-1].regression[..., :2] * sizes[..., :2])


@pytest.mark.parametrize("name", MODELS)
def test_a_student_of_other_classes_queries_and_layers_whose_batch_may_be_empty(name: str) -> None:
    """Its training mode adds denoising queries or groups of queries; the teacher has none of its own then."""
    queries = {"num_queries": 7, "two_stage_num_proposals": 7} if "deformable" in name else {"num_queries": 7}
    student = build(name, num_labels=3, decoder_layers=3, auxiliary_loss=False, **queries).train()
    teacher, inputs = build(name, seed=1), batch()
    inputs["labels"][0]["class_labels"] = torch.tensor([0, 2])
    for labels in (inputs["labels"], inputs["labels"][1:] * 2):
        with Distiller(student, teacher, ["crosskd", "pkd"]) as distiller:
            parts = distiller(student(**inputs | {"labels": labels}), inputs)
        assert set(parts) == {"crosskd/cls", "crosskd/reg", "pkd/features"}
        assert parts["crosskd/cls"].total.shape == (2,)  # the teacher's layers
        distiller.check_gradients(divide(parts))
        assert float(total(parts).detach()) > 0


def test_a_teacher_of_another_family() -> None:
    student, teacher, inputs = build("rt_detr_v2"), build("d_fine", seed=1), batch()
    loss = total(distil(student, teacher, inputs))
    loss.backward()
    assert float(loss.detach()) > 0
    assert reached_by_gradient(student)


class TestWidth:
    def test_an_adapter_takes_the_memory_to_the_teachers_width_and_is_trained(self) -> None:
        student, teacher, inputs = build("deformable_detr"), build("deformable_detr", seed=1, d_model=96), batch()
        distiller = Distiller(student, teacher, ["crosskd", "pkd"])
        total(distiller(student(**pixels(inputs)), inputs)).backward()
        assert all(parameter.grad.any() for parameter in distiller.parameters())
        assert distiller.describe()["adapters"] == {
            "crosskd.adapters.memory.weight": [96, 64, 1, 1],
            "crosskd.adapters.memory.bias": [96],
            "pkd.adapters.64_to_96.weight": [96, 64, 1, 1],
            "pkd.adapters.64_to_96.bias": [96],
        }

    def test_the_teacher_is_no_part_of_the_distiller(self) -> None:
        distiller = Distiller(build("detr"), build("detr", seed=1), ["crosskd"])
        assert not list(distiller.parameters())
        assert not distiller.state_dict()

    def test_student_queries_cannot_be_adapted(self) -> None:
        with pytest.raises(ValueError, match="queries='teacher'"):
            Distiller(build("deformable_detr"), build("deformable_detr", d_model=96), [CrossKD(queries="student")])


class TestLosses:
    @pytest.fixture
    def pair(self) -> tuple[Any, Any, dict[str, Any]]:
        return build("deformable_detr two-stage"), build("deformable_detr two-stage", seed=1), batch()

    def parts(self, pair: tuple[Any, Any, dict[str, Any]], **settings: Any) -> dict[str, LossPart]:
        student, teacher, inputs = pair
        return distil(student, teacher, inputs, CrossKD(**settings))

    def test_keys_of_the_box_losses(self, pair: Any) -> None:
        keys = {box_loss: set(self.parts(pair, box_loss=box_loss)) for box_loss in ("l1_pixel", "l1+giou", "giou")}
        assert keys == {
            "l1_pixel": {"crosskd/cls", "crosskd/reg"},
            "l1+giou": {"crosskd/cls", "crosskd/reg", "crosskd/iou"},
            "giou": {"crosskd/cls", "crosskd/iou"},
        }

    def test_normalizers_are_queries_and_confidence(self, pair: Any) -> None:
        parts = self.parts(pair)
        assert parts["crosskd/cls"].normalizer.tolist() == [2 * 10] * 2
        with torch.no_grad():
            confidence = pair[1](**pixels(pair[2])).logits.sigmoid().amax(-1).sum()
        torch.testing.assert_close(parts["crosskd/reg"].normalizer[1].detach(), 4 * confidence)

    def test_weights(self, pair: Any) -> None:
        plain, weighted = self.parts(pair), self.parts(pair, terms={"reg": 0.5})
        torch.testing.assert_close(weighted["crosskd/reg"].total, plain["crosskd/reg"].total / 2)
        torch.testing.assert_close(weighted["crosskd/cls"].total, plain["crosskd/cls"].total)

    def test_modulation_only_lowers_the_class_loss(self, pair: Any) -> None:
        plain, modulated = (self.parts(pair, beta=beta)["crosskd/cls"].total[0] for beta in (0.0, 1.0))
        assert 0 < float(modulated.detach()) < float(plain.detach())

    def test_boxes_are_compared_in_pixels_of_the_unpadded_image(self, pair: Any) -> None:
        student, teacher, inputs = pair
        parts = self.parts(pair)
        distiller = Distiller(student, teacher, ["crosskd"])
        seen, given = distiller.pair, batch_of(inputs)
        own = seen.student.read(student(**pixels(inputs)), given)
        cross, target = crossed(distiller, own, seen.teacher.teacher_pass(given))[0][:2]
        difference = (cross.regression - target.regression) * torch.tensor([[[SIZE] * 4], [[*SMALL[::-1]] * 2]])
        centers, extents = difference[..., :2], difference[..., 2:]
        corners = (centers - extents / 2).abs().sum(-1) + (centers + extents / 2).abs().sum(-1)
        expected = (target.logits.sigmoid().amax(-1) * corners).sum()
        torch.testing.assert_close(parts["crosskd/reg"].total[0], expected, rtol=1e-4, atol=1e-4)

    def test_bfloat16_autocast_keeps_the_losses_in_float32(self, pair: Any) -> None:
        student, teacher, inputs = pair
        distiller = Distiller(student.train(), teacher, ["crosskd", "pkd"])
        with torch.autocast("cpu", torch.bfloat16):
            parts = distiller(student(**inputs), inputs)
        assert {part.total.dtype for part in parts.values()} == {torch.float32}
        total(parts).backward()
        assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)

    def test_gradient_checkpointing_gives_the_same_gradient(self, pair: Any) -> None:
        student, teacher, inputs = pair
        gradients = []
        for checkpointed in (False, True):
            model = copy.deepcopy(student).train()
            if checkpointed:
                model.gradient_checkpointing_enable()
            total(distil(model, teacher, inputs, CrossKD(queries="student"))).backward()
            gradients.append(model.model.level_embed.grad)
        torch.testing.assert_close(*gradients)


class TestRefusals:
    def test_other_feature_levels(self) -> None:
        student = build("deformable_detr", num_feature_levels=3)
        with pytest.raises(ValueError, match="3 feature levels.*num_feature_levels=4"):
            Distiller(student, build("deformable_detr"), ["crosskd"])

    def test_other_strides(self) -> None:
        student, teacher, inputs = build("deformable_detr"), build("deformable_detr", seed=1), batch()
        distiller = Distiller(student, teacher, ["crosskd"])
        outputs = student(torch.randn(2, 3, 2 * SIZE, 2 * SIZE))
        with pytest.raises(ValueError, match="strides"):
            distiller(outputs, inputs)

    def test_student_queries_across_families(self) -> None:
        with pytest.raises(ValueError, match="one family"):
            Distiller(build("rt_detr"), build("rt_detr_v2"), [CrossKD(queries="student")])

    def test_student_queries_of_d_fine(self) -> None:
        with pytest.raises(ValueError, match="queries='teacher'"):
            Distiller(build("d_fine"), build("d_fine"), [CrossKD(queries="student")])

    def test_student_queries_of_too_few_layers(self) -> None:
        with pytest.raises(ValueError, match="2 layers.*queries='teacher'"):
            Distiller(build("detr"), build("detr", decoder_layers=3), [CrossKD(queries="student")])

    def test_a_cut(self) -> None:
        with pytest.raises(ValueError, match="cut=3 has no effect on a Detr.* Leave it out"):
            Distiller(build("detr"), build("detr"), [CrossKD(cut=3)])

    def test_a_distiller_without_a_pass_of_the_student(self) -> None:
        student, inputs = build("detr"), batch()
        distiller = Distiller(student, build("detr", seed=1), ["crosskd"])
        outputs = student(**pixels(inputs))
        distiller(outputs, inputs)
        with pytest.raises(RuntimeError, match="run the model once"):
            distiller(outputs, inputs)


def number_of_hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class TestHooks:
    @pytest.fixture
    def pair(self) -> tuple[Any, Any]:
        return build("rt_detr").train(), build("rt_detr", seed=1)

    def test_go_with_the_distiller(self, pair: tuple[Any, Any]) -> None:
        student, teacher = pair
        distiller = Distiller(student, teacher, [CrossKD(queries="student")])
        total(distiller(student(**batch()), batch())).backward()
        assert number_of_hooks(student)
        assert number_of_hooks(teacher)
        memory = weakref.ref(student(**batch()).logits)
        del distiller
        gc.collect()
        assert number_of_hooks(student) == number_of_hooks(teacher) == 0
        assert memory() is None

    def test_can_be_removed(self, pair: tuple[Any, Any]) -> None:
        student, teacher = pair
        with Distiller(student, teacher, ["crosskd"]) as distiller:
            student(**batch())
        assert number_of_hooks(student) == number_of_hooks(teacher) == 0
        with pytest.raises(RuntimeError, match="run the model once"):
            distiller(None, batch())

    def test_keep_nothing_of_an_evaluation(self, pair: tuple[Any, Any]) -> None:
        student, teacher = pair
        distiller = Distiller(student, teacher, ["crosskd"])
        with torch.no_grad():
            student.eval()(**pixels(batch()))
        assert distiller.pair.student.tap._latest is None

    def test_do_not_hinder_pickling_or_copying(self, pair: tuple[Any, Any]) -> None:
        student, teacher = pair
        distiller = Distiller(student, teacher, ["crosskd"])
        outputs = student(**batch())
        for copied in (pickle.loads(pickle.dumps(student)), copy.deepcopy(student)):
            copied(**batch())
        assert float(total(distiller(outputs, batch())).detach()) > 0

    def test_of_several_distillers_do_not_disturb_each_other(self, pair: tuple[Any, Any]) -> None:
        student, teacher = pair
        inputs = batch()
        distillers = [Distiller(student, teacher, [CrossKD(beta=1.0)]) for _ in range(2)]
        outputs = student(**inputs)
        losses = [total(distiller(outputs, inputs)) for distiller in distillers]
        torch.testing.assert_close(*losses)

    def test_of_a_tap_without_owner_stay(self) -> None:
        model = build("detr")
        tap = DecoderTap(model, layers=True)
        model(**pixels(batch()))
        assert len(tap.take().layers) == 2
        tap.remove()
        assert number_of_hooks(model) == 0
        model(**pixels(batch()))
        with pytest.raises(RuntimeError):
            tap.take()
