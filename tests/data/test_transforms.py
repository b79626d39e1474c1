import numpy as np
import PIL.Image
import pytest
import torch
from torchvision import transforms, tv_tensors
from torchvision.transforms import v2

from crosskd_hf.data import Albumentations
from crosskd_hf.data.collators import DetectionCollator
from crosskd_hf.data.transforms import (
    KeepSize,
    Record,
    TrainTransform,
    clean_objects,
    finish_record,
    select_objects,
)
from crosskd_hf.models import DetectionImageProcessor
from crosskd_hf.models.image_processing import resized_size

FIELDS = ("boxes", "labels", "area", "iscrowd", "id")


def make_record(count=6, height=60, width=80, seed=0):
    """Boxes that leave the image here and there; every field of object i tells i."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 1.2 - 5
    boxes = torch.cat([corners, corners + 1 + 20 * torch.rand(count, 2, generator=generator)], dim=1)
    ids = torch.arange(count)
    sides = boxes[:, 2:] - boxes[:, :2]
    return Record(
        image=tv_tensors.Image(torch.randint(0, 255, (3, height, width), dtype=torch.uint8, generator=generator)),
        boxes=tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        labels=ids + 100,
        area=sides[:, 0] * sides[:, 1],
        iscrowd=ids % 2,
        id=ids,
    )


def assert_in_step(record):
    """All fields have a row per object, and the rows still belong together."""
    assert {len(record[key]) for key in FIELDS} == {len(record["id"])}
    assert torch.equal(record["labels"], record["id"] + 100)
    assert torch.equal(record["iscrowd"], record["id"] % 2)
    height, width = record["image"].shape[-2:]
    assert record["boxes"].canvas_size == (height, width)
    boxes = record["boxes"].as_subclass(torch.Tensor)
    assert bool((boxes >= 0).all())
    assert bool((boxes[:, 2:] > boxes[:, :2]).all())
    assert bool((boxes[:, 2:] <= torch.tensor([width, height])).all())


class TestTrainTransform:
    @pytest.mark.parametrize("seed", range(20))
    def test_fields_stay_in_step_whatever_is_drawn(self, seed):
        torch.manual_seed(seed)
        transform = TrainTransform(0.5, shortest_edges=(20, 33, 90), longest_edge=100)
        record = make_record(count=seed % 7, height=40 + 7 * seed, width=150 - 5 * seed, seed=seed)
        areas = record["area"].clone()
        old = record["image"].shape[-2:]
        changed = transform(record)
        assert_in_step(changed)
        new = changed["image"].shape[-2:]
        scale = (new[0] * new[1]) / (old[0] * old[1])
        torch.testing.assert_close(changed["area"], areas[changed["id"]] * scale)

    def test_flip_is_its_own_inverse(self):
        record = clean_objects(make_record())
        twice = TrainTransform(1.0)(TrainTransform(1.0)(record))
        torch.testing.assert_close(twice["boxes"], record["boxes"])
        assert torch.equal(twice["image"], record["image"])

    def test_boxes_follow_the_picture(self):
        image = torch.zeros(3, 40, 60, dtype=torch.uint8)
        image[:, 10:20, 5:25] = 255
        record = make_record(count=1, height=40, width=60)
        record["image"] = tv_tensors.Image(image)
        record["boxes"] = tv_tensors.BoundingBoxes([[5.0, 10, 25, 20]], format="XYXY", canvas_size=(40, 60))
        changed = TrainTransform(1.0, shortest_edges=(80,))(record)
        rows, columns = torch.where(changed["image"][0] > 127)
        seen = torch.tensor([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]).float()
        torch.testing.assert_close(changed["boxes"].as_subclass(torch.Tensor), seen, atol=1, rtol=0)

    def test_the_longest_edge_wins(self):
        assert resized_size(100, 300, 100, 150) == (50, 150)
        assert resized_size(300, 200, 100, 150) == (150, 100)
        assert resized_size(1, 1000, 100, 150) == (1, 150)

    def test_every_edge_is_drawn_and_the_seed_decides(self):
        transform = TrainTransform(0.5, shortest_edges=(20, 30, 40))

        def edges():
            torch.manual_seed(0)
            return [min(transform(make_record())["image"].shape[-2:]) for _ in range(30)]

        assert set(edges()) == {20, 30, 40}
        assert edges() == edges()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"flip": 1.5}, "probability"),
            ({"shortest_edges": (0,)}, "lengths in px"),
            ({"shortest_edges": (100,), "longest_edge": 50}, "longest_edge=50 is below"),
        ],
    )
    def test_refuses(self, options, message):
        with pytest.raises(ValueError, match=message):
            TrainTransform(**options)


def through(transform, record=None):
    """What a batch is made of after a transform."""
    return finish_record(transform(clean_objects(record or make_record())))


def rotated(record):
    boxes = torch.cat([record["boxes"].as_subclass(torch.Tensor), torch.zeros(len(record["id"]), 1)], dim=1)
    return {**record, "boxes": tv_tensors.BoundingBoxes(boxes, format="CXCYWHR", canvas_size=(60, 80))}


def assert_same(first, second, tolerance=1e-3):
    for key in FIELDS:
        torch.testing.assert_close(
            torch.Tensor(first[key].float()), torch.Tensor(second[key].float()), atol=tolerance, rtol=0
        )
    assert torch.equal(first["image"], second["image"])
    assert first["boxes"].format == tv_tensors.BoundingBoxFormat.XYXY


class TestFinishRecord:
    """What torchvision's recipes end with: read rightly or refused."""

    @pytest.mark.parametrize("format", ["XYXY", "XYWH", "CXCYWH"])
    def test_the_format_of_boxes_is_read(self, format):
        assert_same(through(v2.ConvertBoundingBoxFormat(format)), clean_objects(make_record()))
        flipped = through(v2.Compose([v2.ConvertBoundingBoxFormat(format), TrainTransform(1.0)]))
        assert_same(flipped, through(TrainTransform(1.0)))

    @pytest.mark.parametrize(
        "transform",
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.ToDtype(torch.float64, scale=True),
            v2.ToDtype(torch.float16, scale=True),
            v2.ToDtype(torch.uint16, scale=True),
            v2.ConvertImageDtype(torch.float32),
            v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
        ],
    )
    def test_scaled_pixels_are_the_same_pixels(self, transform):
        assert_same(through(transform), clean_objects(make_record()))

    def test_one_channel_becomes_three(self):
        image = through(v2.Grayscale())["image"]
        assert torch.equal(image, through(v2.Grayscale(3))["image"])

    def test_what_bicubic_resizing_overshoots_is_clipped(self):
        resize = v2.Resize((90, 120), interpolation=v2.InterpolationMode.BICUBIC)
        image = through(v2.Compose([v2.ToDtype(torch.float32, scale=True), resize]))["image"]
        assert image.dtype == torch.uint8
        assert image.shape == (3, 90, 120)

    @pytest.mark.parametrize(
        ("transform", "message"),
        [
            (v2.ToDtype(torch.float32), r"float pixels from .* to 254; floats have to lie in \[0, 1\]"),
            (
                v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]),
                "leave v2.Normalize out",
            ),
            (v2.ToDtype(torch.int64), "int64 pixels; keep uint8"),
            (v2.Lambda(lambda part: part[None], tv_tensors.Image), r"shape \(1, 3, 60, 80\)"),
            (v2.ToPILImage(), "the image as Image; .* v2.ToImage"),
            (lambda record: {**record, "boxes": record["boxes"] + 1}, "boxes as Tensor.*tv_tensors.wrap"),
            (lambda record: {**record, "image": record["image"][:, :30]}, "image of 80x30, but boxes for 80x60"),
            (
                lambda record: {
                    **record,
                    "boxes": tv_tensors.wrap(record["boxes"] * float("nan"), like=record["boxes"]),
                },
                "boxes that are not finite",
            ),
            (rotated, r"rotated boxes \(CXCYWHR\)"),
        ],
    )
    def test_refuses(self, transform, message):
        with pytest.raises(ValueError, match=message):
            through(transform)

    @pytest.mark.parametrize("seed", range(5))
    def test_what_the_usual_last_transform_leaves_out(self, seed):
        """`v2.SanitizeBoundingBoxes()` as it stands in every recipe knows boxes and labels alone."""
        torch.manual_seed(seed)
        record = through(v2.Compose([v2.RandomIoUCrop(), v2.SanitizeBoundingBoxes(min_size=8)]))
        assert {len(record[key]) for key in FIELDS} == {len(record["labels"])}
        boxes = record["boxes"].as_subclass(torch.Tensor)
        assert len(boxes) < 6
        torch.testing.assert_close(record["area"], (boxes[:, 2:] - boxes[:, :2]).prod(1))
        assert record["iscrowd"].tolist() == [0] * len(boxes)

    def test_fields_that_are_gone_are_made_anew(self):
        given = clean_objects(make_record())
        record = through(lambda record: {key: record[key] for key in ("image", "boxes", "labels")})
        assert torch.equal(record["boxes"], given["boxes"])
        assert torch.equal(record["labels"], given["labels"])
        sides = given["boxes"].as_subclass(torch.Tensor)[:, 2:] - given["boxes"].as_subclass(torch.Tensor)[:, :2]
        torch.testing.assert_close(record["area"], sides.prod(1))
        assert record["id"].tolist() == [-1] * len(given["id"])

    @pytest.mark.parametrize(
        ("returned", "message"),
        [
            (None, "returned a NoneType; it is given the record of an image"),
            ((1, 2), "returned a tuple"),
            ({"image": 1, "boxes": 2}, "returned a dict without labels"),
        ],
    )
    def test_what_is_no_record(self, returned, message):
        with pytest.raises(ValueError, match=message):
            through(lambda record: returned)

    def test_boxes_without_their_labels(self):
        def forget(record):
            return {**record, "boxes": tv_tensors.wrap(record["boxes"][:1], like=record["boxes"])}

        with pytest.raises(ValueError, match="fields at different lengths: {'boxes': 1, 'labels': 6"):
            through(forget)


def test_transforms_that_know_no_boxes_are_refused_before_any_image():
    old = transforms.Compose([transforms.RandomHorizontalFlip()])
    for transform, name in ((old, "Compose"), (v2.Compose([old.transforms[0]]), "RandomHorizontalFlip")):
        with pytest.raises(ValueError, match=f"{name} of torchvision.transforms changes an image and leaves its boxes"):
            DetectionCollator(DetectionImageProcessor(), transform)


class Params:
    def __init__(self, format, fields):
        self.format, self.label_fields = format, fields


class FakeCompose:
    """What of Albumentations' `Compose` is used: keywords, four ways to write boxes, seeds of its own.

    It turns an image from left to right and leaves out every second object.
    """

    __module__ = "albumentations.core.composition"

    def __init__(self, format="pascal_voc", fields=("classes",), boxes=True, tensor=False):
        params = type("Processor", (), {"params": Params(format, list(fields))})
        self.processors = {"bboxes": params} if boxes else {}
        self.transforms, self.tensor, self.seeds = [], tensor, []

    def set_random_seed(self, seed):
        self.seeds.append(seed)

    def __call__(self, *, image, bboxes, **fields):
        params = self.processors["bboxes"].params
        assert set(fields) == set(params.label_fields)
        assert image.shape == (60, 80, 3)
        width = 1.0 if params.format in ("yolo", "albumentations") else 80.0
        made = []
        for a, b, c, d, *rest in bboxes[::2].tolist():
            if params.format == "coco":
                made.append([width - a - c, b, c, d, *rest])
            elif params.format == "yolo":
                made.append([width - a, b, c, d, *rest])
            else:
                made.append([width - c, b, width - a, d, *rest])
        image = image[:, ::-1]
        return {
            "image": torch.from_numpy(image.copy()).permute(2, 0, 1) if self.tensor else image,
            "bboxes": np.array(made) if self.tensor else made,
            **{key: values[::2] for key, values in fields.items()},
        }


class TestAlbumentations:
    @pytest.mark.parametrize("format", ["pascal_voc", "coco", "yolo", "albumentations"])
    @pytest.mark.parametrize(("fields", "tensor"), [((), False), (("classes",), True), (("a", "b"), False)])
    @pytest.mark.parametrize("count", [6, 0])
    def test_is_called_as_it_wants(self, format, fields, tensor, count):
        record = clean_objects(make_record(count))
        made = finish_record(Albumentations(FakeCompose(format, fields, tensor=tensor))(record))
        kept = torch.arange(len(record["id"])) % 2 == 0
        assert_same(made, select_objects(TrainTransform(1.0)(record), kept))

    def test_is_seeded_as_all_transforms(self):
        compose = FakeCompose()
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            Albumentations(compose)(clean_objects(make_record()))
        assert compose.seeds[0] == compose.seeds[1] != compose.seeds[2]

    def test_the_collator_knows_it(self, caplog):
        collator = DetectionCollator(DetectionImageProcessor(do_resize=False), FakeCompose("coco"))
        image = PIL.Image.new("RGB", (80, 60))
        objects = {"id": [5], "bbox": [[8, 6, 16, 12]], "category": [3], "area": [192], "iscrowd": [0]}
        example = {"image": image, "image_id": 1, "width": 80, "height": 60, "objects": objects}
        (label,) = collator([example])["labels"]
        assert label["class_labels"].tolist() == [3]
        torch.testing.assert_close(label["boxes"], torch.tensor([[0.8, 0.2, 0.2, 0.2]]))
        resize = type("Resize", (), {"__module__": "albumentations.augmentations.resize"})()
        compose = FakeCompose()
        compose.transforms = [resize]
        DetectionCollator(DetectionImageProcessor(), compose)
        assert "Resize of the transform doesn't set the final size" in caplog.text

    def test_refuses(self):
        with pytest.raises(ValueError, match="FakeCompose of albumentations has no bbox_params"):
            DetectionCollator(DetectionImageProcessor(), FakeCompose(boxes=False))
        with pytest.raises(ValueError, match="bbox_params of albumentations has format='polar'"):
            Albumentations(FakeCompose("polar"))


class TestFinalSize:
    """A size that a transform set isn't undone by the processor, wherever in the transform it was set."""

    resize = TrainTransform(0, shortest_edges=(32,), longest_edge=100)

    @pytest.mark.parametrize(
        ("transform", "resized"),
        [
            (resize, True),
            (v2.Compose([resize, v2.RandomGrayscale(p=0.5)]), True),
            (v2.Compose([v2.RandomChoice([resize]), v2.RandomHorizontalFlip()]), True),
            (lambda record: TestFinalSize.resize(record), True),
            (v2.Compose([v2.RandomShortestSize([32]), KeepSize()]), True),
            (TrainTransform(), False),
            (v2.RandomHorizontalFlip(), False),
            (v2.Resize(32), False),
        ],
    )  # fmt: skip
    def test_is_told_by_the_record(self, transform, resized):
        record = through(transform)
        assert record.get("resized", False) is resized
        assert not resized or min(record["image"].shape[-2:]) == 32

    def test_a_resize_that_the_processor_undoes_is_told(self, caplog):
        undone = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomApply([v2.RandomShortestSize([32])])])
        processor = DetectionImageProcessor()
        DetectionCollator(processor, v2.Compose([undone, KeepSize()]))
        DetectionCollator(processor, TrainTransform(shortest_edges=[32]))
        DetectionCollator(DetectionImageProcessor(do_resize=False), undone)
        DetectionCollator(processor)
        assert not caplog.messages
        DetectionCollator(processor, undone)
        assert len(caplog.messages) == 1
        assert "RandomShortestSize of the transform doesn't set the final size" in caplog.messages[0]
        assert "KeepSize() last" in caplog.messages[0]

    def test_one_batch_one_way(self):
        images = iter([KeepSize(), lambda record: record])
        objects = {"id": [1], "bbox": [[1.0, 2, 3, 4]], "category": [0], "area": [12.0], "iscrowd": [0]}
        example = {
            "image": PIL.Image.new("RGB", (60, 40)),
            "image_id": 1,
            "width": 60,
            "height": 40,
            "objects": objects,
        }
        with pytest.raises(ValueError, match="final size of some images of a batch"):
            DetectionCollator(DetectionImageProcessor(), lambda record: next(images)(record))([example, example])


class TestCleanObjects:
    def test_drops_with_all_fields(self):
        record = make_record(count=3)
        record["boxes"][1] = torch.tensor([-20.0, 0, -10, 10])
        cleaned = clean_objects(record)
        assert cleaned["id"].tolist() == [0, 2]
        assert_in_step(cleaned)

    def test_without_objects(self):
        assert clean_objects(make_record(count=0))["boxes"].shape == (0, 4)

    def test_says_which_fields_fell_out_of_step(self):
        record = make_record(count=3)
        record["area"] = record["area"][:2]
        with pytest.raises(ValueError, match=r"'area': 2.*have to go together"):
            clean_objects(record)

    @pytest.mark.parametrize("seed", range(5))
    def test_torchvision_transforms_work_on_records(self, seed):
        torch.manual_seed(seed)
        fields = ("labels", "area", "iscrowd", "id")
        transform = v2.Compose(
            [
                v2.RandomIoUCrop(),
                v2.RandomPhotometricDistort(),
                v2.SanitizeBoundingBoxes(labels_getter=lambda record: tuple(record[key] for key in fields)),
            ]
        )
        assert_in_step(clean_objects(transform(clean_objects(make_record()))))
