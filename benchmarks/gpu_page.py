"""docs/gpu.md from the JSON files of `on_gpu.py`: `python benchmarks/gpu_page.py > docs/gpu.md`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "gpu"
PARTS = {
    "correctness": "Does it compute the same as on the CPU?",
    "speed": "How fast is it?",
    "evidence": "Does distillation help?",
}
HEAD = """# On a GPU

This page is made from the files of `benchmarks/gpu` by `python benchmarks/gpu_page.py > docs/gpu.md`. The files are
what

    python benchmarks/on_gpu.py --part {} --out benchmarks/gpu/{}.json

writes for the parts correctness (about 2 minutes), speed (about 4) and evidence (about 8, `--data DIR` takes a data set
in COCO's format, such as BCCD). `--seconds` starts nothing after so long, `--cpu` rehearses in small. What a part lists
and a table below doesn't have was not reached in the time that there was.

What the runs of 2026-11-26 on an H200 found:

- A step at 2 images waits for the processor that launches its kernels: 42 ms for GFL in float32, and `fast=True` is
  slower there (54 ms), since autocast adds kernels. At 16 images `fast=True` takes 0.79 of float32's time.
- torch's GroupNorm is slow on large maps of few images: 2.7 ms each for the 73 of ResNets that start from random
  weights at 800 x 1344, 85 % of a step of 250 ms. Frozen batch norms, which pretrained backbones have, take 42 ms.
- A GroupNorm of our own for the heads was tried and taken out: 101 instead of 147 us forward, 474 instead of 102 back.
- float16's scaler begins at 65536 and skips 2 (GFL), 3 (Faster R-CNN) and 6 (Deformable DETR) updates of tiny nets.
- The memory of a Deformable DETR's encoder differs from the CPU's in rows of padding, whose position embedding is the
  sine of some three million radians; rows of pixels agree.
- The default tests ran at commit 2889932 with 13 processes. Two failed because a GPU was there: one compared a tensor
  on it with a copy on the CPU, one counted copies to a GPU that is not there. One failed with torch 2.11 alone. About
  a hundred told nothing: they need the package installed, and there it was only on the path."""


def page(reports: Sequence[dict[str, Any]]) -> str:
    """The page in Markdown, from the contents of the files; rehearsals on a CPU are left out."""
    found = {report["part"]: report for report in reports if not report["device"].startswith("CPU")}
    sections = [HEAD.format("PART", "PART")]
    for part, title in PARTS.items():
        sections += [f"## {title}", _section(found[part]) if part in found else f"{part}: not run on a GPU."]
    return "\n\n".join(sections) + "\n"


def _section(report: dict[str, Any]) -> str:
    origin = f"{report['device']}, {report['date']}, commit {report['commit']}, torch {report['torch']}."
    rows = ["| what | figures |", "|---|---|"]
    for name, figures in report["checks"].items():
        words = {True: "", False: "**failed** ", None: "not measured "}[figures["ok"]]
        rest = {key: value for key, value in figures.items() if key != "ok" and value not in ([], {})}
        rows.append(f"| {name} | {words}{', '.join(f'{key} {_short(value)}' for key, value in rest.items())} |")
    return "\n".join([origin, "", *rows])


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"({', '.join(f'{key} {_short(each)}' for key, each in value.items())})"
    if isinstance(value, list):
        return " ".join(map(_short, value))
    text = f"{value:.{2 if 0 < abs(value) < 0.001 else 4}g}" if isinstance(value, float) else str(value)
    return text.replace("|", "/").replace("\n", " ")


def known() -> list[dict[str, Any]]:
    """The files that are there."""
    return [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]


if __name__ == "__main__":
    print(page(known()), end="")
