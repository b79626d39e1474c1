"""Images a second of the real trainer with a setting and without, in turn in one run. Prints JSON.

    python benchmarks/fast.py --data bccd --format coco [--student gfl:resnet18] [--teacher gfl:resnet50]

The setting is `fast=True`, or with `--setting exact_accumulation` that of four micro-batches of an image each.
Whatever an update costs is in the time: reading, decoding and augmenting images, both models, losses, optimiser. The
backbones are random: their values change no time. Costs about five minutes on two cores.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from crosskd_hf import CrossKDConfig, CrossKDTrainer, create_detector, load_detection_dataset
from crosskd_hf.create import ImageSize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.setting import print_result

WARM_UP = 2  # updates that are not counted


class Clock(TrainerCallback):
    """When each update ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def update_seconds(options: argparse.Namespace, data: Any, on: bool) -> list[float]:
    """Seconds of each counted update of a short run, with the setting on or off."""
    how: dict[str, Any] = {"fast": on, "per_device_train_batch_size": options.batch}
    if options.setting == "exact_accumulation":
        how = {"exact_accumulation": on, "per_device_train_batch_size": 1, "gradient_accumulation_steps": options.batch}
        how["fast"] = True
    size = ImageSize(*options.size)
    fields = {"backbone_weights": None, "image_size": size, "frozen_stages": 0, "norm_eval": False}
    (student, processor), (teacher, _) = (create_detector(name, data.train, **fields) for name in options.pair)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = CrossKDConfig(
            folder, **how, max_steps=options.updates + WARM_UP,
            schedule="1x", report_to="none", save_strategy="no", disable_tqdm=True, check_first_step=False,
            dataloader_num_workers=options.workers, logging_strategy="no", learning_rate=1e-4,
        )  # fmt: skip
        known = data.train.for_model(student.config)
        CrossKDTrainer(
            student, args, known.for_training().dataset, None, processor, teacher_model=teacher, callbacks=[clock]
        ).train()
    ends = clock.ends[WARM_UP - 1 :]
    return [after - before for before, after in itertools.pairwise(ends)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="what load_detection_dataset reads")
    parser.add_argument("--format", help="of the data, if several are there")
    parser.add_argument("--student", default="gfl:resnet18")
    parser.add_argument("--teacher", default="gfl:resnet50")
    parser.add_argument("--size", type=int, nargs=2, default=(240, 320), help="shorter and longest edge, px")
    parser.add_argument("--batch", type=int, default=4, help="images of an update")
    parser.add_argument("--setting", choices=("fast", "exact_accumulation"), default="fast")
    parser.add_argument("--updates", type=int, default=6, help="of a round, beside two that are not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    options.pair = options.student, options.teacher
    data = load_detection_dataset(options.data, options.format)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(options.rounds):
        for on, found in seconds.items():
            found += update_seconds(options, data, on)
    result: dict[str, Any] = {
        f"{name}_images_per_second": {
            "median": round(options.batch / statistics.median(seconds[on]), 2),
            "best": round(options.batch / min(seconds[on]), 2),
        }
        for name, on in (("off", False), ("on", True))
    }
    medians = [statistics.median(found) for found in seconds.values()]
    result |= {
        "off_over_on_of_medians": round(medians[0] / medians[1], 2),
        "off_over_on_of_minima": round(min(seconds[False]) / min(seconds[True]), 2),
    }
    print_result(result, options)


if __name__ == "__main__":
    main()
