"""Checkpoint folders that are whole or not there at all.

A checkpoint is written into `_saving-checkpoint-N` and renamed when it is complete; it is renamed to
`_deleting-checkpoint-N` before it is removed. Killed at any moment, a run leaves only complete `checkpoint-N` folders
and such left-overs, which `recover` clears away. `manifest.json`, written last, lists every file with its size and
SHA-256, so that a folder that lost files or bytes in another way (a broken copy, a disk that failed) is recognised too.
Sizes are compared whenever checkpoints are listed, contents before one is read: that takes a second per gigabyte.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files import make_readable

MANIFEST = "manifest.json"
SAVING, DELETING = "_saving-", "_deleting-"
_NAME = re.compile(r"checkpoint-(\d+)")

logger = logging.getLogger(__name__)


def write_manifest(folder: Path) -> None:
    """List the files of `folder` with sizes and checksums in `manifest.json` and force all of them to the disk."""
    make_readable(folder)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files.pop(MANIFEST, None)
    for path in files.values():
        _force_to_disk(path)
    entries = {name: {"size": path.stat().st_size, "sha256": _checksum(path)} for name, path in files.items()}
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=2) + "\n", encoding="utf-8")
    _force_to_disk(folder / MANIFEST)
    _force_to_disk(folder)


def is_complete(folder: Path) -> bool:
    """Whether `folder` has a manifest, which lists something, and every file in it, each of the listed size."""
    return fault(folder, contents=False) is None


def fault(folder: Path, contents: bool = True) -> str | None:
    """What is wrong with the checkpoint `folder`, with the name of the file, or None.

    Args:
        folder: `checkpoint-N`.
        contents: Whether to read every file and compare its checksum, not its size alone.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        listed = [(str(name), *_entry(entry)) for name, entry in files.items()]
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} can't be read ({type(error).__name__}: {error})"
    if not listed:
        return f"{MANIFEST} lists no file"
    for name, size, checksum in listed:
        try:
            found = _file_fault(folder, name, size, checksum if contents else None)
        except OSError as error:
            found = f"can't be read ({error.strerror})"
        if found is not None:
            return f"{name} {found}"
    return None


def _entry(entry: Any) -> tuple[int, str | None]:
    """Size and checksum of an entry; the first manifests had sizes alone."""
    return (entry, None) if isinstance(entry, int) else (int(entry["size"]), str(entry["sha256"]))


def _file_fault(folder: Path, name: str, size: int, checksum: str | None) -> str | None:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return "lies outside of the checkpoint"
    path = folder / name
    if not path.is_file():
        return f"is missing, though {MANIFEST} lists it"
    if path.stat().st_size != size:
        return f"has {path.stat().st_size} bytes, {MANIFEST} says {size}"
    if checksum is not None and _checksum(path) != checksum:
        return f"is not what was written: {MANIFEST} has another SHA-256"
    return None


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
    make_readable(staging)
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
    return [path for path in _numbered(run) if is_complete(path)]


def _numbered(run: Path) -> list[Path]:
    numbered = [(int(m[1]), path) for path in run.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def last_checkpoint(run: str | Path, contents: bool = False) -> str | None:
    """The newest complete checkpoint in `run`, or None. Others are passed over with a warning.

    Args:
        run: Folder of the checkpoints.
        contents: Whether to compare its contents too, and to take an earlier one if they have changed.
    """
    for path in _numbered(Path(run))[::-1]:
        found = fault(path, contents)
        if found is None:
            return str(path)
        logger.warning("%s is damaged or was not written by CrossKDTrainer (%s); it is passed over.", path, found)
    return None


def rotate(run: Path, limit: int | None, best: str | None) -> None:
    """Keep at most `limit` checkpoints (None or 0: all); the newest one and the `best` one always stay."""
    if not limit:
        return
    whole = checkpoints(run)
    protected = {whole[-1]} | ({Path(best)} if best else set()) if whole else set()
    removable = [path for path in whole if path not in protected]
    for path in removable[: max(0, len(whole) - limit)]:
        remove(path)


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _force_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
