"""Files that are handed on: readable by whom new files are, and without the folders of the machine that wrote them."""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

# An absolute path, or one below the home folder, alone or behind a delimiter. Addresses of servers are no paths.
_START = r"(?:file:/{1,2}(?=/))?(?:~|[A-Za-z]:)?[/\\]"
_PATH = re.compile(rf"(?P<before>^|[\s=,;'\"(\[{{<]|:(?!//))(?P<path>{_START}[^\s,;'\")\]}}>]+)")
_WHOLE = re.compile(rf"{_START}.+", re.DOTALL)


def make_readable(folder: Path) -> None:
    """Give all files in `folder` the permissions that new files get here; safetensors leaves its own to the owner."""
    probe = folder / "_probe"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def without_folders(content: Any) -> Any:
    """`content`, as it goes into a JSON, with the last part alone of every absolute path of this machine in it.

    A text that begins with a path is taken as a path as a whole, so folders with spaces go too.
    """
    if isinstance(content, Mapping):
        return {without_folders(key): without_folders(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_folders(item) for item in content]
    if not isinstance(content, str):
        return content
    if _WHOLE.fullmatch(content):
        return _last_part(content)
    return _PATH.sub(lambda found: found["before"] + _last_part(found["path"]), content)


def _last_part(path: str) -> str:
    return (PureWindowsPath(path) if "\\" in path else PurePosixPath(path)).name
