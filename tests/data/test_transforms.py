import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from crosskd_hf.data.transforms import Record, TrainTransform, clean_objects

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
        transform = TrainTransform(0, shortest_edges=(100,), longest_edge=150)
        assert transform.target_size(100, 300, 100) == (50, 150)
        assert transform.target_size(300, 200, 100) == (150, 100)
        assert transform.target_size(1, 1000, 100) == (1, 150)

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
        with pytest.raises(ValueError, match=r"'area': 2.*labels_getter"):
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
