"""The student's classes are those of its data, or nothing is trained."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset
from transformers import (
    AutoModelForObjectDetection,
    DeformableDetrImageProcessor,
    DetrImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from crosskd_hf.data import CategoryMap, DataError, DetectionCollator, load_coco
from crosskd_hf.data.shapes import ShapesPaths
from crosskd_hf.models import DetectionImageProcessor
from crosskd_hf.training.trainer import CrossKDTrainer
from tests.distillation import detr_zoo
from tests.tiny_dense import KINDS, make_detector
from tests.tiny_faster_rcnn import make_faster_rcnn
from tests.tiny_run import SIZE, load_data, losses, make_data, make_pair, processor, settings

NAMES = ("circle", "square", "triangle", "star")
FAMILIES = (*KINDS, "faster_rcnn", *detr_zoo.MODELS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classes")
    make_data(path, empty=())
    return path


@pytest.fixture(scope="module")
def data(folder: Path) -> tuple[datasets.Dataset, datasets.Dataset]:
    train, val = load_data(folder)
    return train.dataset, val.dataset


def student(*names: str) -> Any:
    id2label = dict(enumerate(names))
    label2id = {name: index for index, name in id2label.items()}
    return make_detector("gfl", spread=False, num_labels=len(names), id2label=id2label, label2id=label2id)


def trainer(folder: Path, model: Any, train: Any = None, val: Any = None, **more: Any) -> CrossKDTrainer:
    images = more.pop("images", None) or processor()
    return CrossKDTrainer(model, settings(folder, max_steps=2, **more), train, val, images)


def unnamed(dataset: datasets.Dataset, change: Any = lambda labels: labels) -> datasets.Dataset:
    """The same data without names; `change` is applied to the labels of each image."""
    features = dataset.features.copy()
    features["objects"] = {**features["objects"], "category": datasets.List(datasets.Value("int64"))}
    rows = [{**objects, "category": change(objects["category"])} for objects in dataset["objects"]]
    column = datasets.Dataset.from_dict({"objects": rows}, features=datasets.Features(objects=features["objects"]))
    return datasets.concatenate_datasets([dataset.remove_columns("objects"), column], axis=1)


class Rows(Dataset[Any]):
    """A data set of torch, which tells nothing of its columns."""

    def __init__(self, rows: datasets.Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


class TestNames:
    @pytest.mark.parametrize(
        ("names", "way_out"),
        [
            (NAMES[::-1], "same classes in another order.*data.for_model"),
            ([f"class {i}" for i in range(80)], "head for the classes of the data.*ignore_mismatched_sizes"),
            (NAMES[:3], "head for the classes of the data"),
            ((*NAMES, "moon"), "head for the classes of the data"),
            (("circle", "square", "triangle", "moon"), "head for the classes of the data"),
            ([f"LABEL_{i}" for i in range(80)], "head for the classes of the data"),
        ],
    )
    @pytest.mark.parametrize("split", ["training", "evaluation"])
    def test_others_are_refused_and_both_lists_named(
        self, folder: Path, data: tuple[Any, Any], names: list[str], way_out: str, split: str
    ) -> None:
        train, val = data if split == "training" else (None, data[1])
        theirs = f"{len(names)} classes, {', '.join(map(repr, names[:30]))}"
        with pytest.raises(ValueError, match=way_out) as error:
            trainer(folder, student(*names), train, val)
        assert f"than the {split} data. Student (id2label): {theirs}" in str(error.value)
        assert "Data: 4 classes, 'circle', 'square', 'triangle', 'star'." in str(error.value)

    @pytest.mark.parametrize("count", [3, 5])
    def test_of_detr_which_would_take_an_extra_label_for_no_object(
        self, folder: Path, data: tuple[Any, Any], count: int
    ) -> None:
        model = detr_zoo.build("detr", num_labels=count)
        images = DetrImageProcessor(size={"height": SIZE, "width": SIZE})
        with pytest.raises(ValueError, match=f"{count} classes, 'LABEL_0'.*4 classes, 'circle'"):
            trainer(folder, model, data[0], images=images)

    def test_case_and_spaces_do_not_matter(self, folder: Path, data: tuple[Any, Any]) -> None:
        run = trainer(folder, student("Circle", " square", "TRIANGLE", "star"), *data)
        assert "eval_map_Circle" in run.evaluate()

    def test_a_student_without_names_gets_those_of_the_data(
        self, folder: Path, data: tuple[Any, Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        run = trainer(folder, student(*(f"LABEL_{i}" for i in range(4))), *data)
        assert run.model.config.id2label == dict(enumerate(NAMES))
        assert run.model.config.label2id == {name: index for index, name in enumerate(NAMES)}
        assert caplog.text.count("The student's classes had no names") == 1

    @pytest.mark.parametrize("wrap", ["stream", "subset", "concatenated", "dict", "loaded"])
    def test_names_are_found_in_every_kind_of_data_set(
        self, folder: Path, data: tuple[Any, Any], wrap: str, tmp_path: Path
    ) -> None:
        train, val = data
        if wrap == "loaded":
            train.save_to_disk(tmp_path / "train")
        train, val = {
            "stream": lambda: (train.to_iterable_dataset(), None),
            "subset": lambda: (Subset(Subset(train, [0, 1]), [1]), None),
            "concatenated": lambda: (ConcatDataset([train, train]), None),
            "dict": lambda: (None, {"day": val, "night": val}),
            "loaded": lambda: (datasets.load_from_disk(tmp_path / "train"), None),
        }[wrap]()
        with pytest.raises(ValueError, match="evaluation data 'day'" if wrap == "dict" else "than the training data"):
            trainer(folder, student(*NAMES[::-1]), train, val)
        trainer(folder, student(*NAMES), train, val)

    def test_of_data_that_is_evaluated_later(self, folder: Path, data: tuple[Any, Any]) -> None:
        paths = ShapesPaths.below(folder)
        order = CategoryMap((1, 2, 3, 4), NAMES[::-1])
        other = load_coco(paths.val_annotations, paths.val_images, order)
        run = trainer(folder, student(*NAMES), *data)
        with pytest.raises(ValueError, match="other classes than the evaluation data"):
            run.evaluate(other.dataset)
        again = other.for_model(run.model.config)
        assert again.dataset["objects"][:] == data[1]["objects"][:]
        assert "eval_map" in run.evaluate(again.dataset)

    def test_reversed_names_in_a_json_are_found_by_name(self, folder: Path, tmp_path: Path) -> None:
        """Whatever order and ids a json has: read with the student's map, images have the same labels."""
        paths = ShapesPaths.below(folder)
        content = json.loads(paths.val_annotations.read_text())
        ids = {category["id"]: 50 - category["id"] for category in content["categories"]}
        for category in content["categories"]:
            category["id"] = ids[category["id"]]
        for annotation in content["annotations"]:
            annotation["category_id"] = ids[annotation["category_id"]]
        (tmp_path / "val.json").write_text(json.dumps(content))
        train, val = load_data(folder)
        assert load_coco(tmp_path / "val.json", paths.val_images).categories.names == NAMES[::-1]
        read = load_coco(tmp_path / "val.json", paths.val_images, train.categories)
        assert read.dataset["objects"][:] == val.dataset["objects"][:]


class TestWithoutNames:
    def test_one_line_says_how_labels_are_taken(
        self, folder: Path, data: tuple[Any, Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        trainer(folder, student(*NAMES), unnamed(data[0]), unnamed(data[1]))
        lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        expected = "its labels are taken as the student's, 0 for 'circle' to 3 for 'star'."
        assert [line for line in lines if "name its classes" in line] == [
            f"The data doesn't name its classes: {expected}"
        ]

    @pytest.mark.parametrize("label", [4, -1, None])
    @pytest.mark.parametrize("split", ["training", "evaluation"])
    def test_a_label_outside_is_named_with_its_image(
        self, folder: Path, data: tuple[Any, Any], label: int | None, split: str
    ) -> None:
        dataset = data[0] if split == "training" else data[1]
        last = dataset[len(dataset) - 1]
        number = len(dataset["objects"][:]) - 1
        rows = iter(range(number + 1))
        faulty = unnamed(dataset, lambda labels: [label, *labels[1:]] if next(rows) == number else labels)
        with pytest.raises(DataError, match="label-range") as error:
            trainer(folder, student(*NAMES), *((faulty, None) if split == "training" else (None, faulty)))
        (place,) = error.value.findings[0].places
        assert place.file.endswith(".png")
        assert place.detail == f"label {-1 if label is None else label}, image_id {last['image_id']}"
        shuffled = faulty.select([number, 0])  # rows are those of the selection
        with pytest.raises(DataError) as error:
            trainer(folder, student(*NAMES), *((shuffled, None) if split == "training" else (None, shuffled)))
        assert error.value.findings[0].places == (place,)
        rest = faulty.select(range(number))
        trainer(folder, student(*NAMES), *((rest, None) if split == "training" else (None, rest)))

    @pytest.mark.parametrize("kind", ["stream", "torch", "collator"])
    @pytest.mark.parametrize("label", [4, -1])
    def test_of_a_stream_at_the_batch_before_its_update(
        self, folder: Path, data: tuple[Any, Any], label: int, kind: str
    ) -> None:
        numbers = iter(range(7))
        faulty = unnamed(data[0], lambda labels: [label, *labels[1:]] if next(numbers) == 5 else labels)
        image_id = data[0][5]["image_id"]
        train = {"stream": faulty.to_iterable_dataset(), "torch": Rows(faulty)}.get(kind, faulty)
        model = student(*NAMES)
        collator = DetectionCollator(processor()) if kind == "collator" else None
        run = CrossKDTrainer(
            model,
            settings(folder, max_steps=5, per_device_train_batch_size=2),
            train,
            processing_class=processor(),
            data_collator=collator,
        )
        with pytest.raises(ValueError, match=rf"Labels of image_id {image_id} are \[{label}\].*classes 0 to 3"):
            run.train()
        assert run.state.global_step < 3

    def test_numbers_as_names_are_no_names(self, folder: Path, data: tuple[Any, Any]) -> None:
        features = data[0].features.copy()
        numbers = datasets.List(datasets.ClassLabel(num_classes=4))
        features["objects"] = {**features["objects"], "category": numbers}
        dataset = unnamed(data[0]).cast(features)
        trainer(folder, student(*NAMES), dataset)
        trainer(folder, student(*NAMES, "moon"), dataset)
        with pytest.raises(DataError, match="label-range"):
            trainer(folder, student(*NAMES[:2]), dataset)


@pytest.mark.parametrize("family", ["gfl", "faster_rcnn", *(name for name in detr_zoo.MODELS if " " not in name)])
def test_names_that_were_changed_on_a_head_of_other_classes(folder: Path, data: tuple[Any, Any], family: str) -> None:
    """Before anything runs: the losses of DETR and RT-DETR can't even be computed with such labels."""
    images: Any = processor()
    if family == "gfl":
        model = student(*(f"class {i}" for i in range(80)))
    elif family == "faster_rcnn":
        names = {index: f"class {index}" for index in range(80)}
        model = make_faster_rcnn(id2label=names, label2id={name: index for index, name in names.items()})
    else:
        model = detr_zoo.build(family, num_labels=80)
        kind = DetrImageProcessor if family == "detr" else DeformableDetrImageProcessor
        images = kind(size={"height": SIZE, "width": SIZE})
    trainer(folder, model, images=images, schedule=None)
    model.config.id2label = dict(enumerate(NAMES))
    width = "81 outputs, the last for no object" if family == "detr" else "80 outputs"
    with pytest.raises(ValueError, match=f"head has {width}, but its id2label names 4 classes, 'circle'"):
        trainer(folder, model, data[0], images=images, schedule=None)


@pytest.mark.parametrize("outputs", [3, 6, 80])
def test_names_of_another_number_than_the_outputs_of_an_unknown_model(
    folder: Path, data: tuple[Any, Any], outputs: int
) -> None:
    model = Tiny(TinyConfig(id2label=dict(enumerate(NAMES)), outputs=outputs))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    run = trainer(folder, model, data[0], schedule=None)
    with pytest.raises(ValueError, match=f"head has {outputs} outputs, but its id2label names 4 classes, 'circle'"):
        run.train()
    assert all(torch.equal(parameter, before[name]) for name, parameter in run.model.named_parameters())


def test_one_output_more_than_names_needs_a_processor_that_knows_no_object(folder: Path, data: tuple[Any, Any]) -> None:
    def run(images: Any) -> CrossKDTrainer:
        model = Tiny(TinyConfig(id2label=dict(enumerate(NAMES)), outputs=5))
        return trainer(folder, model, data[0], images=images, schedule=None)

    with pytest.raises(ValueError, match="takes 'no object', the last output of the model, for a class"):
        run(processor()).train()
    run(DetrImageProcessor(size={"height": SIZE, "width": SIZE})).train()


QUICK = ("gfl", "faster_rcnn", "detr", "deformable_detr", "rt_detr")


@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_one_class(tmp_path: Path, family: str) -> None:
    """Whose name has a slash in it, and whose raw id is not 1: distilled, evaluated, saved and loaded."""
    make_data(tmp_path)
    for path in tmp_path.glob("annotations/*.json"):
        content = json.loads(path.read_text())
        content["categories"] = [{"id": 7, "name": "a/b c"}]
        content["annotations"] = [annotation | {"category_id": 7} for annotation in content["annotations"]]
        path.write_text(json.dumps(content))
    train, val = load_data(tmp_path)
    images: Any = processor()
    if family in detr_zoo.MODELS:
        pair = [detr_zoo.build(family, seed, num_labels=1) for seed in (1, 2)]
        kind = DetrImageProcessor if family == "detr" else DeformableDetrImageProcessor
        images = kind(size={"height": SIZE, "width": SIZE})
    else:
        names = {"num_labels": 1, "id2label": {0: "a/b c"}, "label2id": {"a/b c": 0}}
        make = make_faster_rcnn if family == "faster_rcnn" else partial(make_detector, family)
        pair = [make(seed=seed, **names) for seed in (1, 2)]
    for model in pair:
        model.config.id2label, model.config.category_ids = {0: "a/b c"}, [7]
    options = {"max_steps": 1, "methods": ["crosskd"], "schedule": None, "save_strategy": "steps", "save_steps": 1}
    args = settings(tmp_path, **options, learning_rate=1e-4)
    run = CrossKDTrainer(pair[0], args, train.dataset, val.dataset, images, teacher_model=pair[1])
    run.train()
    assert 0 <= run.evaluate()["eval_map_a/b c"] <= 1
    saved = AutoModelForObjectDetection.from_pretrained(tmp_path / "run/checkpoint-1")
    assert (saved.config.num_labels, saved.config.id2label) == (1, {0: "a/b c"})


class TinyConfig(PreTrainedConfig):
    model_type = "tiny_unknown"


class Tiny(PreTrainedModel):
    """A detector of no family that is known here, with as many outputs as `outputs`."""

    config_class = TinyConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.net = torch.nn.Conv2d(3, config.outputs + 4, 16, 16)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, pixel_mask: Any = None, labels: Any = None) -> ModelOutput:
        rows = self.net(pixel_values).flatten(2).transpose(1, 2)
        logits, boxes = rows[..., :-4].contiguous(), rows[..., -4:].sigmoid()
        return ModelOutput(loss=None if labels is None else rows.pow(2).mean(), logits=logits, pred_boxes=boxes)


class Unmasked(Tiny):
    """The same with a forward that knows no padding."""

    def forward(self, pixel_values: torch.Tensor, labels: Any = None) -> ModelOutput:  # type: ignore[override]
        return super().forward(pixel_values, None, labels)


class Open(Tiny):
    """The same with a forward that takes anything, and hands it on."""

    def forward(self, **inputs: Any) -> ModelOutput:  # type: ignore[override]
        return super().forward(**inputs)


class TestWithoutMask:
    """A model of one's own need not know `pixel_mask`, as long as no image is padded."""

    def run(self, folder: Path, data: tuple[Any, Any], kind: type, images: Any, **more: Any) -> CrossKDTrainer:
        torch.manual_seed(0)
        model = kind(TinyConfig(id2label=dict(enumerate(NAMES)), outputs=4))
        return trainer(folder, model, *data, images=images, schedule=None, learning_rate=0.1, **more)

    def test_it_trains_and_is_evaluated_as_with_a_mask(self, folder: Path, data: tuple[Any, Any]) -> None:
        images = DeformableDetrImageProcessor(size={"height": SIZE, "width": SIZE})
        runs = [self.run(folder, data, kind, images) for kind in (Tiny, Unmasked, Open)]
        for run in runs:
            run.train()
        assert losses(runs[0]) == losses(runs[1]) == losses(runs[2])
        assert len({run.evaluate()["eval_map"] for run in runs}) == 1
        for run in runs[1:]:
            assert all(map(torch.equal, runs[0].model.parameters(), run.model.parameters()))

    def test_padding_is_refused(self, folder: Path, tmp_path: Path, data: tuple[Any, Any]) -> None:
        """In the constructor, or, where the first two images have one size, at the batch before its update."""
        images = DetectionImageProcessor(size={"shortest_edge": 48, "longest_edge": 64}, size_divisor=1)
        order = sorted(range(len(data[0])), key=lambda number: data[0][number]["width"])
        grouped, mixed = data[0].select(order), data[0].select([order[0], order[-1]])
        fault = "are padded to one size, but Unmasked.forward takes no pixel_mask.*makes all images one size"
        with pytest.raises(ValueError, match=fault):
            self.run(folder, (mixed, None), Unmasked, images)
        run = self.run(folder, (grouped, None), Unmasked, images, per_device_train_batch_size=len(order))
        with pytest.raises(ValueError, match=fault):
            run.train()
        assert run.state.global_step == 0


class TestProcessors:
    @pytest.mark.parametrize("outputs", [4, 5])
    def test_of_a_model_of_no_known_family(self, folder: Path, data: tuple[Any, Any], outputs: int) -> None:
        """As many outputs as classes: none can be "no object"."""
        size = {"height": SIZE, "width": SIZE}
        model = Tiny(TinyConfig(id2label=dict(enumerate(NAMES)), outputs=outputs))
        run = trainer(folder, model, *data, images=DetrImageProcessor(size=size), schedule=None)
        if outputs == 4:
            with pytest.raises(ValueError, match="takes the last class for 'no object'.*or a DeformableDetrImageProc"):
                run.train()
            assert run.state.global_step == 0
            run = trainer(folder, model, *data, images=DeformableDetrImageProcessor(size=size), schedule=None)
        run.train()
        assert "eval_map" in run.evaluate()
        with pytest.raises(ValueError, match="which can't be distilled here. Give one of "):
            CrossKDTrainer(
                Tiny(model.config), settings(folder), *data, processor(), teacher_model=student(*NAMES)
            )  # rather than that its processor is wrong

    @pytest.mark.parametrize("family", [name for name in detr_zoo.MODELS if " " not in name])
    def test_of_another_family_are_refused(self, folder: Path, data: tuple[Any, Any], family: str) -> None:
        """DETR reads the last output as "no object": with its processor the last class is never found."""
        model = detr_zoo.build(family, num_labels=4)
        model.config.id2label = dict(enumerate(NAMES))
        size = {"height": SIZE, "width": SIZE}
        right, wrong = DeformableDetrImageProcessor(size=size), DetrImageProcessor(size=size)
        fault = "takes the last class for 'no object'.*or a DeformableDetrImageProcessor"
        if family == "detr":
            right, wrong = wrong, right
            fault = "takes 'no object', the last output of the model, for a class.*or a DetrImageProcessor"
        trainer(folder, model, *data, images=right)
        for train, val in ((data[0], None), (None, data[1])):
            with pytest.raises(ValueError, match=fault):
                trainer(folder, model, train, val, images=wrong)

    def test_of_a_dense_detector(self, folder: Path, data: tuple[Any, Any]) -> None:
        with pytest.raises(ValueError, match="leaves all double boxes"):
            trainer(folder, student(*NAMES), *data, images=DeformableDetrImageProcessor())
        with pytest.raises(ValueError, match="takes the last class for 'no object'.*or a DetectionImageProcessor"):
            trainer(folder, student(*NAMES), *data, images=DetrImageProcessor())

    def test_that_make_no_detections(self, folder: Path, data: tuple[Any, Any]) -> None:
        from transformers import ViTImageProcessor

        with pytest.raises(ValueError, match="ViTImageProcessor has no post_process_object_detection"):
            trainer(folder, student(*NAMES), *data, images=ViTImageProcessor())

    @pytest.mark.parametrize("who", ["student", "teacher"])
    def test_of_another_size_than_the_anchors(self, folder: Path, data: tuple[Any, Any], who: str) -> None:
        def build(fixed: bool) -> Any:
            model = detr_zoo.build("rt_detr", num_labels=4, **({"anchor_image_size": [SIZE, SIZE]} if fixed else {}))
            model.config.id2label = dict(enumerate(NAMES))
            return model

        def make(edge: int) -> CrossKDTrainer:
            images = DeformableDetrImageProcessor(size={"height": edge, "width": edge})
            args = settings(folder, schedule=None, methods=["crosskd"])
            teacher = build(who == "teacher")
            return CrossKDTrainer(build(who == "student"), args, *data, images, teacher_model=teacher)

        assert make(SIZE).distiller is not None
        with pytest.raises(ValueError, match=rf"The {who} has anchors for images of {SIZE} x {SIZE}.*makes 96 x 96"):
            make(96)


@pytest.mark.parametrize(
    ("numbers", "way_out"),
    [
        ((0, 1, 2, 4), "It leaves out 3: its keys are numbers of outputs, 0 to 3"),
        ((0, 1, 2), "changes no head"),
    ],
)
@pytest.mark.parametrize("family", ["gfl", "faster_rcnn"])
def test_names_of_a_teacher_that_are_not_those_of_its_outputs(
    folder: Path, data: tuple[Any, Any], family: str, numbers: tuple[int, ...], way_out: str
) -> None:
    """A name too high would be an output that is not there, in the loss of the first update."""
    pupil, teacher, _ = make_pair(family)
    teacher.config.id2label = dict(zip(numbers, NAMES, strict=False))
    with pytest.raises(ValueError, match=f"The teacher's head has 4 outputs, but its id2label names .*{way_out}"):
        CrossKDTrainer(pupil, settings(folder), data[0], None, processor(), teacher_model=teacher)
