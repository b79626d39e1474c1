"""What the configuration of a downloaded detector of transformers may ask for.

Our own architectures judge theirs when it is built (`models/bounds.py`). Those of transformers take what `config.json`
says: a backbone that timm fetches from a server, attention from a repository of kernels, or more weights than memory.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForObjectDetection, BaseImageProcessor, PreTrainedConfig
from transformers.utils import find_adapter_config_file, is_peft_available

from ..models import DETECTORS
from ..models.bounds import (
    IMPLEMENTATIONS,
    MAX_LABELS,
    MAX_WEIGHTS,
    check_edges,
    check_implementation,
    check_kind,
    check_pixels,
    check_plain_name,
)
from ..sources import first_line

_OWN = {config.model_type for config in DETECTORS}
_LISTS = ("id2label", "label2id", "category_ids")  # of any class names and numbers
_OF_THE_FACTORY = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
_MAX_LENGTH = 256  # of a list
_MANY = re.compile(r"(layers|depths?|blocks|stages|points|levels|heads|convs)$")
_LARGE = re.compile(r"size|dim|width|channels|queries|proposals|denoising|length|d_model|strides?|^num_")


def check_download(source: str | os.PathLike[str], revision: str = "main") -> None:
    """Judge a saved detector and the image processor beside it before anything is built from them.

    Args:
        source: Folder or Hub id.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ValueError: A configuration would make a library contact a server or run a file, or has absurd values.
        OSError: There is none of a detector.
    """
    _check_processor(source, revision)
    adapter = find_adapter_config_file(source, revision=revision) if is_peft_available() else None
    if adapter is not None:  # transformers then loads what the adapters belong to
        with open(adapter, encoding="utf-8") as file:
            source, revision = str(json.load(file).get("base_model_name_or_path")), "main"
    with _reading("config.json", source):
        content = _mapping(PreTrainedConfig.get_config_dict(source, revision=revision)[0])
    check_kind(content)
    if content.get("model_type") not in _OWN:  # those judge names and values themselves
        check_content(content)
    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForObjectDetection.from_config(config, trust_remote_code=False)
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > MAX_WEIGHTS:
        raise ValueError(f"This configuration is that of {count:.3g} weights; {MAX_WEIGHTS:.3g} is the limit.")


def _check_processor(source: str | os.PathLike[str], revision: str) -> None:
    try:
        with _reading("preprocessor_config.json", source):
            settings = _mapping(BaseImageProcessor.get_image_processor_dict(source, revision=revision)[0])
    except OSError:  # there is none
        return
    check_edges(settings)
    check_pixels(settings)


def _mapping(content: Any) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise TypeError(type(content).__name__)
    return dict(content)


@contextmanager
def _reading(file: str, source: str | os.PathLike[str]) -> Iterator[None]:
    """Inside of it a file of settings is read; one that holds something else is named."""
    try:
        yield
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} of {os.fspath(source)!r} can't be read as settings ({type(error).__name__}: {first_line(error)}): "
            "needed is a JSON object, in UTF-8. Copy the file once more."
        ) from error


def check_content(content: Mapping[str, Any]) -> None:
    """Raise `ValueError` for names and numbers that the `config.json` of a detector may not hold."""
    for path, key, value in _leaves(content):
        if key == "backbone" and value is not None:
            check_plain_name(str(value))
        elif key in IMPLEMENTATIONS:
            check_implementation(path, value, key)
        elif key in _OF_THE_FACTORY and value not in (None, ""):
            raise ValueError(f"{path} in a configuration file would make timm read a file or contact a server.")
        elif isinstance(value, int | float) and not abs(value) <= _most(key):
            raise ValueError(f"{path}={value!r} must lie in [-{_most(key)}, {_most(key)}].")


def _leaves(value: Any, path: str = "config.json", key: str = "") -> Iterator[tuple[str, str, Any]]:
    """Path, last name and value of whatever is no dict or list. Elements of a list have its name."""
    if key in _LISTS or isinstance(value, list):
        most = MAX_LABELS if key in _LISTS else _MAX_LENGTH
        if isinstance(value, list | dict) and len(value) > most:
            raise ValueError(f"{path} has {len(value)} entries; {most} is the limit.")
    if key in _LISTS:
        return
    if isinstance(value, Mapping) and key != "backbone":
        if key in _OF_THE_FACTORY and value:
            yield path, key, "a dict"
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}: {name}", key if key in IMPLEMENTATIONS else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, path, key)
    else:
        yield path, key, value


def _most(key: str) -> float:
    """The largest magnitude of a number of this name."""
    if key == "num_labels":
        return MAX_LABELS
    if _MANY.search(key):
        return 256
    return 8192 if _LARGE.search(key) else 1 << 20
