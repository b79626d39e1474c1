"""Compare the experiment around the losses with the authors': one line a file, exit status 1 if one fails.

    python -m tests.parity.protocol [--coco DIR] tests/golden/protocol/*/*.json

Files are of four kinds, told by what they hold: resolved configurations (`configs`), the image pipeline (`pipeline`),
seeded outputs to detections (`postprocess`) and average precision (`evaluation`). A field is equal, or it stands in the
table of differences that remain, or the file fails. Pipeline and evaluation need the images of `coco_tiny`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from crosskd_hf.experiments.differences import REMAINING
from tests.parity import protocol_configs, protocol_evaluation, protocol_pipeline, protocol_postprocess
from tests.parity.protocol_fields import Field, report

COCO = Path(__file__).parents[3] / "shared" / "data" / "coco_tiny"


def compare(content: dict[str, Any], coco: Path) -> list[Field]:
    """The fields of a file beside ours.

    Raises:
        ValueError: A file of no known kind. FileNotFoundError: No images.
    """
    kinds: dict[str, Callable[[dict[str, Any]], list[Field]]] = {
        "head": protocol_postprocess.compare,
        "split": partial(protocol_pipeline.compare, coco=coco),
        "made": partial(protocol_pipeline.compare, coco=coco),
        "param_groups": protocol_configs.compare,
        "mmdet": partial(protocol_evaluation.compare, coco=coco),
    }
    for mark, run in kinds.items():
        if mark in content:
            return run(content)
    raise ValueError(f"no known kind of file: none of {', '.join(kinds)} is among {list(content)[:6]}")


def run(path: Path, coco: Path = COCO) -> bool:
    """Compare one file. Returns whether it agrees; one that can't be compared does not."""
    title = f"{path.parent.name}/{path.stem}"
    torch.manual_seed(0)
    try:
        fields = compare(json.loads(path.read_text()), coco)
    except Exception as error:  # whatever is wrong with a file, the others are still compared
        print(f"FAIL  {title:44s} {type(error).__name__}: {error}", flush=True)
        return False
    return report(title, fields, REMAINING)


def main() -> int:
    """Compare all files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="files of the protocol (json)")
    parser.add_argument("--coco", type=Path, default=COCO, help="folder of coco_tiny")
    logging.disable_progress_bar()
    arguments = parser.parse_args()
    failed = [path for path in arguments.files if not run(path, arguments.coco)]
    print(f"{len(failed)} of {len(arguments.files)} files differ" if failed else "all files agree")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
