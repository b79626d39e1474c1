"""Every published experiment in small: two updates and one evaluation of its models and losses, from random weights.

    python benchmarks/presets_dry.py                     # all of them: six minutes on one core
    python benchmarks/presets_dry.py gfl-r18 crosskd-gfl-r18-from-r50
    python benchmarks/presets_dry.py --coco COCO_FOLDER  # with train2017, val2017 and annotations

Presets with the same student, teacher and losses are run once. Images have at most 128 x 160 px; without a folder they
are synthetic, under the names of COCO's classes. The figures mean nothing: that everything runs is what is shown.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils import logging as transformers_logging

from crosskd_hf import CrossKDConfig
from crosskd_hf.convert.class_names import COCO_IDS, COCO_NAMES
from crosskd_hf.create import ARCHITECTURES
from crosskd_hf.data import DetectionData, load_coco
from crosskd_hf.data.categories import CategoryMap
from crosskd_hf.data.shapes import make_shapes
from crosskd_hf.data.transforms import TrainTransform
from crosskd_hf.experiments.comparison import Comparison
from crosskd_hf.experiments.deformable_detr import freeze_stem, new_deformable_detr
from crosskd_hf.experiments.presets import PRESETS, Model, Preset
from crosskd_hf.models import DETECTORS
from crosskd_hf.models.backbone import NORMS, weights_follow

NEAR = Path(__file__).parents[2] / "shared" / "data" / "coco_tiny"
IMAGES, EVALUATED = 6, 2
SIZE = {"shortest_edge": 128, "longest_edge": 160}
LARGER = {"shortest_edge": 160, "longest_edge": 224}  # 300 queries are chosen among the locations of an image
CHANGES: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 1,
    "dataloader_num_workers": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def synthetic(folder: Path) -> Path:
    """Shapes in the layout and under the classes of COCO."""
    paths = make_shapes(folder, IMAGES, IMAGES, SIZE["longest_edge"])
    for split in ("train", "val"):
        path = vars(paths)[f"{split}_annotations"]
        content = json.loads(Path(path).read_text())
        ids = {old["id"]: new for old, new in zip(content["categories"], COCO_IDS, strict=False)}
        content["categories"] = [{"id": i, "name": n} for i, n in zip(COCO_IDS, COCO_NAMES, strict=True)]
        for annotation in content["annotations"]:
            annotation["category_id"] = ids[annotation["category_id"]]
        (folder / f"instances_{split}2017.json").write_text(json.dumps(content))
        (folder / f"{split}2017").symlink_to(Path(vars(paths)[f"{split}_images"]).absolute())
    (folder / "annotations").mkdir(exist_ok=True)
    for split in ("train", "val"):
        (folder / f"instances_{split}2017.json").replace(folder / "annotations" / f"instances_{split}2017.json")
    return folder


def read(folder: Path) -> tuple[DetectionData, DetectionData]:
    """A few images of each split, with all 80 classes."""
    classes = CategoryMap(tuple(COCO_IDS), tuple(COCO_NAMES))
    splits = []
    for split, count in (("train", IMAGES), ("val", EVALUATED)):
        path = folder / "annotations" / f"instances_{split}2017.json"
        data = load_coco(path, folder / f"{split}2017", classes)
        full = [index for index, row in enumerate(data.dataset["objects"]) if row["bbox"]]
        chosen = (full or range(len(data.dataset)))[:count]
        splits.append(DetectionData(data.dataset.select(chosen), data.categories, data.report))
    return splits[0], splits[1]


def build(model: Model, classes: CategoryMap) -> PreTrainedModel:
    """The published architecture with random weights, of which as much is trained as of one with ImageNet weights."""
    spec = model.spec
    if spec.architecture == "deformable_detr":
        detr = new_deformable_detr(spec.backbone, classes)
        freeze_stem(detr.model.backbone.model)
        with torch.no_grad():  # as if something had been loaded: frozen norms that multiply by 0 are refused
            for module in detr.model.backbone.modules():
                if "FrozenBatchNorm" in type(module).__name__:
                    module.weight.fill_(1)
                    module.bias += 1e-3 * torch.rand_like(module.bias)
        return detr
    fields = {"id2label": classes.id2label, "label2id": classes.label2id, "category_ids": list(classes.raw_ids)}
    config = ARCHITECTURES[spec.architecture](backbone=spec.backbone, **fields, **dict(spec.fields))
    with weights_follow():
        detector = DETECTORS[type(config)](config)
    with torch.no_grad():  # as if something had been loaded: a frozen net that never was is refused
        for module in detector.backbone.modules():
            if isinstance(module, NORMS) and module.bias is not None:
                module.bias += 1e-3 * torch.rand_like(module.bias)
    return detector


_TEACHERS: dict[str, PreTrainedModel] = {}


def teacher_of(model: Model, classes: CategoryMap) -> PreTrainedModel:
    """As of :func:`build`; the last teacher is kept for the next student, which leaves it as it is."""
    if str(model) not in _TEACHERS:
        _TEACHERS.clear()
        _TEACHERS[str(model)] = build(model, classes)
    return _TEACHERS[str(model)]


def processor_of(model: Model) -> BaseImageProcessor:
    """The published one, for small images."""
    return model.image_processor(size=size_of(model))


def size_of(model: Model) -> dict[str, int]:
    """Edges of the images."""
    return LARGER if model.spec.architecture == "deformable_detr" else SIZE


def dry_run(entry: Preset, data: tuple[DetectionData, DetectionData], folder: Path) -> str:
    """Train and evaluate; the losses of the last update.

    Raises:
        RuntimeError: A loss is not finite, or a method has none.
    """
    args = CrossKDConfig(str(folder / entry.name), **entry.training_arguments() | CHANGES)
    shortest, longest = size_of(entry.model).values()
    edges = (shortest, shortest + 32) if len(entry.training.shortest_edges) > 1 else ()
    transform = TrainTransform(shortest_edges=edges, longest_edge=longest)
    torch.manual_seed(0)
    comparison = Comparison(*data, processor_of(entry.model), args, transform)
    teacher = (None, None)
    if entry.teacher is not None:
        teacher = teacher_of(entry.teacher.model, data[0].categories), processor_of(entry.teacher.model)
    comparison.run("run", build(entry.model, data[0].categories), *teacher)
    state = json.loads((folder / entry.name / "run" / "trainer_state.json").read_text())
    shutil.rmtree(folder / entry.name)  # all students together would take 10 GB
    last = [row for row in state["log_history"] if "loss" in row][-1]
    losses = {name: value for name, value in last.items() if "/" in name or name.startswith("loss")}
    if not all(math.isfinite(value) for value in losses.values()):
        raise RuntimeError(f"not finite: {losses}")
    methods = [] if entry.losses is None else [method.partition(":")[0] for method in entry.losses.methods]
    silent = [method for method in methods if not any(name.startswith(f"{method}/") for name in losses)]
    if silent:
        raise RuntimeError(f"no losses of {', '.join(silent)}: {losses}")
    return " ".join(f"{name}={value:.3g}" for name, value in losses.items())


def distinct(names: list[str]) -> list[Preset]:
    """Presets that differ in student, teacher or losses, of those that can be run."""
    found: dict[object, Preset] = {}
    for name in names:
        entry = PRESETS[name]
        teacher = None if entry.teacher is None else str(entry.teacher.model)
        losses = None if entry.losses is None else entry.losses.methods
        found.setdefault((str(entry.model), teacher, losses), entry)
    return list(found.values())


def main() -> int:
    """Run all, and say which failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=list(PRESETS), metavar="PRESET")
    parser.add_argument("--coco", type=Path, help="folder with train2017, val2017 and annotations")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    entries = distinct(arguments.presets)
    failed = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        coco = arguments.coco or (NEAR if NEAR.is_dir() else synthetic(folder / "coco"))
        data = read(coco)
        for entry in entries:
            start = time.process_time()
            try:
                result = f"waits for {', '.join(entry.needs)}" if entry.needs else dry_run(entry, data, folder)
            except Exception as error:
                failed.append(entry.name)
                result = f"FAILED: {type(error).__name__}: {error}"
            print(f"{entry.name}: {result} ({time.process_time() - start:.0f} s)", flush=True)
    waiting = sum(bool(entry.needs) for entry in entries)
    print(f"{len(entries) - len(failed) - waiting} of {len(entries)} ran, {waiting} wait, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
