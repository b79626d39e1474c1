"""Every test runs on one thread, without a network, from a fixed seed and with a cache of its own."""

import atexit
import gc
import ipaddress
import os
import random
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_CACHE = tempfile.mkdtemp(prefix="crosskd_hf_tests_")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ.update(  # read once, when the libraries are imported: so before that
    {
        "HF_HOME": _CACHE,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of long tests first, by their limits of time, so that no worker waits for another one's at the end.

    What needs a CUDA device is skipped where there is none.
    """
    limits: dict[Path, float] = {}
    for item in items:
        marker = item.get_closest_marker("timeout")
        limits[item.path] = max(limits.get(item.path, 0), marker.args[0] if marker else 0)
    items.sort(key=lambda item: -limits[item.path])
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="module")
def _few_objects_to_look_through() -> None:
    """Keep what was there before a module's tests out of garbage collections.

    Accelerate collects whenever a trainer begins to train, which takes as long as the training of a tiny model if half
    a million objects of the libraries are looked through.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are not forced to the disk, which takes longer than a tiny run; `test_interruption.py` forces them."""
    checkpoints = sys.modules.get("crosskd_hf.training.checkpoints")
    if checkpoints is not None:
        monkeypatch.setattr(checkpoints, "_force_to_disk", lambda path: None)


@pytest.fixture(autouse=True)
def seed() -> int:
    """The seed that random, NumPy and torch start each test from."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0


def _is_local(host: object) -> bool:
    if host in ("localhost", "", None, socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(str(host)).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Refuse connections and name look-ups that leave this machine."""
    connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo

    def local_connect(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and not _is_local(address[0]):
            raise RuntimeError(f"a test tried to connect to {address}: tests run without a network")
        connect(self, address)  # type: ignore[arg-type]

    def local_getaddrinfo(host: object, *args: object, **kwargs: object) -> object:
        if not _is_local(host):
            raise RuntimeError(f"a test tried to look up {host!r}: tests run without a network")
        return getaddrinfo(host, *args, **kwargs)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_connect)
        patch.setattr(socket, "getaddrinfo", local_getaddrinfo)
        yield
