"""The folder of a run: writable before the first update, and that of one run at a time.

The lock is the operating system's (`flock`), so it ends with the process that holds it, however that ends: a run that
was killed leaves nothing behind that would keep the next one away.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate.utils import gather_object

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = "_run.lock"  # the underscore keeps it from being uploaded
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

logger = logging.getLogger(__name__)
_held: set[int] = set()  # file descriptors of locks, to be closed in forked processes


class RunFolderError(OSError):
    """The folder of a run can't be written, or another run writes into it."""


def make(folder: Path) -> None:
    """Make the folder of a run.

    Raises:
        RunFolderError: It can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(_unwritable(folder, error)) from error


@contextmanager
def held(folder: Path, writes: bool, saves: bool) -> Iterator[None]:
    """Inside the context no other run uses `folder`. Every process of a run must enter it.

    Args:
        folder: Where the run saves; it is made if it isn't there.
        writes: Whether this process writes there.
        saves: Whether checkpoints will be written. Without them a folder that can't be written is only warned of.

    Raises:
        RunFolderError: In all processes, if a process that writes can't, or another run holds the folder.
    """
    descriptor, failure = None, ""
    try:
        descriptor = _acquire(folder, saves) if writes else None
    except RunFolderError as error:
        failure = str(error)
    failures = [text for text in gather_object([failure]) if text]
    try:
        if failures:
            raise RunFolderError(failures[0])
        yield
    finally:
        _release(folder, descriptor)


def _acquire(folder: Path, saves: bool) -> int | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _lock(folder / LOCK)
    except RunFolderError:
        raise
    except OSError as error:
        if saves:
            raise RunFolderError(_unwritable(folder, error)) from error
        told = _unwritable(folder, error)
        logger.warning("%s This run saves no checkpoints, so it goes on; save_model() would fail.", told)
        return None


def _lock(path: Path) -> int | None:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):  # its last holder may have removed it in between
                break
            os.close(descriptor)
        except BlockingIOError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            raise RunFolderError(
                f"{path.parent} is in use by another run ({holder or 'of an unknown process'}): two runs would delete "
                "each other's checkpoints. Wait for it, or give another output_dir."
            ) from error
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning(
                "%s lies on a file system without locks (%s), so a second run in it would not be noticed: give every "
                "run its own output_dir.",
                path.parent,
                error.strerror,
            )
            return None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    _held.add(descriptor)
    return descriptor


def _release(folder: Path, descriptor: int | None) -> None:
    if descriptor is None:
        return
    with suppress(OSError):
        (folder / LOCK).unlink()  # while it is still locked, so that nobody else's is removed
    _held.discard(descriptor)
    os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _unwritable(folder: Path, error: OSError) -> str:
    return f"output_dir={str(folder)!r} can't be written ({error.strerror}): give a folder that can."


def _leave_to_the_parent() -> None:
    """In a forked process (a loader's) a copy of the descriptor would hold the lock on after the run was killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)
