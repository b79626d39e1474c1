"""A first and a second start on a data set of COCO's size: seconds, processor seconds and peak memory of `load_coco`.

    python benchmarks/start_time.py [--before WORKTREE] [--images 118287] [--boxes 860001] [--decode] [--folder]

Makes hard links of one photograph and a json in a temporary folder, and prints JSON: of each start, in a process of its
own and without its imports. `--decode` decodes every image in the first one, 0.9 to 1.4 ms of a core each. `--folder`
takes `load_detection_dataset`, which draws a validation split. `--before` adds a start of another checkout.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

LINKS = 30_000  # of one file; a file system takes no more than 65,000


def make_data(folder: Path, images: int, boxes: int) -> None:
    """Hard links of one JPEG, and a json with boxes and outlines at random."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    (folder / "images").mkdir()
    for number in range(images):
        path = folder / "images" / f"{number:012d}.jpg"
        if number % LINKS == 0:
            first = path
            PIL.Image.fromarray(pixels).resize((640, 480)).save(path, quality=90)
        else:
            os.link(first, path)
    entries = [
        {"id": k + 1, "file_name": f"{k:012d}.jpg", "width": 640, "height": 480, "license": 1} for k in range(images)
    ]
    corners = np.column_stack([rng.uniform(0, 300, (boxes, 2)), rng.uniform(5, 170, (boxes, 2))]).round(2).tolist()
    owners, labels = rng.integers(1, images + 1, boxes).tolist(), rng.integers(1, 81, boxes).tolist()
    annotations = [
        {
            "id": k + 1,
            "image_id": owner,
            "category_id": label,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
            "segmentation": [[*box, *box]],
        }
        for k, (owner, label, box) in enumerate(zip(owners, labels, corners, strict=True))
    ]
    categories = [{"id": k, "name": f"class {k}"} for k in range(1, 81)]
    content = {"images": entries, "annotations": annotations, "categories": categories}
    (folder / "truth.json").write_text(json.dumps(content))


def measure(folder: Path, decode: bool, whole: bool) -> dict[str, Any]:
    """One start, in the checkout that the working directory is."""
    sys.path.insert(0, str(Path.cwd()))
    from crosskd_hf.data import load_coco, load_detection_dataset

    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, own = time.perf_counter(), time.process_time()
    if whole:
        objects = sum(data.report.objects for data in load_detection_dataset(folder, decode=decode).values())
    else:
        objects = load_coco(folder / "truth.json", folder / "images", decode=decode).report.objects
    return {
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - own,
        "imports_gb": imported / 1e6,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "objects": objects,
    }


def started(root: Path, folder: Path, options: list[str]) -> dict[str, Any]:
    """A start in a process of its own, whose cache lies beside `folder`."""
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", str(folder), *options]
    environment = {**os.environ, "HF_HOME": str(folder.parent / "cache")}
    made = subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(made.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Make the data, start several times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of this repository")
    parser.add_argument("--images", type=int, default=118_287, help="of the data")
    parser.add_argument("--boxes", type=int, default=860_001, help="of the data")
    parser.add_argument("--decode", action="store_true", help="decode every image in the first start")
    parser.add_argument("--folder", action="store_true", help="read the folder, not the json")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(measure(args.measure, args.decode, args.folder)))
        return
    here = Path(__file__).resolve().parents[1]
    options = [f"--{name}" for name in ("decode", "folder") if getattr(args, name)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "data"
        folder.mkdir()
        make_data(folder, args.images, args.boxes)
        result = {} if args.before is None else {"before": started(args.before, folder, options)}
        for start in ("first", "second", "third"):
            result[start] = started(here, folder, options)
    print(json.dumps({"images": args.images, "boxes": args.boxes, **result}, indent=2))


if __name__ == "__main__":
    main()
