"""What was read and checked once, below the cache of `datasets`: the next start and other processes take it from there.

An entry holds as long as the annotation file has the same content and every image file its size and time of change.
Where the cache can't be written, everything is read each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock, Timeout

from . import images
from .categories import CategoryMap
from .report import DataReport, Finding, Place

logger = logging.getLogger(__name__)
VERSION = 3  # of what is checked, and of the entries' form
PATIENCE = 3600.0  # seconds that a process waits for the one that checks


def cache_folder() -> Path:
    """Where entries are."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "crosskd_hf"


def digest(*parts: Any) -> str:
    """A name for values that json knows, and for bytes."""
    whole = hashlib.sha256(f"{VERSION} {images.MAX_PIXELS}".encode())
    for part in parts:
        whole.update(hashlib.sha256(part if isinstance(part, bytes) else json.dumps(part).encode()).digest())
    return whole.hexdigest()[:40]


def content_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file; OSError if it can't be read."""
    whole = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            whole.update(block)
    return whole.hexdigest()


def stamps(paths: Sequence[str | os.PathLike[str]]) -> bytes:
    """Sizes and times of change of files; OSError if one isn't there."""
    found = map(os.stat, paths)
    return np.array([(stat.st_size, stat.st_mtime_ns) for stat in found], dtype=np.int64).tobytes()


@contextlib.contextmanager
def alone(name: str) -> Iterator[None]:
    """One process at a time, as far as the cache can be written; the others find what it has left there."""
    lock = None
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache_folder() / f"{name}.lock")
        lock.acquire(timeout=PATIENCE)
    except (OSError, Timeout):
        lock = None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def read_json(name: str) -> dict[str, Any] | None:
    """An entry; None if there is none."""
    try:
        content = json.loads((cache_folder() / f"{name}.json").read_bytes())
        return content if isinstance(content, dict) else None
    except (OSError, ValueError):
        return None


def write_json(name: str, content: dict[str, Any]) -> None:
    """Put an entry in place whole; OSError if that can't be done."""
    path = cache_folder() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{name}.{uuid.uuid4().hex}.tmp")
    new.write_text(json.dumps(content))
    os.replace(new, path)


def write_table(name: str, dataset: datasets.Dataset) -> str:
    """Write a data set as an Arrow file that processes map; return its name."""
    file = f"{name}.{uuid.uuid4().hex}.arrow"
    with ArrowWriter(features=dataset.features, path=str(cache_folder() / file)) as writer:
        writer.write_table(dataset.with_format("arrow")[:])
        writer.finalize()
    return file


def read_table(file: str) -> datasets.Dataset:
    """The data set of an Arrow file, mapped; an error of some kind if it is gone or damaged."""
    return datasets.Dataset.from_file(str(cache_folder() / file))


def forget(file: str | None) -> None:
    """Remove an Arrow file that was replaced; whoever has mapped it keeps it."""
    with contextlib.suppress(OSError):
        if file:
            (cache_folder() / file).unlink()


# ---- Reports ----


def plain_findings(findings: Sequence[Finding]) -> list[Any]:
    """Findings as json holds them."""
    return [[f.severity, f.kind, f.message, f.fix, [list(place) for place in f.places]] for f in findings]


def findings_of(plain: Sequence[Any]) -> tuple[Finding, ...]:
    """Findings from json."""
    return tuple(
        Finding(severity, kind, message, fix, tuple(Place(*place) for place in places))
        for severity, kind, message, fix, places in plain
    )


def plain_report(report: DataReport, categories: CategoryMap) -> dict[str, Any]:
    """A report and the classes as json holds them."""
    counts = [report.images, report.objects, report.crowds, report.empty_images]
    return {
        "counts": counts,
        "findings": plain_findings(report.findings),
        "raw_ids": categories.raw_ids,
        "names": categories.names,
    }


def report_of(plain: dict[str, Any]) -> tuple[DataReport, CategoryMap]:
    """A report and the classes from json."""
    categories = CategoryMap(tuple(plain["raw_ids"]), tuple(plain["names"]))
    images, objects, crowds, empty_images = plain["counts"]
    return DataReport(images, objects, crowds, empty_images, findings_of(plain["findings"])), categories
