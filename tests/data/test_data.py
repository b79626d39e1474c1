"""Reading data sets, and batches made of them."""

import json
from dataclasses import replace

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from torchvision import tv_tensors
from transformers import DeformableDetrImageProcessor, PreTrainedConfig, RTDetrImageProcessor

from crosskd_hf.data import AspectRatioSampler, DataError, DetectionCollator, TrainTransform, load_coco, load_objects
from crosskd_hf.data.categories import CategoryMap
from crosskd_hf.data.shapes import make_shapes
from crosskd_hf.models.image_processing import DetectionImageProcessor

SIZE = (100, 80)


def annotation(number, box=(10, 10, 20, 20), image=1, category=1, **more):
    return {"id": number, "image_id": image, "category_id": category, "bbox": list(box), "area": 400, **more}


def write_coco(folder, annotations, listed=((1, "cat"),), files=("a.png",), size=SIZE, without=None, **changes):
    """A folder with grey images of `size` and a json; image ids count from 1."""
    (folder / "images").mkdir()
    for name in files:
        PIL.Image.new("RGB", size, "gray").save(folder / "images" / name)
    images = [{"id": i, "file_name": f, "width": size[0], "height": size[1]} for i, f in enumerate(files, start=1)]
    categories = [{"id": raw, "name": name} for raw, name in listed]
    content = {"images": images, "annotations": annotations, "categories": categories, **changes}
    content.pop(without, None)
    (folder / "truth.json").write_text(json.dumps(content))
    return folder / "truth.json", folder / "images"


def example(width, height, image=None, **objects):
    """An example with one object that fills the image."""
    fields = {"id": [1], "bbox": [[0.0, 0, width, height]], "category": [0], "area": [1.0], "iscrowd": [0]}
    picture = image or PIL.Image.new("RGB", (width, height))
    return {"image": picture, "image_id": 3, "width": width, "height": height, "objects": {**fields, **objects}}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    paths = make_shapes(tmp_path_factory.mktemp("shapes"), num_train=8, num_val=2, size=96)
    return load_coco(paths.train_annotations, paths.train_images)


class TestCategoryMap:
    def test_raw_contiguous_and_name(self):
        categories = CategoryMap((0, 7, 90), ("a", "b", "c"))
        assert [categories.to_contiguous(raw) for raw in (0, 7, 90)] == [0, 1, 2]
        assert [categories.to_raw(index) for index in range(3)] == [0, 7, 90]
        assert categories.id2label == {0: "a", 1: "b", 2: "c"}
        assert categories.label2id == {"a": 0, "b": 1, "c": 2}
        assert len(categories) == 3

    def test_outside_of_the_map(self):
        categories = CategoryMap((0, 7), ("a", "b"))
        with pytest.raises(KeyError, match="category id 1 is not in the map"):
            categories.to_contiguous(1)
        for index in (-1, 2):
            with pytest.raises(IndexError, match="outside"):
                categories.to_raw(index)

    @pytest.mark.parametrize(
        ("raw_ids", "names", "message"),
        [
            ((1,), ("a", "b"), "1 raw_ids and 2 names"),
            ((), (), "at least one class"),
            ((1, 1), ("a", "b"), "raw_ids holds .1. more than once"),
            ((1, 2), ("a", "a"), "names holds"),
        ],
    )
    def test_refuses(self, raw_ids, names, message):
        with pytest.raises(ValueError, match=message):
            CategoryMap(raw_ids, names)

    def test_comes_back_from_a_saved_config(self, tmp_path):
        categories = CategoryMap((3, 8), ("x", "y"))
        config = PreTrainedConfig(id2label=categories.id2label, label2id=categories.label2id, category_ids=[3, 8])
        config.save_pretrained(tmp_path)
        assert CategoryMap.from_config(PreTrainedConfig.from_pretrained(tmp_path)) == categories

    def test_of_a_config_that_knows_no_raw_ids(self):
        assert CategoryMap.from_config(PreTrainedConfig(id2label={0: "x", 1: "y"})).raw_ids == (0, 1)

    def test_of_a_config_with_ids_of_a_former_head(self):
        config = PreTrainedConfig(id2label={0: "x", 1: "y"}, category_ids=[3, 8, 9])
        assert CategoryMap.from_config(config) == CategoryMap((0, 1), ("x", "y"))

    def test_a_parent_named_like_its_class_is_dropped(self):
        fish = {"id": 1, "name": "fish", "supercategory": "fish"}
        for name in ("fish", "Fish"):
            parent = {"id": 0, "name": name, "supercategory": "none"}
            assert CategoryMap.from_coco([parent, fish], used={1}) == CategoryMap((1,), ("fish",))
            trap = {"id": 2, "name": "trap", "supercategory": name}
            assert CategoryMap.from_coco([parent, fish, trap], used={2}) == CategoryMap((1, 2), ("fish", "trap"))
        with pytest.raises(DataError, match="duplicate-category-name"):
            CategoryMap.from_coco([parent | {"name": "fish"}, fish], used={0, 1})

    def test_order_is_that_of_raw_ids_and_unused_parents_are_dropped(self):
        listed = [
            {"id": 9, "name": "rbc", "supercategory": "cells"},
            {"id": 0, "name": "cells", "supercategory": "none"},
            {"id": 2, "name": "never", "supercategory": "cells"},
            {"id": 5, "name": "person", "supercategory": "person"},
        ]
        assert CategoryMap.from_coco(listed, used={9}).names == ("never", "person", "rbc")
        assert CategoryMap.from_coco(listed, used={9, 0}).names == ("cells", "never", "person", "rbc")


class TestLoadCoco:
    def test_schema(self, tmp_path):
        annotations = [annotation(5, (1.5, 2, 3, 4)), annotation(6, (0, 0, 50, 50), iscrowd=1, area=99.5)]
        data = load_coco(*write_coco(tmp_path, annotations, files=("a.png", "empty.png")))
        first, second = data.dataset
        assert first["image"].mode == "RGB"
        assert first["image"].size == (first["width"], first["height"]) == SIZE
        assert first["objects"] == {
            "id": [5, 6],
            "bbox": [[1.5, 2, 3, 4], [0, 0, 50, 50]],
            "category": [0, 0],
            "area": [400, 99.5],
            "iscrowd": [0, 1],
        }
        assert second["image_id"] == 2
        assert second["objects"] == {"id": [], "bbox": [], "category": [], "area": [], "iscrowd": []}
        assert (data.report.images, data.report.objects, data.report.crowds, data.report.empty_images) == (2, 2, 1, 1)

    @pytest.mark.parametrize("raw_ids", [(0,), (0, 1, 2), (1, 2, 3), (90, 3, 17)])
    def test_any_category_ids(self, tmp_path, raw_ids):
        annotations = [annotation(number, category=raw) for number, raw in enumerate(raw_ids, start=1)]
        data = load_coco(*write_coco(tmp_path, annotations, [(raw, f"c{raw}") for raw in raw_ids]))
        assert data.categories.raw_ids == tuple(sorted(raw_ids))
        labels = data.dataset["objects"][0]["category"]
        assert [data.categories.to_raw(label) for label in labels] == list(raw_ids)

    def test_another_split_is_read_with_the_map_of_the_first(self, tmp_path):
        categories = CategoryMap((1, 4, 6), ("cat", "dog", "cow"))
        data = load_coco(*write_coco(tmp_path, [annotation(1, category=6)], [(6, "cow")]), categories)
        assert data.categories == categories
        assert data.dataset["objects"][0]["category"] == [2]

    @pytest.mark.parametrize(
        ("listed", "message"), [([(1, "dog")], "'dog' here and 'cat'"), ([(2, "dog")], "category is not known")]
    )
    def test_another_split_must_agree(self, tmp_path, listed, message):
        paths = write_coco(tmp_path, [annotation(1, category=listed[0][0])], listed)
        with pytest.raises(DataError, match=message):
            load_coco(*paths, CategoryMap((1,), ("cat",)))

    def test_the_names_travel_with_the_data_set(self, shapes, tmp_path):
        part = shapes.dataset.shuffle(seed=0).select(range(5)).filter(lambda objects: True, input_columns="objects")
        part.save_to_disk(tmp_path / "saved")
        for dataset in (part, datasets.load_from_disk(tmp_path / "saved"), part.to_iterable_dataset()):
            assert dataset.features["objects"]["category"].feature.names == ["circle", "square", "triangle", "star"]

    def test_another_split_is_read_by_name_whatever_its_ids_are(self, tmp_path):
        categories = CategoryMap((1, 2), ("cat", "Dog"))
        listed = [(1, "dog "), (2, "zebra"), (7, "cat")]
        annotations = [annotation(1, category=1), annotation(2, category=7)]
        data = load_coco(*write_coco(tmp_path, annotations, listed), categories)
        assert data.dataset["objects"][0]["category"] == [1, 0]
        findings = {finding.kind: finding for finding in data.report.findings}
        assert [place.detail for place in findings["category-moved"].places] == [
            "id 1 is 'dog ' here and 'cat' in the given map"
        ]
        assert [place.detail for place in findings["category-spelling"].places] == ["'dog ' is 'Dog' in the given map"]
        assert [place.file for place in findings["category-left-out"].places] == ["zebra"]

    def test_a_background_is_no_class_unless_it_is_used(self, tmp_path):
        listed = [(0, "_background_"), (1, "cat")]
        data = load_coco(*write_coco(tmp_path, [annotation(1, category=1)], listed))
        assert data.categories == CategoryMap((1,), ("cat",))
        of_others = PreTrainedConfig(id2label={0: "background", 1: "cat"})  # a student that was made with it
        assert data.for_model(of_others).categories.names == ("background", "cat")
        assert data.for_model(of_others).dataset["objects"][0]["category"] == [1]
        with pytest.raises(ValueError, match="other classes"):
            data.for_model(PreTrainedConfig(id2label={0: "zebra", 1: "cat"}))
        (tmp_path / "used").mkdir()
        used = load_coco(*write_coco(tmp_path / "used", [annotation(1), annotation(2, category=0)], listed))
        assert used.categories == CategoryMap((0, 1), ("_background_", "cat"))

    def test_a_class_that_may_be_several_is_refused(self, tmp_path):
        paths = write_coco(tmp_path, [annotation(1, category=3)], [(3, "HELMET")])
        with pytest.raises(DataError, match="category-ambiguous.*\n.*'HELMET' may be 'Helmet' or 'helmet'"):
            load_coco(*paths, CategoryMap((1, 2), ("Helmet", "helmet")))

    def test_labels_follow_another_order_of_the_classes(self, shapes):
        order = CategoryMap((1, 2, 3, 4, 5), ("star", "zebra", "triangle", "Square", "circle"))
        other = shapes.with_classes(order)
        assert other.categories == order
        assert other.dataset.column_names == shapes.dataset.column_names
        assert other.dataset.features["objects"]["category"].feature.names == list(order.names)
        for before, after in zip(shapes.dataset, other.dataset, strict=True):
            names = [shapes.categories.names[label].lower() for label in before["objects"]["category"]]
            assert [order.names[label].lower() for label in after["objects"]["category"]] == names
            assert before["objects"] | {"category": 0} == after["objects"] | {"category": 0}
        part = replace(shapes, dataset=shapes.dataset.select([5, 2])).with_classes(order)
        assert part.dataset["objects"][:] == [other.dataset[5]["objects"], other.dataset[2]["objects"]]
        assert part.with_classes(shapes.categories).dataset[1]["objects"] == shapes.dataset[2]["objects"]
        with pytest.raises(ValueError, match="that the other map doesn't hold: ..circle., .square., .triangle.."):
            shapes.with_classes(CategoryMap((1,), ("star",)))

    def test_degenerate_boxes_are_dropped_and_named(self, tmp_path):
        bad = {
            2: [10, 10, 0, 5],
            3: [10, 10, 5, -1],
            4: [float("nan"), 1, 2, 3],
            5: [0, 0, float("inf"), 3],
            6: [100, 10, 20, 20],
            7: [-30, 10, 30, 20],
            8: [1, 2, 3],
            9: None,
            10: [1, 2, 3, "x"],
        }
        annotations = [annotation(1), *(annotation(number, (0,)) | {"bbox": box} for number, box in bad.items())]
        data = load_coco(*write_coco(tmp_path, annotations))
        assert data.dataset["objects"][0]["id"] == [1, 2, 3, 6, 7]  # the truth of the evaluation
        label = DetectionCollator(DeformableDetrImageProcessor())([data.dataset[0]])["labels"][0]
        assert len(label["boxes"]) == 1
        assert [(place.file, place.annotation) for place in data.report.dropped] == [("a.png", n) for n in bad]
        assert data.report.objects == 1
        assert "9 degenerate boxes dropped" in str(data.report)

    def test_boxes_partly_outside_are_kept_as_they_are(self, tmp_path):
        data = load_coco(*write_coco(tmp_path, [annotation(1, (-10, 70, 30, 40))]))
        assert data.dataset["objects"][0]["bbox"] == [[-10, 70, 30, 40]]
        label = DetectionCollator(DeformableDetrImageProcessor())([data.dataset[0]])["labels"][0]
        torch.testing.assert_close(label["boxes"], torch.tensor([[0.1, 75 / 80, 0.2, 10 / 80]]))

    def test_missing_area_and_size_are_filled_in(self, tmp_path):
        images = [{"id": 1, "file_name": "a.png"}]
        bare = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 30]}
        data = load_coco(*write_coco(tmp_path, [bare], images=images))
        row = data.dataset[0]
        assert (row["width"], row["height"]) == SIZE
        assert row["objects"]["area"] == [600]
        assert row["objects"]["iscrowd"] == [0]

    @pytest.mark.parametrize("key", ["images", "annotations", "categories"])
    def test_missing_part(self, tmp_path, key):
        with pytest.raises(DataError, match=f"no '{key}'"):
            load_coco(*write_coco(tmp_path, [annotation(1)], without=key))

    @pytest.mark.parametrize(
        ("text", "message"),
        [("{", "not json"), ("[1]", "list at its top level"), ("[" * 100_000, "not json"), ("\xff\xfe", "not json")],
    )
    def test_not_a_coco_json(self, tmp_path, text, message):
        annotations, images = write_coco(tmp_path, [])
        annotations.write_bytes(text.encode("latin-1"))
        with pytest.raises(DataError, match=message):
            load_coco(annotations, images)

    def test_missing_json_and_folder(self, tmp_path):
        annotations, images = write_coco(tmp_path, [annotation(1)])
        with pytest.raises(DataError, match="does not exist"):
            load_coco(tmp_path / "none.json", images)
        with pytest.raises(DataError, match="image folder does not exist"):
            load_coco(annotations, tmp_path / "none")

    def test_missing_images_are_counted_and_named(self, tmp_path):
        annotations, images = write_coco(tmp_path, [annotation(1)], files=("a.png", "b.png", "c.png"))
        (images / "b.png").unlink()
        with pytest.raises(DataError, match=r"1 of 3 images are not in .*\n.*b\.png"):
            load_coco(annotations, images)
        for name in ("a.png", "c.png"):
            (images / name).unlink()
        with pytest.raises(DataError, match=r"3 of 3 images are not in .*, which is empty"):
            load_coco(annotations, images)

    def test_all_errors_are_told_at_once(self, tmp_path):
        annotations = [annotation(1), annotation(1), annotation(2, image=8), annotation(3, category=9)]
        with pytest.raises(DataError) as caught:
            load_coco(*write_coco(tmp_path, annotations))
        kinds = {finding.kind: finding.places for finding in caught.value.findings}
        assert set(kinds) == {"duplicate-annotation-id", "unknown-image", "unknown-category"}
        assert kinds["unknown-image"][0].annotation == 2
        assert kinds["unknown-category"][0] == ("a.png", 3, "category_id 9")

    @pytest.mark.parametrize(
        "name", ["../secret.png", "/etc/passwd", "a/../../b.png", "..\\b.png", "C:\\b.png", "a\0b"]
    )
    def test_file_names_cannot_leave_the_folder(self, tmp_path, name):
        PIL.Image.new("RGB", SIZE).save(tmp_path / "secret.png")
        images = [{"id": 1, "file_name": name, "width": 100, "height": 80}]
        with pytest.raises(DataError, match="leaves the image folder"):
            load_coco(*write_coco(tmp_path, [annotation(1)], images=images))

    def test_sub_folders_are_fine(self, tmp_path):
        annotations, images = write_coco(
            tmp_path, [annotation(1)], images=[{"id": 1, "file_name": "sub/a.png", "width": 100, "height": 80}]
        )
        (images / "sub").mkdir()
        (images / "a.png").rename(images / "sub" / "a.png")
        assert load_coco(annotations, images).dataset[0]["image"].size == SIZE

    @pytest.mark.parametrize("size", [(10**6, 10**6), (2**62, 2**62), (-1, 80)])
    def test_absurd_sizes_are_refused(self, tmp_path, size):
        images = [{"id": 1, "file_name": "a.png", "width": size[0], "height": size[1]}]
        with pytest.raises(DataError, match="impossible width x height"):
            load_coco(*write_coco(tmp_path, [annotation(1)], images=images))

    @pytest.mark.parametrize("value", ["1", 1.5, True, 2**70, float("nan"), [1]])
    def test_ids_must_be_integers(self, tmp_path, value):
        with pytest.raises(DataError, match=r"'id' is not an integer"):
            load_coco(*write_coco(tmp_path, [annotation(value)]))

    def test_no_annotation_at_all(self, tmp_path):
        data = load_coco(*write_coco(tmp_path, []), CategoryMap((1,), ("cat",)))
        assert data.dataset["objects"][0]["bbox"] == []
        assert "not a single box" in str(data.report)

    def test_fractions_instead_of_pixels_are_refused(self, tmp_path):
        with pytest.raises(DataError, match="fractions, not pixels"):
            load_coco(*write_coco(tmp_path, [annotation(1, (0.1, 0.1, 0.5, 0.5))]))

    def test_examples_are_decoded_one_at_a_time(self, tmp_path, monkeypatch):
        data = load_coco(*write_coco(tmp_path, [annotation(1)], files=("a.png", "b.png")))
        opened = []
        monkeypatch.setattr(
            "crosskd_hf.data.framed_image.open_upright", lambda image, size: opened.append(image["path"])
        )
        assert data.dataset["objects"][0]["id"] == [1]
        assert not opened
        data.dataset[1]
        assert [path.endswith("b.png") for path in opened] == [True]


def save_rotated(path, size, orientation):
    """A JPEG of stored `size` with a white left half, to be shown with an EXIF orientation."""
    image = PIL.Image.new("RGB", size)
    image.paste("white", (0, 0, size[0] // 2, size[1]))
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif, quality=95)


class TestImageColumn:
    @pytest.fixture
    def rotated(self, tmp_path):
        """Two images that EXIF turns; the annotations of one are for the upright, of the other for the stored."""
        sizes = [(80, 100), (100, 80)]
        images = [
            {"id": i, "file_name": f"{i}.jpg", "width": width, "height": height}
            for i, (width, height) in enumerate(sizes, start=1)
        ]
        paths = write_coco(tmp_path, [annotation(1), annotation(2, image=2)], images=images)
        for number in (1, 2):
            save_rotated(tmp_path / "images" / f"{number}.jpg", (100, 80), 6)
        return load_coco(*paths)

    def test_decodes_in_the_frame_of_the_annotations_and_says_so(self, rotated):
        upright, stored = (row["image"] for row in rotated.dataset)
        assert upright.size == (80, 100)
        assert min(upright.getpixel((40, 10))) > 200  # the left half is on top after a turn by 90 degrees
        assert stored.size == (100, 80)
        assert min(stored.getpixel((10, 40))) > 200
        kinds = {finding.kind: finding.places[0].file for finding in rotated.report.findings}
        assert kinds == {"exif-rotated": "1.jpg", "exif-ignored": "2.jpg"}

    def test_the_batch_is_made_in_that_frame_too(self, rotated):
        processor = DeformableDetrImageProcessor(do_resize=False)
        batch = DetectionCollator(processor)(list(rotated.dataset))
        assert [label["orig_size"].tolist() for label in batch["labels"]] == [[100, 80], [80, 100]]
        assert batch["pixel_mask"][0].sum() == batch["pixel_mask"][1].sum() == 8000

    def test_survives_saving_selecting_and_mapping(self, rotated, tmp_path):
        rotated.dataset.save_to_disk(tmp_path / "saved")
        again = datasets.load_from_disk(tmp_path / "saved").select([1])
        again = again.map(lambda row: {"seen": row["image"].size[0]})
        assert again[0]["image"].size == (100, 80)
        assert again[0]["seen"] == 100
        assert again[0]["objects"] == rotated.dataset[1]["objects"]

    def test_becomes_a_plain_image_column(self, shapes):
        plain = shapes.dataset.cast_column("image", datasets.Image())
        assert np.array_equal(plain[1]["image"], shapes.dataset[1]["image"])

    def test_transforms_of_the_user_see_pictures(self, shapes):
        sizes = shapes.dataset.with_transform(lambda batch: {"sizes": [image.size for image in batch["image"]]})
        assert sizes[0]["sizes"] == shapes.dataset[0]["image"].size

    def test_hub_images_whose_boxes_ignore_exif_are_refused(self, tmp_path):
        save_rotated(tmp_path / "a.jpg", (100, 80), 6)
        content = {"image": [str(tmp_path / "a.jpg")], "width": [100], "height": [80]}
        objects = {"objects": [{"bbox": [[1.0, 2, 3, 4]], "category": [0]}]}
        dataset = datasets.Dataset.from_dict({**content, **objects}).cast_column("image", datasets.Image())
        with pytest.raises(DataError, match="without its EXIF rotation"):
            load_objects(dataset)


class TestLoadObjects:
    def hub(self, objects, category=None, **columns):
        pictures = [PIL.Image.new("RGB", SIZE) for _ in objects]
        category = category or datasets.Value("int64")
        fields = {"bbox": datasets.List(datasets.Value("float32"), length=4), "category": category}
        fields |= {key: datasets.Value("int64") for key in ("id", "iscrowd") if key in objects[0]}
        features = {key: datasets.Value("int64") for key in columns}
        features |= {"image": datasets.Image(), "objects": {key: datasets.List(value) for key, value in fields.items()}}
        content = {"image": pictures, "objects": objects, **columns}
        return datasets.Dataset.from_dict(content, features=datasets.Features(features))

    def test_of_lists_with_names(self):
        label = datasets.ClassLabel(names=["mask", "glove"])
        objects = [{"bbox": [[1, 2, 3, 4], [5, 6, 0, 8]], "category": [1, 0]}, {"bbox": [], "category": []}]
        data = load_objects(self.hub(objects, label))
        first = data.dataset[0]
        assert data.categories == CategoryMap((0, 1), ("mask", "glove"))
        boxes, areas = [[1, 2, 3, 4], [5, 6, 0, 8]], [12, 0]
        assert first["objects"] == {"id": [1, 2], "bbox": boxes, "category": [1, 0], "area": areas, "iscrowd": [0, 0]}
        assert (first["image_id"], first["width"], first["height"]) == (0, *SIZE)
        assert first["image"].size == SIZE
        assert data.report.dropped == (("row 0", 2, "[5.0, 6.0, 0.0, 8.0] no positive width and height"),)

    def test_ids_and_crowds_are_kept(self):
        objects = [{"bbox": [[1, 2, 3, 4]] * 2, "category": [4, 4], "id": [77, 9], "iscrowd": [1, 0]}]
        data = load_objects(self.hub(objects, image_id=[12], width=[100], height=[80]))
        assert data.dataset[0]["image_id"] == 12
        assert data.dataset[0]["objects"]["id"] == [77, 9]
        assert data.dataset[0]["objects"]["iscrowd"] == [1, 0]
        assert data.categories == CategoryMap((4,), ("4",))

    @pytest.mark.parametrize("dtype", ["bool", "int8", "float32"])
    def test_crowd_regions_of_any_type(self, dtype):
        one = {"bbox": [[1, 2, 3, 4]] * 3, "category": [0] * 3}
        fields = {"bbox": datasets.List(datasets.Value("float32"), length=4), "category": datasets.Value("int64")}
        fields["iscrowd"] = datasets.Value(dtype)
        features = {"image": datasets.Image(), "objects": {key: datasets.List(value) for key, value in fields.items()}}
        content = {"image": [PIL.Image.new("RGB", SIZE)], "objects": [{**one, "iscrowd": [True, None, False]}]}
        data = load_objects(datasets.Dataset.from_dict(content, features=datasets.Features(features)))
        assert data.dataset[0]["objects"]["iscrowd"] == [1, 0, 0]

    @pytest.mark.parametrize(("dtype", "value"), [("string", "0"), ("int64", 2)])
    def test_crowd_flags_that_are_none(self, dtype, value):
        objects = {"bbox": [[1.0, 2, 3, 4]], "category": [0], "iscrowd": [value]}
        content = {"image": [PIL.Image.new("RGB", SIZE)], "objects": [objects]}
        dataset = datasets.Dataset.from_dict(content).cast_column("image", datasets.Image())
        with pytest.raises(ValueError, match=f"iscrowd of an object is {value!r}"):
            load_objects(dataset)

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ({"category": [[0]]}, r"'category' of 'objects' holds List\(Value\('int64'\)\); needed is one class"),
            ({"label": [1.0]}, r"'label' of 'objects' holds Value\('float64'\)"),
            ({"label": [1], "category_id": [2]}, "'objects' has 'label' and 'category_id', and either may be the cat"),
        ],
    )
    @pytest.mark.parametrize("as_list", [False, True])
    def test_classes_that_cannot_be_told(self, more, message, as_list):
        objects = {"bbox": [[1.0, 2, 3, 4]], **more}
        entries = [{key: values[0] for key, values in objects.items()}]
        content = {"image": [PIL.Image.new("RGB", SIZE)], "objects": [entries if as_list else objects]}
        with pytest.raises(ValueError, match=message):
            load_objects(datasets.Dataset.from_dict(content).cast_column("image", datasets.Image()))

    def test_the_field_of_our_name_counts(self):
        objects = {"boxes": [[1.0, 2, 3, 4]], "category_id": [7], "category": ["cat"], "label": [5]}
        content = {"image": [PIL.Image.new("RGB", SIZE)], "objects": [objects]}
        data = load_objects(datasets.Dataset.from_dict(content).cast_column("image", datasets.Image()))
        assert data.categories.names == ("cat",)

    def test_several_images_in_a_row(self):
        objects = [{"bbox": [[1.0, 2, 3, 4]], "category": [0]}]
        images = datasets.Features({"image": datasets.List(datasets.Image())})
        rows = datasets.Dataset.from_dict({"image": [[PIL.Image.new("RGB", SIZE)]]}, features=images)
        dataset = datasets.concatenate_datasets([rows, self.hub(objects).remove_columns("image")], axis=1)
        with pytest.raises(ValueError, match=r"the column image holds List\(Image.*which is not one image a row"):
            load_objects(dataset)

    def test_why_no_box_is_left(self):
        objects = [{"bbox": [[1.0, 2, 0, 4]], "category": [0]}]
        with pytest.raises(DataError, match=r"not a single box is left[^$]* no positive width and height"):
            load_objects(self.hub(objects))

    def test_ids_that_start_anew_in_every_image_are_numbered(self):
        objects = [{"bbox": [[1, 2, 3, 4]], "category": [0], "id": [0]}] * 2
        assert [row["id"] for row in load_objects(self.hub(objects)).dataset["objects"]] == [[1], [2]]

    def test_list_of_structs_corners_and_names_as_strings(self):
        inner = {"bbox": datasets.List(datasets.Value("float32"), length=4), "category": datasets.Value("string")}
        features = datasets.Features({"image": datasets.Image(), "objects": datasets.List(inner)})
        objects = [[{"bbox": [1, 2, 11, 22], "category": "dog"}, {"bbox": [1, 2, 3, 4], "category": "cat"}], []]
        content = {"image": [PIL.Image.new("L", SIZE)] * 2, "objects": objects}
        data = load_objects(datasets.Dataset.from_dict(content, features=features), bbox_format="xyxy")
        assert data.categories.names == ("cat", "dog")
        assert data.dataset[0]["objects"]["bbox"] == [[1, 2, 10, 20], [1, 2, 2, 2]]
        assert data.dataset[0]["objects"]["category"] == [1, 0]
        assert data.dataset[1]["objects"]["bbox"] == []

    def test_of_the_second_split_with_the_first_ones_map(self):
        categories = CategoryMap((2, 4), ("a", "b"))
        data = load_objects(self.hub([{"bbox": [[1, 2, 3, 4]], "category": [4]}]), categories)
        assert data.dataset[0]["objects"]["category"] == [1]

    def test_the_second_split_has_its_names_in_another_order(self):
        categories = CategoryMap((0, 1), ("mask", "glove"))
        label = datasets.ClassLabel(names=["Glove", "mask"])
        data = load_objects(self.hub([{"bbox": [[1, 2, 3, 4]] * 2, "category": [0, 1]}], label), categories)
        assert data.dataset[0]["objects"]["category"] == [1, 0]
        text = self.hub([{"bbox": [[1, 2, 3, 4]], "category": ["MASK"]}], datasets.Value("string"))
        assert load_objects(text, categories).dataset[0]["objects"]["category"] == [0]
        numbers = self.hub([{"bbox": [[1, 2, 3, 4]], "category": [1]}], datasets.ClassLabel(num_classes=2))
        assert load_objects(numbers, categories).dataset[0]["objects"]["category"] == [1]

    @pytest.mark.parametrize(
        ("boxes", "more"),
        [(1, {"category": [0, 0]}), (2, {"category": [0]}), (1, {"category": [0], "iscrowd": [0, 1]})],
    )
    def test_lists_of_different_lengths_would_shift_labels(self, boxes, more):
        good = {"bbox": [[1, 2, 3, 4]], "category": [0], **({"iscrowd": [0]} if "iscrowd" in more else {})}
        odd = {"bbox": [[1, 2, 3, 4]] * boxes, **more}
        with pytest.raises(DataError, match="row 1: {'bbox': ") as error:
            load_objects(self.hub([good, odd]))
        assert error.value.findings[0].kind == "objects-length"

    def test_rows_without_image_or_objects(self):
        objects = [{"bbox": [[1, 2, 3, 4]], "category": [0]}, {"bbox": None, "category": None}]
        dataset = self.hub(objects)
        assert [row["bbox"] for row in load_objects(dataset).dataset["objects"]] == [[[1, 2, 3, 4]], []]
        some = {"image": [dataset[0]["image"], None]}
        pictures = datasets.Dataset.from_dict(some, datasets.Features(image=datasets.Image()))
        without = datasets.concatenate_datasets([pictures, dataset.remove_columns("image")], axis=1)
        with pytest.raises(DataError, match="broken-image") as error:
            load_objects(without)
        assert [place.file for place in error.value.findings[0].places] == ["row 1"]

    def test_an_object_without_category(self):
        objects = [{"bbox": [[1, 2, 3, 4], [1, 2, 3, 4]], "category": [0, None]}]
        with pytest.raises(DataError, match="unknown-category"):
            load_objects(self.hub(objects))

    @pytest.mark.parametrize(
        "name", ["xyxy", "XYXY", "pascal_voc", "Pascal VOC", " voc", tv_tensors.BoundingBoxFormat.XYXY]
    )
    def test_names_of_corners(self, name):
        dataset = self.hub([{"bbox": [[1, 2, 11, 22]], "category": [0]}])
        assert load_objects(dataset, bbox_format=name).dataset[0]["objects"]["bbox"] == [[1, 2, 10, 20]]

    @pytest.mark.parametrize("name", ["xywh", "XYWH", "coco", "COCO", tv_tensors.BoundingBoxFormat.XYWH])
    def test_names_of_sides(self, name):
        dataset = self.hub([{"bbox": [[1, 2, 11, 22]], "category": [0]}])
        assert load_objects(dataset, bbox_format=name).dataset[0]["objects"]["bbox"] == [[1, 2, 11, 22]]

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("cxcywh", r"bbox_format='cxcywh' is not read\. Give.*box_convert"),  # a format, not a slip of "xywh"
            ("xyxyn", r"not read\. Give"),
            ("yolo", "fractions"),
            ("albumentations", "'xyxy'"),
            ("xyhw", "Did you mean 'xywh'"),
            ("xyxyxyxy", r"not read\. Give"),
            ("pascal", "Did you mean 'pascal_voc'"),
            (tv_tensors.BoundingBoxFormat.CXCYWH, r"'CXCYWH' is not read\. Give"),
            ("", "not read"),
            (None, "not read"),
        ],
    )
    def test_other_formats_of_boxes_are_refused(self, name, message):
        with pytest.raises(ValueError, match=message):
            load_objects(self.hub([{"bbox": [[1, 2, 11, 22]], "category": [0]}]), bbox_format=name)

    def test_rows_with_wrong_sizes_can_be_left_out(self):
        """As in cppe-5, where width and height of 49 of 1,000 rows are wrong."""
        objects = [{"bbox": [[1, 2, 3, 4]], "category": [0]}] * 3
        dataset = self.hub(objects, width=[SIZE[0], 7, SIZE[0]], height=[SIZE[1]] * 3)
        with pytest.raises(DataError) as refused:
            load_objects(dataset)
        assert "row 1: annotations 7x80, file 100x80" in str(refused.value)
        assert "drop=['size-mismatch']" in str(refused.value)
        assert "remove the columns width and height" in str(refused.value)
        data = load_objects(dataset, drop=["size-mismatch"])
        assert data.dataset["image_id"][:] == [0, 2]
        assert [row["id"] for row in data.dataset["objects"]] == [[1], [2]]
        assert data.report.images == 2
        (finding,) = [finding for finding in data.report.findings if finding.kind == "size-mismatch"]
        assert finding.severity == "warning"
        assert finding.places == (("row 1", None, "annotations 7x80, file 100x80"),)
        assert "left out" in finding.message
        assert len(load_objects(dataset.remove_columns(["width", "height"])).dataset) == 3

    def test_broken_images_can_be_left_out(self):
        objects = [{"bbox": [[1, 2, 3, 4]], "category": [0]}] * 3
        good = self.hub(objects)
        storage = [*good.cast_column("image", datasets.Image(decode=False))["image"]]
        content = {"image": [storage[0], {"path": None, "bytes": b"no image"}, None], "objects": objects}
        dataset = datasets.Dataset.from_dict(content, features=good.features)
        with pytest.raises(DataError, match="broken-image"):
            load_objects(dataset)
        data = load_objects(dataset, drop=["broken-image"])
        assert data.dataset["image_id"][:] == [0]
        assert data.dataset[0]["image"].size == SIZE

    def test_nothing_is_left(self):
        dataset = self.hub([{"bbox": [[1, 2, 3, 4]], "category": [0]}], width=[7], height=[7])
        with pytest.raises(DataError, match="not a single box"):
            load_objects(dataset, drop=["size-mismatch"])

    @pytest.mark.parametrize("drop", ["size-mismatch", ["size"], ["degenerate-box"], [None], True, 3])
    def test_drop_takes_known_kinds(self, drop):
        with pytest.raises(ValueError, match="list of kinds of findings.*size-mismatch"):
            load_objects(self.hub([{"bbox": [[1, 2, 3, 4]], "category": [0]}]), drop=drop)

    def test_no_finding_speaks_of_a_json(self):
        """There is none to correct."""
        objects = [{"bbox": [[1, 2, 3, 4], [0.5, 0.5, 0.1, 0.1]], "category": [7, 8]}] * 5
        dataset = self.hub(objects, width=[0, -5, 9, 10**7, SIZE[0]], height=[SIZE[1]] * 5, image_id=[1, 1, 2, 3, 4])
        for categories in (None, CategoryMap((7,), ("seven",))):
            with pytest.raises(DataError) as refused:
                load_objects(dataset, categories)
            assert {finding.kind for finding in refused.value.findings} >= {"image-size", "size-mismatch"}
            assert "json" not in str(refused.value)

    @pytest.mark.parametrize("as_list", [False, True])
    def test_rotated_boxes_are_named(self, as_list):
        fields = {"bbox": datasets.List(datasets.Value("float32")), "category": datasets.Value("int64")}
        fields["rotation"] = datasets.Value("float32")
        entries = [{"bbox": [1, 2, 30, 4], "category": 0, "rotation": value} for value in (0, 30)]
        objects = entries if as_list else {key: [entry[key] for entry in entries] for key in entries[0]}
        feature = datasets.List(fields) if as_list else {key: datasets.List(value) for key, value in fields.items()}
        features = datasets.Features({"image": datasets.Image(), "objects": feature})
        content = {"image": [PIL.Image.new("RGB", SIZE)], "objects": [objects]}
        report = load_objects(datasets.Dataset.from_dict(content, features=features)).report
        (finding,) = [finding for finding in report.findings if finding.kind == "rotated-box"]
        assert finding.places == (("row 0", 2, "rotation 30"),)

    def test_says_which_columns_it_needs(self):
        with pytest.raises(ValueError, match="needs columns image and objects"):
            load_objects(datasets.Dataset.from_dict({"x": [1]}))
        other = datasets.Dataset.from_dict({"image": ["a"], "objects": [{"box": [1]}]})
        with pytest.raises(ValueError, match="needs 'bbox' and 'category'"):
            load_objects(other)

    def test_equals_load_coco_of_the_same_data(self, shapes):
        plain = shapes.dataset.cast_column("image", datasets.Image())
        data = load_objects(plain)
        assert data.categories.names == shapes.categories.names
        assert data.dataset["objects"][:] == shapes.dataset["objects"][:]
        assert np.array_equal(data.dataset[2]["image"], shapes.dataset[2]["image"])


class TestDetectionCollator:
    @pytest.mark.parametrize("processor_class", [DetectionImageProcessor, DeformableDetrImageProcessor])
    def test_batch_is_what_hf_models_take(self, shapes, processor_class):
        processor = processor_class(size={"shortest_edge": 64, "longest_edge": 96})
        batch = DetectionCollator(processor)([shapes.dataset[i] for i in range(4)])
        assert batch["pixel_values"].shape[:2] == (4, 3)
        assert batch["pixel_values"].dtype == torch.float32
        assert batch["pixel_mask"].shape == (4, *batch["pixel_values"].shape[2:])
        assert batch["pixel_mask"].dtype == torch.int64
        assert [label["image_id"].item() for label in batch["labels"]] == shapes.dataset["image_id"][:4]
        keys = {"class_labels", "boxes", "area", "iscrowd", "image_id", "orig_size"}
        for label in batch["labels"]:
            assert set(label) == keys
            assert type(label["boxes"]) is torch.Tensor
            assert label["class_labels"].dtype == torch.int64
            assert label["boxes"].shape == (len(label["class_labels"]), 4)
            assert bool(((label["boxes"] >= 0) & (label["boxes"] <= 1)).all())

    @pytest.mark.parametrize(
        "processor",
        [
            DetectionImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}),
            DeformableDetrImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}),
            RTDetrImageProcessor(size={"height": 64, "width": 64}),
        ],
        ids=["ours", "padding", "stretching"],
    )
    def test_boxes_are_relative_to_the_unpadded_image(self, processor):
        batch = DetectionCollator(processor)([example(60, 40), example(40, 60)])
        for label in batch["labels"]:
            torch.testing.assert_close(label["boxes"], torch.tensor([[0.5, 0.5, 1, 1]]))
        assert [label["orig_size"].tolist() for label in batch["labels"]] == [[40, 60], [60, 40]]

    def test_area_is_that_of_the_resized_image(self):
        batch = DetectionCollator(DeformableDetrImageProcessor(size={"height": 80, "width": 60}))(
            [example(60, 40, area=[600.0])]
        )
        torch.testing.assert_close(batch["labels"][0]["area"], torch.tensor([1200.0]))

    def test_crowds_and_images_without_objects(self):
        crowd = example(60, 40, iscrowd=[1])
        nothing = example(60, 40, id=[], bbox=[], category=[], area=[], iscrowd=[])
        for label in DetectionCollator(DeformableDetrImageProcessor(), TrainTransform(1.0))([crowd, nothing])["labels"]:
            assert label["boxes"].shape == (0, 4)
            assert label["class_labels"].shape == label["area"].shape == (0,)

    def test_multi_scale_is_not_undone_by_the_processor(self):
        processor = DeformableDetrImageProcessor(size={"shortest_edge": 32, "longest_edge": 32})
        batch = DetectionCollator(processor, TrainTransform(0, shortest_edges=(48,)))([example(60, 40)])
        assert batch["pixel_values"].shape[2:] == (48, 72)
        plain = DetectionCollator(processor, TrainTransform(0))([example(60, 40)])
        assert max(plain["pixel_values"].shape[2:]) == 32

    @pytest.mark.parametrize("area", [None, float("nan"), 99.0])
    @pytest.mark.parametrize("crowds", [[None, True], [0, 1], [False, 1.0], np.array([0, 1])])
    def test_rows_of_others_may_lack_areas_and_crowd_marks(self, area, crowds):
        image = PIL.Image.new("RGB", (60, 40))
        objects = {"id": [1, 2], "bbox": [[5, 5, 10, 8]] * 2, "category": [3, 4], "area": [area] * 2, "iscrowd": crowds}
        example = {"image": image, "image_id": 1, "width": 60, "height": 40, "objects": objects}
        (label,) = DetectionCollator(DetectionImageProcessor(do_resize=False))([example])["labels"]
        assert label["class_labels"].tolist() == [3]
        assert label["area"].tolist() == [99 if area == 99 else 80]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"bbox": [[5, 5, float("nan"), 8]]},
                r"\(image_id 7\) has a box that isn't four finite numbers: \[5, 5, nan",
            ),
            ({"bbox": [[5, 5, 8]]}, "four finite numbers"),
            ({"bbox": ["5 5 8 8"]}, "four finite numbers"),
            ({"bbox": [None]}, "four finite numbers: None"),
            ({"category": [0, 1]}, "lists of different lengths in objects: {'id': 1, 'bbox': 1, 'category': 2"),
            ({"category": ["cat"]}, "has a class that isn't a whole number: 'cat'"),
            ({"category": [1.0]}, "a whole number: 1.0"),
        ],
    )
    def test_rows_of_others_that_are_wrong_are_named(self, change, message):
        objects = {"id": [1], "bbox": [[5, 5, 10, 8]], "category": [3], "area": [80], "iscrowd": [0], **change}
        image = PIL.Image.new("RGB", (60, 40))
        example = {"image": image, "image_id": 7, "width": 60, "height": 40, "objects": objects}
        with pytest.raises(ValueError, match=message):
            DetectionCollator(DetectionImageProcessor())([example])

    def test_takes_paths_and_bytes_too(self, tmp_path):
        PIL.Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
        collator = DetectionCollator(DeformableDetrImageProcessor())
        for source in (str(tmp_path / "a.png"), {"path": None, "bytes": (tmp_path / "a.png").read_bytes()}):
            assert collator([example(60, 40, image=source)])["pixel_values"].shape[0] == 1

    def test_workers_can_have_it(self, shapes):
        collator = DetectionCollator(DeformableDetrImageProcessor(size={"height": 32, "width": 32}), TrainTransform())
        loader = torch.utils.data.DataLoader(shapes.dataset, batch_size=4, num_workers=1, collate_fn=collator)
        ids = [label["image_id"].item() for batch in loader for label in batch["labels"]]
        assert ids == shapes.dataset["image_id"][:]


class TestAspectRatioSampler:
    def sampler(self, batch_size=4, **options):
        generator = torch.Generator().manual_seed(1)
        widths, heights = torch.randint(50, 100, (2, 45), generator=generator)
        return AspectRatioSampler(widths.tolist(), heights.tolist(), batch_size, **options)

    def test_every_image_comes_once(self):
        assert sorted(self.sampler()) == list(range(45))
        assert len(self.sampler()) == 45

    def test_batches_are_of_one_orientation_but_for_the_last(self):
        sampler = self.sampler()
        batches = torch.tensor(list(sampler)).split(4)
        mixed = [len(set(sampler.portrait[batch].tolist())) == 2 for batch in batches]
        assert not any(mixed[:-2])

    def test_squares_go_with_landscapes(self):
        kinds = {"square": (10, 10), "landscape": (20, 10), "portrait": (10, 20)}
        names = [name for name in kinds for _ in range(10)]
        widths, heights = zip(*(kinds[name] for name in names), strict=True)
        order = list(AspectRatioSampler(widths, heights, 5))
        batches = [{names[index] for index in order[start : start + 5]} for start in range(0, 30, 5)]
        assert sum("portrait" in batch for batch in batches) == 2
        assert all(len(batch) == 1 for batch in batches if "portrait" in batch)

    def test_order_follows_seed_and_epoch_only(self):
        sampler = self.sampler(seed=3)
        first = list(sampler)
        assert list(sampler) == first == list(self.sampler(seed=3))
        sampler.set_epoch(1)
        assert list(sampler) != first
        assert list(self.sampler(seed=4)) != first

    @pytest.mark.parametrize("count", [0, 1, 3])
    def test_few_images(self, count):
        assert sorted(AspectRatioSampler([5] * count, [6] * count, 4)) == list(range(count))

    def test_accelerate_tells_it_the_epoch(self):
        from accelerate import Accelerator

        sampler = self.sampler()
        loader = torch.utils.data.DataLoader(torch.arange(45), batch_size=4, sampler=sampler)
        prepared = Accelerator(cpu=True).prepare_data_loader(loader)
        epochs = [torch.cat(list(prepared)).tolist() for _ in range(2)]
        assert epochs[0] != epochs[1]
        assert sampler.epoch == 1

    def test_refuses(self):
        with pytest.raises(ValueError, match="at least 1"):
            AspectRatioSampler([1], [1], 0)
        with pytest.raises(ValueError, match="1 widths and 2 heights"):
            AspectRatioSampler([1], [1, 2], 1)
