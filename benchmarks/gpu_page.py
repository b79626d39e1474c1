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

writes for the parts correctness, speed (about 4 minutes) and evidence (about 8, `--data DIR` takes a data set in COCO's
format, such as BCCD). `--seconds` starts nothing after so long, `--cpu` rehearses in small."""


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
        rest = {key: value for key, value in figures.items() if key != "ok"}
        rows.append(f"| {name} | {words}{', '.join(f'{key} {_short(value)}' for key, value in rest.items())} |")
    return "\n".join([origin, "", *rows])


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "/").replace("\n", " ")


def known() -> list[dict[str, Any]]:
    """The files that are there."""
    return [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]


if __name__ == "__main__":
    print(page(known()), end="")
