"""What the trainer accepts as its arguments, and what it says of the others before anything is trained."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import IterableDataset, Subset
from transformers import EarlyStoppingCallback, EvalPrediction, TrainerCallback, TrainingArguments
from transformers.utils import ModelOutput

from crosskd_hf.data import DetectionCollator
from crosskd_hf.data.transforms import TrainTransform
from crosskd_hf.inference.coco_evaluator import CocoEvaluator
from crosskd_hf.models import FasterRCNNConfig, GFLConfig
from crosskd_hf.training import arguments, predictions
from crosskd_hf.training.arguments import move_teacher
from crosskd_hf.training.best_metric import check_metric
from crosskd_hf.training.first_batch import check_batch
from crosskd_hf.training.guard import NonFiniteLossError
from crosskd_hf.training.predictions import KeptPredictions
from crosskd_hf.training.trainer import CrossKDTrainer
from tests.tiny_run import SIZE, load_data, losses, make_detector, make_pair, make_trainer, processor, settings


def build(folder: Path, tmp_path: Path, **given: Any) -> CrossKDTrainer:
    """A trainer on the data in `folder`; `given` are its arguments, and `args` its settings."""
    train, val = load_data(folder)
    changes = {"max_steps": 2, "methods": ["crosskd"]} | given.pop("args", {})
    arguments: dict[str, Any] = {
        "args": settings(tmp_path, **changes),
        "train_dataset": train.dataset,
        "eval_dataset": val.dataset,
        "processing_class": processor(),
    }
    if "model_init" not in given:
        arguments["model"] = make_detector(2)
    return CrossKDTrainer(**(arguments | given))


# ---- Settings, student and teacher ----


def test_training_arguments_are_refused(folder: Path, tmp_path: Path) -> None:
    train, _ = load_data(folder)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(TypeError, match=r"args is a TrainingArguments; .* args=CrossKDConfig\("):
        CrossKDTrainer(make_detector(2), args, train.dataset, processing_class=processor())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: "org/student", "model=AutoModelForObjectDetection.from_pretrained('org/student')"),
        (lambda: None, "or model_init, a function that makes one"),
        (lambda: torch.compile(make_detector(2), backend="eager"), "torch_compile=True"),
        (lambda: nn.DataParallel(make_detector(2)), "give model.module"),
        (lambda: torchvision.ops.Conv2dNormActivation(3, 3), "crosskd-hf convert"),
        (lambda: make_detector(2).state_dict(), "load_state_dict"),
        (lambda: make_detector, "goes by model_init"),
        (lambda: nn.Linear(2, 2), "a torch Linear; a PreTrainedModel is needed"),
    ],
)
def test_what_is_no_detector_is_refused_with_a_way_out(
    folder: Path, tmp_path: Path, make: Callable[[], Any], words: str
) -> None:
    given = make()
    with pytest.raises(TypeError) as caught:
        build(folder, tmp_path, model=given)
    assert words in str(caught.value)
    if given is not None and not isinstance(given, str):
        with pytest.raises(TypeError, match="teacher_model is a .*a folder or Hub id to load one from"):
            build(folder, tmp_path, teacher_model=given)


def test_a_model_of_tuples_is_refused(folder: Path, tmp_path: Path) -> None:
    student = make_detector(2)
    student.config.return_dict = False
    with pytest.raises(TypeError, match="return_dict=True"):
        build(folder, tmp_path, model=student)


def test_a_teacher_of_the_students_modules_is_refused(folder: Path, tmp_path: Path) -> None:
    student, teacher = make_detector(2), make_detector(1)
    with pytest.raises(ValueError, match=r"share \d+ parameters that are to be trained, such as .*copy.deepcopy"):
        build(folder, tmp_path, model=student, teacher_model=student)
    teacher.backbone = student.backbone
    with pytest.raises(ValueError, match=r"share \d+ parameters .*, such as backbone"):
        build(folder, tmp_path, model=student, teacher_model=teacher)
    assert any(parameter.requires_grad for parameter in student.backbone.parameters())
    student.backbone.requires_grad_(False)
    build(folder, tmp_path, model=student, teacher_model=teacher)


def test_a_teacher_that_refuses_to_move_teaches_where_it_is(folder: Path, tmp_path: Path) -> None:
    """As quantised models of bitsandbytes do."""

    def to(*_: Any, **__: Any) -> None:
        raise ValueError("`.to` is not supported for `4-bit` or `8-bit` models.")

    teacher = make_detector(1, 12)
    teacher.to = to
    trainer = build(folder, tmp_path, teacher_model=teacher, args={"max_steps": 1})
    trainer.train()
    assert losses(trainer)[0]["crosskd/cls"] > 0
    with pytest.raises(ValueError, match=r"lies on cpu and can't be moved to meta .*device_map=\{'': 'meta'\}"):
        move_teacher(teacher, torch.device("meta"))


def test_a_teacher_that_no_gradient_passes_is_refused(folder: Path, tmp_path: Path) -> None:
    student, teacher, images = make_pair("deformable_detr")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        teacher = torch.ao.quantization.quantize_dynamic(teacher.eval(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match="quantised by torch.ao"):
        build(folder, tmp_path, model=student, teacher_model=teacher, processing_class=images)


# ---- Data ----


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        yield from ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.to_iterable_dataset(), "load this data without streaming"),
        (lambda data: Stream(), "load this data without streaming"),
        (lambda data: Subset(data, [0]), "dataset.select(indices)"),
        (lambda data: data.remove_columns("objects"), "Its columns are"),
        (lambda data: [data, data], "Several data sets go by name"),
        (lambda data: {"near": data, "far": Stream()}, "The evaluation data 'far' must be"),
    ],
)
def test_evaluation_data_without_truth_are_refused(
    folder: Path, tmp_path: Path, change: Callable[[Any], Any], words: str
) -> None:
    with pytest.raises(ValueError, match="must be a datasets.Dataset with the columns") as caught:
        build(folder, tmp_path, eval_dataset=change(load_data(folder)[1].dataset))
    assert words in str(caught.value)


def test_data_without_images_are_refused(folder: Path, tmp_path: Path) -> None:
    train, val = (split.dataset for split in load_data(folder))
    for given, words in (
        ({"train_dataset": train.select([])}, "The training data has no images"),
        ({"eval_dataset": val.select([])}, "The evaluation data has no images"),
        ({"eval_dataset": {"near": val, "far": val.select([])}}, "The evaluation data 'far' has no images"),
        ({"eval_dataset": {}}, "eval_dataset is an empty dict"),
        ({"args": {"dataloader_drop_last": True, "per_device_train_batch_size": 8}}, "7 images, fewer than the 8"),
    ):
        with pytest.raises(ValueError, match=words):
            build(folder, tmp_path, **given)


def test_the_best_of_several_evaluation_sets(folder: Path, tmp_path: Path) -> None:
    train, val = load_data(folder)
    sets = {"a": val.dataset, "b": train.dataset}
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(ValueError, match="metric_for_best_model='eval_map' .* gives eval_a_map, eval_a_map_50"):
        build(folder, tmp_path, eval_dataset=sets, args=steps | {"load_best_model_at_end": True})
    chosen = steps | {"load_best_model_at_end": True, "metric_for_best_model": "b_map", "max_steps": 1}
    trainer = build(folder, tmp_path, eval_dataset=sets, args=chosen)
    trainer.train()
    results = [entry["eval_b_map"] for entry in trainer.state.log_history if "eval_b_map" in entry]
    assert trainer.state.best_metric == results[0]


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("loss", "is no result of this evaluation, which gives eval_map, eval_map_50, .*eval_map_star: choose"),
        ("mAP", "is no result of this evaluation"),
        ("map_circel", "is no result of this evaluation"),
        ("map_large", r"eval_map_large would be NaN each time.*no object of an area from 9216 to inf px.*eval_map,"),
        ("eval_map_moon", "eval_map_moon would be NaN each time.*no object of the class 'moon'"),
    ],
)
def test_a_metric_that_evaluation_does_not_give(folder: Path, metric: str, words: str) -> None:
    """The first evaluation, an epoch later, would stop the run, or no model would ever be the best."""
    val, names = load_data(folder)[1].dataset, ("circle", "square", "moon", "star")
    for good in ("map", "eval_map_75", "map_small", "map_circle"):
        check_metric(good, val, names)
    with pytest.raises(ValueError, match=words):
        check_metric(metric, val, names)


def test_metrics_beside_ap(folder: Path, tmp_path: Path) -> None:
    """Of `compute_metrics`, of a subclass's `evaluate` and of a callback; nothing says which they are."""

    class Adding(TrainerCallback):
        def on_evaluate(self, *args: Any, metrics: dict[str, float], **kwargs: Any) -> None:
            metrics["eval_f1"] = 1.0

    chosen = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "f1"}
    with pytest.raises(ValueError, match="metric_for_best_model='f1' is no result"):
        build(folder, tmp_path, args=chosen, callbacks=[EarlyStoppingCallback()])
    build(folder, tmp_path, args=chosen, callbacks=[Adding()])
    build(folder, tmp_path, args=chosen, compute_metrics=lambda results: {"f1": 1.0})
    with pytest.raises(ValueError, match="metric_for_best_model='loss' is no result"):
        build(folder, tmp_path, args=chosen | {"metric_for_best_model": "loss"}, callbacks=[Adding()])


def test_the_lowest_ap_is_never_the_best(folder: Path, tmp_path: Path) -> None:
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(ValueError, match="greater_is_better=False would keep the model of the lowest eval_map, an AP"):
        build(folder, tmp_path, args=steps | {"load_best_model_at_end": True, "greater_is_better": False})


def test_a_plateau_is_one_of_ap(folder: Path, tmp_path: Path) -> None:
    steps = {"eval_strategy": "steps", "eval_steps": 1, "schedule": None}
    args = settings(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", **steps)
    assert (args.metric_for_best_model, args.lr_scheduler_kwargs["mode"]) == ("eval_map", "max")


class Collator(DetectionCollator):
    """Adds to and takes from what `DetectionCollator` makes."""

    extra: dict[str, Any] = {}
    left_out: tuple[str, ...] = ()

    def __call__(self, examples: Any) -> dict[str, Any]:
        batch = super().__call__(examples)
        for label in batch["labels"]:
            for name in self.left_out:
                del label[name]
        return {**batch, **self.extra}


def test_labels_that_evaluation_can_not_use(folder: Path, tmp_path: Path) -> None:
    collator = Collator(processor())
    collator.left_out = ("orig_size", "image_id")
    with pytest.raises(ValueError, match="The labels that the collator makes lack image_id, orig_size"):
        build(folder, tmp_path, data_collator=collator)
    trainer = build(folder, tmp_path, data_collator=collator, eval_dataset=None, args={"max_steps": 1})
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_batch_that_the_model_does_not_take(folder: Path, tmp_path: Path) -> None:
    collator = Collator(processor())
    collator.extra = {"file_names": ["a", "b"]}
    with pytest.raises(ValueError, match=r"The batches have file_names, which GFLForObjectDetection.forward"):
        build(folder, tmp_path, data_collator=collator)


def changed(key: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], Any]:
    """A change of one value of every label of a batch."""

    def of_batch(batch: dict[str, Any]) -> dict[str, Any]:
        return batch | {"labels": [label | {key: change(label[key])} for label in batch["labels"]]}

    return of_batch


BATCHES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a pair": (lambda batch: (batch["pixel_values"], batch["labels"]), "The collator makes a tuple; needed is a dict"),
    "one label": (lambda batch: batch | {"labels": batch["labels"][0]}, "a list with a dict for each image"),
    "a list of images": (lambda batch: batch | {"pixel_values": list(batch["pixel_values"])}, "of the form list"),
    "channels last": (lambda b: b | {"pixel_values": b["pixel_values"].permute(0, 2, 3, 1)}, r"64, 3\), channels last"),
    "whole numbers": (lambda batch: batch | {"pixel_values": batch["pixel_values"].int()}, "of torch.int32; needed"),
    "lists": (changed("boxes", lambda boxes: boxes.tolist()), "boxes that are a list; needed is a float tensor"),
    "five columns": (changed("boxes", lambda boxes: boxes[:, [0, 1, 2, 3, 3]]), r"torch.float32 \(\d, 5\); needed"),
    "pixels": (
        changed("boxes", lambda boxes: boxes * SIZE),
        r"boxes of image_id \d+ of up to \d\d.*relative to the image",
    ),
    "fewer classes": (changed("class_labels", lambda classes: classes[1:]), "class_labels that are .* beside . boxes"),
    "fractions": (changed("class_labels", lambda classes: classes.float()), "class_labels that are torch.float32"),
}


MASKS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "of DETR": (lambda batch: batch | {"pixel_mask": 1 - batch["pixel_mask"]}, "a pixel_mask of 0 in the top left"),
    "transposed": (lambda batch: batch | {"pixel_mask": batch["pixel_mask"][:, :, :32]}, "a pixel_mask that is .* 32"),
}
BATCHES |= MASKS
LATER = BATCHES | {
    "no numbers": (changed("boxes", lambda boxes: boxes * float("nan")), r"boxes of image_id \d+ that are not finite"),
    "turned corners": (
        changed("boxes", lambda boxes: boxes * torch.tensor([1, 1, -1, 1])),
        r"boxes of image_id \d+ with a width or height of -0",
    ),
    "a label less": (lambda batch: batch | {"labels": batch["labels"][1:]}, "makes 2 images and 1 labels"),
    "no boxes": (
        lambda batch: (
            batch | {"labels": [{k: v for k, v in label.items() if k != "boxes"} for label in batch["labels"]]}
        ),
        "lack boxes",
    ),
}


@pytest.mark.parametrize("name", LATER)
@pytest.mark.parametrize("streamed", [True, False])
def test_a_later_batch_of_another_form(folder: Path, tmp_path: Path, name: str, streamed: bool) -> None:
    """Only a first batch of a data set with a length was judged: errors of torch, or none, hours later."""
    change, words = LATER[name]
    collator, count = DetectionCollator(processor()), 0

    def collate(examples: Any) -> Any:
        nonlocal count
        count += len(examples) == 2 and started
        batch = collator(examples)
        return change(batch) if count == 2 else batch

    started = False
    data = load_data(folder)[0].dataset
    data = data.filter(lambda objects: len(objects["id"]) > 1, input_columns="objects")
    train = data.to_iterable_dataset() if streamed else data
    args = {"max_steps": 3, "per_device_train_batch_size": 2}
    trainer = build(folder, tmp_path, data_collator=collate, train_dataset=train, eval_dataset=None, args=args)
    started = True
    with pytest.raises(ValueError, match=words):
        trainer.train()
    assert trainer.state.global_step <= 1


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_of_another_form(folder: Path, tmp_path: Path, name: str) -> None:
    """Boxes in pixels were trained on without a word, the others were errors of torch."""
    change, words = BATCHES[name]
    collator = DetectionCollator(processor())
    with pytest.raises(ValueError, match=words):
        build(folder, tmp_path, data_collator=lambda examples: change(collator(examples)))


def test_types_of_labels_do_not_matter(folder: Path, tmp_path: Path) -> None:
    """Deformable DETR's loss takes neither int32 classes nor float64 boxes."""
    model, _, images = make_pair("deformable_detr")
    before, logged = copy.deepcopy(model.state_dict()), []
    collator = DetectionCollator(images)
    for change in (dict, changed("class_labels", Tensor.int), changed("boxes", Tensor.double)):
        model.load_state_dict(before)
        given: dict[str, Any] = {"model": model, "processing_class": images, "args": {"schedule": None}}
        trainer = build(folder, tmp_path, data_collator=lambda examples, c=change: c(collator(examples)), **given)
        trainer.train()
        logged.append(losses(trainer))
    assert len(logged[0]) == 2
    assert logged[1:] == logged[:1] * 2


def test_sizes_of_images_the_other_way_round(folder: Path, tmp_path: Path) -> None:
    """Detections were scaled to width x height, and AP fell without a word."""
    collator = DetectionCollator(processor())

    def collate(examples: Any) -> Any:
        batch = collator(examples)
        for label in batch["labels"]:
            label["orig_size"] = label["orig_size"].flip(0)
        return batch

    trainer = build(folder, tmp_path, data_collator=collate)
    with pytest.raises(ValueError, match=r"orig_size of image \d+ is \(64, 48\).* in the data set it is 64 px wide"):
        trainer.evaluate()


def test_boxes_that_may_be_corners(caplog: pytest.LogCaptureFixture) -> None:
    model = make_detector(2)
    pixels, classes = torch.zeros(1, 3, 8, 8), torch.zeros(4, dtype=torch.long)
    centres = torch.tensor([[0.4, 0.4, 0.6, 0.7], [0.8, 0.3, 0.3, 0.5], [0.5, 0.5, 1.0, 1.0], [0.2, 0.2, 0.3, 0.3]])
    corners = torch.cat([centres[:, :2] - centres[:, 2:] / 2, centres[:, :2] + centres[:, 2:] / 2], 1)
    for boxes, told in ((centres, 0), (corners[:3], 0), (corners, 1)):
        label = {"boxes": boxes, "class_labels": classes[: len(boxes)]}
        check_batch({"pixel_values": pixels, "labels": [label]}, model, evaluated=False)
        assert caplog.text.count("all of them could be corners") == told


def test_judging_a_batch_leaves_chance_alone() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    with arguments.same_chance():
        torch.rand(3), np.random.rand(3)
    assert (torch.rand(1), np.random.rand()) == expected


def test_grouping_needs_sizes(folder: Path, tmp_path: Path) -> None:
    stream = load_data(folder)[0].dataset.to_iterable_dataset()
    chosen = {"group_by_aspect_ratio": True, "train_sampling_strategy": "random"}
    with pytest.raises(ValueError, match="group_by_aspect_ratio=True needs all images' sizes .* got IterableDataset"):
        build(folder, tmp_path, train_dataset=stream, args=chosen)


# ---- Losses of one's own ----


class Half(CrossKDTrainer):
    """Half the student's own loss, and nothing of the teacher."""

    factor = 0.5

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        loss = outputs.loss * self.factor
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("family", ["gfl", "deformable_detr"])
def test_a_subclass_has_a_loss_of_its_own(
    folder: Path, tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture
) -> None:
    train, val = load_data(folder)
    student, teacher, images = make_pair(family)
    changes = {"max_steps": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    args = settings(tmp_path, **changes, methods=["crosskd"], schedule=None, learning_rate=1e-3)
    trainer = Half(student, args, train.dataset, val.dataset, images, teacher_model=teacher)
    trainer.train()
    assert caplog.text.count("Half.compute_loss doesn't call CrossKDTrainer.compute_loss, so the teacher teaches") == 1
    assert [set(entry) for entry in losses(trainer)] == [{"loss", "grad_norm"}] * 2
    assert all(entry["loss"] > 0 and entry["grad_norm"] > 0 for entry in losses(trainer))


def test_a_loss_of_ones_own_that_is_not_finite_stops_the_run(folder: Path, tmp_path: Path) -> None:
    train, _ = load_data(folder)
    trainer = Half(make_detector(2), settings(tmp_path, max_steps=2), train.dataset, processing_class=processor())
    trainer.factor = float("nan")
    with pytest.raises(NonFiniteLossError, match=r"Update 1 is not finite: loss = nan for image ids \[\d+, "):
        trainer.train()


class Constant(CrossKDTrainer):
    """A loss that has lost its graph, and is no number."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return torch.tensor(float("nan"), requires_grad=True)


class Former(CrossKDTrainer):
    """As it was written for earlier releases of transformers."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
        return super().compute_loss(model, inputs, return_outputs)


def test_other_losses_of_ones_own(folder: Path, tmp_path: Path) -> None:
    train, _ = load_data(folder)
    args = settings(tmp_path, max_steps=1)
    with pytest.raises(NonFiniteLossError, match="loss = nan"):  # though its gradient is 0
        Constant(make_detector(2), args, train.dataset, processing_class=processor()).train()
    with pytest.raises(TypeError, match=r"Former.compute_loss\(self, model, .* takes no num_items_in_batch"):
        Former(make_detector(2), args, train.dataset, processing_class=processor())


def mean_score(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
    """A mean over images."""
    assert len(labels) == len(outputs.logits)
    return outputs.logits.sigmoid().mean()


def test_compute_loss_func_replaces_the_students_loss(folder: Path, tmp_path: Path) -> None:
    teacher = make_detector(1, 12)
    whole, small = (
        build(folder, tmp_path, teacher_model=teacher, compute_loss_func=mean_score, args=args)
        for args in (
            {"per_device_train_batch_size": 4},
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        )
    )
    batch = whole.data_collator([whole.train_dataset[number] for number in range(4)])
    with torch.no_grad():
        expected = whole.model(batch["pixel_values"], batch["pixel_mask"]).logits.sigmoid().mean()
    for trainer in (whole, small):
        trainer.train()
        assert set(losses(trainer)[0]) == {"loss", "grad_norm", "loss_task", "crosskd/cls", "crosskd/reg"}
    assert losses(whole)[0]["loss_task"] == pytest.approx(float(expected), rel=1e-5)
    for ours, theirs in zip(losses(small), losses(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_a_model_without_a_loss(folder: Path, tmp_path: Path) -> None:
    trainer = build(folder, tmp_path)
    trainer.model.forward = lambda **inputs: ModelOutput(logits=torch.zeros(1, 3, 4))
    with pytest.raises(TypeError, match="GFLForObjectDetection returned no loss"):
        trainer.train()


# ---- The optimiser ----


def test_an_optimiser_of_ones_own(folder: Path, tmp_path: Path) -> None:
    chosen = torch.optim.AdamW, {"lr": 0.003, "betas": (0.8, 0.9)}
    changes = {"backbone_lr": 0.002, "weight_decay": 0.01, "scale_learning_rate": False}
    trainer = build(folder, tmp_path, teacher_model=make_detector(1, 12), optimizer_cls_and_kwargs=chosen, args=changes)
    trainer.train()
    groups = trainer.optimizer.param_groups
    assert isinstance(trainer.optimizer.optimizer, torch.optim.AdamW)
    assert {group["initial_lr"] for group in groups} == {0.003, 0.002}
    assert {group["betas"] for group in groups} == {(0.8, 0.9)}
    assert {group["weight_decay"] for group in groups} == {0.01}
    known = {id(parameter) for group in groups for parameter in group["params"]}
    assert all(id(parameter) in known for parameter in trainer.distiller.parameters())
    with pytest.raises(ValueError, match="weight_decay in optimizer_cls_and_kwargs has no effect"):
        build(folder, tmp_path, optimizer_cls_and_kwargs=(torch.optim.AdamW, {"weight_decay": 0.1}))


# ---- Metrics ----


class Recipe:
    """AP from outputs, as transformers' example of object detection computes it."""

    def __init__(self, dataset: Any, categories: Any) -> None:
        self.evaluator = CocoEvaluator(dataset, categories)

    def __call__(self, results: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        batches = results.predictions, results.label_ids
        for outputs, labels in [batches] if isinstance(batches[0], tuple) else zip(*batches, strict=True):
            made = ModelOutput(logits=torch.tensor(outputs[1]), pred_boxes=torch.tensor(outputs[2]))
            if len(outputs) > 3:
                made["level_lengths"] = torch.tensor(outputs[3])
            sizes = torch.tensor(np.stack([label["orig_size"] for label in labels]))
            found = processor().post_process_object_detection(made, 0.0, sizes)
            self.evaluator.update([label["image_id"].item() for label in labels], found)
        return {"own": self.evaluator.compute()["map_50"]} if compute_result else {}


@pytest.mark.parametrize(("kind", "each_batch"), [(GFLConfig, False), (GFLConfig, True), (FasterRCNNConfig, False)])
def test_compute_metrics_gets_outputs_and_labels(folder: Path, tmp_path: Path, kind: type, each_batch: bool) -> None:
    _, val = load_data(folder)
    trainer = build(
        folder,
        tmp_path,
        model=make_detector(2, kind=kind),
        compute_metrics=Recipe(val.dataset, val.categories),
        args={"batch_eval_metrics": each_batch},
    )
    metrics = trainer.evaluate()
    assert metrics["eval_own"] == pytest.approx(metrics["eval_map_50"], abs=1e-6)
    rows = trainer.predict(val.dataset).predictions
    assert {image: len(found) for image, found in rows.items()} == {
        image: len(found) for image, found in trainer.compute_metrics.evaluator.rows.items()
    }


def test_outputs_are_preprocessed_before_they_are_kept(folder: Path, tmp_path: Path) -> None:
    seen: list[Any] = []

    def best(outputs: Any, labels: Any) -> Tensor:
        assert len(outputs[1]) == len(labels)
        return outputs[1].sigmoid().amax((1, 2))

    def metrics(results: EvalPrediction) -> dict[str, float]:
        seen.extend(results.predictions)
        return {"best": max(float(batch.max()) for batch in results.predictions)}

    trainer = build(folder, tmp_path, compute_metrics=metrics, preprocess_logits_for_metrics=best)
    assert trainer.evaluate()["eval_best"] > 0
    assert [batch.shape for batch in seen] == [(2,), (2,), (1,)]
    with pytest.raises(ValueError, match="preprocess_logits_for_metrics needs compute_metrics"):
        build(folder, tmp_path, preprocess_logits_for_metrics=best)
    with pytest.raises(ValueError, match="include_for_metrics="):
        build(folder, tmp_path, compute_metrics=metrics, args={"include_for_metrics": ["inputs"]})


def test_batches_of_all_processes_in_the_order_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five images in batches of two for two processes: the sampler fills up with the first ones."""
    kept = []
    for images in ([0, 1], [4, 0]), ([2, 3], [1, 2]):
        own = KeptPredictions()
        for numbers in images:
            outputs = {
                "loss": torch.tensor(1.0),
                "loss_dict": {"a": torch.tensor(2.0)},
                "logits": torch.tensor(numbers),
            }
            own.begin_batch()
            own.add(outputs, [{"image_id": torch.tensor(number)} for number in numbers])
        kept.append(own)
    monkeypatch.setattr(predictions, "gather_object", lambda mine: [own._batches for own in kept])
    whole = kept[0].gathered(5)
    assert [batch[0][1].tolist() for batch in whole] == [[0, 1], [2, 3], [4]]
    assert [[int(label["image_id"]) for label in labels] for _, labels in whole] == [[0, 1], [2, 3], [4]]


# ---- A model for every run ----


def test_model_init_starts_every_run_from_the_same_weights(folder: Path, tmp_path: Path) -> None:
    teacher = make_detector(1)
    plain = build(folder, tmp_path / "plain", teacher_model=teacher)
    plain.train()
    trainer = build(folder, tmp_path, model_init=lambda: make_detector(2), teacher_model=teacher)
    for _ in range(2):
        trainer.train()
        assert losses(trainer) == losses(plain)


def test_model_init_excludes_what_belongs_to_one_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Both model and model_init are given"):
        build(folder, tmp_path, model=make_detector(2), model_init=lambda: make_detector(2))
    optimizer = torch.optim.SGD(make_detector(2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizers belong to one model"):
        build(folder, tmp_path, model_init=lambda: make_detector(2), optimizers=(optimizer, None))
    with pytest.raises(TypeError, match="a torch Linear; a PreTrainedModel is needed"):
        build(folder, tmp_path, model_init=lambda: nn.Linear(2, 2))


def test_resuming_a_model_of_model_init(folder: Path, tmp_path: Path) -> None:
    def run(steps: int) -> CrossKDTrainer:
        args = {"max_steps": steps, "save_strategy": "steps", "save_steps": 1, "schedule": None}
        args |= {"lr_scheduler_type": "constant"}
        teacher = make_detector(1, 12)
        return build(folder, tmp_path, model_init=lambda: make_detector(2), teacher_model=teacher, args=args)

    whole = run(2)
    whole.train()
    again = run(2)
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"))
    assert losses(again) == losses(whole)
    for ours, theirs in ((again.model, whole.model), (again.distiller, whole.distiller)):
        pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
        assert all(torch.equal(own, other) for own, other in pairs)


def test_hyperparameters_are_searched_for(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    cuts: list[int] = []

    class Searched(CrossKDTrainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            cuts.append(self.distiller.named_methods["crosskd"].config.cut)
            return super().evaluate(*args, **kwargs) | {"eval_map": 0.1 * cuts[-1], "eval_map_50": 1e6}

    train, val = load_data(folder)
    args = settings(tmp_path, max_steps=1, methods=["crosskd"])
    trainer = Searched(None, args, train.dataset, val.dataset, processor(), make_detector(1, 12), model_init=make_trial)
    best = trainer.hyperparameter_search(
        lambda trial: {"methods": [f"crosskd:cut={trial.suggest_categorical('cut', [1, 3, 2])}"]},
        n_trials=4,
        backend="optuna",
    )
    assert set(cuts) >= {best.hyperparameters["cut"]}
    assert best.objective == pytest.approx(0.1 * max(cuts))


def make_trial(trial: Any) -> Any:
    return make_detector(2)


# ---- Checkpointing, and before the first update ----


def test_reentrant_checkpointing(folder: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"gradient_checkpointing": True, "schedule": None, "max_steps": 1, "methods": ["crosskd"]}
    changes |= {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="Reentrant checkpointing .* check_first_step=False"):
        make_trainer(folder, family="deformable_detr", output_dir=str(tmp_path), **changes)
    trainer = make_trainer(
        folder, family="deformable_detr", output_dir=str(tmp_path), check_first_step=False, **changes
    )
    trainer.train()
    assert losses(trainer)[0]["grad_norm"] > 0


def test_one_line_tells_the_images_of_an_update(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 1}
    build(folder, tmp_path, args=changes).train()
    told = [record.getMessage() for record in caplog.records if "images an update" in record.getMessage()]
    assert told == ["1 x 2 x 3 = 6 images an update (processes x batch x accumulation), learning rate 0.01875"]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_PORT", "29500")  # as accelerate launch --cpu --num_processes 2 sets them
    build(folder, tmp_path, args=changes | {"schedule": None}).train()
    assert "accumulation); for several processes on CPUs: torchrun --nproc_per_node N" in caplog.text


def test_kwargs_of_a_checkpointing_that_is_off(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gradient_checkpointing_kwargs=.* would have no effect without"):
        build(folder, tmp_path, args={"gradient_checkpointing_kwargs": {"use_reentrant": False}})


def test_evaluation_leaves_out_no_image(folder: Path, tmp_path: Path) -> None:
    """`dataloader_drop_last` is for training; the first evaluation stopped the run for the images of its last batch."""
    trainer = build(folder, tmp_path, args={"dataloader_drop_last": True, "per_device_eval_batch_size": 3})
    assert len(trainer.get_train_dataloader()) == 1
    assert trainer.evaluate()["eval_map"] == build(folder, tmp_path).evaluate()["eval_map"]
    assert len(trainer.predict(trainer.eval_dataset).predictions) == 5


def test_a_hub_that_does_not_answer(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told when the trainer is built, in one sentence; at the end nothing is lost."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise ConnectionError("[Errno -2] Name or service not known\nmore")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    monkeypatch.setattr(HfApi, "upload_folder", refuse)
    words = r"The repository 'me/x' .*can't be made or reached .*service not known\. Log in .*without push_to_hub"
    with pytest.raises(OSError, match=words):
        build(folder, tmp_path, args={"push_to_hub": True, "hub_model_id": "me/x"})
    trainer = build(folder, tmp_path)
    trainer.hub_model_id = "me/x"
    with pytest.raises(OSError, match="could not be uploaded to me/x; .*Nothing is lost"):
        trainer.push_to_hub()
    assert (tmp_path / "run/model.safetensors").is_file()


def test_data_given_to_a_method_are_those_of_the_constructor(folder: Path, tmp_path: Path) -> None:
    trainer, (_, val) = build(folder, tmp_path), load_data(folder)
    assert trainer.evaluate(val)["eval_map"] == trainer.evaluate()["eval_map"]
    assert len(trainer.predict(val).predictions) == 5
    with pytest.raises(ValueError, match=r"The evaluation data are a path, .*load_detection_dataset"):
        trainer.evaluate(str(folder))
    with pytest.raises(ValueError, match="Images without boxes: crosskd_hf.inference.predict"):
        trainer.predict(val.dataset.remove_columns("objects"))


@pytest.mark.parametrize("returned", [None, 0.5])
def test_compute_metrics_may_return_nothing(folder: Path, tmp_path: Path, returned: Any) -> None:
    """It stopped the run at the first evaluation."""
    metrics = build(folder, tmp_path, compute_metrics=lambda prediction: returned).evaluate()
    assert metrics["eval_map"] == build(folder, tmp_path).evaluate()["eval_map"]


def test_a_model_without_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    empty = make_detector(2).to("meta")
    with pytest.raises(ValueError, match=r"^model has no weights yet: \d+ of its tensors are on the device 'meta'"):
        build(folder, tmp_path, model=empty)
    with pytest.raises(ValueError, match="^teacher_model has no weights yet"):
        build(folder, tmp_path, teacher_model=empty)


# ---- What is trained, and what can be saved ----


def test_a_frozen_student_is_refused(folder: Path, tmp_path: Path) -> None:
    trainer = build(folder, tmp_path, model=make_detector(2).requires_grad_(False), teacher_model=make_detector(1, 12))
    with pytest.raises(ValueError, match="No parameter of the student is to be trained"):
        trainer.train()


def test_an_optimiser_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    """Nothing was learned, without a word."""
    model = make_detector(2)
    for of, refused in ((make_detector(2), True), (model, False)):
        optimizer = torch.optim.SGD(of.parameters(), lr=0.01)
        given: dict[str, Any] = {"model": model, "args": {"schedule": None}, "optimizers": (optimizer, None)}
        trainer = build(folder, tmp_path, **given)
        with pytest.raises(ValueError, match="holds no parameter of the student") if refused else nullcontext():
            trainer.train()


@pytest.mark.parametrize("both", [True, False])
def test_a_schedule_of_another_optimiser_is_refused(folder: Path, tmp_path: Path, both: bool) -> None:
    """The rates stayed as they were, without a word."""
    model = make_detector(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 0.5**update)
    given: dict[str, Any] = {"model": model, "args": {"schedule": None}}
    trainer = build(folder, tmp_path, optimizers=(optimizer if both else None, schedule), **given)
    with nullcontext() if both else pytest.raises(ValueError, match="schedule in optimizers was made for another"):
        trainer.train()
    assert trainer.state.global_step == (2 if both else 0)


class Nothing(IterableDataset):  # type: ignore[type-arg]
    """A stream that is at its end."""

    def __iter__(self) -> Any:
        return iter(())


def test_a_stream_without_an_image_is_refused(folder: Path, tmp_path: Path) -> None:
    """The run ended without an update, and the student was saved as it was."""
    with pytest.raises(ValueError, match="The training data gave no batch: nothing would be learned"):
        build(folder, tmp_path, train_dataset=Nothing()).train()


class OwnOptimizer(CrossKDTrainer):
    """Makes its optimiser without asking `super()`."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        return self.optimizer


def test_an_optimiser_without_the_adapters_is_refused(folder: Path, tmp_path: Path) -> None:
    """They stayed random, without a word."""
    train, _ = load_data(folder)
    args = settings(tmp_path, max_steps=1, methods=["crosskd"])
    given: dict[str, Any] = {"args": args, "train_dataset": train.dataset, "processing_class": processor()}
    with pytest.raises(ValueError, match="The optimiser lacks 4 parameters of the adapters"):
        OwnOptimizer(make_detector(2), teacher_model=make_detector(1, 12), **given).train()
    OwnOptimizer(make_detector(2), teacher_model=make_detector(1), **given).train()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_optimiser_trains_in_float32(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Half precision was an error of torch with a `create_optimizer` of one's own, double precision always."""
    train, _ = load_data(folder)
    args = settings(tmp_path, max_steps=1, methods=["crosskd"], save_strategy="steps", save_steps=1)
    model, teacher = make_detector(2).to(dtype), make_detector(1).to(dtype)
    trainer = OwnOptimizer(model, args, train.dataset, processing_class=processor(), teacher_model=teacher)
    trainer.train()
    assert {p.dtype for p in (*model.parameters(), *teacher.parameters())} == {torch.float32}
    weights = load_file(tmp_path / "run/checkpoint-1/model.safetensors").values()
    assert {weight.dtype for weight in weights if weight.is_floating_point()} == {dtype}


def shared(model: nn.Module) -> None:
    model.head.cls_tower[1].conv.weight = model.head.cls_tower[0].conv.weight


def replaced(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model.head.classifier)


@pytest.mark.parametrize("change", [shared, replaced])
def test_a_student_that_can_not_be_loaded_again_is_refused(
    folder: Path, tmp_path: Path, change: Callable[[nn.Module], None]
) -> None:
    """The first failed at the first checkpoint, the second when the best checkpoint was loaded at the end."""
    model = make_detector(2)
    change(model)
    trainer = build(folder, tmp_path, model=model, args={"save_strategy": "steps", "save_steps": 1})
    with pytest.raises(RuntimeError, match="can't be saved and loaded again, so no checkpoint of this run"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not list((tmp_path / "run").glob("*checkpoint*"))
    without = build(folder, tmp_path, model=model, args={"max_steps": 1})
    without.train()


def test_trying_to_save_leaves_chance_and_weights_alone(folder: Path, tmp_path: Path) -> None:
    logged = []
    for strategy in ("no", "steps"):
        trainer = build(folder, tmp_path, teacher_model=make_detector(1, 12), args={"save_strategy": strategy})
        trainer.train()
        logged.append((losses(trainer), torch.random.get_rng_state().tolist()))
    assert logged[0] == logged[1]


def test_a_checkpoint_in_the_settings_alone(folder: Path, tmp_path: Path) -> None:
    """`Trainer` doesn't read it: the run began anew, without a word."""
    trainer = build(folder, tmp_path, args={"resume_from_checkpoint": "True", "max_steps": 1})
    with pytest.raises(ValueError, match="in the settings, which Trainer doesn't read"):
        trainer.train()
    trainer.train(resume_from_checkpoint=False)
    assert trainer.state.global_step == 1


def test_rates_that_the_run_never_has(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build(folder, tmp_path, args={"max_steps": 1, "warmup_steps": 100, "decay_epochs": [0.5, 8.0]}).train()
    assert "The warm-up takes 100 updates, the run has 1" in caplog.text
    assert "doesn't fall at decay_epochs [0.5, 8.0]: the run ends after epoch 0.5" in caplog.text
    caplog.clear()
    build(folder, tmp_path, args={"max_steps": 2, "decay_epochs": [0.5]}).train()
    assert "warm-up" not in caplog.text
    assert "fall at" not in caplog.text


# ---- Arguments that need others ----


def test_arguments_that_nothing_reads_are_refused(folder: Path, tmp_path: Path) -> None:
    collator = DetectionCollator(processor())
    with pytest.raises(ValueError, match="train_transform would have no effect beside a data_collator"):
        build(folder, tmp_path, data_collator=collator, train_transform=TrainTransform())
    with pytest.raises(ValueError, match="teacher_processing_class would have no effect without teacher_model"):
        build(folder, tmp_path, teacher_processing_class=processor())
    for transform in (None, "default"):
        build(folder, tmp_path, data_collator=collator, train_transform=transform)


def test_evaluation_without_an_image_processor_is_refused_at_once(folder: Path, tmp_path: Path) -> None:
    """It stopped the run at the first evaluation."""
    given: dict[str, Any] = {"data_collator": DetectionCollator(processor()), "processing_class": None}
    with pytest.raises(ValueError, match="Evaluation needs processing_class"):
        build(folder, tmp_path, **given)
    build(folder, tmp_path, eval_dataset=None, **given).train()


def test_methods_without_a_teacher_are_told(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build(folder, tmp_path)
    assert "labels alone" not in caplog.text
    build(folder, tmp_path, args={"methods": ["pkd"]})
    assert "no teacher_model, so the student learns from labels alone: methods=['pkd'] rest" in caplog.text


def test_arguments_of_the_card_are_on_the_card(folder: Path, tmp_path: Path) -> None:
    trainer = build(folder, tmp_path, teacher_model=make_detector(1, 12))
    trainer.create_model_card(language="de", finetuned_from="me/base", dataset_tags="me/data", tasks="object-detection")
    data = ModelCard.load(tmp_path / "run/README.md").data
    assert (data.language, data.base_model, data.datasets) == ("de", "me/base", ["me/data"])
    for given in ({"tasks": "image-classification"}, {"dataset_args": "x"}):
        with pytest.raises(ValueError, match="no place on the card of a detector"):
            trainer.create_model_card(**given)
