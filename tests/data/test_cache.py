"""What was checked once is not checked again until something changes."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import pytest

from crosskd_hf.data import DataError, cache, check_images, dataset, load_coco, load_detection_dataset, load_objects
from crosskd_hf.data.formats import FORMATS
from crosskd_hf.data.shapes import ShapesPaths, make_shapes


@pytest.fixture
def files(tmp_path: Path) -> ShapesPaths:
    return make_shapes(tmp_path / "shapes", num_train=6, num_val=2, size=48)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every image that is looked into from now on."""
    seen: list[str] = []
    probe = check_images.probe_image

    def noting(source: Any, *options: Any) -> Any:
        seen.append(str(source))
        return probe(source, *options)

    monkeypatch.setattr(check_images, "probe_image", noting)
    return seen


def load(files: ShapesPaths, **options: Any) -> Any:
    return load_coco(files.train_annotations, files.train_images, **options)


def test_the_second_start_reads_nothing_and_finds_the_same(
    files: ShapesPaths, looks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(files)
    assert len(looks) == 6
    monkeypatch.setattr(dataset, "inspect_coco", None)  # can't be called
    second = load(files)
    assert len(looks) == 6
    assert second.report == first.report
    assert second.categories == first.categories
    assert second.dataset.features == first.dataset.features
    for ours, theirs in zip(second.dataset, first.dataset, strict=True):
        assert ours["image"].tobytes() == theirs["image"].tobytes()
        assert {**ours, "image": None} == {**theirs, "image": None}
    assert second.dataset.cache_files
    load(files, decode=False)  # what was decoded is good for this, too
    assert len(looks) == 6


def touch(files: ShapesPaths) -> None:
    os.utime(files.train_images / "00002.png", ns=(1, 1))


def redraw(files: ShapesPaths) -> None:
    PIL.Image.open(files.train_images / "00001.png").rotate(180).save(files.train_images / "00001.png")


def edit(files: ShapesPaths) -> None:
    content = json.loads(files.train_annotations.read_text())
    content["annotations"].pop()
    files.train_annotations.write_text(json.dumps(content))


@pytest.mark.parametrize(("change", "again"), [(touch, 6), (redraw, 6), (edit, 0)])
def test_a_change_is_seen(files: ShapesPaths, looks: list[str], change: Any, again: int) -> None:
    before = load(files)
    looks.clear()
    change(files)
    after = load(files)
    assert len(looks) == again  # an edited json leaves the images as they were checked
    assert after.report.objects == before.report.objects - (change is edit)
    looks.clear()
    assert load(files).report == after.report
    assert looks == []


def test_a_removed_and_a_broken_image_are_found(files: ShapesPaths) -> None:
    load(files)
    image = files.train_images / "00003.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:100])
    with pytest.raises(DataError, match="broken-image"):
        load(files)
    image.unlink()
    with pytest.raises(DataError, match="missing-image"):
        load(files)
    image.write_bytes(whole)
    assert load(files).report.images == 6


def test_what_was_not_decoded_is_decoded_when_that_is_wanted(files: ShapesPaths, looks: list[str]) -> None:
    load(files, decode=False)
    load(files, decode=False)
    assert len(looks) == 6
    load(files)
    assert len(looks) == 12


def test_classes_of_another_split_are_another_entry(files: ShapesPaths) -> None:
    train = load(files)
    turned = dataset.CategoryMap(train.categories.raw_ids[::-1], train.categories.names[::-1])
    assert load(files, categories=turned).categories == turned
    assert load(files).categories == train.categories


def test_a_damaged_entry_is_made_anew(files: ShapesPaths) -> None:
    first = load(files)
    for path in cache.cache_folder().glob("*.arrow"):
        path.write_bytes(b"nothing")
    for path in cache.cache_folder().glob("*.json"):
        path.write_text("{")
    assert load(files).report == first.report


def test_a_cache_that_cannot_be_written_is_done_without(
    files: ShapesPaths, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache, "cache_folder", lambda: files.train_annotations / "no folder")
    assert load(files).report.images == 6
    assert any("can't be kept for the next start" in message for message in caplog.messages)


def test_a_moved_data_set_is_another_one(files: ShapesPaths, tmp_path: Path) -> None:
    load(files)
    shutil.move(tmp_path / "shapes", tmp_path / "moved")
    moved = ShapesPaths.below(tmp_path / "moved")
    assert (
        str(tmp_path / "moved")
        in load(moved).dataset.cast_column("image", dataset.FramedImage(decode=False))[0]["image"]["path"]
    )


def test_images_of_any_format_are_decoded_once(files: ShapesPaths, looks: list[str], tmp_path: Path) -> None:
    first = load_detection_dataset(tmp_path / "shapes")
    assert len(looks) == 8
    second = load_detection_dataset(tmp_path / "shapes")
    assert len(looks) == 8
    assert second.train.report == first.train.report


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every folder that is read from now on, by the name of its format."""
    seen: list[str] = []
    for known in FORMATS.values():

        def noting(folder: Any, options: Any, known: Any = known, read: Any = known.read) -> Any:
            seen.append(known.name)
            return read(folder, options)

        monkeypatch.setattr(known, "read", noting)
    return seen


def as_coco(files: ShapesPaths, folder: Path) -> None:
    shutil.copytree(files.train_annotations.parents[1], folder)


def as_voc(files: ShapesPaths, folder: Path) -> None:
    _each_image(files, folder, lambda name, box, label: (
        folder / f"{name}.xml",
        f"<annotation><filename>{name}.png</filename>"
        f"<object><name>{label}</name><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[0] + box[2]}</xmax>"
        f"<ymax>{box[1] + box[3]}</ymax></bndbox></object></annotation>",
    ))  # fmt: skip


def as_yolo(files: ShapesPaths, folder: Path) -> None:
    _each_image(files, folder / "images", lambda name, box, label: (
        folder / "labels" / f"{name}.txt",
        f"0 {(box[0] + box[2] / 2) / 48} {(box[1] + box[3] / 2) / 48} {box[2] / 48} {box[3] / 48}",
    ))  # fmt: skip
    (folder / "data.yaml").write_text("names: [thing]\n")


def as_csv(files: ShapesPaths, folder: Path) -> None:
    rows = ["filename,xmin,ymin,xmax,ymax,class"]
    _each_image(files, folder, lambda name, box, label: rows.append(
        f"{name}.png,{box[0]},{box[1]},{box[0] + box[2]},{box[1] + box[3]},{label}"
    ))  # fmt: skip
    (folder / "boxes.csv").write_text("\n".join(rows))


def as_image_folder(files: ShapesPaths, folder: Path) -> None:
    rows: list[str] = []
    _each_image(files, folder, lambda name, box, label: rows.append(
        json.dumps({"file_name": f"{name}.png", "objects": {"bbox": [box], "category": [label]}})
    ))  # fmt: skip
    (folder / "metadata.jsonl").write_text("\n".join(rows))


def _each_image(files: ShapesPaths, folder: Path, make: Any) -> None:
    """Copy the training images, and write what `make` says of the first object of each: a path and a text."""
    shutil.copytree(files.train_images, folder)
    content = json.loads(files.train_annotations.read_text())
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    for image in content["images"]:
        first = next(entry for entry in content["annotations"] if entry["image_id"] == image["id"])
        made = make(Path(image["file_name"]).stem, first["bbox"], names[first["category_id"]])
        if made is not None:
            made[0].parent.mkdir(exist_ok=True)
            made[0].write_text(made[1])


LAYOUTS = {"coco": as_coco, "voc": as_voc, "yolo": as_yolo, "csv": as_csv, "imagefolder": as_image_folder}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_second_start_reads_no_folder_of_any_format(
    name: str, files: ShapesPaths, reads: list[str], looks: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "kept" / "data"
    folder.parent.mkdir()
    LAYOUTS[name](files, folder)
    first = load_detection_dataset(folder)
    assert reads == [name]
    reads.clear()
    looks.clear()
    second = load_detection_dataset(folder)
    assert (reads, looks) == ([], [])
    assert str(second) == str(first)
    assert list(second) == list(first)
    for split, data in first.items():
        again = second[split]
        assert (again.report, again.categories) == (data.report, data.categories)
        assert again.dataset.features == data.dataset.features
        assert again.dataset.cache_files
        for ours, theirs in zip(again.dataset, data.dataset, strict=True):
            assert ours["image"].tobytes() == theirs["image"].tobytes()
            assert {**ours, "image": None} == {**theirs, "image": None}
    load_detection_dataset(folder, decode=False)
    assert (reads, looks) == ([], [])
    load_detection_dataset([folder, folder], seed=1)
    assert reads == [name, name]  # another split


def test_images_of_a_saved_data_set_are_decoded_once(files: ShapesPaths, looks: list[str], tmp_path: Path) -> None:
    data = load(files).dataset.cast_column("image", datasets.Image())
    stored = [{"bytes": path.read_bytes(), "path": None} for path in sorted(files.train_images.iterdir())]
    image = datasets.Dataset.from_dict({"image": stored}, features=datasets.Features({"image": datasets.Image()}))
    whole = datasets.concatenate_datasets([image, data.remove_columns("image")], axis=1)
    whole.save_to_disk(tmp_path / "saved")
    looks.clear()
    first = load_detection_dataset(tmp_path / "saved")
    assert len(looks) == 6
    assert "split-overlap" not in str(first)  # its rows are those of the whole, of which each is in one split
    second = load_detection_dataset(tmp_path / "saved")
    assert len(looks) == 6
    assert str(second) == str(first)
    load_detection_dataset(tmp_path / "saved", seed=5)  # other images of each split
    assert len(looks) == 12
    whole.select([5, 4, 3, 2, 1, 0]).save_to_disk(tmp_path / "turned")
    shutil.rmtree(tmp_path / "saved")
    shutil.move(tmp_path / "turned", tmp_path / "saved")
    load_detection_dataset(tmp_path / "saved")
    assert len(looks) == 18
    in_memory = datasets.Dataset.from_list(list(whole.cast_column("image", datasets.Image(decode=False))))
    for _ in range(2):  # it has no files that tell of a change
        load_objects(in_memory.cast_column("image", datasets.Image()))
    assert len(looks) == 30


def grow(folder: Path) -> None:
    shutil.copy(folder / "images" / "00001.png", folder / "images" / "00099.png")


def relabel(folder: Path) -> None:
    label = folder / "labels" / "00001.txt"
    before = label.stat()
    label.write_text(label.read_text().replace("0 ", "1 ", 1))
    os.utime(label, ns=(before.st_atime_ns, before.st_mtime_ns))  # as some tools do


def rename(folder: Path) -> None:
    (folder / "data.yaml").write_text("names: [thing, other]\n")


def unlabel(folder: Path) -> None:
    (folder / "labels" / "00001.txt").unlink()


@pytest.mark.parametrize("change", [grow, relabel, rename, unlabel])
def test_a_change_of_any_file_of_the_folder_is_seen(
    change: Any, files: ShapesPaths, reads: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    as_yolo(files, folder)
    (folder / "data.yaml").write_text("names: [thing, another]\n")
    before = load_detection_dataset(folder)
    change(folder)
    after = load_detection_dataset(folder)
    assert reads == ["yolo", "yolo"]
    assert str(after) + str(after.categories) + str([list(part.dataset["objects"]) for part in after.values()]) != (
        str(before) + str(before.categories) + str([list(part.dataset["objects"]) for part in before.values()])
    )
    load_detection_dataset(folder)
    assert reads == ["yolo", "yolo"]


def test_what_lies_elsewhere_is_read_again(files: ShapesPaths, reads: list[str], tmp_path: Path) -> None:
    as_yolo(files, tmp_path / "there")
    yaml, images = tmp_path / "here" / "settings" / "data.yaml", tmp_path / "there" / "images"
    yaml.parent.mkdir(parents=True)
    yaml.write_text(f"names: [thing]\ntrain: {images}\nval: {images}\n")
    for _ in range(2):
        assert load_detection_dataset(yaml).train.report.objects == 6
    assert reads == ["yolo", "yolo"]


def _looked(files: ShapesPaths, results: Any) -> None:
    seen: list[str] = []
    probe = check_images.probe_image
    check_images.probe_image = lambda source, *options: (seen.append(str(source)), probe(source, *options))[1]  # type: ignore[assignment]
    report = load(files).report
    results.put((len(seen), report.objects))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_of_two_processes_one_checks(files: ShapesPaths) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_looked, args=(files, results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert [looked for looked, _ in found] == [0, 6]
    assert found[0][1] == found[1][1]
