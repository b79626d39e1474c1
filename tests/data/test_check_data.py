"""Every fault of a data set is found and named; training on the same folder starts right or not at all."""

import io
import json
import logging
import os
import re
import struct
import subprocess
import sys
import threading
import zlib

import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest

from crosskd_hf.data import DataError, DetectionCollator, load_coco
from crosskd_hf.data.categories import CategoryMap
from crosskd_hf.data.coco_json import CocoTable, read_coco
from crosskd_hf.data.images import open_image
from crosskd_hf.data.inspection import check_data, inspect_table
from crosskd_hf.models import DetectionImageProcessor
from crosskd_hf.models.image_processing import resized_size

logger = logging.getLogger(__name__)

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
        number, bbox = len(self.annotations) + 1, list(bbox) if isinstance(bbox, tuple) else bbox
        entry = {
            "id": number,
            "image_id": len(self.images),
            "category_id": 1,
            "bbox": list(bbox) if isinstance(bbox, tuple) else bbox,
            "iscrowd": 0,
        }
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


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_a_bomb_behind_the_pixels(png):
    """The PNG with 64 MB of text in few bytes; its checksums are right."""
    return png[:-12] + png_chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(1 << 26), 9)) + png[-12:]


def without_pixels(jpeg):
    """The JPEG's header and its end marker."""
    return jpeg[: jpeg.index(b"\xff\xda")] + b"\xff\xd9"


def encoded(format):
    buffer = io.BytesIO()
    noise().save(buffer, format)
    return buffer.getvalue()


def noise(mode="RGB"):
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (*SIZE[::-1], 3), dtype=np.uint8)).convert(
        mode
    )


_PEAK = """
import re, sys
from crosskd_hf.data import check_data
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) // 1024
before = peak()
report = check_data(*sys.argv[1:])
print(report.ok, peak() - before)
"""


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
            load_coco(*folder.paths())

    @pytest.mark.parametrize(
        ("name", "content"),
        [("a.png", with_a_bomb_behind_the_pixels(encoded("PNG"))), ("a.jpg", without_pixels(encoded("JPEG")))],
    )
    def test_files_that_seem_whole_from_their_ends(self, folder, name, content):
        folder.add(name, content=content)
        assert [place.file for place in folder.findings()["broken-image"].places] == [name]
        with pytest.raises(DataError, match="broken-image"):
            load_coco(*folder.paths())

    @pytest.mark.filterwarnings("ignore::UserWarning")
    @pytest.mark.parametrize("format", ["JPEG", "GIF", "WEBP"])
    def test_an_image_that_passes_never_fails_in_training(self, folder, format):
        rng, whole = np.random.default_rng(0), encoded(format)
        for number in range(60):
            content = bytearray(whole)
            start, length = rng.integers(len(whole)), rng.integers(1, 32)
            content[start : start + length] = rng.bytes(length)
            folder.add(f"{number}.{format.lower()}", content=bytes(content))
        broken = {place.file for finding in check_data(*folder.paths()).findings for place in finding.places}
        kept = [image for image in folder.images if image["file_name"] not in broken]
        assert 5 < len(kept) < 60
        folder.images = kept
        folder.annotations = [a for a in folder.annotations if a["image_id"] in {image["id"] for image in kept}]
        data = load_coco(*folder.paths())
        collator = DetectionCollator(DetectionImageProcessor(size={"height": 32, "width": 32}))
        assert len(collator(list(data.dataset))["labels"]) == len(kept)

    @pytest.mark.parametrize(
        ("content", "told"),
        [
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
            (b"\n<!DOCTYPE html><html>no such file</html>", "it is a web page"),
            (b"something", "cannot identify image file"),
        ],
    )
    def test_what_lies_in_the_place_of_an_image(self, folder, content, told):
        folder.add("a.jpg", content=content)
        (place,) = folder.findings()["broken-image"].places
        assert told in place.detail

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
        picture = load_coco(*folder.paths()).dataset[1]["image"]
        assert picture.mode in (("I;16", "I") if kind == "sixteen-bit" else ("RGB",))  # Pillow 10 opens them as I
        assert open_image(picture).mode == "RGB"

    @pytest.mark.parametrize(
        ("low", "high", "dead_pixel", "kind"),
        [(28000, 31000, None, "pixel-range"), (28000, 31000, 65535, "pixel-range"), (0, 4095, None, "pixel-range"),
         (0, 65535, None, None), (500, 500, None, None)],
    )  # fmt: skip
    def test_a_narrow_range_of_16_bit_values(self, folder, low, high, dead_pixel, kind):
        """The range is that of all images; a dead pixel doesn't hide it."""
        values = np.linspace(low, high, 2 * SIZE[0] * SIZE[1]).astype(np.uint16).reshape(2, *SIZE[::-1])
        if dead_pixel is not None:
            values[0, 0, :2] = dead_pixel
        for number, part in enumerate(values):
            folder.add(f"{number}.png", PIL.Image.fromarray(part))
        findings = folder.findings()
        assert set(findings) == {"sixteen-bit", kind} - {None}
        if kind is not None:
            finding = findings[kind]
            assert finding.severity == "warning"
            assert [place.file for place in finding.places] == ["0.png", "1.png"]
            given = [float(number) for number in re.search(r"pixel_range=\((.*), (.*)\)", finding.fix).groups()]
            assert np.abs(np.array(given) - [low, high]).max() <= 0.002 * (high - low)
            assert ("but for a thousandth" in finding.message) == (dead_pixel is not None)

    def test_float_values_have_no_scale(self, folder):
        folder.add("a.tif", PIL.Image.fromarray(np.linspace(-2, 3, 2400, dtype=np.float32).reshape(40, 60)))
        finding = folder.findings()["float-pixels"]
        assert (finding.severity, finding.places[0].file) == ("warning", "a.tif")
        assert "pixel_range=(-2, 3)" in finding.fix

    def test_16_bit_colours_are_noted(self, folder):
        row = b"\0" + bytes(6 * SIZE[0])
        header = struct.pack(">IIBBBBB", *SIZE, 16, 2, 0, 0, 0)
        chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(row * SIZE[1])), (b"IEND", b"")]
        folder.add("a.png", content=b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks))
        assert set(folder.findings()) == {"sixteen-bit"}

    @pytest.mark.parametrize(("size", "kind"), [((40, 60), "exif-rotated"), ((60, 40), "exif-ignored")])
    def test_exif_rotation(self, folder, size, kind):
        exif = PIL.Image.Exif()
        exif[0x0112] = 8
        folder.add("turned.jpg", noise(), size=size, exif=exif)
        assert set(folder.findings()) == {kind}
        assert load_coco(*folder.paths()).dataset[1]["image"].size == size

    @pytest.mark.parametrize(("orientation", "size"), [(2, SIZE), (3, SIZE), (6, (40, 40)), (6, None)])
    def test_exif_rotation_that_sizes_do_not_show(self, folder, orientation, size):
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        folder.add("turned.jpg", noise().resize(size or SIZE), size=size or (0, 0), exif=exif)
        findings = folder.findings()
        assert set(findings) - {"size-missing"} == {"exif-unsure"}
        assert findings["exif-unsure"].severity == "warning"

    def test_an_orientation_that_does_not_exist(self, folder):
        exif = PIL.Image.Exif()
        exif[0x0112] = 99
        folder.add("odd.jpg", noise(), exif=exif)
        assert not folder.findings()
        assert load_coco(*folder.paths()).dataset[1]["image"].size == SIZE

    def test_an_image_of_which_resizing_leaves_hardly_anything(self, folder):
        folder.add("long.png", PIL.Image.new("RGB", (2100, 20)), size=(2100, 20))
        folder.add("high.png", PIL.Image.new("RGB", (20, 2000)), size=(20, 2000))
        finding = folder.findings()["elongated"]
        assert (finding.severity, finding.places) == ("error", (("long.png", None, "2100x20"),))
        assert "at most 13 px" in finding.message
        assert resized_size(20, 2100, 800, 1333) == (13, 1333)

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

    @pytest.mark.parametrize("name", ["x" * 5000, "\ud800.jpg", "a\nerror: b.jpg", "\x1b[2J.jpg"])
    def test_names_that_no_file_or_terminal_takes(self, folder, name):
        folder.add(name)
        finding = folder.findings()["missing-image"]
        assert finding.places[0].file == name
        (line,) = str(finding.places[0]).splitlines()
        assert line.isprintable()
        assert len(line) < 300
        assert line.encode()

    def test_names_written_on_windows(self, folder):
        folder.add("sub\\a.jpg")
        assert 'separated by "/"' in folder.findings()["missing-image"].fix

    def test_a_pipe_or_a_folder_in_the_place_of_an_image(self, folder):
        (folder.path / "images/folder.jpg").mkdir()
        folder.add("folder.jpg")
        (folder.path / "images/link.jpg").symlink_to("/dev/zero")
        folder.add("link.jpg")
        assert [place.file for place in folder.findings()["missing-image"].places] == ["folder.jpg", "link.jpg"]

    @pytest.mark.parametrize("name", ["good.jpg", "./good.jpg"])
    def test_one_file_twice(self, folder, name):
        folder.add(name)
        assert folder.findings()["duplicate-file"].severity == "warning"

    def test_huge_images_are_decoded_one_after_the_other(self, folder, monkeypatch):
        monkeypatch.setattr("crosskd_hf.data.check_images._MOST_BYTES", 6 * SIZE[0] * SIZE[1])
        for number in range(4):
            folder.add(f"small{number}.png", noise())
            folder.add(f"huge{number}.tif", noise().resize((120, 80)), size=(120, 80))
        folder.add("broken.tif", noise().resize((120, 80)), size=(120, 80))
        with (folder.path / "images/broken.tif").open("r+b") as file:
            file.truncate(20_000)
        threads, load = {}, PIL.ImageFile.ImageFile.load

        def seen(image):
            threads.setdefault(os.path.basename(image.filename), threading.current_thread())
            return load(image)

        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", seen)
        assert [place.file for place in folder.findings()["broken-image"].places] == ["broken.tif"]
        assert all(threads[f"huge{number}.tif"] is threading.current_thread() for number in range(4))
        assert all(threads[f"small{number}.png"] is not threading.current_thread() for number in range(4))

    @pytest.mark.slow
    @pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak of memory from Linux")
    def test_a_small_file_with_many_float_pixels_takes_the_memory_of_its_pixels_once(self, folder):
        """4 files of 0.2 MB that hold 144 MB each."""
        image = PIL.Image.new("F", (6000, 6000), 1.5)
        for number in range(4):
            folder.add(f"{number}.tif", image, size=image.size, compression="tiff_adobe_deflate")
        words = [sys.executable, "-W", "ignore", "-c", _PEAK, *map(str, folder.paths())]
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300)
        ok, megabytes = done.stdout.split()
        logger.info("4 images of 144 MB: %s MB at the peak", megabytes)
        assert ok == "True"
        assert 130 < int(megabytes) < 250

    def test_bomb(self, folder, monkeypatch):
        monkeypatch.setattr("crosskd_hf.data.images.MAX_PIXELS", 10_000)
        folder.add("bomb.png", PIL.Image.new("1", (1000, 1000)))
        assert "limit is 10000" in folder.findings()["broken-image"].places[0].detail
        folder.images[-1].update(width=10**6, height=10**6)
        assert folder.findings()["image-size"].places == (("bomb.png", None, "1000000x1000000"),)


class TestAnnotations:
    @pytest.mark.parametrize(
        ("bbox", "reason"),
        [
            ((float("nan"), 1, 2, 3), "not four finite numbers"),
            ((1, 2, 3), "[1, 2, 3] not four finite numbers"),
            ((1, 2, 3, 4, 5), "[1, 2, 3, 4, 5] not four finite numbers"),
            (("1", "2", "3", "4"), "['1', '2', '3', '4'] not four finite numbers"),
            ((None, 2, 3, 4), "[None, 2, 3, 4] not four finite numbers"),
            ({"x": 1, "y": 2, "width": 3, "height": 4}, "not four finite numbers"),
            (None, "not four finite numbers"),
            ((0, 0, float("inf"), 3), "not four finite numbers"),
            ((10, 10, 1e-9, 5), "narrower than 0.001 px"),
            ((59.9999999, 10, 5, 5), "outside"),
            ((-1e300, -1e300, 2e300, 2e300), "outside"),
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

    def test_a_parent_named_like_its_class_is_left_out(self, folder):
        folder.categories = [
            {"id": 0, "name": "cat", "supercategory": "none"},
            {"id": 1, "name": "cat", "supercategory": "cat"},
            {"id": 2, "name": "dog", "supercategory": "cat"},
        ]
        assert check_data(*folder.paths()).ok
        assert [place.file for place in folder.findings()["category-left-out"].places] == ["cat"]
        assert load_coco(*folder.paths()).categories == CategoryMap((1, 2), ("cat", "dog"))

    def test_names_that_differ_in_case_and_spaces_only(self, folder):
        folder.categories = [{"id": 1, "name": "Helmet"}, {"id": 2, "name": " helmet"}, {"id": 3, "name": "head"}]
        finding = folder.findings()["category-alike"]
        assert finding.severity == "warning"
        assert [place.detail for place in finding.places] == ["'Helmet', ' helmet'"]
        assert load_coco(*folder.paths()).categories.names == ("Helmet", " helmet", "head")
        given = load_coco(*folder.paths()).categories
        assert check_data(*folder.paths(), given).ok
        folder.categories[0]["name"] = "HELMET"
        report = check_data(*folder.paths(), given)
        assert [finding.kind for finding in report.findings][:2] == ["category-ambiguous", "unknown-category"]

    @pytest.mark.parametrize(
        ("categories", "kind"),
        [
            ([{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], "duplicate-category-id"),
            ([{"id": 1, "name": "a"}, {"id": 2, "name": "a"}], "duplicate-category-name"),
            ([{"id": "1", "name": "a"}], "category"),
            ([{"id": 1}], "category"),
            ([{"id": 1, "name": " "}], "category"),
        ],
    )
    def test_faulty_categories(self, folder, categories, kind):
        folder.categories = categories
        assert folder.findings()[kind].severity == "error"

    @pytest.mark.parametrize(("count", "severity"), [(5, "warning"), (25, "error")])
    def test_few_corners_in_the_place_of_sides(self, folder, count, severity):
        folder.annotations.clear()
        for number in range(count):
            folder.box((number % 9 + 20, 10, number % 9 + 50, 35))
        assert folder.findings()["corner-boxes"].severity == severity

    def test_fractions_with_a_box_that_is_none(self, folder):
        folder.annotations.clear()
        for number in range(9):
            folder.box((0.05 * number, 0.1, 0.5, 0.5))
        folder.box((5, 5, 10, 10))
        assert folder.findings()["relative-boxes"].severity == "error"

    @pytest.mark.parametrize("area", [float("inf"), 1e300, float("nan"), "big", None])
    def test_areas_that_are_impossible(self, folder, area):
        number = folder.box((5, 5, 10, 20), area=area)
        assert folder.findings()["area-missing"].places == (("good.jpg", number, ""),)
        assert load_coco(*folder.paths()).dataset[0]["objects"]["area"][-1] == 200

    @pytest.mark.parametrize("flag", ["yes", "0", 2, float("nan"), []])
    def test_flags_that_are_neither_0_nor_1(self, folder, flag):
        number = folder.box(iscrowd=flag)
        finding = folder.findings()["json"]
        assert "'iscrowd' is not 0 or 1" in finding.message
        assert finding.places[0].file == f"annotations[{number - 1}]"

    def test_training_needs_objects_and_evaluation_does_not(self, folder):
        categories = load_coco(*folder.paths()).categories
        for annotations in ([], [{**annotation, "bbox": None} for annotation in folder.annotations]):
            folder.annotations = annotations
            assert not check_data(*folder.paths()).ok
            with pytest.raises(DataError, match="no-objects"):
                load_coco(*folder.paths())
            assert check_data(*folder.paths(), categories).ok
            assert load_coco(*folder.paths(), categories).report.objects == 0


def scattered(count, least, most, reach, seed=0):
    """Corners (x1, y1, x2, y2) of boxes with sides of `least` to `most` px that begin in [0, reach) px."""
    rng = np.random.default_rng(seed)
    starts, sides = rng.uniform(0, reach, (count, 2)), rng.uniform(least, most, (count, 2))
    return np.concatenate([starts, starts + sides], axis=1)


def sides_of(corners):
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)


class TestShares:
    """A file is judged by the share of its boxes that have a fault: one box more or less changes nothing."""

    def kinds(self, boxes, size=(640, 480), **changes):
        """Severity by kind of a file with one image, in which boxes may be alike."""
        findings = self.findings(boxes, size, **changes)
        found = {finding.kind: finding.severity for finding in findings if finding.severity != "note"}
        return {kind: severity for kind, severity in found.items() if kind != "duplicate-object"}

    def findings(self, boxes, size=(640, 480), **changes):
        count = len(boxes)
        table = CocoTable(
            image_ids=np.array([1]),
            file_names=["a.jpg"],
            sizes=np.array([size]),
            annotation_ids=np.arange(1, count + 1),
            annotation_images=np.ones(count, dtype=np.int64),
            annotation_categories=np.ones(count, dtype=np.int64),
            boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
            areas=changes.pop("areas", np.full(count, np.nan)),
            crowds=changes.pop("crowds", np.zeros(count, dtype=bool)),
            categories=[{"id": 1, "name": "cat"}],
            **changes,
        )
        return inspect_table(table, table.sizes, None).findings

    @pytest.mark.parametrize("count", [60, 95])
    @pytest.mark.parametrize("others", [[], [[300, 200, 300, 220]], [[300, 200, 20, 220]] * 2])
    def test_corners(self, count, others):
        corners = scattered(count, 10, 90, (540, 390))
        assert self.kinds([*corners, *others])["corner-boxes"] == "error"
        assert "corner-boxes" not in self.kinds([*sides_of(corners), *others])

    def test_boxes_of_whole_images_are_no_corners(self):
        """As of data sets that once were for classification; both ways of writing them are the same."""
        assert "corner-boxes" not in self.kinds([[0, 0, 590, 400]] * 50)

    @pytest.mark.parametrize(("most", "reach"), [(100, (100, 100)), (60, (150, 120)), (20, (300, 220))])
    def test_corners_in_the_upper_left_leave_no_image(self, most, reach):
        corners = scattered(95, 10, most, reach)
        assert self.kinds(corners) == {"corner-boxes": "error"}
        assert self.kinds(corners, areas=sides_of(corners)[:, 2:].prod(1)) == {"corner-boxes": "error"}
        assert self.kinds(sides_of(corners)) == {}

    def test_corners_of_half_of_the_boxes(self):
        corners = scattered(90, 10, 90, (540, 390))
        assert self.kinds([*corners[:45], *sides_of(corners[45:])])["corner-boxes"] == "error"

    def test_big_objects_are_no_corners(self):
        rng = np.random.default_rng(0)
        sides = rng.uniform(0.5, 1, (90, 2)) * (640, 480)
        starts = (np.array([640, 480]) - sides) * rng.uniform(0, 1, (90, 2))
        assert self.kinds(np.concatenate([starts, sides], axis=1)) == {}
        assert self.kinds([[0, 0, 640, 480]] * 90) == {}

    def test_boxes_for_images_of_another_size(self):
        boxes = sides_of(scattered(90, 10, 60, (1240, 900)))
        assert self.kinds(boxes) == {"degenerate-box": "error"}
        assert self.kinds([[500, 10, 300, 40]] * 30 + [[10, 400, 30, 40]] * 60) == {"boxes-outside": "warning"}
        assert self.kinds([[500, 10, 300, 40]] * 10 + [[10, 400, 30, 40]] * 80) == {}

    @pytest.mark.parametrize("box", [[np.nan] * 4, [700, 10, 5, 5], [10, 10, -5, 5]])
    @pytest.mark.parametrize(("good", "bad", "severity"), [(1, 99, "error"), (60, 30, "error"), (80, 10, "warning")])
    def test_boxes_that_cannot_be_learned(self, box, good, bad, severity):
        assert self.kinds([[10, 400, 30, 40]] * good + [box] * bad) == {"degenerate-box": severity}

    @pytest.mark.parametrize(
        ("twice", "severity"), [(0, None), (1, "note"), (7, "note"), (9, "warning"), (30, "warning")]
    )
    def test_objects_that_are_there_twice(self, twice, severity):
        """Of two exports that were joined every object is there twice: AP can't be above a half."""
        boxes = [[10.0 + i, 20, 30, 40 + i] for i in range(30)]
        found = [each for each in self.findings(boxes + boxes[:twice]) if each.kind == "duplicate-object"]
        assert [(each.severity, len(each.places)) for each in found] == ([(severity, twice)] if twice else [])
        crowds = np.ones(30 + twice, dtype=bool)
        assert not [x for x in self.findings(boxes + boxes[:twice], crowds=crowds) if x.kind == "duplicate-object"]

    @pytest.mark.parametrize(
        ("crowds", "kinds"), [(30, {"no-objects": "error", "crowd": "warning"}), (16, {"crowd": "warning"}), (15, {})]
    )
    def test_crowd_regions_of_most_or_all(self, crowds, kinds):
        """As of exports that mark every mask in run-length encoding: nothing would be learnt, without a word."""
        boxes = [[10.0 + i, 20, 30, 40 + i] for i in range(30)]
        assert self.kinds(boxes, crowds=np.arange(30) < crowds) == kinds

    def test_objects_that_are_all_left_out_of_training(self):
        boxes = [[10.0 + i, 20, 0.5, 40] for i in range(5)]
        assert self.kinds(boxes) == {"no-objects": "error"}
        assert self.kinds([*boxes, [1, 2, 30, 40]]) == {}
        areas = np.array([-1.0, -1, -1, -1, 20])
        assert self.kinds([[10.0 + i, 20, 30, 40] for i in range(5)], areas=areas) == {}
        assert self.kinds([[10.0 + i, 20, 30, 40] for i in range(5)], ignored=frozenset(range(5))) == {
            "no-objects": "error"
        }

    def test_fractions(self):
        assert self.kinds([[0.1, 0.2, 0.3, 0.4]] * 30 + [[10, 400, 30, 40]] * 60) == {"relative-boxes": "error"}

    @pytest.mark.parametrize(("count", "crowds", "told"), [(100, 0, False), (101, 0, True), (101, 1, False)])
    def test_more_objects_than_ap_counts(self, count, crowds, told):
        boxes, crowd = [[10, 400, 30, 40]] * count, np.arange(count) < crowds
        assert self.kinds(boxes, crowds=crowd) == ({"many-objects": "warning"} if told else {})


class TestRotatedBoxes:
    @pytest.mark.parametrize(
        "changes",
        [
            {"attributes": {"occluded": False, "rotation": 90.0}},  # CVAT
            {"attributes": [{"name": "rotation", "value": "90.0"}]},
            {"rotation": 90},  # Label Studio
            {"angle": 90.0},
            {"theta": "90"},
            {"attributes": {"Rotation": 90.0}},
            {"ANGLE": 90},
        ],
    )
    def test_are_named(self, folder, changes):
        number = folder.box((10, 20, 40, 4), **changes)
        finding = folder.findings()["rotated-box"]
        assert finding.severity == "warning"
        assert finding.places == (("good.jpg", number, "rotation 90"),)
        assert load_coco(*folder.paths()).report.ok

    @pytest.mark.parametrize("value", [0, 0.0, 180, -360.0, None, "", "left", True, [90], {}, float("nan"), 10**400])
    def test_boxes_that_lie_as_they_are_written(self, folder, value):
        folder.box(rotation=value, attributes={"rotation": value})
        folder.box(attributes=value)
        assert "rotated-box" not in folder.findings()


class TestReport:
    def test_lists_all_faults_at_once(self, folder):
        """A fault of the file's structure hides neither its like nor those of categories, images and boxes."""
        folder.add("zero.jpg", content=b"")
        folder.add("gone.jpg")
        folder.box(category_id="1")
        folder.box(id=None)
        folder.box(image_id=99)
        folder.box((0, 0, -1, 5))
        folder.annotations.append("text")
        folder.images += [None, {"id": "9", "file_name": "a"}, {"id": 9, "file_name": 5, "width": "60"}]
        folder.categories = [{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}, {"id": 7}]
        report = check_data(*folder.paths())
        structure = {finding.message for finding in report.findings if finding.kind == "json"}
        assert structure == {
            "an entry is not an object",
            "'id' is not an integer",
            "'category_id' is not an integer",
            "'file_name' is not a string",
            "'width' is not an integer",
        }
        kinds = {finding.kind for finding in report.findings}
        assert kinds >= {"broken-image", "missing-image", "category", "duplicate-category-id", "unknown-category"}
        assert kinds >= {"unknown-image", "degenerate-box"}
        with pytest.raises(DataError) as error:
            load_coco(*folder.paths())
        assert error.value.findings == tuple(f for f in report.findings if f.severity == "error")
        with pytest.raises(DataError, match="'category_id' is not an integer"):
            read_coco(folder.paths()[0])

    @pytest.mark.parametrize("key", ["annotations", "categories"])
    def test_a_missing_part_or_folder_hides_nothing_else(self, folder, key):
        folder.box((0, 0, 0, 0))
        annotations, images = folder.paths()
        content = json.loads(annotations.read_text())
        del content[key]
        annotations.write_text(json.dumps(content))
        kinds = {finding.kind for finding in check_data(annotations, images / "none").findings}
        assert kinds >= {"json", "image-folder", "no-objects" if key == "annotations" else "degenerate-box"}

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
        rng, loaded = np.random.default_rng(0), 0
        collator = DetectionCollator(DetectionImageProcessor(size={"height": 32, "width": 32}))
        for _ in range(60):
            content = json.loads(original)
            part = ("images", "annotations", "categories")[rng.integers(3)]
            entry = content[part][rng.integers(len(content[part]))]
            entry[list(entry)[rng.integers(len(entry))]] = odd[rng.integers(len(odd))]
            paths[0].write_text(json.dumps(content))
            report = check_data(*paths)
            assert str(report)
            if report.ok:
                labels = collator(list(load_coco(*paths).dataset))["labels"]
                assert all(label[key].isfinite().all() for label in labels for key in ("boxes", "area"))
                loaded += 1
            else:
                with pytest.raises(DataError):
                    load_coco(*paths)
        assert 5 < loaded < 55


MILLION = 10**6
MEASURE = """
import json, re, sys, time
from pathlib import Path
from crosskd_hf.data import check_data, load_coco

def peak():  # kB; `resource.getrusage` would begin with the peak of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

start, imports = time.perf_counter(), peak()
report = {"check": check_data, "load": lambda *paths: load_coco(*paths).report}[sys.argv[1]](*sys.argv[2:])
print(json.dumps([report.objects, len(report.dropped), time.perf_counter() - start, imports, peak()]))
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Paths of a json with a million annotations of 2,001 images, one in a thousand without width."""
    folder, rng = Folder(tmp_path_factory.mktemp("many")), np.random.default_rng(0)
    for number in range(2000):
        folder.add(f"{number:04d}.jpg", PIL.Image.new("RGB", SIZE))
    boxes = np.round(rng.uniform(1, 30, (MILLION, 4)), 2)
    boxes[::1000, 2] = 0
    images, categories = rng.integers(1, 2002, MILLION).tolist(), rng.integers(1, 3, MILLION).tolist()
    folder.annotations = [
        {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": 9.5, "iscrowd": 0}
        for number, (image, category, box) in enumerate(zip(images, categories, boxes.tolist(), strict=True), start=1)
    ]
    return folder.paths()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("what", ["check", "load"])
def test_a_million_annotations(many, what):
    command = [sys.executable, "-c", MEASURE, what, *map(str, many)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    objects, dropped, seconds, imports, peak = json.loads(done.stdout)
    megabytes = many[0].stat().st_size / 1e6
    figures = (what, megabytes, seconds, peak / 1e3, imports / 1e3)
    logger.warning("%s of %.0f MB: %.1f s, peak %.0f MB, of which imports %.0f MB", *figures)
    assert (objects, dropped) == (MILLION - 1000, 1000)
    assert (peak - imports) / 1e3 < 10 * megabytes


class TestRealData:
    def test_two_degenerate_boxes_of_bccd(self, request):
        root = request.config.rootpath.parent / "shared" / "data" / "bccd"
        if not root.is_dir():
            pytest.skip("the BCCD data set is not here")
        for split, annotation in (("train", 2288), ("val", 887)):
            data = load_coco(root / "coco" / f"instances_{split}.json", root / "JPEGImages")
            assert [place.annotation for place in data.report.dropped] == [annotation]
            assert data.categories.names == ("Platelets", "RBC", "WBC")
