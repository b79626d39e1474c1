"""Does distillation pay? Train teacher, baseline and distilled student over several seeds; append to results.csv.

    python benchmarks/accuracy.py --seeds 0 1 2                                  # synthetic data
    python benchmarks/accuracy.py --seeds 0 --data_name bccd --train_images ... (all arguments of distill_coco.py)
    python benchmarks/accuracy.py --example distill_deformable_detr              # ... or of another example

One teacher, of the first seed, teaches all students. Costs the teacher plus two students a seed.
"""

import csv
import datetime
import importlib
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

RESULTS = Path(__file__).parent / "results.csv"


def take(argv: list[str], name: str, default: list[str]) -> tuple[list[str], list[str]]:
    """Cut the values of one of our own options out of the command line."""
    if name not in argv:
        return default, argv
    start = argv.index(name)
    end = next((i for i in range(start + 1, len(argv)) if argv[i].startswith("--")), len(argv))
    return argv[start + 1 : end], argv[:start] + argv[end:]


def hardware() -> str:
    """The device that the runs use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0] if names else platform.processor()} CPU, {torch.get_num_threads()} threads"


def append(rows: list[dict[str, Any]]) -> None:
    """Append rows, with a header if the file is new."""
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def row(name: str, metrics: dict[str, float], arguments: Any, config: Any, models: dict[str, Any]) -> dict[str, Any]:
    """What is known about one run; of a teacher that was given, only its kind is."""
    dense = "detector" in vars(arguments)
    student = arguments.detector if dense else "deformable_detr"
    teacher = f"{(dense and arguments.teacher_detector) or student}:{arguments.teacher_backbone}"
    epochs = arguments.teacher_epochs if name == "teacher" else None
    if arguments.teacher is not None:
        teacher = f"{models['teacher'][0].config.model_type} of --teacher"
        epochs = "" if name == "teacher" else None
    return {
        "run": name,
        "model": teacher if name == "teacher" else f"{student}:{arguments.student_backbone}",
        "teacher": teacher if name == "distilled" else "",
        "methods": "+".join(config.methods) if name == "distilled" else "",
        "epochs": config.num_train_epochs if epochs is None else epochs,
        **{key: f"{100 * metrics[key]:.2f}" for key in ("map", "map_50", "map_75")},
    }


def main() -> None:
    """Run all seeds."""
    seeds, argv = take(sys.argv[1:], "--seeds", ["0", "1", "2"])
    (data_name,), argv = take(argv, "--data_name", ["shapes"])
    (name,), argv = take(argv, "--example", ["distill_coco"])
    example = importlib.import_module(name)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    models: dict[str, Any] = {}
    gains: list[float] = []
    for seed in seeds:
        arguments, config = example.parse([*argv, "--seed", seed])
        root = config.output_dir
        config.output_dir = str(Path(root) / f"seed{seed}")
        comparison = example.prepare(arguments, config)
        example.run(arguments, comparison, models)
        models = {"teacher": models["teacher"]}
        shared = {
            "date": datetime.date.today().isoformat(),
            "commit": commit,
            "hardware": hardware(),
            "data": data_name,
            "seed": seed,
        }
        append([shared | row(name, metrics, arguments, config, models) for name, metrics in comparison.results.items()])
        print(comparison.table(), flush=True)
        if {"baseline", "distilled"} <= set(comparison.results):
            gains.append(100 * (comparison.results["distilled"]["map"] - comparison.results["baseline"]["map"]))
    if gains:
        deviation = f", standard deviation {statistics.stdev(gains):.2f}" if len(gains) > 1 else ""
        print(f"distilled - baseline: mean {statistics.mean(gains):+.2f} AP{deviation} over seeds {' '.join(seeds)}")


if __name__ == "__main__":
    main()
