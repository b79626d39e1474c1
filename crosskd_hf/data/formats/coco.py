"""COCO: a json for each split. Roboflow, CVAT and Label Studio write it too, beside the images or in other folders."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ..coco_json import parse_coco
from ..report import DataError, Finding, Place
from .faults import Faults
from .folder import SPLITS, Claims, Folder, encoding_of, split_of
from .raw import FileSplit, RawSplit, Reading, ReadOptions, as_place

_HEAD = 1 << 16
_KEYS = ("images", "annotations", "categories")
_OTHER_TASKS = ("captions", "person_keypoints", "panoptic", "stuff", "image_info", "keypoints")


class Coco:
    """See the module."""

    name = "coco"
    layout = "annotations/instances_train.json (images, annotations, categories) and train/*.jpg; one json a split"
    options: frozenset[str] = frozenset()

    def seen(self, folder: Folder) -> str:
        """A json with the keys of COCO."""
        jsons = _jsons(folder)
        return f"COCO json: {', '.join(jsons[:3])}" if jsons else ""

    def read(self, folder: Folder, options: ReadOptions) -> Reading:
        """Read the json of each split and look for its images."""
        jsons = _by_split(folder)
        splits: dict[str, RawSplit] = {}
        findings: list[Finding] = []
        claims = Claims()
        for split, name in jsons.items():
            try:
                splits[split] = _read(folder, name, None if split == "all" else split, claims)
            except DataError as error:
                findings += _in_file(error.findings, name)
        if findings:
            raise DataError([*findings, *(finding for split in splits.values() for finding in split.findings)])
        left = [f"left out beside these: {name}" for name in _jsons(folder) if name not in jsons.values()]
        return Reading(splits, [*(f"{split}: {name}" for split, name in jsons.items()), *left])


def _jsons(folder: Folder) -> list[str]:
    """The jsons of detection; those of COCO's other tasks are left out beside them."""
    found = [name for name in folder.files(".json") if _looks_like_coco(folder.path(name))]
    own = [name for name in found if not PurePosixPath(name).name.startswith(_OTHER_TASKS)]
    return own or found


def _looks_like_coco(path: Path) -> bool:
    """Whether a json has keys of COCO; of a big one its beginning is looked at."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
        rest = file.read(1)
    if encoding_of(path) == "utf-16":
        head = head.decode("utf-16", "ignore").encode()
    keys = {key for key in _KEYS if re.search(rf'"{key}"\s*:'.encode(), head)}
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"{":
        return False
    if rest or len(keys) < 2:
        return len(keys) >= (1 if rest else 2)
    try:
        content = json.loads(head)
    except ValueError:
        return True  # cut short: what is wrong is said when it is read
    return isinstance(content, dict) and len(set(_KEYS).intersection(content)) >= 2


def _by_split(folder: Folder) -> dict[str, str]:
    """Split -> its json."""
    jsons = _jsons(folder)
    groups: dict[str, list[str]] = {}
    for name in jsons:
        groups.setdefault(split_of(name) or "all", []).append(name)
    if "train" in groups and len(groups["train"]) > 1:
        groups["train"] = [name for name in groups["train"] if "trainval" not in name] or groups["train"]
    for split, names in groups.items():
        if len(names) > 1:
            what = "nothing tells which split is which" if split == "all" else f"all of them for the split {split!r}"
            raise DataError([Finding(
                "error", "several-files", f"{len(names)} COCO jsons: {what}",
                "name them by split (instances_train.json, instances_val.json), or give the path of one of them",
                tuple(Place(name) for name in names),
            )])  # fmt: skip
    if "all" in groups and len(groups) > 1:
        if "train" in groups:
            del groups["all"]
        else:
            groups["train"] = groups.pop("all")
    return {split: groups[split][0] for split in (*SPLITS, "all") if split in groups}


def _read(folder: Folder, name: str, split: str | None, claims: Claims) -> FileSplit:
    table, structure = parse_coco(folder.path(name))
    faults, near = Faults(), str(PurePosixPath(name).parent)
    paths: list[Path | None] = []
    for wanted in table.file_names:
        found, why = folder.locate(wanted, near, split)
        if found is None:
            kind = "ambiguous-image" if why.startswith("may be") else "missing-image"
            faults.add(kind, as_place(name, detail=f"{wanted}: {why}"))
        elif (other := claims.other(found, wanted)) is not None:
            faults.add("shared-image", as_place(name, detail=f"{other} and {wanted}: {found}"))
        paths.append(None if found is None else folder.path(found))
    return FileSplit(table, paths, [*_in_file(structure, name), *faults.findings()])


def _in_file(findings: list[Finding] | tuple[Finding, ...], name: str) -> list[Finding]:
    """Findings of a json, with its name in each place."""
    parts = ("images[", "annotations[", "categories[")
    return [
        replace(finding, places=tuple(
            Place(f"{name} {place.file}", *place[1:]) if place.file.startswith(parts) else Place(name, *place[1:])
            for place in finding.places
        ))
        for finding in findings
    ]  # fmt: skip
