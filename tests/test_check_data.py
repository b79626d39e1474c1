"""Every fault of a data set is found and named; training on the same folder starts right or not at all."""

import json

import numpy as np
import PIL.Image
import pytest

from crosskd_hf.check_data import check_data
from crosskd_hf.data import DataError, load_coco

SIZE = (60, 40)


class Folder:
    """A COCO folder in which every fault is added by one call."""

    def __init__(self, path):
        self.path = path
        self.images, self.annotations = [], []
        self.categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
        (path / "images").mkdir()
        self.add("good.jpg", PIL.Image.new("RGB", SIZE))
        self.box(category_id=2)

    def add(self, name, image=None, size=SIZE, content=None, **options):
        file = self.path / "images" / name
        if image is not None:
            image.save(file, **options)
        if content is not None:
            file.write_bytes(content)
        self.images.append({"id": len(self.images) + 1, "file_name": name, "width": size[0], "height": size[1]})
        self.box()

    def box(self, bbox=(5, 5, 20, 20), **changes):
        number = len(self.annotations) + 1
        entry = {"id": number, "image_id": len(self.images), "category_id": 1, "bbox": list(bbox), "iscrowd": 0}
        self.annotations.append({**entry, "area": 400, **changes})
        return number

    def paths(self):
        content = {key: getattr(self, key) for key in ("images", "annotations", "categories")}
        (self.path / "truth.json").write_text(json.dumps(content))
        return self.path / "truth.json", self.path / "images"

    def findings(self):
        return {finding.kind: finding for finding in check_data(*self.paths()).findings}


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def noise(mode="RGB"):
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (*SIZE[::-1], 3), dtype=np.uint8)).convert(
        mode
    )


class TestImages:
    def test_good_data_has_no_finding(self, folder):
        report = check_data(*folder.paths())
        assert report.findings == ()
        assert report.ok

    @pytest.mark.parametrize("part", [0, 0.5, 0.95])
    def test_truncated_and_empty_files(self, folder, part):
        noise().save(folder.path / "whole.jpg")
        whole = (folder.path / "whole.jpg").read_bytes()
        folder.add("cut.jpg", content=whole[: int(len(whole) * part)])
        finding = folder.findings()["broken-image"]
        assert finding.severity == "error"
        assert [place.file for place in finding.places] == ["cut.jpg"]
        with pytest.raises(DataError, match=r"cut\.jpg"):
            load_coco(*folder.paths())

    def test_damage_inside_a_file_is_found_by_decoding(self, folder):
        noise().save(folder.path / "whole.jpg")
        content = bytearray((folder.path / "whole.jpg").read_bytes())
        start = content.index(b"\xff\xdb")  # the first quantisation table
        content[start + 2] = 255
        folder.add("damaged.jpg", content=bytes(content))
        assert folder.findings()["broken-image"].places[0].file == "damaged.jpg"
        with pytest.raises(DataError, match=r"damaged\.jpg"):
            load_coco(*folder.paths(), decode=True)

    def test_wrong_extension(self, folder):
        folder.add("really_png.jpg", noise(), format="PNG")
        finding = folder.findings()["wrong-extension"]
        assert (finding.severity, finding.places[0].detail) == ("note", "is PNG")
        assert load_coco(*folder.paths()).dataset[1]["image"].size == SIZE

    @pytest.mark.parametrize(
        ("kind", "name", "image", "options"),
        [
            ("sixteen-bit", "a.png", PIL.Image.new("I;16", SIZE), {}),
            ("cmyk", "a.jpg", noise("CMYK"), {}),
            ("animated", "a.gif", noise(), {"save_all": True, "append_images": [PIL.Image.new("RGB", SIZE)]}),
        ],
    )
    def test_what_is_converted_is_noted(self, folder, kind, name, image, options):
        folder.add(name, image, **options)
        findings = folder.findings()
        assert set(findings) == {kind}
        assert findings[kind].severity == "note"
        assert load_coco(*folder.paths()).dataset[1]["image"].mode == "RGB"

    @pytest.mark.parametrize(("size", "kind"), [((40, 60), "exif-rotated"), ((60, 40), "exif-ignored")])
    def test_exif_rotation(self, folder, size, kind):
        exif = PIL.Image.Exif()
        exif[0x0112] = 8
        folder.add("turned.jpg", noise(), size=size, exif=exif)
        assert set(folder.findings()) == {kind}
        assert load_coco(*folder.paths()).dataset[1]["image"].size == size

    def test_size_that_does_not_fit(self, folder):
        folder.add("other.png", noise(), size=(61, 40))
        finding = folder.findings()["size-mismatch"]
        assert finding.severity == "error"
        assert finding.places[0] == ("other.png", None, "annotations 61x40, file 60x40")

    def test_missing_image_and_escaping_name(self, folder):
        folder.add("gone.jpg")
        folder.add("../out.jpg")
        findings = folder.findings()
        assert [place.file for place in findings["missing-image"].places] == ["gone.jpg"]
        assert [place.file for place in findings["file-name"].places] == ["'../out.jpg'"]

    def test_one_file_twice(self, folder):
        folder.add("good.jpg")
        assert folder.findings()["duplicate-file"].severity == "warning"

    def test_bomb(self, folder, monkeypatch):
        monkeypatch.setattr("crosskd_hf.images.MAX_PIXELS", 10_000)
        folder.add("bomb.png", PIL.Image.new("1", (1000, 1000)))
        assert "limit is 10000" in folder.findings()["broken-image"].places[0].detail
        folder.images[-1].update(width=10**6, height=10**6)
        assert folder.findings()["image-size"].places == (("bomb.png", None, "1000000x1000000"),)


class TestAnnotations:
    @pytest.mark.parametrize(
        ("bbox", "reason"),
        [
            ((float("nan"), 1, 2, 3), "not four finite numbers"),
            ((1, 2, 3), "not four finite numbers"),
            ((1, 2, -3, 4), "no positive width and height"),
            ((1, 2, 3, 0), "no positive width and height"),
            ((100, 2, 3, 4), "outside"),
        ],
    )
    def test_degenerate_boxes_name_file_annotation_and_reason(self, folder, bbox, reason):
        number = folder.box(bbox)
        finding = folder.findings()["degenerate-box"]
        assert finding.severity == "warning"
        assert finding.places[0][:2] == ("good.jpg", number)
        assert finding.places[0].detail.endswith(reason)

    def test_boxes_partly_outside_and_crowds_are_notes(self, folder):
        outside, crowd = folder.box((-5, 10, 30, 10)), folder.box(iscrowd=1)
        findings = folder.findings()
        assert findings["box-partly-outside"].places == (("good.jpg", outside, ""),)
        assert findings["crowd"].places == (("good.jpg", crowd, ""),)
        assert {finding.severity for finding in findings.values()} == {"note"}

    def test_duplicate_ids(self, folder):
        folder.box(id=1)
        folder.add("twin.jpg", noise())
        folder.images[-1]["id"] = 1
        findings = folder.findings()
        assert {findings[kind].severity for kind in ("duplicate-annotation-id", "duplicate-image-id")} == {"error"}
        assert [place.annotation for place in findings["duplicate-annotation-id"].places] == [1, 1]
        assert [place.file for place in findings["duplicate-image-id"].places] == ["good.jpg", "twin.jpg"]

    def test_unknown_category_and_image(self, folder):
        category, image = folder.box(category_id=77), folder.box(image_id=99)
        findings = folder.findings()
        assert findings["unknown-category"].places == (("good.jpg", category, "category_id 77"),)
        assert findings["unknown-image"].places == (("annotations", image, "image_id 99"),)

    def test_gaps_and_zero_in_category_ids_are_mapped(self, folder):
        folder.categories = [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}, {"id": 2, "name": "c"}]
        findings = folder.findings()
        assert findings["category-ids"].severity == "note"
        assert [place.file for place in findings["category-unused"].places] == ["a"]

    def test_unused_parent_is_left_out(self, folder):
        folder.categories = [
            {"id": 0, "name": "pets", "supercategory": "none"},
            {"id": 1, "name": "cat", "supercategory": "pets"},
            {"id": 2, "name": "dog", "supercategory": "pets"},
        ]
        findings = folder.findings()
        assert [place.file for place in findings["category-left-out"].places] == ["pets"]
        assert load_coco(*folder.paths()).categories.raw_ids == (1, 2)

    @pytest.mark.parametrize(
        ("categories", "kind"),
        [
            ([{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], "duplicate-category-id"),
            ([{"id": 1, "name": "a"}, {"id": 2, "name": "a"}], "duplicate-category-name"),
            ([{"id": "1", "name": "a"}], "category"),
            ([{"id": 1}], "category"),
        ],
    )
    def test_faulty_categories(self, folder, categories, kind):
        folder.categories = categories
        assert folder.findings()[kind].severity == "error"

    def test_corners_in_the_place_of_sides(self, folder):
        folder.annotations.clear()
        for left in range(5):
            folder.box((left + 20, 10, left + 50, 35))
        assert folder.findings()["corner-boxes"].severity == "warning"


class TestReport:
    def test_lists_errors_first_and_says_the_fix(self, folder):
        folder.box((0, 0, 0, 0))
        folder.box(iscrowd=1)
        folder.box(category_id=77)
        report = check_data(*folder.paths())
        assert not report.ok
        assert [finding.severity for finding in report.findings] == ["error", "warning", "note"]
        text = report.describe()
        assert "fix: list the category" in text
        assert "good.jpg annotation 3" in text

    def test_shows_a_few_places_or_all(self, folder):
        for _ in range(9):
            folder.box((0, 0, 0, 0))
        report = check_data(*folder.paths())
        assert "and 4 more" in report.describe()
        assert "more" not in report.describe(most=None)
        assert len(report.dropped) == 9

    def test_an_unreadable_json_is_a_finding_too(self, tmp_path):
        report = check_data(tmp_path / "none.json", tmp_path)
        assert not report.ok
        assert "none.json" in str(report)

    def test_whatever_is_odd_is_read_or_refused_before_training(self, folder):
        odd = [
            None,
            0,
            -1,
            1e308,
            float("nan"),
            "",
            "1",
            True,
            [],
            {},
            2**63,
            1.5,
            [1, 2, 3, 4],
            [None] * 4,
            [1e16, 1, 1, 1],
        ]
        for number in range(3):
            folder.add(f"{number}.jpg", noise())
        paths = folder.paths()
        original = paths[0].read_text()
        rng = np.random.default_rng(0)
        loaded = 0
        for _ in range(60):
            content = json.loads(original)
            part = ("images", "annotations", "categories")[rng.integers(3)]
            entry = content[part][rng.integers(len(content[part]))]
            entry[list(entry)[rng.integers(len(entry))]] = odd[rng.integers(len(odd))]
            paths[0].write_text(json.dumps(content))
            report = check_data(*paths)
            assert str(report)
            if report.ok:
                load_coco(*paths)
                loaded += 1
            else:
                with pytest.raises(DataError):
                    load_coco(*paths)
        assert 5 < loaded < 55

    def test_many_annotations_take_little_time(self, folder):
        rng = np.random.default_rng(0)
        boxes = np.round(rng.uniform(-1, 40, (30_000, 4)), 2).tolist()
        for box in boxes:
            folder.box(box)
        report = check_data(*folder.paths())
        assert report.objects + len(report.dropped) == 30_002
        assert len(report.dropped) > 100


class TestRealData:
    def test_two_degenerate_boxes_of_bccd(self, request):
        root = request.config.rootpath.parent / "shared" / "data" / "bccd"
        if not root.is_dir():
            pytest.skip("the BCCD data set is not here")
        for split, annotation in (("train", 2288), ("val", 887)):
            data = load_coco(root / "coco" / f"instances_{split}.json", root / "JPEGImages")
            assert [place.annotation for place in data.report.dropped] == [annotation]
            assert data.categories.names == ("Platelets", "RBC", "WBC")
