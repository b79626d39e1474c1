"""What a configuration may ask for: values of the right type and size, and of timm an architecture and nothing else.

A `config.json` comes from wherever a model was downloaded. Without these bounds one line of it allocates the machine's
memory, and one argument of timm's factory reads a file or contacts a server.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from transformers import PreTrainedConfig

Range = tuple[float, float]

MAX_LABELS = 1 << 16
MAX_LENGTH = 64  # of a list in a configuration
MAX_EDGE = 8192  # px, of an image as the model sees it
MAX_WEIGHTS = 1 << 30  # of a model that is built from a file; 4 GiB in float32

# Arguments of timm's nets that a configuration may set. The factory's own ones (weights, files, servers) aren't among
# them, nor are those that take code. The number is the largest value, of each element if it is a list; a word is looked
# up in a table of timm's.
_SIZES = (
    "embed_dim", "embed_dims", "dims", "channels", "stem_width", "stem_size", "stem_chs", "stem_channels", "base_width",
    "num_init_features", "num_features", "growth_rate", "head_hidden_size", "img_size", "width_list",
)  # fmt: skip
_COUNTS = (
    "depth", "depths", "layers", "stages", "depth_list", "num_heads", "num_heads_ratio", "num_kv_heads", "heads",
    "head_dim", "key_dim", "window_size", "patch_size", "kernel_size", "kernel_sizes", "cardinality", "groups",
    "output_stride", "down_kernel_size", "down_patch_size", "down_stride", "block_reduce_first", "width_factor",
    "sr_ratios", "window_ratio",
)  # fmt: skip
_FACTORS = (
    "drop_rate", "drop_path_rate", "drop_block_rate", "proj_drop_rate", "attn_drop_rate", "pos_drop_rate",
    "patch_drop_rate", "mlp_ratio", "mlp_ratios", "expand_ratio", "attn_ratio", "conv_ratio", "width",
    "channel_multiplier", "init_values", "ls_init_value", "layer_scale_init_value", "norm_eps",
)  # fmt: skip
_SWITCHES = (
    "qkv_bias", "conv_bias", "conv_mlp", "use_grn", "avg_down", "replace_stem_pool", "zero_init_last", "qk_norm",
    "preact", "strict_img_size", "always_partition", "dynamic_img_size", "dynamic_img_pad", "use_pos_embed",
    "fix_stem", "downsamples", "legacy",
)  # fmt: skip
_WORDS = ("norm_layer", "act_layer", "aa_layer", "stem_type", "pad_type")
NET_ARGUMENTS: dict[str, float] = {
    **dict.fromkeys(_SIZES, 8192),
    **dict.fromkeys(_COUNTS, 256),
    **dict.fromkeys(_FACTORS, 64),
    **dict.fromkeys((*_SWITCHES, *_WORDS), 1),
}
_CHANNELS = 3
_FILTERS = 5  # the largest number of one in Pillow
PIXELS: dict[str, Range] = {"image_mean": (-1e4, 1e4), "image_std": (1e-4, 1e4), "rescale_factor": (1e-6, 1e3)}
_DTYPES = (None, "auto", "float16", "bfloat16", "float32", "float64")
IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation")
_PLAIN_NAME = re.compile(r"[\w.-]+")
_WORD = re.compile(r"\w{0,32}")


def check_fields(config: PreTrainedConfig) -> None:
    """Check type and range of every field that the classes below `PreTrainedConfig` add.

    A class states the ranges of its own numbers in `ranges`: smallest and largest value, of each element of a list.

    Raises:
        ValueError: A value of another type or out of its range, or a list that is too long.
    """
    ranges: dict[str, Range] = {}
    for base in reversed(type(config).__mro__):
        ranges |= vars(base).get("ranges", {})
    inherited = {field.name for field in fields(PreTrainedConfig)}
    for field in fields(config):
        if field.name in inherited:
            continue
        value = getattr(config, field.name)
        if not _fits(value, field.type):
            raise ValueError(f"{field.name}={_short(value)} must be {_told(field.type)}.")
        values = value if isinstance(value, list | tuple) else [value]
        if field.name in ranges:
            low, high = ranges[field.name]
            if len(values) > MAX_LENGTH or not all(item is None or low <= item <= high for item in values):
                raise ValueError(f"{field.name}={_short(value)} must lie in [{low}, {high}].")


def check_labels(count: Any, names: Any) -> None:
    """Check the number of classes and their names by index, before the base class makes a name for each of the number.

    Raises:
        ValueError: Not 1 to `MAX_LABELS` classes, or they aren't numbered from 0. None is taken as not given.
    """
    if count is not None and not (_fits(count, int) and 1 <= count <= MAX_LABELS):
        raise ValueError(f"num_labels={_short(count)} must be a whole number in [1, {MAX_LABELS}].")
    if names is not None:
        given = [str(index) for index in names] if isinstance(names, Mapping) else None
        if given is None or not 1 <= len(given) <= MAX_LABELS or set(given) != set(map(str, range(len(given)))):
            raise ValueError(f"id2label={_short(names)} must name 1 to {MAX_LABELS} classes, numbered from 0.")


def check_net_arguments(arguments: Mapping[str, Any] | None) -> None:
    """Raise `ValueError` for arguments of a timm net that a configuration may not set, or for absurd values."""
    for name, value in (arguments or {}).items():
        if name not in NET_ARGUMENTS:
            raise ValueError(
                f"backbone_arguments has {name!r}, which a configuration may not set. It may set arguments of the net "
                f"alone ({', '.join(sorted(NET_ARGUMENTS))}). Weights are loaded with model.backbone.load_weights(...)."
            )
        values = value if isinstance(value, list | tuple) else [value]
        if len(values) > MAX_LENGTH or not all(_is_plain(item, NET_ARGUMENTS[name]) for item in values):
            raise ValueError(
                f"backbone_arguments has {name}={_short(value)}: it must be a word or numbers in "
                f"[0, {NET_ARGUMENTS[name]:g}], at most {MAX_LENGTH} of them."
            )


def check_plain_name(name: str) -> None:
    """Raise `ValueError` if timm would look for a net of this name outside of its own list."""
    if not _PLAIN_NAME.fullmatch(name):
        raise ValueError(
            f"backbone={_short(name)} in a configuration file: only timm's own names are read from files, because "
            "others (hf-hub:..., local-dir:...) contact a server or read files. If you trust it, give it in Python: "
            "from_pretrained(..., backbone=...)."
        )


def check_kind(content: Mapping[str, Any]) -> None:
    """Raise `ValueError` for what a `config.json` of any detector may not hold: type of weights, attention, name.

    Args:
        content: Of the file.
    """
    if not isinstance(content.get("model_type"), str | None):
        raise ValueError(f"model_type={_short(content['model_type'])} in a configuration file must be text.")
    for name in ("dtype", "torch_dtype"):
        value = content.get(name)
        plain = value.removeprefix("torch.") if isinstance(value, str) else value
        if not isinstance(plain, Mapping) and plain not in _DTYPES:
            raise ValueError(
                f"{name}={_short(value)} in a configuration file must be one of {', '.join(filter(None, _DTYPES))}."
            )
    for name in IMPLEMENTATIONS:
        check_implementation(name, content.get(name), name)


def check_implementation(path: str, value: Any, name: str) -> None:
    """Raise `ValueError` for code of a repository of kernels in the place of a plain word."""
    values = value.values() if isinstance(value, Mapping) else [value]
    if not all(re.fullmatch(r"\w*", str(item or "")) for item in values):
        raise ValueError(
            f"{path}={value!r} in a configuration file would fetch code. If you trust it, load the model in Python "
            f"with from_pretrained(..., {name.removeprefix('_')}=...) and give the model."
        )


def check_edges(settings: Mapping[str, Any]) -> None:
    """Raise `ValueError` if an image processor of these settings would make images of absurd sizes.

    Args:
        settings: As `preprocessor_config.json` holds them; `size`, `pad_size` and `crop_size` may be given as mappings.
    """
    for name in ("size", "pad_size", "crop_size", "size_divisor"):
        given = settings.get(name)
        for key, edge in dict(given).items() if isinstance(given, Mapping) else [("", given)]:
            if edge is not None and not (_fits(edge, int) and 1 <= edge <= MAX_EDGE):
                raise ValueError(
                    f"{name}{f'[{key!r}]' if key else ''}={_short(edge)} must lie in [1, {MAX_EDGE}] px, and be whole."
                )


def check_pixels(settings: Mapping[str, Any]) -> None:
    """Raise `ValueError` if an image processor of these settings would make pixels that no model can read.

    Args:
        settings: As `preprocessor_config.json` holds them. What is missing or None is the processor's own business.
    """
    for name, value in settings.items():
        if name.startswith("do_") and not isinstance(value, bool | None):
            raise ValueError(f"{name}={_short(value)} of the image processor must be true or false.")
    for name, (low, high) in PIXELS.items():
        value = settings.get(name)
        values = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
        fits = all(_fits(item, float) and low <= item <= high for item in values)
        if not fits or (isinstance(value, list | tuple) and len(value) != _CHANNELS):
            each = f", one or {_CHANNELS} of them" if name != "rescale_factor" else ""
            raise ValueError(f"{name}={_short(value)} of the image processor must lie in [{low:g}, {high:g}]{each}.")
    resample = settings.get("resample")
    if isinstance(resample, int) and not 0 <= resample <= _FILTERS:
        raise ValueError(f"resample={_short(resample)} of the image processor must lie in [0, {_FILTERS}].")


def _is_plain(value: Any, most: float) -> bool:
    if isinstance(value, str):
        return bool(_WORD.fullmatch(value))
    return value is None or (isinstance(value, int | float) and 0 <= value <= most)


def _fits(value: Any, kind: Any) -> bool:
    """Whether `value` is of the annotated type; a whole number is a real one too, a truth value is no number."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, choice) for choice in inner)
    if origin is Literal:
        return value in inner
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(_fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, inner[1]) for item in value.values())
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return kind is Any or isinstance(value, kind)


def _told(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_told, inner)))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin in (list, tuple):
        return f"a list with each element {_told(inner[0])}"
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", type(None): "none"}
    return words.get(kind, "a dict of values by name")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
