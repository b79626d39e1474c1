"""Milliseconds an image costs the loader: batches of uint8 against batches of floats, side by side.

    python benchmarks/loader_time.py [--before WORKTREE] [--data JSON FOLDER]

Prints JSON: for 0 and 2 workers the time of an image of 640 x 480 px at 800 px, 8 a batch, median and minimum of rounds
that take turns, by the clock and in time of processors, which other programs change less; the same with the
normalisation in the training process; and the bytes of a batch. `--before` takes the loader of another checkout of this
repository instead of today's batches of floats, `--data` the first images of a COCO json instead of made ones. About
two minutes.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import PIL.Image

FIGURES = ("loader_ms", "loader_processor_ms", "with_normalisation_ms", "with_normalisation_processor_ms")
PASSES = 3  # the first one starts the workers


def make_data(folder: Path, images: int) -> None:
    """JPEGs with the detail of a photograph, and their json."""
    rng = np.random.default_rng(0)
    entries, annotations = [], []
    for number in range(images):
        coarse = PIL.Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((640, 480))
        pixels = np.asarray(coarse) + rng.normal(0, 8, (480, 640, 3))
        PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)
        entries.append({"id": number, "file_name": f"{number}.jpg", "width": 640, "height": 480})
        box = {"bbox": [10, 20, 200, 100], "area": 20000, "category_id": 1, "iscrowd": 0}
        annotations += [{"id": 10 * number + k, "image_id": number, **box} for k in range(1, 8)]
    content = {"images": entries, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "truth.json").write_text(json.dumps(content))


def measure(data: list[Path], images: int, compact: bool, workers: int) -> dict[str, Any]:
    """One pass over the data, in the checkout that the working directory is."""
    sys.path.insert(0, str(Path.cwd()))
    import torch
    from torch.utils.data import DataLoader

    from crosskd_hf.data import DetectionCollator, TrainTransform, load_coco
    from crosskd_hf.models import DetectionImageProcessor

    torch.set_num_threads(1)
    processor, normalize = DetectionImageProcessor(), dict
    if compact:
        from crosskd_hf.models.normalization import Normalizer

        normalize = Normalizer(processor)
    collator = DetectionCollator(processor, TrainTransform(), **({"compact": True} if compact else {}))
    whole = load_coco(*data, decode=False).dataset
    dataset: Any = whole.select(range(min(images, len(whole))))
    result: dict[str, Any] = {}
    for name, finish in (("loader", dict), ("with_normalisation", normalize)):
        loader = DataLoader(dataset, 8, collate_fn=collator, num_workers=workers, persistent_workers=workers > 0)
        passes, before = [], processor_seconds()
        for _ in range(PASSES):
            start = time.perf_counter()
            for batch in loader:
                finish(batch)
            passes.append((time.perf_counter() - start) * 1000 / len(dataset))
        del loader  # whose workers end
        result[f"{name}_ms"] = min(passes[1:])
        result[f"{name}_processor_ms"] = (processor_seconds() - before) * 1000 / (PASSES * len(dataset))
    result["bytes"] = sum(batch[key].nbytes for key in ("pixel_values", "pixel_mask"))
    return result


def processor_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def side_by_side(data: list[Path], images: int, workers: int, rounds: int, before: Path | None) -> dict[str, Any]:
    """Both loaders turn and turn about, each in a process of its own."""
    here = Path(__file__).resolve()
    found: dict[str, list[dict[str, Any]]] = {"before": [], "now": []}
    for _ in range(rounds):
        for name, compact, root in (("before", False, before or here.parents[1]), ("now", True, here.parents[1])):
            command = [sys.executable, str(here), "--measure", "--data", *map(str, data), "--images", str(images)]
            command += ["--workers", str(workers)]
            made = subprocess.run(
                [*command, *(["--compact"] if compact else [])], cwd=root, check=True, capture_output=True, text=True
            )
            found[name].append(json.loads(made.stdout.splitlines()[-1]))
    result: dict[str, Any] = {"bytes": {name: runs[0]["bytes"] for name, runs in found.items()}}
    for figure in FIGURES:
        values = {name: [run[figure] for run in runs] for name, runs in found.items()}
        ratios = [old / new for old, new in zip(values["before"], values["now"], strict=True)]
        ends = {name: {"median": median(of), "min": min(of)} for name, of in values.items()}
        result[figure] = ends | {"times_faster": {"median": median(ratios), "max": max(ratios)}}
    return result


def main() -> None:
    """Measure 0 and 2 workers, or one loader for the parent process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of this repository")
    parser.add_argument("--data", type=Path, nargs=2, metavar=("JSON", "FOLDER"), help="annotations and images")
    parser.add_argument("--images", type=int, default=64, help="so many are loaded")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each loader")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--compact", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.data, args.images, args.compact, args.workers)))
        return
    with tempfile.TemporaryDirectory() as name:
        made = [Path(name) / "truth.json", Path(name)]
        data = made if args.data is None else [path.resolve() for path in args.data]
        if args.data is None:
            make_data(Path(name), args.images)
        figures = {
            f"{workers} workers": side_by_side(data, args.images, workers, args.rounds, args.before)
            for workers in (0, 2)
        }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
