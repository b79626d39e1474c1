"""CrossKD between DETR-type models: invariants of every family, the options, and what must be refused."""

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from crosskd_hf.distillation import detr as detr_module
from crosskd_hf.distillation.config import DistillationConfig
from crosskd_hf.distillation.detr import DetrDistiller
from crosskd_hf.distillation.detr_families import FAMILIES, DecoderTap, Trace
from crosskd_hf.models.losses import LossPart, divide
from tests.distillation.detr_zoo import MODELS, SIZE, SMALL, batch, build

CrossKD = DistillationConfig


def pixels(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: inputs[name] for name in ("pixel_values", "pixel_mask")}


def distil(student: Any, teacher: Any, config: DistillationConfig, inputs: dict[str, Any]) -> dict[str, LossPart]:
    distiller = DetrDistiller(student, teacher, config)
    parts = distiller(student(**pixels(inputs)), inputs)
    distiller.remove_hooks()
    return parts


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
        distiller = DetrDistiller(build(name, seed=1), teacher, CrossKD())
        if name in ("d_fine", "deimv2"):
            teacher.model.decoder.training = True  # or they emit the last layer alone
        outputs = teacher(**inputs)
        trace = distiller._teacher_tap.take()
        own = own_predictions(outputs, trace)
        pairs = list(distiller.predictions(trace.memory, trace, trace))
        assert len(pairs) == 2
        assert len(own) == (2 if auxiliary_loss or name in ("d_fine", "deimv2") else 1)
        for (logits, boxes), (cross, target) in zip(own, pairs[-len(own) :], strict=True):
            for prediction in (cross, target):
                torch.testing.assert_close(prediction.logits, logits, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(prediction.boxes, boxes, atol=1e-5, rtol=1e-5)

    def test_student_equal_to_the_teacher_has_no_loss(self, name: str) -> None:
        teacher = build(name)
        parts = distil(copy.deepcopy(teacher), teacher, CrossKD(beta=1.0, methods=("crosskd", "pkd")), batch())
        assert float(total(parts).detach()) == pytest.approx(0, abs=1e-4)

    def test_gradient_reaches_trunk_and_encoder_only_and_a_step_leaves_the_teacher_as_it_was(self, name: str) -> None:
        student, teacher, inputs = build(name), build(name, seed=1), batch()
        before = copy.deepcopy(teacher.state_dict())
        distiller = DetrDistiller(student, teacher, CrossKD())
        loss = total(distiller(student.train()(**inputs), inputs))
        distiller.check_gradients(student, loss)
        loss.backward()
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
        losses = [divide(distil(student, teacher, CrossKD(), inputs)) for inputs in (once, twice)]
        for key, loss in losses[0].items():
            torch.testing.assert_close(loss, losses[1][key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if FAMILIES[name.split()[0]].student_queries])
def test_student_queries_reach_the_students_decoder_but_not_its_heads(name: str) -> None:
    changes = {"num_queries": 8, "two_stage_num_proposals": 8} if "deformable" in name else {"num_queries": 8}
    student, teacher, inputs = build(name, **changes).train(), build(name, seed=1), batch()
    distiller = DetrDistiller(student, teacher, CrossKD(queries="student"))
    loss = total(distiller(student(**inputs), inputs))  # in training, with denoising queries where there are any
    distiller.check_gradients(student, loss)
    loss.backward()
    reached = reached_by_gradient(student)
    assert any(key.startswith("model.decoder.layers.0") for key in reached)
    assert not [key for key in reached if "class" in key or "bbox" in key]


@pytest.mark.parametrize("name", ["rt_detr", "rt_detr_v2", "lw_detr", "rf_detr"])
@torch.no_grad()
def test_queries_that_exist_in_training_only_are_left_out(name: str) -> None:
    student, teacher, inputs = build(name).train(), build(name, seed=1), batch()
    distiller = DetrDistiller(student, teacher, CrossKD(queries="student"))
    outputs = student(**inputs)
    assert outputs.logits.shape[1] > student.config.num_queries
    trace = distiller._student_tap.take()
    for cross, target in distiller.predictions(trace.memory, trace, distiller._run_teacher(**_both(inputs))):
        assert cross.boxes.shape == target.boxes.shape == (2, student.config.num_queries, 4)


def _both(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"pixels": inputs["pixel_values"], "mask": inputs["pixel_mask"]}


@pytest.mark.parametrize("name", MODELS)
def test_a_student_of_other_classes_queries_and_layers_whose_batch_may_be_empty(name: str) -> None:
    """Its training mode adds denoising queries or groups of queries; the teacher has none of its own then."""
    queries = {"num_queries": 7, "two_stage_num_proposals": 7} if "deformable" in name else {"num_queries": 7}
    student = build(name, num_labels=3, decoder_layers=3, auxiliary_loss=False, **queries).train()
    teacher, inputs = build(name, seed=1), batch()
    inputs["labels"][0]["class_labels"] = torch.tensor([0, 2])
    for labels in (inputs["labels"], inputs["labels"][1:] * 2):
        with DetrDistiller(student, teacher, CrossKD(methods=("crosskd", "pkd"))) as distiller:
            parts = distiller(student(**inputs | {"labels": labels}), inputs)
        assert {key.split(".")[0] for key in parts} == {"d0", "d1", "loss_feat_kd"}  # the teacher's layers
        loss = total(parts)
        distiller.check_gradients(student, loss)
        assert float(loss.detach()) > 0


def test_a_teacher_of_another_family() -> None:
    student, teacher, inputs = build("rt_detr_v2"), build("d_fine", seed=1), batch()
    loss = total(distil(student, teacher, CrossKD(), inputs))
    loss.backward()
    assert float(loss.detach()) > 0
    assert reached_by_gradient(student)


class TestWidth:
    def test_projector_takes_the_memory_to_the_teachers_width_and_is_trained(self) -> None:
        student, teacher, inputs = build("deformable_detr"), build("deformable_detr", seed=1, d_model=64), batch()
        distiller = DetrDistiller(student, teacher, CrossKD(methods=("crosskd", "pkd")))
        total(distiller(student(**pixels(inputs)), inputs)).backward()
        assert distiller.projector is not None
        assert distiller.projector.weight.shape == (64, 32)
        assert all(parameter.grad.any() for parameter in distiller.projector.parameters())
        assert set(distiller.describe()["adapters"]) == {
            "projector.weight",
            "projector.bias",
            "pearson.adapter.weight",
            "pearson.adapter.bias",
        }

    def test_the_teacher_is_no_part_of_the_distiller(self) -> None:
        distiller = DetrDistiller(build("detr"), build("detr", seed=1), CrossKD())
        assert not list(distiller.parameters())
        assert not distiller.state_dict()

    def test_student_queries_cannot_be_projected(self) -> None:
        with pytest.raises(ValueError, match="queries='teacher'"):
            DetrDistiller(build("deformable_detr"), build("deformable_detr", d_model=64), CrossKD(queries="student"))


class TestLosses:
    @pytest.fixture
    def pair(self) -> tuple[Any, Any, dict[str, Any]]:
        return build("deformable_detr two-stage"), build("deformable_detr two-stage", seed=1), batch()

    def parts(self, pair: tuple[Any, Any, dict[str, Any]], **settings: Any) -> dict[str, LossPart]:
        student, teacher, inputs = pair
        return distil(student, teacher, CrossKD(**settings), inputs)

    def test_keys_of_the_box_losses(self, pair: Any) -> None:
        keys = {box_loss: set(self.parts(pair, box_loss=box_loss)) for box_loss in ("l1_pixel", "l1+giou", "giou")}
        of_layer = lambda *names: {f"d{layer}.loss_{name}_kd" for layer in (0, 1) for name in names}  # noqa: E731
        assert keys == {
            "l1_pixel": of_layer("cls", "reg"),
            "l1+giou": of_layer("cls", "reg", "iou"),
            "giou": of_layer("cls", "iou"),
        }

    def test_normalizers_are_queries_and_confidence(self, pair: Any) -> None:
        parts = self.parts(pair)
        assert float(parts["d0.loss_cls_kd"].normalizer) == 2 * 10
        with torch.no_grad():
            confidence = pair[1](**pixels(pair[2])).logits.sigmoid().amax(-1).sum()
        torch.testing.assert_close(parts["d1.loss_reg_kd"].normalizer.detach(), 4 * confidence)

    def test_weights(self, pair: Any) -> None:
        plain, weighted = self.parts(pair), self.parts(pair, loss_weights={"loss_reg_kd": 0.5})
        torch.testing.assert_close(weighted["d0.loss_reg_kd"].total, plain["d0.loss_reg_kd"].total / 2)
        torch.testing.assert_close(weighted["d0.loss_cls_kd"].total, plain["d0.loss_cls_kd"].total)

    def test_modulation_only_lowers_the_class_loss(self, pair: Any) -> None:
        plain, modulated = (self.parts(pair, beta=beta)["d0.loss_cls_kd"].total for beta in (0.0, 1.0))
        assert 0 < float(modulated.detach()) < float(plain.detach())

    def test_boxes_are_compared_in_pixels_of_the_unpadded_image(self, pair: Any) -> None:
        student, teacher, inputs = pair
        parts = self.parts(pair)
        distiller = DetrDistiller(student, teacher, CrossKD())
        student(**pixels(inputs))
        trace = distiller._student_tap.take()
        cross, target = next(distiller.predictions(trace.memory, trace, distiller._run_teacher(**_both(inputs))))
        difference = (cross.boxes - target.boxes) * torch.tensor([[[SIZE] * 4], [[*SMALL[::-1]] * 2]])
        centers, extents = difference[..., :2], difference[..., 2:]
        corners = (centers - extents / 2).abs().sum(-1) + (centers + extents / 2).abs().sum(-1)
        expected = (target.logits.sigmoid().amax(-1) * corners).sum()
        torch.testing.assert_close(parts["d0.loss_reg_kd"].total, expected, rtol=1e-4, atol=1e-4)

    def test_bfloat16_autocast_keeps_the_losses_in_float32(self, pair: Any) -> None:
        student, teacher, inputs = pair
        distiller = DetrDistiller(student.train(), teacher, CrossKD(methods=("crosskd", "pkd")))
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
            total(distil(model, teacher, CrossKD(queries="student"), inputs)).backward()
            gradients.append(model.model.level_embed.grad)
        torch.testing.assert_close(*gradients)


class TestRefusals:
    def test_other_feature_levels(self) -> None:
        student = build("deformable_detr", num_feature_levels=3)
        with pytest.raises(ValueError, match="3 feature levels.*num_feature_levels=4"):
            DetrDistiller(student, build("deformable_detr"), CrossKD())

    def test_other_strides(self) -> None:
        student, teacher, inputs = build("deformable_detr"), build("deformable_detr", seed=1), batch()
        distiller = DetrDistiller(student, teacher, CrossKD())
        outputs = student(torch.randn(2, 3, 2 * SIZE, 2 * SIZE))
        with pytest.raises(ValueError, match="strides"):
            distiller(outputs, inputs)

    def test_student_queries_across_families(self) -> None:
        with pytest.raises(ValueError, match="one family"):
            DetrDistiller(build("rt_detr"), build("rt_detr_v2"), CrossKD(queries="student"))

    def test_student_queries_of_d_fine(self) -> None:
        with pytest.raises(ValueError, match="queries='teacher'"):
            DetrDistiller(build("d_fine"), build("d_fine"), CrossKD(queries="student"))

    def test_student_queries_of_too_few_layers(self) -> None:
        with pytest.raises(ValueError, match="2 layers.*queries='teacher'"):
            DetrDistiller(build("detr"), build("detr", decoder_layers=3), CrossKD(queries="student"))

    def test_plain_kd(self) -> None:
        with pytest.raises(ValueError, match="no such order"):
            DetrDistiller(build("detr"), build("detr"), CrossKD(methods=("kd",)))

    def test_a_cut(self) -> None:
        with pytest.raises(ValueError, match="leave cut"):
            DetrDistiller(build("detr"), build("detr"), CrossKD(cut=3))

    def test_missing_scipy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(detr_module, "is_scipy_available", lambda: False)
        with pytest.raises(ImportError, match="pip install scipy"):
            DetrDistiller(build("detr"), build("detr"), CrossKD())

    def test_a_distiller_without_a_pass_of_the_student(self) -> None:
        student, inputs = build("detr"), batch()
        distiller = DetrDistiller(student, build("detr", seed=1), CrossKD())
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
        distiller = DetrDistiller(student, teacher, CrossKD(queries="student"))
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
        with DetrDistiller(student, teacher, CrossKD()) as distiller:
            student(**batch())
        assert number_of_hooks(student) == number_of_hooks(teacher) == 0
        with pytest.raises(RuntimeError, match="run the model once"):
            distiller(None, batch())

    def test_keep_nothing_of_an_evaluation(self, pair: tuple[Any, Any]) -> None:
        student, teacher = pair
        distiller = DetrDistiller(student, teacher, CrossKD())
        with torch.no_grad():
            student.eval()(**pixels(batch()))
        assert distiller._student_tap._latest is None

    def test_do_not_hinder_pickling_or_copying(self, pair: tuple[Any, Any]) -> None:
        student, teacher = pair
        distiller = DetrDistiller(student, teacher, CrossKD())
        outputs = student(**batch())
        for copied in (pickle.loads(pickle.dumps(student)), copy.deepcopy(student)):
            copied(**batch())
        assert float(total(distiller(outputs, batch())).detach()) > 0

    def test_of_several_distillers_do_not_disturb_each_other(self, pair: tuple[Any, Any]) -> None:
        student, teacher = pair
        inputs = batch()
        distillers = [DetrDistiller(student, teacher, CrossKD(beta=1.0)) for _ in range(2)]
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
