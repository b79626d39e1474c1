"""What a figure depends on, printed beside it."""

import json
import platform
import subprocess
import sys
from argparse import Namespace
from typing import Any

import torch


def print_result(result: dict[str, Any], options: Namespace) -> None:
    """Print figures as json, with the options, threads, device, release of torch and commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    setting = {
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
        "torch": torch.__version__,
        "commit": commit,
    }
    json.dump({**result, **vars(options), **setting}, sys.stdout, indent=2)
    print()
