"""The part "evidence" of `on_gpu.py`: whether distillation helps a student that starts from scratch, over seeds."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from crosskd_hf import distill, load_detection_dataset
from crosskd_hf.create import ImageSize
from crosskd_hf.data.shapes import make_shapes

SEEDS = (0, 1, 2)


def evidence(report: Any, device: str, data: str | None) -> None:
    """A teacher, then for each seed a student without and with it; `report` writes each seed down.

    Args:
        report: As of `on_gpu.py`.
        device: "cuda", or "cpu" for a rehearsal.
        data: What `load_detection_dataset` reads, such as BCCD; None: synthetic shapes.
    """
    small = device == "cpu"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if data is None:
            make_shapes(folder / "shapes", *((8, 4, 64) if small else (240, 80, 320)))
        splits = load_detection_dataset(data or folder / "shapes", "coco")
        gains: list[float] = []
        for seed in SEEDS:
            report.run(f"seed {seed}", lambda seed=seed: _seed(seed, splits, folder, small, gains))


def _seed(seed: int, splits: Any, folder: Path, small: bool, gains: list[float]) -> dict[str, Any]:
    """AP in percent of a seed's students; the first seed trains the teacher of all."""
    student, teacher = ("gfl:test_resnet",) * 2 if small else ("gfl:resnet18", "gfl:resnet50")
    given = folder / f"seed-{SEEDS[0]}" / "teacher"
    result = distill(
        (splits["train"], splits["val"]),
        student,
        str(given) if given.is_dir() else teacher,
        folder / f"seed-{seed}",
        backbone_weights=None,
        width=32 if small else 256,
        image_size=ImageSize(64, 64) if small else ImageSize(240, 320),
        seed=seed,
        fast=True,
        use_cpu=small,
        num_train_epochs=1 if small else 40,
        dataloader_num_workers=0 if small else 8,
        disable_tqdm=True,
    )
    gains += result.gains
    found = {name: round(100 * metrics["map"], 2) for name, metrics in result.results.items()}
    return {"ok": True, **found, "gain": round(result.gains[0], 2), "mean_gain": round(statistics.fmean(gains), 2)}
