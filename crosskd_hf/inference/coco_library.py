"""Which library computes COCO's figures: faster-coco-eval where it is installed, else pycocotools."""

from __future__ import annotations

import contextlib
import io
import logging
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

logger = logging.getLogger(__name__)
FAST = "faster-coco-eval"
COUNTED = 100
"""So many detections of an image and class count in COCO's AP."""
LEAST = (1, 8)  # of which the figures were compared with pycocotools'


class Library(NamedTuple):
    """The two classes that pycocotools and its replacements have in common."""

    name: str
    coco: Any
    evaluation: Any


class Figures(NamedTuple):
    """What an evaluation found.

    Args:
        stats: COCO's twelve numbers, in [0, 1] or -1.
        precision: (10, 101, K) at IoUs .50:.95, recalls 0:1 and classes, of all areas and as many detections as count;
            -1 where a class has no truth.
    """

    stats: tuple[float, ...]
    precision: NDArray[np.float64]


def library(fast: bool | None = None) -> Library:
    """The library that is used.

    Args:
        fast: None: faster-coco-eval, which gives the same figures, where it is installed. True: it has to be. False:
            pycocotools.

    Raises:
        ImportError: It isn't there, or is older than 1.8.
    """
    found = None if fast is False else _fast()
    if found is None and fast:
        raise ImportError(f"fast=True needs {FAST} 1.8 or later: pip install 'crosskd_hf[fast]'.")
    return found or Library(f"pycocotools {version('pycocotools')}", COCO, COCOeval)


@cache
def _fast() -> Library | None:
    try:
        installed = version(FAST)
        if tuple(int(part) for part in installed.split(".")[:2]) < LEAST:
            logger.warning("%s %s is not used for COCO AP: needed is 1.8 or later.", FAST, installed)
            return None
        from faster_coco_eval import COCO as FastCOCO
        from faster_coco_eval import COCOeval_faster
    except (PackageNotFoundError, ImportError):
        return None
    return Library(f"{FAST} {installed}", FastCOCO, COCOeval_faster)


@cache
def tell(name: str) -> None:
    """Say once that it isn't pycocotools that computes the figures."""
    if name.startswith(FAST):
        logger.warning("COCO AP is computed by %s, with pycocotools' figures.", name)


def figures(truth: dict[str, Any], detections: NDArray[np.float64], used: Library, most: int = COUNTED) -> Figures:
    """Evaluate detections.

    Args:
        truth: The content of a COCO json; the library writes into it.
        detections: (D, 7) image id, x, y, width, height px, score, category id; those of an image together.
        used: Of :func:`library`.
        most: So many detections of an image and class count, `COUNTED` or more.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        coco = _indexed(truth, used)
        found = coco.loadRes(detections) if len(detections) else _indexed({**truth, "annotations": []}, used)
        evaluation = used.evaluation(coco, found, "bbox")
        evaluation.params.maxDets = [1, 10, most]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = np.array(evaluation.stats, dtype=np.float64)
    precision = np.asarray(evaluation.eval["precision"])[..., 0, -1]
    if most != COUNTED:  # the first of pycocotools' numbers, and that one alone, looks for 100 detections
        stats[0] = precision[precision > -1].mean() if (precision > -1).any() else -1
    return Figures(tuple(stats.tolist()), precision)


def _indexed(content: dict[str, Any], used: Library) -> Any:
    coco = used.coco()
    coco.dataset = content
    coco.createIndex()
    return coco
