"""YOLO: a .txt for each image, a line for each object, and `data.yaml`. Ultralytics, Roboflow and Darknet write it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from ..report import DataError, Finding
from .faults import Faults
from .folder import IMAGE_SUFFIXES, SPLITS, Folder, demand_text, encoding_of, read_text, split_of
from .raw import Box, FileSplit, RawSplit, Reading, ReadOptions, SplitBuilder, as_place, builders_by_split

_BEYOND = 0.1  # of the image's side; boxes may leave their image a little
_MANY = 20  # images; of fewer, most may be empty
_NAME_FILES = ("classes.txt", "obj.names", "labels.txt", "names.txt", "_darknet.labels")  # the last of Roboflow
_IMAGE_FOLDERS = ("images", "jpegimages", "img", "imgs")
_FIXES = {
    "unknown-category": "add the class to `names` of data.yaml, or correct the number that the line begins with",
    "relative-boxes": "nothing",
    "broken-image": "replace the image, or remove it and its .txt",
    "no-objects": "add objects to the label files",
}
_QUIET = frozenset({"size-missing", "area-missing", "category-ids"})


@dataclass(frozen=True)
class _Yaml:
    """What data.yaml says.

    Args:
        file: the file; None if there is none.
        names: number of each class -> its name.
        splits: split -> folders, lists or patterns of images.
        keypoints: numbers of a line behind its box.
    """

    file: Path | None
    names: dict[int, str]
    splits: dict[str, list[str]]
    base: str = ""
    keypoints: int = 0


class Yolo:
    """See the module."""

    name = "yolo"
    layout = "data.yaml with `names`, `train` and `val`; images/train/*.jpg and labels/train/*.txt"
    options: frozenset[str] = frozenset()

    def seen(self, folder: Folder) -> str:
        """A data.yaml, or label files of images."""
        for name in _yamls(folder):
            return f"{name} with names or splits"
        labels = [name for name in _label_files(folder)[:50] if _looks_like_labels(folder.path(name))]
        return f"label files, such as {labels[0]}" if labels else ""

    def read(self, folder: Folder, options: ReadOptions) -> Reading:
        """Read all images that data.yaml names, or all of the folder, and their label files."""
        faults = Faults()
        settings, used = _settings(folder, faults), set()
        labels = _Labels(folder)
        builders = builders_by_split()
        alone = _is_alone(folder, settings)
        for split, image, place in _images(folder, settings, faults):
            builder = builders[split]
            if image is None:
                builder.faults.add("missing-image", place)
                continue
            row = builder.image(_relative(image, folder.root), image)
            label = labels.of(image)
            alone = alone and _inside(label or image.parent, folder.root)  # its label may come to lie beside its folder
            if label is None:
                builder.faults.add("no-label-file", as_place(_relative(image, folder.root)))
            else:
                used.add(label.resolve())
                _read_labels(builder, row, label, folder.root, settings)
        _check_orphans(folder, used, faults)
        return Reading(_build(builders, settings, faults), [_told(settings, builders)], alone)


def _is_alone(folder: Folder, settings: _Yaml) -> bool:
    """Whether neither lists nor labels are looked for outside of the folder."""
    bases = [folder.root] if settings.file is None else [settings.file.parent / settings.base, folder.root]
    named = [_existing(entry, bases) for entries in settings.splits.values() for entry in entries]
    below_images = any(part.lower() in _IMAGE_FOLDERS for part in folder.root.absolute().parts)
    return not below_images and all(path is not None and _inside(path, folder.root) for path in named)


def _inside(path: Path, root: Path) -> bool:
    """Whether a path lies below a folder, and is another one."""
    return os.path.abspath(path).startswith(os.path.join(os.path.abspath(root), ""))


def _told(settings: _Yaml, builders: Mapping[str, SplitBuilder]) -> str:
    if settings.splits and settings.file is not None:
        return f"splits of {settings.file.name}"
    return "splits by folder" if set(builders) - {"all"} else "no splits"


def _build(builders: Mapping[str, SplitBuilder], settings: _Yaml, faults: Faults) -> dict[str, RawSplit]:
    names = dict(settings.names)
    if not names:
        numbers = {int(str(number)) for builder in builders.values() for number in builder.classes}
        names = {number: str(number) for number in sorted(numbers)}
        faults.add("no-class-names", as_place("data.yaml"))
    categories = [{"id": number, "name": name} for number, name in sorted(names.items())]
    raw_ids: dict[Any, int] = {str(number): number for number in names}
    splits: dict[str, RawSplit] = {}
    for split, builder in builders.items():
        known = raw_ids | {str(number): int(str(number)) for number in builder.classes}
        built: FileSplit = builder.build(known, categories, fractions=True, quiet=_QUIET, fixes=_FIXES)
        built.findings = _by_share(built.findings, split, built.table.file_names)
        splits[split] = built
    if splits:
        first = next(iter(splits.values()))
        first.findings = [*faults.findings(), *first.findings]
    elif faults.findings():
        raise DataError(faults.findings())
    return splits


def _by_share(findings: Sequence[Finding], split: str, images: Sequence[str]) -> list[Finding]:
    """Images without a label file: a note, unless they are most, or all."""
    without = next((finding for finding in findings if finding.kind == "no-label-file"), None)
    if without is None or 2 * len(without.places) <= len(images):
        return list(findings)
    own = Faults()
    if len(without.places) == len(images):
        own.add("no-labels", as_place(split, detail=f"{len(images)} images, such as {images[0]}"))
        return own.findings()
    if len(images) < _MANY:
        return list(findings)
    message = f"{len(without.places):,} of {len(images):,} images have no label file: they are taken as empty"
    fix = "if they have objects, call their label files as the images; an empty .txt says that there are none"
    told = replace(without, severity="warning", message=message, fix=fix)
    return [told if finding is without else finding for finding in findings]


# ---- data.yaml ----


def _yamls(folder: Folder) -> list[str]:
    """Yaml files with classes or splits; those nearest to the root first."""
    found = []
    for name in folder.files(".yaml", ".yml"):
        text = read_text(folder.path(name))
        keys = set(re.findall(r"^(names|train|val|nc)\s*:", text, re.MULTILINE))
        if "names" in keys or {"train", "val"} <= keys:
            found.append(name)
    return sorted(found, key=lambda name: (len(PurePosixPath(name).parts), PurePosixPath(name).stem != "data", name))


def _settings(folder: Folder, faults: Faults) -> _Yaml:
    name = _chosen(_yamls(folder))
    if name is None:
        return _Yaml(None, _names_of_file(folder), {})
    path = folder.path(name)
    try:
        text = path.read_text(encoding=encoding_of(path))
        content = yaml.load(text, Loader=yaml.BaseLoader)  # texts alone: a class may be called `no`
    except (yaml.YAMLError, UnicodeError) as error:
        mark = getattr(error, "problem_mark", None)
        faults.add("yolo-yaml", as_place(name, None if mark is None else mark.line + 1, str(error).split("\n")[0]))
        raise DataError(faults.findings()) from error
    if not isinstance(content, dict):
        faults.add("yolo-yaml", as_place(name, 1, f"it holds a {type(content).__name__}"))
        raise DataError(faults.findings())
    return _of_yaml(path, name, content, faults, folder)


def _chosen(yamls: Sequence[str]) -> str | None:
    """The one that counts: nearest to the root, and called data if there are others beside it."""
    if not yamls:
        return None
    first, *others = [PurePosixPath(name) for name in yamls]
    rivals = [other for other in others if len(other.parts) == len(first.parts)]
    if any(other.parent != first.parent for other in rivals) or (rivals and first.stem != "data"):
        places = tuple(as_place(str(path)) for path in (first, *rivals))
        fix = "give the path of one of them; or a list of several, which are joined by the names of their classes"
        raise DataError([Finding("error", "several-files", "several yaml files name classes or splits", fix, places)])
    return str(first)


def _of_yaml(path: Path, name: str, content: dict[str, Any], faults: Faults, folder: Folder) -> _Yaml:
    names = _class_names(content.get("names"), path)
    if names is None:
        faults.add("yolo-yaml", as_place(name, _line(path, "names"), f"names: {content['names']!r}"[:80]))
        raise DataError(faults.findings())
    others = {} if names else _names_of_file(folder)
    count = str(content.get("nc") or "")
    if not names and count.isdigit():
        names = others or {number: str(number) for number in range(int(count))}
    elif count and count != str(len(names)) and names:
        faults.add("class-count", as_place(name, _line(path, "nc"), f"nc {count}, {len(names)} names"))
    splits = {}
    for split, keys in {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}.items():
        given = next((content[key] for key in keys if content.get(key)), None)
        if given is not None:
            splits[split] = [str(entry) for entry in (given if isinstance(given, list) else [given])]
    shape = content.get("kpt_shape")
    keypoints = math.prod(map(int, shape)) if isinstance(shape, list) and all(map(str.isdigit, shape)) else 0
    return _Yaml(path, names or others, splits, str(content.get("path") or ""), keypoints)


def _class_names(given: Any, file: Path) -> dict[int, str] | None:
    """Number -> name; empty if nothing is given, None if it is of no known form, or a file that isn't there."""
    if not given:
        return {}
    if isinstance(given, str) and given.lower().endswith((".txt", ".names")):  # a file, as of Darknet
        listed = _existing(given, [file.parent, file.parent.parent])
        return None if listed is None else _lines(listed, listed.name)
    if isinstance(given, str):
        given = [part.strip() for part in given.strip("[]").split(",")]
    if isinstance(given, list):
        return {number: str(name).strip() for number, name in enumerate(given)}
    if isinstance(given, dict) and all(re.fullmatch(r"\d+", str(key).strip()) for key in given):
        return {int(key): str(name).strip() for key, name in given.items()}
    return None


def _names_of_file(folder: Folder) -> dict[int, str]:
    """Names of a file with one a line, if there is one, or several that say the same."""
    files = [
        name for name in folder.files(".txt", ".names", ".labels") if PurePosixPath(name).name.lower() in _NAME_FILES
    ]
    texts = {read_text(folder.path(name)).strip() for name in files}
    return _lines(folder.path(files[0]), files[0]) if len(texts) == 1 else {}


def _lines(path: Path, called: str) -> dict[int, str]:
    """Number -> name of a file with a name a line."""
    demand_text(path, called)
    return dict(enumerate(map(str.strip, read_text(path).strip().splitlines())))


def _line(path: Path, key: str) -> int | None:
    lines = read_text(path).splitlines()
    return next((number for number, line in enumerate(lines, 1) if line.startswith(key)), None)


# ---- Images ----


def _images(folder: Folder, settings: _Yaml, faults: Faults) -> Iterator[tuple[str, Path | None, Any]]:
    """(split, image, place); of images that are not there None and where they are named."""
    if settings.file is None or not settings.splits:
        lists = _darknet_lists(folder)
        if lists:
            for split, path in lists:
                yield from _of_entry(split, path, folder, [path.parent, folder.root])
            return
        for name in folder.images:
            yield split_of(str(PurePosixPath(name).parent)) or "all", folder.path(name), None
        return
    home = settings.file.parent
    bases = [home / settings.base, home, folder.root] if settings.base else [home, folder.root]
    named = [(split, entry) for split in SPLITS for entry in settings.splits.get(split, ())]
    for split, entry in named:
        found = _existing(entry, bases)
        if found is None:
            detail = f"{split}: {entry}, looked for in {', '.join(dict.fromkeys(map(str, bases)))}"
            place = as_place(_relative(settings.file, folder.root), _line(settings.file, split), detail)
            faults.add("yolo-split" if split == "test" else "yolo-path", place)
        else:
            if _is_absolute(entry) and not Path(entry).exists():
                detail = f"{split}: {entry}, read {_relative(found, folder.root)}"
                place = as_place(_relative(settings.file, folder.root), _line(settings.file, split), detail)
                faults.add("yolo-elsewhere", place)
            yield from _of_entry(split, found, folder, bases)


def _existing(entry: str, bases: list[Path]) -> Path | None:
    """A split's folder or list, below one of some folders; Roboflow writes `../train/images` for `train/images`.

    Of an absolute path that isn't there, written on another machine, the end is looked for: the longest first.
    """
    inner = re.sub(r"^(\.\.?/)+", "", entry.replace("\\", "/"))
    candidates = [Path(entry), *(base / name for base in bases for name in (entry.replace("\\", "/"), inner))]
    if not Path(entry).is_absolute():
        candidates = candidates[1:]
    if _is_absolute(entry):
        parts = PurePosixPath(inner).parts
        candidates += [base / PurePosixPath(*parts[start:]) for start in range(1, len(parts)) for base in bases]
    return next((path for path in candidates if path.exists()), None)


def _is_absolute(entry: str) -> bool:
    """Whether a path begins at a root, of Windows too."""
    return re.match(r"/|[A-Za-z]:/", entry.replace("\\", "/")) is not None


def _of_entry(split: str, path: Path, folder: Folder, bases: list[Path]) -> Iterator[tuple[str, Path | None, Any]]:
    if path.is_dir():
        for name in Folder(path).images:
            yield split, path / name, None
    elif path.suffix.lower() in IMAGE_SUFFIXES:
        yield split, path, None
    else:
        text = read_text(path)
        for line, name in enumerate(map(str.strip, text.splitlines()), 1):
            if name:
                image = _existing(name, [path.parent, *bases])
                if image is None:
                    found, _ = folder.locate(name, str(PurePosixPath(_relative(path.parent, folder.root))))
                    image = None if found is None else folder.path(found)
                yield split, image, as_place(_relative(path, folder.root), line, name)


def _darknet_lists(folder: Folder) -> list[tuple[str, Path]]:
    """train.txt, valid.txt, ... with paths of images."""
    found = []
    for name in folder.files(".txt"):
        stem = PurePosixPath(name).stem.lower()
        if stem not in ("train", "val", "valid", "validation", "test"):
            continue
        with folder.path(name).open(encoding=encoding_of(folder.path(name)), errors="replace") as file:
            first = file.readline().strip()
        if PurePosixPath(first).suffix.lower() in IMAGE_SUFFIXES:
            found.append((split_of(stem) or "all", folder.path(name)))
    return sorted(found, key=lambda pair: SPLITS.index(pair[0])) if any(s == "train" for s, _ in found) else []


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


# ---- Labels ----


class _Labels:
    """Finds the label files of images."""

    def __init__(self, folder: Folder):
        self.folder = folder
        self._by_stem: dict[str, list[str]] = {}
        for name in _label_files(folder):
            self._by_stem.setdefault(PurePosixPath(name).stem, []).append(name)

    def of(self, image: Path) -> Path | None:
        """That in the usual place; otherwise the only one of its name, if that is of no other split."""
        usual = _label_of(image, self.folder.root)
        if usual is not None:
            return usual
        split = split_of(str(PurePosixPath(_relative(image, self.folder.root)).parent))
        names = self._by_stem.get(image.stem, [])
        names = [name for name in names if split_of(str(PurePosixPath(name).parent)) in (None, split)]
        paths = [path for path in map(self.folder.path, names) if _looks_like_labels(path)]
        return paths[0] if len(paths) == 1 else None


def _label_of(image: Path, root: Path) -> Path | None:
    """The label file of an image: below `labels` where the image is below `images`, or beside the image."""
    parts = image.parts
    spots = [spot for spot in range(len(parts) - 1) if parts[spot].lower() in _IMAGE_FOLDERS]
    names = ("labels", "Labels")
    candidates = [Path(*parts[:spot], name, *parts[spot + 1 :]) for spot in reversed(spots) for name in names]
    candidates += [image, image.parent / "labels" / image.name, image.parent.parent / "labels" / image.name]
    below = image.relative_to(root) if image.is_relative_to(root) else Path(image.name)
    candidates += [root / "labels" / below, root / "labels" / image.name]
    return next((label for path in candidates if (label := path.with_suffix(".txt")).is_file()), None)


def _label_files(folder: Folder) -> list[str]:
    """The .txt files that may hold labels: named like an image, or below `labels`."""
    stems = {PurePosixPath(name).stem for name in folder.images}
    files = [PurePosixPath(name) for name in folder.files(".txt") if PurePosixPath(name).name not in _NAME_FILES]
    return [str(path) for path in files if path.stem in stems or "labels" in path.parts[:-1]]


def _looks_like_labels(path: Path) -> bool:
    with path.open(encoding=encoding_of(path), errors="replace") as file:
        words = file.readline().replace(",", " ").split()
    return len(words) >= 5 and all(math.isfinite(_float(word)) for word in words[1:])


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _check_orphans(folder: Folder, used: set[Path], faults: Faults) -> None:
    """Label files that belong to no image."""
    for name in _label_files(folder):
        path = folder.path(name)
        inside = "labels" in PurePosixPath(name).parts[:-1]
        if inside and path.resolve() not in used and _looks_like_labels(path) and not _is_of_an_image(folder, name):
            faults.add("label-without-image", as_place(name))


def _is_of_an_image(folder: Folder, label: str) -> bool:
    """Whether an image that no split names has this label file."""
    path = PurePosixPath(label)
    return folder.locate(path.stem, str(path.parent), split_of(str(path.parent)))[0] is not None


def _read_labels(builder: SplitBuilder, row: int, label: Path, root: Path, settings: _Yaml) -> None:
    name = _relative(label, root)
    text = read_text(label)
    for line, words in enumerate(map(str.split, text.splitlines()), 1):
        if not words:
            continue
        numbers = [_float(word) for word in words]
        place = as_place(name, line, " ".join(words)[:60])
        shape = _shape_of(numbers, settings.keypoints)
        if shape == "yolo-line":
            builder.faults.add("yolo-line", place)
            continue
        box = _polygon_box(numbers[1:]) if shape == "polygon" else _centre_box(numbers[1:5])
        if shape:
            builder.faults.add(shape, as_place(name, line))
        if any(not -_BEYOND <= value <= 1 + _BEYOND for value in numbers[1:5]):
            builder.faults.add("yolo-pixels", place)
            continue
        builder.add(row, str(int(numbers[0])), box, f"{name}:{line}")


def _shape_of(numbers: list[float], keypoints: int) -> str:
    """ "" for a box, "extra-column" for a box and a number more, "polygon", or "yolo-line": none of them."""
    class_number = numbers[0]
    if not (all(map(math.isfinite, numbers)) and 0 <= class_number < 2**31 and class_number == int(class_number)):
        return "yolo-line"
    if len(numbers) == 5 or (keypoints and len(numbers) == 5 + keypoints):
        return ""
    if len(numbers) == 6:
        return "extra-column"
    return "polygon" if len(numbers) >= 7 and len(numbers) % 2 else "yolo-line"


def _centre_box(values: list[float]) -> Box:
    x, y, width, height = values
    return x - width / 2, y - height / 2, width, height


def _polygon_box(values: list[float]) -> Box:
    xs, ys = values[::2], values[1::2]
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
