"""Runs one command in this process."""

import pytest

from crosskd_hf.cli import main

Output = pytest.CaptureFixture[str]


def run(*words: object) -> int:
    """The exit status of `crosskd-hf WORDS...`."""
    return main([str(word) for word in words])
