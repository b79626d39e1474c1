"""COCO AP by faster-coco-eval against pycocotools: time and figures of the same detections, side by side.

    python benchmarks/evaluation_time.py

Prints JSON: for each, seconds of `CocoEvaluator.compute` (median and minimum), their ratio, and the largest difference
of any figure. 5,000 images, 80 classes and 100 detections an image are a COCO validation; three rounds of it take about
5 minutes, `--images 500 --rounds 5` one.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.scenes import Scene, make_scene

NAMES = {True: "faster-coco-eval", False: "pycocotools"}


def timed(scene: Scene, fast: bool) -> tuple[float, Any]:
    """Seconds of one evaluation, and its evaluator."""
    evaluator = scene.evaluator(fast)
    start = time.perf_counter()
    evaluator.compute()
    return time.perf_counter() - start, evaluator


def main() -> None:
    """Time both, turn and turn about."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000, help="of the scene")
    parser.add_argument("--classes", type=int, default=80, help="of the scene")
    parser.add_argument("--rounds", type=int, default=3, help="evaluations by each")
    args = parser.parse_args()
    scene = make_scene(0, args.images, args.classes)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    stats: dict[bool, Any] = {}
    names = {}
    for _ in range(args.rounds):
        for fast in (True, False):
            taken, evaluator = timed(scene, fast)
            seconds[fast].append(taken)
            stats[fast], names[fast] = evaluator.stats, evaluator.library.name
    result: dict[str, Any] = {
        NAMES[fast]: {"library": names[fast], "median_s": median(seconds[fast]), "min_s": min(seconds[fast])}
        for fast in (True, False)
    }
    ratios = [fast / slow for fast, slow in zip(seconds[True], seconds[False], strict=True)]
    result["ratio"] = {"median": median(ratios), "min": min(ratios)}
    result["largest_difference"] = float(np.abs(np.subtract(stats[True], stats[False])).max())
    print(json.dumps({"images": args.images, "classes": args.classes, **result}, indent=2))


if __name__ == "__main__":
    main()
