"""PASCAL VOC: an xml for each image, and lists of splits in `ImageSets`. LabelImg, CVAT and Roboflow write it too."""

from __future__ import annotations

import codecs
import math
import re
import xml.etree.ElementTree as ElementTree
import xml.parsers.expat as expat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .folder import Folder, demand_text, read_text, split_of
from .raw import Box, Reading, ReadOptions, SplitBuilder, as_place, build_named, builders_by_split, number, whole

_PASCAL = re.compile(r"(the )?(pascal )?voc ?20\d\d( database)?", re.IGNORECASE)
_ENCODING = re.compile(rb"\s*<\?xml[^>]*encoding\s*=\s*[\"']([\w.:-]+)")
_SETS = ("train", "val", "test", "trainval", "valid", "validation")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_FIXES = {
    "size-mismatch": "correct <size>; if the image was resized, scale the boxes too",
    "image-size": "write the image's own width and height into <size>",
    "unknown-category": "use the class names of the training split",
    "broken-image": "replace the image, or remove it and its xml",
}


class _Element(ElementTree.Element):
    line = 0


@dataclass(frozen=True)
class _Listed:
    """An xml of a split, or the name that a list gives where there is none, and the list's line."""

    split: str
    xml: str | None
    name: str
    place: str


class Voc:
    """See the module."""

    name = "voc"
    layout = "Annotations/*.xml and JPEGImages/*.jpg, splits in ImageSets/Main/*.txt; or xml files beside the images"
    options = frozenset({"one_based", "difficult"})

    def seen(self, folder: Folder) -> str:
        """An xml of an image."""
        for name in folder.files(".xml")[:20]:
            with folder.path(name).open("rb") as file:
                if b"<annotation" in file.read(4096).replace(b"\0", b""):  # of UTF-16
                    return f"{len(folder.files('.xml')):,} xml files, such as {name}"
        return ""

    def read(self, folder: Folder, options: ReadOptions) -> Reading:
        """Read every xml that a list names, or all of them if there is no list."""
        builders = builders_by_split()
        reader = _Reader(folder, options)
        listed, note = _listed(folder)
        for entry in listed:
            reader.read(builders[entry.split], entry)
        used = {entry.xml for entry in listed}
        first = next(iter(builders.values()), SplitBuilder())
        for name in folder.files(".xml"):
            if name not in used:
                first.faults.add("unlisted", as_place(name))
        for name in folder.images:
            if name not in reader.images:
                first.faults.add("unannotated", as_place(name))
        quiet = frozenset({"area-missing", "category-ids"})
        return Reading(build_named(builders, _class_list(folder), quiet=quiet, fixes=_FIXES), [note, *reader.notes()])


def _class_list(folder: Folder) -> list[str]:
    """The order of classes that a file says; without one it is that of the alphabet."""
    lists = [name for name in folder.files(".txt") if PurePosixPath(name).name in ("classes.txt", "labels.txt")]
    if len(lists) != 1:
        return []
    demand_text(folder.path(lists[0]), lists[0])
    text = read_text(folder.path(lists[0]))
    return list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))


def _listed(folder: Folder) -> tuple[list[_Listed], str]:
    """The xml files by split, and what tells of splits."""
    xmls = folder.files(".xml")
    by_stem: dict[str, list[str]] = {}
    for name in xmls:
        by_stem.setdefault(PurePosixPath(name).stem, []).append(name)
    sets = _set_files(folder)
    if sets:
        listed = [entry for split, name in sets for entry in _of_list(folder, split, name, by_stem)]
        return listed, f"splits of {', '.join(name for _, name in sets)}"
    listed = [_Listed(split_of(str(PurePosixPath(name).parent)) or "all", name, "", name) for name in xmls]
    named = {entry.split for entry in listed} - {"all"}
    return listed, "splits by folder" if named else "no splits"


def _set_files(folder: Folder) -> list[tuple[str, str]]:
    """(split, list) of those lists of `ImageSets` that aren't of one class; trainval only where there is no train."""
    lists = [PurePosixPath(name) for name in folder.files(".txt") if PurePosixPath(name).stem.lower() in _SETS]
    by_rank = [
        [path for path in lists if path.parent.name.lower() == "main"],
        [path for path in lists if path.parent.name.lower() in ("imagesets", "annotations")],
        [path for path in lists if len(path.parts) == 1],
    ]
    chosen = next((paths for paths in by_rank if paths), [])
    has_train = {path.parent for path in chosen if path.stem.lower() == "train"}
    kept = [path for path in chosen if path.stem.lower() != "trainval" or path.parent not in has_train]
    order = {"train": 0, "val": 1, "test": 2}
    found = [(split_of(path.stem) or "train", str(path)) for path in kept if folder.path(str(path)).stat().st_size]
    return sorted(found, key=lambda pair: order[pair[0]])


def _of_list(folder: Folder, split: str, name: str, by_stem: dict[str, list[str]]) -> Iterator[_Listed]:
    text = read_text(folder.path(name))
    near = PurePosixPath(name).parts
    for line, words in enumerate(map(str.split, text.splitlines()), 1):
        if not words:
            continue
        # an image's name may hold spaces; oxford's and others' lists have more columns behind it
        given = " ".join(words)
        stems = [PurePosixPath(given).stem, PurePosixPath(given).name, PurePosixPath(words[0]).stem, words[0]]
        xmls = next((by_stem[stem] for stem in stems if stem in by_stem), [])
        best = max(xmls, key=lambda xml: _common(PurePosixPath(xml).parts, near), default=None)
        yield _Listed(split, best, words[0], f"{name}:{line}")


def _common(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


class _Reader:
    """Reads xml files into builders."""

    def __init__(self, folder: Folder, options: ReadOptions):
        self.folder = folder
        self.options = options
        self.images: dict[str, set[str]] = {}  # image -> the xml files that it belongs to
        self.databases: dict[str, int] = {}
        self.subtracted = self.files = 0

    def read(self, builder: SplitBuilder, entry: _Listed) -> None:
        """Read one xml, if it is there."""
        if entry.xml is None:
            builder.faults.add("missing-annotation", as_place(entry.place, detail=entry.name))
            return
        try:
            root = _parse(self.folder.path(entry.xml))
        except (expat.ExpatError, ValueError, OSError) as error:
            line = f":{error.lineno}" if isinstance(error, expat.ExpatError) else ""
            builder.faults.add("annotation-file", as_place(f"{entry.xml}{line}", detail=str(error)))
            return
        self.files += 1
        image = self._image(builder, root, entry.xml)
        sides = whole(_text(root, "size/width")), whole(_text(root, "size/height"))
        size = sides if min(sides) > 0 else (0, 0)
        row = builder.image(image or entry.xml, None if image is None else self.folder.path(image), size)
        offset = self._offset(builder, root, entry.xml)
        for element in root.findall("object"):
            self._object(builder, row, element, entry.xml, offset)

    def notes(self) -> list[str]:
        """What was decided about the numbers of pixels."""
        if self.subtracted:
            return [f"1 is subtracted from the pixel numbers of {self.subtracted:,} of {self.files:,} xml files"]
        return ["pixel numbers are taken as they are (not PASCAL VOC's own files; one_based=True would subtract 1)"]

    def _offset(self, builder: SplitBuilder, root: _Element, xml: str) -> float:
        """1 where the first pixel has the number 1."""
        database = _text(root, "source/database")
        own = _PASCAL.fullmatch(database) is not None
        if not (own if self.options.one_based is None else self.options.one_based):
            return 0.0
        self.subtracted += 1
        detail = f"<database> {database}" if self.options.one_based is None else "one_based=True"
        builder.faults.add("one-based", as_place(xml, detail=detail))
        return 1.0

    def _image(self, builder: SplitBuilder, root: _Element, xml: str) -> str | None:
        """The image of an xml: that of its own name first, for <filename> is often that of a copied file."""
        near, given = _beside(self.folder, PurePosixPath(xml).parent), _text(root, "filename")
        own, why = self.folder.locate(PurePosixPath(xml).stem, near)
        named, _ = self.folder.locate(given, near) if given else (None, "")
        image = own or named
        if image is None:
            kind = "ambiguous-image" if why.startswith("may be") else "missing-image"
            detail = f"{why}: {given or PurePosixPath(xml).stem}"
            builder.faults.add(kind, as_place(xml, detail=detail))
            return None
        if own and named and own != named:
            builder.faults.add("voc-filename", as_place(xml, detail=f"<filename> {given}, image {own}"))
        of_image = self.images.setdefault(image, set())
        of_image.add(xml)
        if len(of_image) > 1:
            builder.faults.add("duplicate-file", as_place(xml, detail=image))
        return image

    def _object(self, builder: SplitBuilder, row: int, element: ElementTree.Element, xml: str, offset: float) -> None:
        name, boxes = _text(element, "name"), element.findall("bndbox")
        if not name or not boxes:
            others = ", ".join(child.tag for child in element) or "nothing"
            builder.faults.add("voc-object", as_place(xml, _line(element), f"it has {others}"))
            return
        difficult = _text(element, "difficult").lower() in ("1", "true")
        crowd = difficult and self.options.difficult == "ignore"
        for box in boxes:
            texts = [_text(box, key) for key in _CORNERS]
            left, top, right, bottom = (number(text) - offset for text in texts)
            sides: Box = (left, top, right - left, bottom - top)
            builder.add(row, name, sides, f"{xml}:{_line(box)}", crowd=crowd)
            if not all(map(math.isfinite, sides)):
                builder.odd(dict(zip(_CORNERS, texts, strict=True)))
        if crowd:
            builder.faults.add("difficult", as_place(xml, _line(element), name))


def _beside(folder: Folder, annotations: PurePosixPath) -> str:
    """Where images most likely lie: in JPEGImages or images for Annotations, otherwise beside the annotations."""
    for spot, part in reversed(list(enumerate(annotations.parts))):
        if part.lower() in ("annotations", "labels", "xmls", "xml"):
            for name in ("JPEGImages", "images"):
                images = PurePosixPath(*annotations.parts[:spot], name, *annotations.parts[spot + 1 :])
                if str(images) in folder.image_folders:
                    return str(images)
    return str(annotations)


def _parse(path: Path) -> _Element:
    """The tree of an xml file, with lines; entities of its own, which may grow without end, are refused."""
    builder = ElementTree.TreeBuilder(element_factory=_Element)
    parser = expat.ParserCreate()

    def start(tag: str, attributes: dict[str, str]) -> None:
        element = builder.start(tag, attributes)
        element.line = parser.CurrentLineNumber  # type: ignore[attr-defined]

    def refuse(*_: object) -> None:
        raise ValueError("it declares entities of its own")

    parser.StartElementHandler, parser.EndElementHandler = start, builder.end
    parser.CharacterDataHandler, parser.EntityDeclHandler = builder.data, refuse
    parser.Parse(_decoded(path.read_bytes()), True)
    root = builder.close()
    if root.tag != "annotation":
        raise ValueError(f"its root is <{root.tag}>, not <annotation>")
    return root  # type: ignore[return-value]


def _decoded(content: bytes) -> bytes | str:
    """The text of an xml that declares an encoding which expat doesn't know, such as gb2312; others stay bytes."""
    declared = _ENCODING.match(content)
    if declared is None:
        return content
    try:
        name = codecs.lookup(declared[1].decode("ascii")).name
    except LookupError:
        return content
    return content if name.startswith("utf") else content.decode("gb18030" if name.startswith("gb") else name)


def _line(element: ElementTree.Element) -> int:
    return element.line if isinstance(element, _Element) else 0


def _text(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()
