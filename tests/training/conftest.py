"""The data that most tests of training use."""

from pathlib import Path

import pytest

from tests.tiny_run import make_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic data, shared by all tests of a file."""
    path = tmp_path_factory.mktemp("data")
    make_data(path)
    return path
