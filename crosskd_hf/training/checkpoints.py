"""Checkpoint folders that are whole or not there at all.

A checkpoint is written into `_saving-checkpoint-N` and renamed when it is complete; it is renamed to
`_deleting-checkpoint-N` before it is removed. Killed at any moment, a run leaves only complete `checkpoint-N` folders
and such left-overs, which `recover` clears away. `manifest.json`, written last, lists every file with its size, so that
a folder that lost files in another way (a broken copy) is recognised too.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "manifest.json"
SAVING, DELETING = "_saving-", "_deleting-"
_NAME = re.compile(r"checkpoint-(\d+)")

logger = logging.getLogger(__name__)


def write_manifest(folder: Path) -> None:
    """List the files of `folder` with their sizes in `manifest.json` and force all of them to the disk."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    for path in files.values():
        _force_to_disk(path)
    manifest = {"files": {name: path.stat().st_size for name, path in files.items() if name != MANIFEST}}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    _force_to_disk(folder / MANIFEST)
    _force_to_disk(folder)


def is_complete(folder: Path) -> bool:
    """Whether `folder` has a manifest, which lists something, and every file in it, each of the listed size."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def publish(staging: Path, folder: Path) -> None:
    """Give a complete `staging` folder its final name; a folder that has the name already is replaced."""
    old = folder.with_name(DELETING + folder.name)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    staging.rename(folder)
    _force_to_disk(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A new folder to write into; after the context each file has replaced its namesake in `folder` in one move."""
    staging = folder / f"{SAVING}model"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    yield staging
    for path in staging.iterdir():
        os.replace(path, folder / path.name)
    staging.rmdir()


def remove(folder: Path) -> None:
    """Delete a checkpoint so that no half of it keeps its name."""
    doomed = folder.with_name(DELETING + folder.name)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def recover(run: Path) -> None:
    """Finish or clear away what a killed process left in the folder `run`."""
    for staging in run.glob(f"{SAVING}checkpoint-*"):
        folder = staging.with_name(staging.name.removeprefix(SAVING))
        if is_complete(staging) and not folder.exists():
            staging.rename(folder)
        else:
            shutil.rmtree(staging, ignore_errors=True)
    for doomed in run.glob(f"{DELETING}checkpoint-*"):
        shutil.rmtree(doomed, ignore_errors=True)


def checkpoints(run: Path) -> list[Path]:
    """The `checkpoint-N` folders of `run` that are complete, by rising N."""
    numbered = [(int(m[1]), path) for path in run.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered) if is_complete(path)]


def last_checkpoint(run: str | Path) -> str | None:
    """The newest complete checkpoint in `run`, or None. Incomplete folders are passed over with a warning."""
    whole = checkpoints(Path(run))
    for path in sorted(Path(run).glob("checkpoint-*")):
        if path not in whole:
            logger.warning("%s is incomplete or was not written by CrossKDTrainer; it is passed over.", path)
    return str(whole[-1]) if whole else None


def rotate(run: Path, limit: int | None, best: str | None) -> None:
    """Keep at most `limit` checkpoints (None or 0: all); the newest one and the `best` one always stay."""
    if not limit:
        return
    whole = checkpoints(run)
    protected = {whole[-1]} | ({Path(best)} if best else set()) if whole else set()
    removable = [path for path in whole if path not in protected]
    for path in removable[: max(0, len(whole) - limit)]:
        remove(path)


def _force_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
