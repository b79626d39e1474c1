"""What a distilled step asks of the device: no value that the host waits for, no copy between the two."""

import contextlib
import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import TrainerCallback

from benchmarks.step_kernels import KernelCount, WaitCount, batch, build, count_step, faked, main
from crosskd_hf.distillation import METHODS, Distiller
from crosskd_hf.models import DetectionImageProcessor
from crosskd_hf.models.assigners import SizeCache, Targets
from crosskd_hf.models.boxes import image_sizes
from crosskd_hf.models.normalization import Normalizer
from crosskd_hf.models.pyramid import valid_priors
from crosskd_hf.models.rpn import Proposals
from crosskd_hf.training.detr_loss import take_over
from tests.distillation import detr_zoo
from tests.tiny_dense import KINDS, make_batch, make_detector
from tests.tiny_faster_rcnn import make_faster_rcnn
from tests.tiny_run import make_trainer
from tests.versions import needs_fake_gpu

pytestmark = needs_fake_gpu


def fitting(kind: str) -> list[str]:
    """The methods that such a pair can be distilled by."""
    names = []
    for name in METHODS:
        with contextlib.suppress(ValueError), Distiller(make_detector(kind), make_detector(kind, 1), [name]):
            names.append(name)
    assert len(names) > 3
    return names


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_step_neither_asks_for_a_value_nor_copies_from_the_host(kind: str) -> None:
    """Fake tensors have no values: whoever asks for one raises."""
    counts = count_step(make_detector(kind), make_detector(kind, 1), fitting(kind), "cuda", 64, 96)
    assert counts["distillation"].kernels
    assert {name: count.copies for name, count in counts.items() if count.copies} == {}


def test_a_gfl_step_launches_few_kernels() -> None:
    """Of a ResNet-18 that learns from a ResNet-50, at the size of COCO: 1,821.

    The layout of a convolution's output is torch's choice; rows of maps that lie channels last are no copies.
    """
    counts = count_step(build("gfl:resnet18"), build("gfl:resnet50"), ["crosskd"], "cpu", 800, 1344)
    assert sum(sum(count.kernels.values()) for count in counts.values()) <= 1850


def test_folded_batch_norms_launch_nothing() -> None:
    """Those of a ResNet-50 are 53; torch dispatches two operators for each."""
    models = [[build(f"gfl:{name}") for name in ("resnet18", "resnet50")] for _ in range(2)]
    found = [
        sum(count_step(*pair, ["crosskd"], "cpu", 800, 1344, fast)["distillation"].kernels.values())
        for pair, fast in zip(models, (False, True), strict=True)
    ]
    assert found[0] - found[1] == 2 * 53


def test_a_backward_pass_asks_for_no_value() -> None:
    counts = count_step(make_detector("gfl"), make_detector("gfl", 1), fitting("gfl"), "cpu", 64, 96)
    assert all(count.kernels for count in counts.values())


def test_pixels_are_normalised_without_a_wait() -> None:
    normalize = Normalizer(DetectionImageProcessor())
    with FakeTensorMode():
        given = {
            "pixel_values": torch.empty(2, 3, 64, 96, dtype=torch.uint8, device="cuda"),
            "pixel_mask": torch.empty(2, 64, 96, dtype=torch.bool, device="cuda"),
        }
        normalize(given)  # sends mean and deviation
        with KernelCount() as count:
            made = normalize(given)["pixel_values"]
    assert made.dtype == torch.float32
    assert made.is_contiguous()
    assert count.copies == []
    assert sum(count.kernels.values()) <= 6  # memory, pixels less mean, deviation, twice the mask, and its product


def test_faster_rcnn_waits_for_proposals_alone() -> None:
    """From the backbone to the losses of the RPN, and the second stage on given proposals."""
    model = make_faster_rcnn().train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        faked(model, "cuda")
        inputs = batch("cuda", 64, 96)
        boxes, mask = torch.empty(2, 60, 4, device="cuda"), torch.empty(2, 60, device="cuda", dtype=torch.bool)
        for _ in range(2):
            with KernelCount() as count:
                sizes = image_sizes(inputs["pixel_values"], inputs["pixel_mask"])
                features = model.pyramid(inputs["pixel_values"])
                proposed, anchors = model.rpn(features), model.rpn.anchors(features)
                targets = Targets.from_labels(inputs["labels"], sizes)
                parts = model.rpn.loss(proposed, anchors, valid_priors(model.config, anchors, sizes), targets)
                rois = model.roi_head.sample(Proposals(boxes, mask, boxes[..., 0]), targets)
                parts |= model.roi_head.loss(model.roi_head(features, rois.boxes), rois)
    assert len(parts) == 4
    assert count.copies == []


IN_THE_MODEL = {  # functions of transformers' models that ask for values, or send sizes of maps
    "deformable_detr": {"DeformableDetrEncoderLayer.forward", "DeformableDetrModel.forward"},
    "deformable_detr two-stage": {"DeformableDetrEncoderLayer.forward", "DeformableDetrModel.forward"},
    "rt_detr": {"RTDetrEncoderLayer.forward", "RTDetrModel.forward", "RTDetrForObjectDetectionLoss"},
    "detr": {"DetrEncoderLayer.forward", "ForObjectDetectionLoss"},
    "conditional_detr": {"ConditionalDetrEncoderLayer.forward"},
    "dab-detr": set(),
    "lw_detr": {"LwDetrModel.forward"},
    "rf_detr": {"RfDetrModel.forward"},
}


@pytest.mark.parametrize("name", IN_THE_MODEL)
def test_losses_of_detrs_ask_for_no_value_on_given_matches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matching waits, and so do models of transformers; in neither the losses nor the distillation anybody does."""

    def given(matcher: Any, outputs: Any, targets: Any, *args: Any, **kwargs: Any) -> list[Any]:
        return [(torch.arange(3), torch.arange(3)) for _ in targets]

    for module in ("loss_for_object_detection", "loss_deformable_detr", "loss_rt_detr", "loss_lw_detr", "loss_rf_detr"):
        for found in vars(importlib.import_module(f"transformers.loss.{module}")).values():
            if isinstance(found, type) and found.__name__.endswith("HungarianMatcher"):
                monkeypatch.setattr(found, "forward", given)
    changes = {"num_denoising": 0} if "rt" in name else {}  # the number of denoising queries depends on values
    student, teacher = detr_zoo.build(name, **changes), detr_zoo.build(name, 1, **changes)
    take_over(student)
    distiller = Distiller(student.train(), teacher, ["crosskd", "pkd"])
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (student, teacher, distiller):
            faked(module, "cuda")
        inputs = batch("cuda", 64, 96)
        with WaitCount() as supervised:
            outputs = student(**inputs, **distiller.student_request)
        with WaitCount() as distilled:
            parts = distiller(outputs, inputs)
    assert any("crosskd" in part for part in parts)
    assert any("pkd" in part for part in parts)
    assert distilled.values == []
    every = {*supervised.values, *supervised.copies, *distilled.copies}
    assert {place.rsplit(":", 1)[1] for place in every} - {"_OnDevice.forward"} == IN_THE_MODEL[name]
    assert not [place for place in supervised.values if "loss" in place or "crosskd" in place]


@pytest.mark.parametrize("kind", ["gfl", pytest.param("fcos", marks=pytest.mark.slow)])
def test_model_and_losses_are_one_graph(kind: str) -> None:
    torch.compiler.reset()
    model, inputs = make_detector(kind).train(), make_batch()
    compiled = torch.compile(lambda **given: model(**given, cut=1).loss, backend="eager", fullgraph=True)
    assert float(compiled(**inputs).detach()) == pytest.approx(float(model(**inputs).loss.detach()), rel=1e-5)


class Asking(KernelCount):
    """Counts who asks for values of real tensors, which on a CPU are all there: each would wait for a GPU."""

    packages = WaitCount.packages

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = "aten.index" in str(func) and any(rows is not None and rows.dtype == torch.bool for rows in args[1])
        if by_mask or any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "masked_select", "unique")):
            self.asked.append(self._place())
        return func(*args, **(kwargs or {}))


class ThirdUpdate(TrainerCallback):
    """Counts from the begin to the end of the third update: the first checks more, and fills caches."""

    def __init__(self) -> None:
        self.count = Asking()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.count.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            self.count.__exit__(None, None, None)


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}])
def test_an_update_of_the_trainer_asks_for_one_value(changes: dict[str, Any], tmp_path: Path) -> None:
    """Whether it is finite: the whole update from forward pass to optimiser, with logging and saving elsewhere."""
    third = ThirdUpdate()
    trainer = make_trainer(tmp_path, max_steps=4, logging_steps=100, save_strategy="no", eval_strategy="no", **changes)
    trainer.add_callback(third)
    trainer.train()
    on_hosts_alone = "models/normalization.py:_rectangle"  # of a mask on the CPU: no device is waited for
    assert [place for place in third.count.asked if place != on_hosts_alone] == [
        "training/guard.py:NonFiniteGuard.triggered"
    ]


def test_the_count_sees_copies_and_values() -> None:

    with FakeTensorMode(), KernelCount() as count:
        torch.tensor([1.0, 2.0], device="cuda")
        torch.ones(2, device="cuda").to("cpu")
    # Where there is a GPU, torch makes the tensor of a list there without an operation that could be counted.
    assert len(count.copies) == (1 if torch.cuda.is_available() else 2)
    with Asking() as asking:
        values = torch.arange(3.0)
        assert values[values > 1].sum() == 2
    assert len(asking.asked) >= 2
    with FakeTensorMode(), pytest.raises(Exception, match="_local_scalar_dense"):
        torch.ones(2).sum().item()


def test_the_benchmark_prints_what_it_counts(capsys: pytest.CaptureFixture[str]) -> None:
    found = main(["--student", "retinanet:test_resnet", "--teacher", "retinanet:test_resnet", "--top", "3"])
    assert found["kernels"] == sum(found["cpu"].values())
    assert found["copies"] == []
    assert "models/layers.py:ConvNormAct.forward" in capsys.readouterr().out


class TestSizeCache:
    def test_makes_a_size_once_and_forgets_the_oldest(self) -> None:
        made: list[int] = []
        cache = SizeCache(limit=2)

        def get(key: int) -> Any:
            return cache.get(key, lambda: made.append(key) or torch.ones(key))  # type: ignore[func-returns-value]

        assert [len(get(key)) for key in (1, 2, 1, 3, 2, 1)] == [1, 2, 1, 3, 2, 1]
        assert made == [1, 2, 3, 1]

    def test_copies_and_files_of_a_model_have_none(self) -> None:

        model = make_detector("gfl")
        model(torch.randn(1, 3, 64, 64))
        assert model.head._known_priors._known
        assert not copy.deepcopy(model).head._known_priors._known

    def test_priors_of_a_prediction_serve_a_training_step(self) -> None:
        model, inputs = make_detector("fcos"), make_batch()
        with torch.inference_mode():
            model(inputs["pixel_values"])
        model.train()(**inputs).loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
