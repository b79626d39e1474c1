"""How time and memory grow with images, boxes, classes, image size and processes: one picture with fitted slopes.

    python benchmarks/growth.py --picture docs/growth.png

Prints JSON: of each task seconds and the peak of memory beyond its beginning, in MB, at three sizes, and the slope of
both on logarithmic axes (1: linear). Seconds are the processor's, so that a busy machine tells the same; of workers
they are the wall clock's. Small sizes, on Linux; at most five minutes.
"""

import argparse
import ctypes
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.loader_time import make_data
from benchmarks.postprocess_time import LEVELS
from benchmarks.scenes import make_scene
from crosskd_hf.data import DetectionCollator, load_coco
from crosskd_hf.data.dataset import DetectionData
from crosskd_hf.data.inspection import inspect_coco
from crosskd_hf.models import DetectionImageProcessor
from crosskd_hf.models.processors import image_processor
from tests.tiny_dense import make_detector

Task = Callable[[], object]
REPEATS = 2


def high_water() -> float:
    """The peak of this process's memory in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1000


def measured(task: Task, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds, the least of some runs, and MB beyond the beginning."""
    task()  # warms up
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free goes back, and is seen when it is taken again
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, seconds = high_water(), []
    for _ in range(REPEATS):
        start = clock()
        task()
        seconds.append(clock() - start)
    return {"s": min(seconds), "mb": max(high_water() - before, 0.1)}


def evaluation(images: int = 100, objects: float = 7, classes: int = 20) -> Task:
    """COCO AP of 100 detections an image."""
    return make_scene(0, images, classes, objects).evaluator(fast=None).compute


def reading(folder: Path, images: int = 200, boxes: int = 7) -> Task:
    """Reading and judging a json; images are looked at, not decoded."""
    (folder / f"{images}").mkdir(exist_ok=True)
    make_data(folder / f"{images}", 1)
    content = json.loads((folder / f"{images}" / "truth.json").read_text())
    image, annotation = content["images"][0], content["annotations"][0]
    content["images"] = [{**image, "id": k, "file_name": f"{k}.jpg"} for k in range(images)]
    content["annotations"] = [
        {**annotation, "id": 1 + k * boxes + j, "image_id": k} for k in range(images) for j in range(boxes)
    ]
    for number in range(1, images):
        (folder / f"{images}" / f"{number}.jpg").unlink(missing_ok=True)
        (folder / f"{images}" / f"{number}.jpg").hardlink_to(folder / f"{images}" / "0.jpg")
    truth = folder / f"{images}" / f"{boxes}.json"
    truth.write_text(json.dumps(content))
    return lambda: inspect_coco(truth, folder / f"{images}", decode=False)


def step(classes: int = 20, boxes: int = 8, size: int = 160) -> Task:
    """Loss and gradient of a small GFL on two images."""
    model = make_detector("gfl", num_labels=classes).train()
    pixels, corner = torch.rand(2, 3, size, size), torch.rand(boxes, 2) * 0.5
    label = {
        "class_labels": torch.randint(classes, (boxes,)),
        "boxes": torch.cat([corner + 0.2, corner * 0.4 + 0.1], 1),
    }
    return lambda: model(pixels, labels=[label, label]).loss.backward()


def reading_outputs(classes: int) -> Task:
    """Post-processing of one image of 800 x 1344 px."""
    count = sum(LEVELS)
    found: dict[str, Any] = {
        "logits": torch.randn(1, count, classes) - 5,
        "pred_boxes": torch.rand(1, count, 4) * 0.5,
        "level_lengths": torch.tensor([LEVELS]),
    }
    processor = image_processor("gfl")
    return lambda: processor.post_process_object_detection(found, 0.0, [(800, 1333)])  # type: ignore[arg-type]


def loading(data: DetectionData, size: int = 400, workers: int = 0) -> Task:
    """The images of the data as compact batches of 4."""
    collator = DetectionCollator(DetectionImageProcessor(size={"height": size, "width": size}), compact=True)
    dataset: Any = data.dataset
    return lambda: list(DataLoader(dataset, 4, collate_fn=collator, num_workers=workers))


def axes(folder: Path, data: DetectionData) -> dict[str, dict[str, dict[int, Task]]]:
    """What grows -> task -> size -> what is run."""
    classes, boxes, sizes = (20, 80, 365), (10, 40, 160), (160, 320, 640)
    return {
        "images": {
            "read and check": {n: reading(folder, images=n) for n in (500, 1000, 2000)},
            "evaluate": {n: evaluation(images=n) for n in (50, 100, 200)},
        },
        "boxes an image": {
            "read and check": {n: reading(folder, boxes=n) for n in boxes},
            "evaluate": {n: evaluation(images=30, objects=n) for n in boxes},
            "step": {n: step(boxes=n) for n in boxes},
        },
        "classes": {
            "evaluate": {n: evaluation(images=30, classes=n) for n in classes},
            "step": {n: step(classes=n) for n in classes},
            "post-process": {n: reading_outputs(n) for n in classes},
        },
        "image side, px": {
            "load": {n: loading(data, size=n) for n in sizes},
            "step": {n: step(size=n) for n in sizes},
        },
        "workers": {"load": {n: loading(data, workers=n) for n in (1, 2)}},
    }


def slopes(points: dict[int, dict[str, float]]) -> dict[str, float]:
    """Of time and memory on logarithmic axes."""
    x = np.log(list(points))
    return {key: float(np.polyfit(x, np.log([point[key] for point in points.values()]), 1)[0]) for key in ("s", "mb")}


def draw(results: dict[str, Any], path: Path) -> None:
    """Time above, memory below, a column for each thing that grows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.1 * len(results), 5.6), layout="constrained")
    grid = figure.subplots(2, len(results))
    for column, (axis, tasks) in enumerate(results.items()):
        for row, (key, title) in enumerate((("s", "processor seconds"), ("mb", "MB at most"))):
            plot = grid[row, column]
            for task, found in tasks.items():
                values = [point[key] for point in found["points"].values()]
                label = f"{task}: {found['slope'][key]:.2f}"
                plot.loglog([int(size) for size in found["points"]], values, "o-", label=label)
            plot.set(xlabel=axis, ylabel=title)
            plot.xaxis.set_major_formatter("{x:g}")
            plot.xaxis.set_minor_formatter("")
            plot.set_xticks([int(size) for size in found["points"]])
            plot.grid(alpha=0.3, which="both")
            plot.legend(title="slope", fontsize=8)
    figure.savefig(path, dpi=90)


def main() -> None:
    """Measure all, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, help="PNG to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "photos").mkdir()
        make_data(folder / "photos", 16)
        data = load_coco(folder / "photos/truth.json", folder / "photos", decode=False)
        for axis, tasks in axes(folder, data).items():
            results[axis] = {}
            for task, sizes in tasks.items():
                clock = time.perf_counter if axis == "workers" else time.process_time
                points = {size: measured(run, clock) for size, run in sizes.items()}
                results[axis][task] = {"points": points, "slope": slopes(points)}
    print(json.dumps(results, indent=2))
    if args.picture is not None:
        draw(results, args.picture)


if __name__ == "__main__":
    main()
