"""`crosskd-hf options` and `env`: what the program itself is."""

import argparse
import importlib.metadata
import platform

from .command import Add, Commands, add_command
from .parser import make_parser, parsers_of

# Commands that have options of their own. Those of train and distill are the fields of their dataclasses.
WITH_OPTIONS = "evaluate", "predict", "check-data", "check-pair", "analyse"
PACKAGES = (
    "crosskd_hf", "torch", "torchvision", "transformers", "timm", "accelerate", "datasets", "huggingface_hub",
    "safetensors", "pycocotools", "scipy", "numpy", "pillow", "matplotlib",
)  # fmt: skip


def _add_options(commands: Commands, name: str, text: str) -> None:
    add_command(commands, name, _options, text)


def _add_env(commands: Commands, name: str, text: str) -> None:
    add_command(commands, name, _env, text)


def _options(_: argparse.Namespace) -> int:
    from ..experiments.options import reference

    commands = parsers_of(make_parser(*WITH_OPTIONS))
    print(reference(part for name in WITH_OPTIONS for part in parsers_of(commands[name]).values() or [commands[name]]))
    return 0


def _env(_: argparse.Namespace) -> int:
    import torch

    print(f"{'python':16s} {platform.python_version()}")
    print(f"{'platform':16s} {platform.platform()}")
    for name in PACKAGES:
        print(f"{name:16s} {importlib.metadata.version(name)}")
    count = torch.cuda.device_count()
    devices = ", ".join(torch.cuda.get_device_name(index) for index in range(count))
    print(f"{'cuda':16s} {torch.version.cuda or 'none'}, devices: {devices or 'none'}")
    return 0


ADD: dict[str, Add] = {"options": _add_options, "env": _add_env}
