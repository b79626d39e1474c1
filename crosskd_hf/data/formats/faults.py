"""What readers find in files: one table of kinds, with severity, message and fix; places are collected by kind."""

from __future__ import annotations

from collections import defaultdict

from ..report import Finding, Place, Severity, found

READER_FINDINGS: dict[str, tuple[Severity, str, str]] = {
    "annotation-file": ("error", "the annotation file can't be read", "correct the file, or remove it and its image"),
    "missing-image": (
        "error",
        "an annotation names an image that isn't in the folder",
        "add the image, or remove the annotation",
    ),
    "ambiguous-image": (
        "error",
        "several images in the folder have the name that an annotation gives",
        "write the image's folder into the annotation, or rename the images",
    ),
    "shared-image": (
        "error",
        "annotations of two images find one file, for there is no other of that name",
        "add the image that is missing, or write the names as they are in the folder",
    ),
    "missing-annotation": (
        "error",
        "the list of a split names an image that has no annotation file",
        "add the annotation file, or remove the line; an image without objects has an annotation file without objects",
    ),
    "voc-object": (
        "error",
        "an object has no class name or no upright box",
        "give each <object> a <name> and a <bndbox> with xmin, ymin, xmax and ymax",
    ),
    "voc-filename": (
        "warning",
        "<filename> names another image of the folder than the file's own name does; the file's own name counts",
        "correct <filename>",
    ),
    "yolo-line": (
        "error",
        "a line is neither a class and a box, nor a class and a polygon",
        "write `class x_center y_center width height`, numbers with spaces in between, in fractions of the image",
    ),
    "yolo-pixels": (
        "error",
        "numbers lie outside of [0, 1]: pixels, not fractions of the image",
        "divide x and width by the image's width, y and height by its height",
    ),
    "yolo-path": (
        "error",
        "data.yaml names images that are not there",
        "correct `path`, or the line of the split; both may be relative to data.yaml's folder",
    ),
    "yolo-yaml": ("error", "data.yaml can't be understood", "correct it: names is a list, or a dict number: name"),
    "class-count": ("error", "nc and names of data.yaml disagree", "correct one of them, or leave nc out"),
    "no-labels": (
        "error",
        "not one image of the split has a label file",
        "put `labels` beside `images`, with a .txt of the image's name in the same place",
    ),
    "csv-row": (
        "error",
        "a row has an image and some of a box and a class, but not all of it",
        "fill in the row; an image without objects has a row with empty box and class",
    ),
    "metadata-row": (
        "error",
        "a row of the metadata can't be read",
        "give each row file_name and objects: {bbox: [[x, y, w, h]], category: [...]}",
    ),
    "label-without-image": ("warning", "no image belongs to the label file; it is left out", "add the image"),
    "extra-column": (
        "warning",
        "a line has a sixth number, as predictions have for the score; it is left out",
        "make sure that these are labels, not predictions",
    ),
    "no-class-names": (
        "warning",
        "nothing names the classes; they are called by their numbers",
        "add data.yaml with `names`, or classes.txt with a name a line",
    ),
    "yolo-split": ("warning", "data.yaml names a test split that is not there", "remove the line, or add the images"),
    "yolo-elsewhere": (
        "note",
        "data.yaml names a path of another machine; its end is read below data.yaml's folder",
        "",
    ),
    "duplicate-file": (
        "warning",
        "several annotation files belong to one image",
        "keep one of them, with all objects of the image",
    ),
    "unlisted": ("note", "annotation files that no list of a split names are left out", ""),
    "unannotated": ("note", "images that no annotation names are left out", ""),
    "no-label-file": ("note", "the image has no label file: it is taken as one without objects", ""),
    "polygon": ("note", "a polygon is read as the upright box around it", ""),
    "one-based": ("note", "numbers of pixels begin at 1; 1 is subtracted from them", ""),
    "difficult": (
        "note",
        "difficult objects are treated as crowd regions: training leaves them out, evaluation ignores detections there",
        "difficult='keep' makes objects of them",
    ),
    "annotation-id": ("note", "annotations without an id were numbered", ""),
}


class Faults:
    """Places by kind of finding."""

    def __init__(self) -> None:
        self._places: dict[str, list[Place]] = defaultdict(list)

    def add(self, kind: str, place: Place) -> None:
        """Note that something of a kind was seen."""
        self._places[kind].append(place)

    def findings(self) -> list[Finding]:
        """One finding of each kind that was seen."""
        return [
            finding
            for kind, (severity, message, fix) in READER_FINDINGS.items()
            for finding in found(severity, kind, message, fix, self._places[kind])
        ]
