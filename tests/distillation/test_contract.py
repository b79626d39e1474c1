"""What holds for every method on every family of detectors."""

import ast
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from crosskd_hf.distillation import methods
from crosskd_hf.distillation.detectors import VIEWS, view
from crosskd_hf.distillation.distiller import Distiller
from crosskd_hf.distillation.method import MethodConfig
from crosskd_hf.distillation.methods import METHODS, kd
from crosskd_hf.distillation.passes import Batch
from tests import tiny_dense
from tests.distillation import detector_zoo, detr_zoo
from tests.distillation.detector_zoo import FAMILIES
from tests.distillation.step import distilled_losses, distilled_parts

NAMES = list(METHODS)
IMITATIONS = ("defeat", "fine_grained", "fitnets", "inside_gt", "main_region")
ACTING = {"fine_grained": "fine_grained:start=0"}  # from the first update


def zero(name: str, family: str) -> str:
    """The configuration of a method whose loss is zero for a student that is its teacher.

    A trainable adapter between equal widths isn't the identity. Cross entropy of centerness, of the classes of queries
    as published, and of GID's classes, is not zero but the entropy of its target.
    """
    softmax = family in ("detr", "faster_rcnn")
    if name == "crosskd":
        queries = family in detr_zoo.MODELS and not softmax
        return "crosskd:terms.centerness=0" + ",beta=1" * queries
    acting = ACTING.get(name, name)
    if name in IMITATIONS:
        return f"{acting}{',' if ':' in acting else ':'}adapter=False"
    if name == "kd":
        queries = family in detr_zoo.MODELS and not softmax
        return "kd:terms.centerness=0" + ",beta=1" * queries
    return {"gid": "gid:terms.cls=0"}.get(name, acting)


def distil(family: str, config: MethodConfig | str, teacher_seed: int = 1, **changes: Any) -> tuple[Distiller, Any]:
    """A distiller and its student; skips what the pair can't do."""
    config = ACTING.get(config, config) if isinstance(config, str) else config
    student, teacher = detector_zoo.build(family), detector_zoo.build(family, teacher_seed, **changes)
    try:
        return Distiller(student, teacher, [config]), student
    except ValueError as error:
        pytest.skip(str(error))


# Methods that read maps alone see no difference between two detectors of one view: fitnets stands for them.
REPRESENTATIVES = [*tiny_dense.KINDS, "faster_rcnn", "detr", "deformable_detr"]
EVERYWHERE = ("crosskd", "kd", "fitnets")
CASES = [(name, family) for name in NAMES for family in (FAMILIES if name in EVERYWHERE else REPRESENTATIVES)]


@pytest.mark.parametrize(("name", "family"), CASES)
class TestEveryMethodOnEveryFamily:
    def test_a_student_that_is_its_teacher_has_no_loss(
        self, name: str, family: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Matched boxes of a teacher are cut off at the border of the image, as published; whether random weights make
        # one that reaches over it is chance.
        monkeypatch.setattr(kd, "clipped", lambda boxes, sizes: boxes)
        distiller, student = distil(family, zero(name, family), teacher_seed=0)
        for key, loss in distilled_losses(distiller, student, detector_zoo.batch(family)).items():
            assert loss.item() == pytest.approx(0, abs=1e-4), key

    def test_gradients_reach_the_student_and_nothing_else(self, name: str, family: str) -> None:
        distiller, student = distil(family, name)
        parts = distilled_losses(distiller, student, detector_zoo.batch(family))
        assert set(parts) <= {f"{name}/{term}" for term in METHODS[name].method.terms}
        distiller.check_gradients(parts)
        (method,) = distiller.named_methods.values()
        spared = [id(parameter) for parameter in method.unreached(distiller.pair.student)]
        torch.stack(list(parts.values())).sum().backward(retain_graph=True)
        reached = [p for p in student.parameters() if p.grad is not None and p.grad.any()]
        assert not {id(parameter) for parameter in reached}.intersection(spared)
        if not reached:  # no location of a coarse map lies inside of a box
            assert all(loss == 0 for loss in parts.values())
            return
        method.unreached = lambda view: reached
        with pytest.raises(RuntimeError, match=f"The {name} loss reaches student layers that it must not reach"):
            distiller.check_gradients(parts)
        assert all(p.grad is None for p in distiller.teacher.parameters())
        assert all(p.grad is not None for p in distiller.parameters())

    def test_a_batch_without_objects_is_finite(self, name: str, family: str) -> None:
        distiller, student = distil(family, name)
        inputs = detector_zoo.batch(family)
        for label in inputs["labels"]:
            label["class_labels"], label["boxes"] = label["class_labels"][:0], label["boxes"][:0]
        parts = distilled_losses(distiller, student, inputs)
        torch.stack(list(parts.values())).sum().backward()
        assert all(torch.isfinite(loss) for loss in parts.values())
        assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)

    def test_described_by_numbers_that_json_knows(self, name: str, family: str) -> None:
        distiller, _ = distil(family, name)
        described = distiller.describe()["methods"][name]
        assert json.loads(json.dumps(described)) == described
        assert described["terms"]
        assert all(described["terms"].values())

    def test_the_split_of_a_batch_makes_no_difference(self, name: str, family: str) -> None:
        """Images padded alike: totals and normalizers of the halves add up, so that processes don't matter."""
        distiller, student = distil(family, name)
        whole = detector_zoo.batch(family)
        expected = distilled_parts(distiller, student, whole)
        halves = []
        for image in (slice(0, 1), slice(1, 2)):
            half = {key: value[image] for key, value in whole.items()}
            halves.append(distilled_parts(distiller, student, half))
        for key, part in expected.items():
            for index in (0, 1):
                together = halves[0][key][index].float() + halves[1][key][index].float()
                torch.testing.assert_close(together, part[index].float(), rtol=1e-3, atol=1e-4, msg=key)

    def test_maps_of_single_cells_are_finite(self, name: str, family: str) -> None:
        distiller, student = distil(family, name)
        inputs = detector_zoo.batch(family, 1)
        if family not in detr_zoo.MODELS:  # an image whose coarsest maps are 1x1, and which is alone
            inputs = {"pixel_values": torch.randn(1, 3, 32, 32), "labels": inputs["labels"][:1]}
        parts = distilled_losses(distiller, student, inputs)
        torch.stack(list(parts.values())).sum().backward()
        assert all(torch.isfinite(loss) for loss in parts.values())
        assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def options_of(name: str) -> set[str]:
    return {entry.name for entry in fields(METHODS[name])}


@pytest.mark.parametrize("name", NAMES)
class TestEveryConfiguration:
    def test_has_no_place_for_an_option_of_another_method(self, name: str) -> None:
        others = {option for other in NAMES for option in options_of(other)} - options_of(name)
        assert others
        for option in others:
            with pytest.raises(ValueError, match=f"{name} has no option '{option}="):
                MethodConfig.parse(f"{name}:{option}=1")
            with pytest.raises(TypeError, match=option):
                METHODS[name](**{option: 1})

    def test_has_no_place_for_a_term_of_another_method(self, name: str) -> None:
        terms = {term for other in NAMES for term in METHODS[other].method.terms} - set(METHODS[name].method.terms)
        for term in terms:
            with pytest.raises(ValueError, match=f"{name} has no terms"):
                MethodConfig.parse(f"{name}:terms.{term}=1")

    def test_says_what_each_option_is(self, name: str) -> None:
        kind = METHODS[name]
        assert all(entry.metadata["help"].endswith(".") for entry in fields(kind))
        assert kind.__doc__
        assert kind.method.paper is None or kind.method.paper.title


class TestEveryMethodKeepsItsOwnChecks:
    def test_a_leak_of_one_is_named_beside_another_that_may_reach_all(self) -> None:
        student, teacher = detector_zoo.build("gfl").train(), detector_zoo.build("gfl", 1)
        distiller, inputs = Distiller(student, teacher, ["crosskd", "kd"]), detector_zoo.batch("gfl")
        parts = distilled_losses(distiller, student, inputs)
        distiller.check_gradients(parts)
        leaking = parts | {"crosskd/cls": parts["crosskd/cls"] + parts["kd/cls"]}
        with pytest.raises(RuntimeError, match="The crosskd loss reaches student layers that it must not reach"):
            distiller.check_gradients(leaking)

    def test_a_loss_that_reaches_nothing_is_named(self) -> None:
        student, teacher = detector_zoo.build("gfl"), detector_zoo.build("gfl", 1)
        distiller, inputs = Distiller(student, teacher, ["crosskd", "pkd"]), detector_zoo.batch("gfl")
        parts = distilled_losses(distiller, student, inputs)
        with pytest.raises(RuntimeError, match="The pkd loss does not depend on any trained parameter"):
            distiller.check_gradients(parts | {"pkd/features": parts["pkd/features"].detach()})


def test_methods_import_no_detector() -> None:
    """Neither a view nor a class of models; import-linter follows the imports of what they import."""
    sources = sorted((Path(methods.__file__).parent).glob("*.py"))
    assert len(sources) > len(METHODS)
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not [n for n in names if "detectors" in n or (n.endswith(("Detector", "ObjectDetection", "Head"))
                            and n not in ("SplitHead", "ComparableHead"))], path.name  # fmt: skip


def test_methods_are_named_once_and_some_are_named() -> None:
    pair = detector_zoo.build("gfl"), detector_zoo.build("gfl", 1)
    with pytest.raises(ValueError, match="give each method once"):
        Distiller(*pair, ["pkd", "pkd:weight=2"])
    with pytest.raises(ValueError, match="methods is empty"):
        Distiller(*pair, [])
    with pytest.raises(ValueError, match="every term has the weight 0"):
        Distiller(*pair, ["pkd:weight=0"])


@pytest.mark.parametrize("name", NAMES)
def test_the_weight_of_a_method_multiplies_its_terms(name: str) -> None:
    said, found = ACTING.get(name, name), []
    for weight in (1, 3):
        torch.manual_seed(0)  # of the adapters
        distiller, student = distil("gfl", f"{said}{',' if ':' in said else ':'}weight={weight}")
        found.append(distilled_parts(distiller, student, detector_zoo.batch("gfl")))
    one, three = ({key: part.total for key, part in parts.items()} for parts in found)
    assert any(total.any() for total in one.values())
    for key in one:
        torch.testing.assert_close(three[key], 3 * one[key], msg=key)


class TestViews:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_features_have_the_strides_and_channels_that_the_view_says(self, family: str) -> None:
        student = detector_zoo.build(family)
        seen = view(student, "student")
        inputs = detector_zoo.batch(family)
        outputs = student(**inputs, **seen.request(frozenset({"features"})))
        found = seen.read(outputs, Batch(inputs["pixel_values"], inputs["pixel_mask"], inputs["labels"]))
        assert [feature.stride for feature in found.features] == list(seen.strides)
        assert [feature.values.shape[1] for feature in found.features] == list(seen.channels)
        for stride, values in found.features:
            assert values.shape[-2:] == (-(-64 // stride), -(-64 // stride))

    @pytest.mark.parametrize(
        ("student", "teacher", "strides"),
        [
            ("gfl", "faster_rcnn", (8, 16, 32, 64)),
            ("gfl", "deformable_detr", (8, 16, 32, 64)),
            ("detr", "fcos", (32,)),
            ("rt_detr", "deformable_detr", (8, 16, 32)),
            ("faster_rcnn", "lw_detr", (8, 32)),
        ],
    )
    def test_levels_of_equal_stride_meet_across_families(
        self, student: str, teacher: str, strides: tuple[int, ...]
    ) -> None:
        models = detector_zoo.build(student), detector_zoo.build(teacher, 1)
        distiller = Distiller(*models, ["fitnets"])
        assert distiller.pair.student.strides == distiller.pair.teacher.strides == strides
        (loss,) = distilled_losses(distiller, models[0], detector_zoo.batch(student)).values()
        assert loss > 0

    def test_a_view_of_a_users_own_detector(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Mine(torch.nn.Linear):
            config = type("Config", (), {"model_type": "mine"})

        with pytest.raises(ValueError, match="add a view of your own"):
            view(Mine(1, 1), "student")
        seen = next(iter(VIEWS.values()))
        monkeypatch.setitem(VIEWS, type(detector_zoo.build("gfl")), seen)
        assert isinstance(view(detector_zoo.build("gfl"), "teacher"), seen)


class TestSpelling:
    @pytest.mark.parametrize(
        "text",
        ["fitnets", "fitnets:weight=2", "fitnets:weight=1e-3,adapter=False", "fitnets:weight=0.5,terms.features=0.25"],
    )
    def test_a_string_becomes_a_configuration_becomes_the_same_string(self, text: str) -> None:
        config = MethodConfig.parse(text)
        assert str(config) == text
        assert MethodConfig.parse(str(config)) == config

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("crossfit", "'crossfit' is not known: choose from"),
            ("fitnets:cut=2", "fitnets has no option 'cut=2'; its options are weight, terms, adapter, preset"),
            ("fitnets:weight=much", "weight='much' must be a number"),
            ("fitnets:weight=-1", "weight=-1.0 must be at least 0"),
            ("fitnets:terms.cls=1", r"no terms \['cls'\]; its terms are features"),
            ("nowhere.at_all:Mine", "can't be imported: No module named 'nowhere'"),
            ("crosskd_hf.distillation.distiller:Distiller", "is no subclass of MethodConfig"),
        ],
    )
    def test_what_cannot_be_meant_is_refused(self, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            MethodConfig.parse(text)
