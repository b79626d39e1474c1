r"""Defaults of `crosskd-hf train` beside those of `TrainingArguments`: AP over seeds, and the time of a run.

    nice -n 19 python benchmarks/defaults.py --out outputs/defaults --seeds 0 1 2                 # synthetic shapes
    nice -n 19 python benchmarks/defaults.py --out outputs/bccd -- --data bccd --data_format voc \
        --student gfl:test_efficientnet_gn --width 64 --longest_edge 160

Words after `--` go to both runs. Each run is a process of its own; `OUT/defaults.csv` has a row for each.
"""

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path

from crosskd_hf.data.shapes import make_shapes
from crosskd_hf.experiments.run_file import commit_of

FORMER = ["--learning_rate", "5e-5", "--num_train_epochs", "3", "--per_device_train_batch_size", "8",
          "--lr_scheduler_type", "linear", "--warmup_steps", "0", "--weight_decay", "0", "--max_grad_norm", "1",
          "--ema_decay", "0.001", "--save_strategy", "no", "--eval_strategy", "no"]  # fmt: skip


def run(out: Path, words: list[str], seed: int) -> dict[str, object]:
    """One training run; its AP in percent and minutes."""
    start = time.monotonic()
    command = [sys.executable, "-m", "crosskd_hf", "train", *words, "--seed", str(seed), "--output_dir", str(out)]
    subprocess.run(command, check=True)
    logs = json.loads((out / "trainer_state.json").read_text())["log_history"]
    best = max(entry["eval_map"] for entry in logs if "eval_map" in entry)
    return {
        "seed": seed, "ap": round(100 * best, 1), "updates": max(entry["step"] for entry in logs),
        "minutes": round((time.monotonic() - start) / 60, 1), "commit": commit_of(Path(__file__).parent),
    }  # fmt: skip


def main() -> None:
    """Run both for every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("words", nargs="*", help="after --: of crosskd-hf train")
    given = parser.parse_args()
    words = given.words
    if not words:
        paths = make_shapes(given.out / "shapes", 160, 60, 128)
        words = [word for name in ("train_annotations", "train_images", "val_annotations", "val_images")
                 for word in (f"--{name}", str(getattr(paths, name)))]  # fmt: skip
        words += ["--student", "gfl:test_efficientnet_gn", "--width", "64", "--longest_edge", "128"]
    rows = []
    for seed in given.seeds:
        for name, settings in (("former", FORMER), ("defaults", [])):
            rows.append({"defaults": name} | run(given.out / f"{name}-{seed}", [*words, *settings], seed))
            print(rows[-1], flush=True)
            with (given.out / "defaults.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
