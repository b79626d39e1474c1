"""A data set of four tiny images in every format, made where it is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

SIZE = (40, 20)
# image -> its objects, (class, x, y, width, height) in px
OBJECTS: dict[str, list[tuple[str, int, int, int, int]]] = {
    "a": [("cat", 4, 2, 8, 6), ("dog", 20, 10, 10, 5)],
    "b": [("dog", 0, 0, 40, 20)],
    "c": [],
    "d": [("cat", 10, 5, 4, 4)],
}
TRAIN, VAL = ("a", "b", "c"), ("d",)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def picture(path: Path, size: tuple[int, int] = SIZE, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 30)).save(path, **options)
    return path


def xml(
    name: str, objects: list[Any], size: str = "<size><width>40</width><height>20</height></size>", **more: str
) -> str:
    """An xml of LabelImg's form, a tag a line."""
    parts = [
        f"<object>\n<name>{label}</name>\n<difficult>{more.get('difficult', 0)}</difficult>\n<bndbox>\n<xmin>{x}</xmin>"
        f"\n<ymin>{y}</ymin>\n<xmax>{x + w}</xmax>\n<ymax>{y + h}</ymax>\n</bndbox>\n</object>"
        for label, x, y, w, h in objects
    ]
    database = more.get("database", "Unknown")
    head = f"<annotation>\n<filename>{name}</filename>\n<source><database>{database}</database></source>\n{size}\n"
    return head + "\n".join(parts) + "\n</annotation>\n"


def make_voc(root: Path, **more: str) -> Path:
    for name, objects in OBJECTS.items():
        picture(root / f"JPEGImages/{name}.jpg")
        write(root / f"Annotations/{name}.xml", xml(f"{name}.jpg", objects, **more))
    write(root / "ImageSets/Main/train.txt", "\n".join(TRAIN) + "\n")
    write(root / "ImageSets/Main/val.txt", "\n".join(VAL))
    write(root / "ImageSets/Main/trainval.txt", "\n".join(OBJECTS))
    write(root / "ImageSets/Main/cat_train.txt", "a 1\nb -1\n")
    return root


def yolo_line(label: str, x: float, y: float, w: float, h: float) -> str:
    width, height = SIZE
    values = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
    return " ".join([str(["cat", "dog"].index(label)), *(f"{value:.8f}" for value in values)])


def make_yolo(
    root: Path, yaml: str | None = "path: .\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n"
) -> Path:
    for name, objects in OBJECTS.items():
        split = "train" if name in TRAIN else "val"
        picture(root / f"images/{split}/{name}.jpg")
        if objects:
            write(root / f"labels/{split}/{name}.txt", "\n".join(yolo_line(*entry) for entry in objects) + "\n")
    if yaml is not None:
        write(root / "data.yaml", yaml)
    return root


def coco(names: tuple[str, ...], prefix: str = "", ids: bool = True) -> dict[str, Any]:
    images = [
        {"id": n, "file_name": f"{prefix}{name}.jpg", "width": 40, "height": 20} for n, name in enumerate(names, 1)
    ]
    annotations = [
        {"image_id": n, "category_id": 1 + ["cat", "dog"].index(label), "bbox": box, "area": box[2] * box[3]}
        for n, name in enumerate(names, 1)
        for label, *box in OBJECTS[name]
    ]  # fmt: skip
    if ids:
        annotations = [{"id": n, **entry} for n, entry in enumerate(annotations, 1)]
    categories = [{"id": 1, "name": "cat", "supercategory": "pets"}, {"id": 2, "name": "dog", "supercategory": "pets"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def make_coco(root: Path, ids: bool = True) -> Path:
    for split, names in (("train", TRAIN), ("val", VAL)):
        for name in names:
            picture(root / f"{split}2017/{name}.jpg")
        write(root / f"annotations/instances_{split}2017.json", json.dumps(coco(names, ids=ids)))
        write(root / f"annotations/captions_{split}2017.json", json.dumps({"images": [], "annotations": []}))
    return root


def make_roboflow(root: Path) -> Path:
    for split, names in (("train", TRAIN), ("valid", VAL)):
        for name in names:
            picture(root / f"{split}/{name}.jpg")
        content = coco(names)
        content["categories"].insert(0, {"id": 0, "name": "pets", "supercategory": "none"})
        write(root / f"{split}/_annotations.coco.json", json.dumps(content))
    return root


def make_csv(root: Path, header: str = "filename,width,height,class,xmin,ymin,xmax,ymax") -> Path:
    for split, names in (("train", TRAIN), ("val", VAL)):
        lines = [header]
        for name in names:
            picture(root / f"images/{name}.jpg")
            rows = [f"{name}.jpg,40,20,{k},{x},{y},{x + w},{y + h}" for k, x, y, w, h in OBJECTS[name]]
            lines += rows or [f"{name}.jpg,40,20,,,,,"]
        write(root / f"{split}.csv", "\n".join(lines))
    return root


def make_imagefolder(root: Path) -> Path:
    for split, names in (("train", TRAIN), ("validation", VAL)):
        rows = []
        for name in names:
            picture(root / f"{split}/{name}.jpg")
            boxes, labels = [entry[1:] for entry in OBJECTS[name]], [entry[0] for entry in OBJECTS[name]]
            rows.append(json.dumps({"file_name": f"{name}.jpg", "objects": {"bbox": boxes, "categories": labels}}))
        write(root / f"{split}/metadata.jsonl", "\n".join(rows))
    return root


def make_saved(root: Path) -> Path:
    parts = {}
    for split, names in (("train", TRAIN), ("validation", VAL)):
        rows = {
            "image": [str(picture(root.parent / f"pictures/{name}.jpg")) for name in names],
            "objects": [
                {"bbox": [list(map(float, e[1:])) for e in OBJECTS[name]], "categories": [e[0] for e in OBJECTS[name]]}
                for name in names
            ],
        }
        objects = {"bbox": [[datasets.Value("float64")]], "categories": [datasets.Value("string")]}
        features = datasets.Features({"image": datasets.Image(), "objects": objects})
        parts[split] = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(parts).save_to_disk(str(root))
    return root


MAKERS = {
    "coco": make_coco,
    "roboflow": make_roboflow,
    "voc": make_voc,
    "yolo": make_yolo,
    "csv": make_csv,
    "imagefolder": make_imagefolder,
    "datasets": make_saved,
}
