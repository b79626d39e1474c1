"""What `predict` takes, images, patterns, addresses and videos, and the boxes that it writes."""

import functools
import http.server
import json
import os
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import PIL.Image
import pytest
import torch
from pycocotools.coco import COCO

from crosskd_hf.cli import main
from crosskd_hf.create import DetectorSpec, build_detector
from crosskd_hf.data.categories import CategoryMap
from crosskd_hf.data.images import open_image
from crosskd_hf.data.loading import load_detection_dataset
from crosskd_hf.inference.files import find_images, open_sources
from crosskd_hf.inference.predict import predict_to_folder
from crosskd_hf.inference.video import VideoWriter, read_frames
from crosskd_hf.inference.web import download
from crosskd_hf.models import DetectionImageProcessor, GFLForObjectDetection
from tests.pictures import noise
from tests.tiny_formats import picture

Output = pytest.CaptureFixture[str]
SIZE = 64, 48


@pytest.fixture(scope="module")
def detector() -> tuple[GFLForObjectDetection, DetectionImageProcessor]:
    """Untrained, but it finds something."""
    torch.manual_seed(0)
    model = build_detector(DetectorSpec("gfl", "test_resnet", width=32), CategoryMap((3, 7), ("cat", "dog")))
    torch.nn.init.zeros_(model.head.classifier.bias)
    return model, DetectionImageProcessor(size={"height": 64, "width": 64}, max_detections=5)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for number, name in enumerate(("a.png", "b.JPG", "deep/a.png", "deep/er/c.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise(SIZE, 40 + number, number).convert("RGB").save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def names(sources: list[object]) -> list[str]:
    with open_sources([source if isinstance(source, str) else str(source) for source in sources]) as files:
        return [files.name_of(path).as_posix() for path in files.files]


class TestSources:
    def test_patterns(self, photos: Path) -> None:
        assert names([photos / "*.png"]) == ["a.png"]
        assert names([photos / "*"]) == ["a.png", "b.JPG", "deep/a.png", "deep/er/c.png"]
        assert names([photos / "**/*.png"]) == ["a.png", "deep/a.png", "deep/er/c.png"]
        assert names([photos / "**"]) == ["a.png", "b.JPG", "deep/a.png", "deep/er/c.png"]
        assert names([photos / "deep" / "[ab].png"]) == ["a.png"]
        assert find_images(photos / "*").others == 1
        with pytest.raises(FileNotFoundError, match=r"No file is called .*\*\.gif"):
            find_images(photos / "*.gif")
        with pytest.raises(FileNotFoundError, match=r"1 files are called .*none of them is an image"):
            find_images(photos / "*.txt")

    def test_links_to_folders_are_followed(self, tmp_path: Path) -> None:
        for name in ("elsewhere/a.jpg", "in/b.jpg", "in/.c.jpg"):
            picture(tmp_path / name)
        (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in")
        found = find_images(tmp_path / "in")
        assert [found.name_of(path).as_posix() for path in found.files] == ["b.jpg", "link/a.jpg"]
        assert found.skipped == "1 hidden files skipped"

    def test_a_file_whose_name_looks_like_a_pattern(self, photos: Path) -> None:
        (photos / "a.png").rename(photos / "a[1].png")
        assert names([photos / "a[1].png"]) == ["a[1].png"]

    def test_several(self, photos: Path) -> None:
        """Names are relative to the folder that all lie in; what is named twice is seen once."""
        given = [photos / "deep" / "a.png", photos / "a.png", photos / "deep"]
        assert names(given) == ["deep/a.png", "a.png", "deep/er/c.png"]
        with pytest.raises(FileNotFoundError, match="nowhere is no image"):
            names([photos, photos / "nowhere"])

    def test_results_of_before_are_left_out(self, photos: Path) -> None:
        assert len(find_images(photos / "**", without=photos / "deep").files) == 2


@pytest.fixture
def server(photos: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    (photos / "page.html").write_text("<html></html>")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=photos)) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


class TestAddresses:
    def test_are_downloaded(self, server: str, photos: Path) -> None:
        with open_sources([f"{server}/deep/a.png?size=1"]) as files:
            (path,) = files.files
            assert path.read_bytes() == (photos / "deep/a.png").read_bytes()
            assert files.name_of(path) == Path("a.png")
        assert not path.exists()

    def test_two_of_one_name(self, server: str, photos: Path) -> None:
        given = [f"{server}/a.png", f"{server}/deep/a.png"]
        assert names(given) == ["127.0.0.1/a.png", "127.0.0.1-1/a.png"]
        assert names([photos / "deep", *given]) == ["a.png", "er/c.png", "127.0.0.1-1/a.png", "127.0.0.1-2/a.png"]

    def test_faults_name_the_address(self, server: str, tmp_path: Path) -> None:
        with pytest.raises(OSError, match=r"/nothing\.png can't be read: 404"):
            download(f"{server}/nothing.png", tmp_path / "one")
        with pytest.raises(OSError, match=r"page\.html can't be read: it is a page"):
            download(f"{server}/page.html", tmp_path / "two")

    def test_nothing_else_is_taken_for_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("crosskd_hf.inference.files.download", lambda *_: pytest.fail("a download"))
        for source in ("example.com/a.png", "ftp://example.com/a.png", "file:///etc/passwd"):
            with pytest.raises(FileNotFoundError):
                names([source])


class TestVideo:
    @pytest.fixture
    def clip(self, tmp_path: Path) -> Path:
        """Three frames at 10 a second, of odd sides."""
        pytest.importorskip("av")
        path = tmp_path / "clip.MP4"
        with VideoWriter(path, Fraction(10)) as writer:
            for grey in (0, 100, 200):
                writer.write(PIL.Image.new("RGB", (65, 47), (grey, grey, grey)))
        return path

    def test_frames(self, clip: Path) -> None:
        frames = list(read_frames(clip))
        assert [frame.time for frame in frames] == pytest.approx([0, 0.1, 0.2])
        assert [frame.image.getpixel((10, 10))[0] for frame in frames] == pytest.approx([0, 100, 200], abs=4)
        assert (frames[0].rate, frames[0].image.size) == (10, (66, 48))

    def test_is_predicted_frame_by_frame(self, clip: Path, tmp_path: Path, detector: tuple) -> None:
        records = predict_to_folder(*detector, clip, tmp_path / "out", 0.0, ["coco", "csv"])
        assert [(record["file"], record["frame"], record["time"]) for record in records] == [
            ("clip.MP4", number, number / 10) for number in range(3)
        ]
        assert all(record["detections"] for record in records)
        drawn = list(read_frames(tmp_path / "out" / "clip.MP4.mp4"))
        assert len(drawn) == 3
        assert drawn[0].image.width * 48 == drawn[0].image.height * 66
        content = json.loads((tmp_path / "out" / "coco.json").read_text())
        assert [image["file_name"] for image in content["images"]][1:] == [
            "clip.MP4/000001.png", "clip.MP4/000002.png",
        ]  # fmt: skip

    def test_broken_and_disguised_files(self, clip: Path, tmp_path: Path, detector: tuple) -> None:
        """A playlist with the name of a video would have FFmpeg open what it lists."""
        playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{clip}\n#EXT-X-ENDLIST\n"
        for name, content in (("empty.mp4", ""), ("list.mp4", playlist), ("list2.avi", f"ffconcat version 1.0\n"
                              f"file {clip}\n")):  # fmt: skip
            (tmp_path / name).write_text(content)
            (record,) = predict_to_folder(*detector, tmp_path / name, tmp_path / "out")
            assert record["file"] == name
            assert f"{name} can't be decoded" in record["error"]

    def test_without_pyav(self, photos: Path, tmp_path: Path, detector: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
        """Images are predicted nevertheless."""
        (photos / "c.mov").write_bytes(b"")
        monkeypatch.setitem(__import__("sys").modules, "av", None)
        records = predict_to_folder(*detector, photos, tmp_path / "out")
        assert "pip install 'crosskd_hf[video]'" in {r["file"]: r.get("error", "") for r in records}["c.mov"]
        assert sum("detections" in record for record in records) == 4


class TestBoxFiles:
    def test_all_formats_hold_the_same_boxes(self, photos: Path, tmp_path: Path, detector: tuple) -> None:
        """Written, and read again as data sets: the same boxes and classes."""
        out = tmp_path / "out"
        records = predict_to_folder(*detector, photos, out, 0.0, ["coco", "yolo", "csv"])
        assert sum(len(record["detections"]) for record in records) >= 8
        truth = COCO(str(out / "coco.json"))
        assert truth.loadRes(truth.dataset["annotations"]).dataset["annotations"]
        assert [entry["id"] for entry in truth.dataset["categories"]] == [3, 7]
        expected = sorted(
            (record["file"], found["label"], *found["box"]) for record in records for found in record["detections"]
        )
        for name, source in (("coco", "coco.json"), ("csv", "boxes.csv"), ("yolo", "data.yaml")):
            rows = sorted(_objects(name, out / source, photos, tmp_path / name))
            assert [row[:2] for row in rows] == [row[:2] for row in expected], name
            boxes, wanted = torch.tensor([r[2:] for r in rows]), torch.tensor([r[2:] for r in expected])
            assert torch.allclose(boxes, wanted, atol=1e-3), name

    def test_a_file_whose_name_is_in_no_encoding(self, tmp_path: Path, detector: tuple) -> None:
        name = os.fsdecode(b"caf\xe9.jpg")
        picture(tmp_path / "in" / name)
        (record,) = predict_to_folder(*detector, tmp_path / "in", tmp_path / "out", 0.0, ["coco", "yolo", "csv"])
        assert len(record["detections"]) > 0
        assert b"caf\xe9.jpg," in (tmp_path / "out" / "boxes.csv").read_bytes()
        assert (tmp_path / "out" / "labels" / os.fsdecode(b"caf\xe9.txt")).is_file()

    def test_a_file_of_an_image_without_objects(self, photos: Path, tmp_path: Path, detector: tuple) -> None:
        predict_to_folder(*detector, photos / "a.png", tmp_path / "out", 0.999, ["yolo", "coco"])
        assert (tmp_path / "out" / "labels" / "a.txt").read_text() == ""
        content = json.loads((tmp_path / "out" / "coco.json").read_text())
        assert (len(content["images"]), content["annotations"]) == (1, [])

    def test_two_images_of_one_label_file(self, photos: Path, tmp_path: Path, detector: tuple) -> None:
        PIL.Image.new("RGB", SIZE).save(photos / "a.jpg")
        with pytest.raises(ValueError, match=r"would share the label file a\.txt"):
            predict_to_folder(*detector, photos, tmp_path / "out", formats=["yolo"])
        assert not (tmp_path / "out").exists()

    def test_unknown_format(self, photos: Path, tmp_path: Path, detector: tuple, capsys: Output) -> None:
        detector[0].save_pretrained(tmp_path / "model")
        detector[1].save_pretrained(tmp_path / "model")
        words = "predict", str(tmp_path / "model"), str(photos / "*.png"), str(photos / "deep"), "--device", "cpu"
        assert main([*words, "--out", str(tmp_path / "out"), "--format", "voc"]) == 1
        assert "can't be written as voc; choose of coco, yolo, csv" in capsys.readouterr().err
        assert main([*words, "--out", str(tmp_path / "out"), "--format", "csv"]) == 0
        assert "objects in 3 images" in capsys.readouterr().out


def _objects(name: str, source: Path, photos: Path, folder: Path) -> Iterator[tuple]:
    """What was written, put where data sets have it and read by this package: photo, class and corners."""
    known = {}
    for path in (path for path in photos.rglob("*") if path.suffix.lower() in (".png", ".jpg")):
        target = folder / ("images" if name == "yolo" else "") / path.relative_to(photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, target)
        known[open_image(path).tobytes()] = str(path.relative_to(photos))
    (folder / source.name).write_bytes(source.read_bytes())
    if name == "yolo":
        (source.parent / "labels").rename(folder / "labels")
    for data in load_detection_dataset(folder).values():
        for row in data.dataset:
            photo, objects = known[row["image"].tobytes()], row["objects"]
            for (x, y, width, height), label in zip(objects["bbox"], objects["category"], strict=True):
                yield photo, data.categories.names[label], x, y, x + width, y + height
