"""What is written for others names no folder of this machine."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from crosskd_hf.files import make_readable, without_folders


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("/home/ann/secret project/run", "run"),
        ("/home/ann/run/", "run"),
        ("~/run", "run"),
        ("C:\\Users\\ann\\run", "run"),
        ("C:/Users/ann/run", "run"),
        ("\\\\server\\share\\run", "run"),
        ("file:///home/ann/x.json", "x.json"),
        ("ckpt=/home/ann/x.pt,lr=1", "ckpt=x.pt,lr=1"),
        ("see '/home/ann/x y' and (/tmp/z)", "see 'x y' and (z)"),
        ('{"a": "/home/ann/x"}', '{"a": "x"}'),
        ("steps", "steps"),
        ("org/teacher", "org/teacher"),
        ("https://huggingface.co/org/teacher", "https://huggingface.co/org/teacher"),
        ("a/b and 3 / 4", "a/b and 3 / 4"),
        ("1e-3", "1e-3"),
        ("", ""),
        (3.5, 3.5),
        (None, None),
        ({"a": ["/x/y", {"/p/q": "/r/s"}], "b": ("/t/u", 1)}, {"a": ["y", {"q": "s"}], "b": ["u", 1]}),
    ],
    ids=str,
)
def test_folders_are_left_out(content: Any, expected: Any) -> None:
    assert without_folders(content) == expected


def test_permissions_are_those_of_new_files(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    usual, private = tmp_path / "usual", tmp_path / "inner/private"
    for path in (usual, private):
        path.touch()
    private.chmod(0o600)
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.touch(0o600)
    (tmp_path / "link").symlink_to(outside)
    make_readable(tmp_path)
    assert private.stat().st_mode == usual.stat().st_mode
    assert stat.S_IMODE(outside.stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inner", "link", "usual"]
