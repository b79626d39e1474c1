"""MMDetection's configuration files, read as text: literals and `dict(...)` count, nothing is executed."""

import ast
import operator
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .checkpoint import CheckpointError
from .mmdet import MMDetOptions

MOST_BASES = 32  # files that one config may inherit from, all in all
_DELETE = "_delete_"
_MOST = 1e12  # of what is calculated with: squares of squares would fill the memory


class _Unknown:
    """The value of an expression that is no literal."""

    def __repr__(self) -> str:
        return "<no literal>"


UNKNOWN = _Unknown()
_NUMBERS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda a, b: a / b if b else UNKNOWN,
}


def parse_config(text: str) -> dict[str, Any]:
    """Top-level assignments of a Python config. What isn't built of literals, `dict(...)` and earlier names is unknown.

    Raises:
        CheckpointError: The text is no Python.
    """
    names: dict[str, Any] = {}
    try:
        for statement in ast.parse(text).body:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    names[name] = _value(value, names)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"The config can't be read as Python: {error}.") from None
    return names


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A config file with the files under `_base_` that it inherits from, merged as MMEngine merges them.

    Raises:
        FileNotFoundError: The file or a base of it isn't there.
        CheckpointError: One of them is no Python, or they inherit from each other in a circle.
    """
    return _read(Path(path), [])


def _read(path: Path, seen: list[Path]) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no config {path}. Configs with '_base_' need the files they name; the full text that "
            f"MMDetection writes into its work folder needs no other."
        )
    seen.append(path)
    if len(seen) > MOST_BASES:
        raise CheckpointError(f"{seen[0]} inherits from more than {MOST_BASES} files; is there a circle?")
    config = parse_config(path.read_text(encoding="utf-8"))
    bases = config.pop("_base_", [])
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        merged = _merge(merged, _read(path.parent / str(base), seen))
    return _merge(merged, config)


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and not value.get(_DELETE):
            merged[key] = _merge(old, value)
        else:
            merged[key] = {k: v for k, v in value.items() if k != _DELETE} if isinstance(value, dict) else value
    return merged


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return names.get(name, UNKNOWN)
        case ast.List(elts=parts) | ast.Set(elts=parts):
            return [_value(part, names) for part in parts]
        case ast.Tuple(elts=parts):
            return tuple(_value(part, names) for part in parts)
        case ast.Dict(keys=keys, values=values):
            return _dict([(None if key is None else _value(key, names), _value(value, names))
                          for key, value in zip(keys, values, strict=True)])  # fmt: skip
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords):
            return _dict([(keyword.arg, _value(keyword.value, names)) for keyword in keywords])
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = _value(operand, names)
            return -value if isinstance(value, int | float) else UNKNOWN
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _NUMBERS:
            pair = _value(left, names), _value(right, names)
            fine = all(isinstance(part, int | float) and abs(part) < _MOST for part in pair)
            return _NUMBERS[type(op)](*pair) if fine else UNKNOWN
    return UNKNOWN


def _dict(items: list[tuple[Any, Any]]) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    for key, value in items:
        if key is None:  # **value
            result.update(value if isinstance(value, dict) else {})
        elif isinstance(key, str | int):
            result[key] = value
    return result


@dataclass(frozen=True)
class MMDetSettings:
    """What a config tells about a detector beside its weights.

    Args:
        options: For `convert_mmdet`.
        fields: Fields of our config which differ from what names and shapes tell.
        image_mean, image_std: RGB, for pixels in [0, 1].
        processor: Further settings of the image processor.
        head_type: Class of MMDetection's dense head or RPN, None if the config doesn't say.
        num_queries: Of a DETR, None if the config doesn't say.
    """

    options: MMDetOptions
    image_mean: list[float]
    image_std: list[float]
    fields: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    head_type: str | None = None
    num_queries: int | None = None


def read_settings(config: Mapping[str, Any]) -> MMDetSettings:
    """Read the options out of a parsed config (MMDetection 3.x, or 2.x); what isn't there has MMDetection's default.

    Raises:
        CheckpointError: The config says nothing of the pixels' normalisation, or an option isn't a literal.
    """
    head = _first(config, ("model.bbox_head", "model.rpn_head"), {})
    pixels = _first(config, ("model.data_preprocessor", "data_preprocessor", "img_norm_cfg"), {})
    if not isinstance(head, dict) or not isinstance(pixels, dict) or _get(pixels, "mean", None) is None:
        raise CheckpointError(
            "The config doesn't say how pixels are normalised: it needs data_preprocessor=dict(mean=[...], std=[...], "
            "bgr_to_rgb=...) in its model, or img_norm_cfg. Give the right file with --config."
        )
    rgb = bool(_first(pixels, ("bgr_to_rgb", "to_rgb"), "to_rgb" in pixels))
    mean, std = ([float(v) / 255 for v in _get(pixels, key, None)] for key in ("mean", "std"))
    options = MMDetOptions(
        caffe_style=_get(config, "model.backbone.style", "pytorch") == "caffe",
        bgr=not rgb,
        fpn_extra_relu=bool(_get(config, "model.neck.relu_before_extra_convs", False)),
        norm_on_bbox=bool(_get(head, "norm_on_bbox", False)),
        centerness_on_reg=bool(_get(head, "centerness_on_reg", False)),
        center_sampling=bool(_get(head, "center_sampling", False)),
    )
    return MMDetSettings(
        options,
        mean if rgb else mean[::-1],
        std if rgb else std[::-1],
        _head_fields(head) | _proposal_fields(config),
        _processor(config, pixels),
        _get(head, "type", None),
        _get(config, "model.num_queries", _get(head, "num_query", None)),
    )


def _head_fields(head: Mapping[str, Any]) -> dict[str, Any]:
    """Fields for our config; a detector without such a field has MMDetection's value built in, and is checked by it."""
    anchors = _get(head, "anchor_generator", {})
    scales = _get(anchors, "scales", None)
    fields = {
        "anchor_scale": _get(anchors, "octave_base_scale", scales[0] if scales else None),
        "scales_per_octave": _get(anchors, "scales_per_octave", len(scales) if scales else None),
        "aspect_ratios": _get(anchors, "ratios", None),
        "anchor_strides": _get(anchors, "strides", None),
        "delta_std": _get(head, "bbox_coder.target_stds", None),
        "regress_limits": [limits[1] for limits in _get(head, "regress_ranges", ())][:-1] or None,
        "center_radius": _get(head, "center_sample_radius", None) if _get(head, "center_sampling", False) else None,
    }
    return {key: value for key, value in fields.items() if value is not None}


def _proposal_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    rpn = _first(config, ("model.test_cfg.rpn", "test_cfg.rpn"), {})
    fields = {
        "test_proposals_per_level": _get(rpn, "nms_pre", None),
        "test_proposals": _first(rpn, ("max_per_img", "max_num"), None),
        "proposal_nms": _first(rpn, ("nms.iou_threshold", "nms_thr"), None),
    }
    return {key: value for key, value in fields.items() if value is not None}


def _processor(config: Mapping[str, Any], pixels: Mapping[str, Any]) -> dict[str, Any]:
    test = _first(config, ("model.test_cfg.rcnn", "model.test_cfg", "test_cfg"), {})
    settings = {
        "score_threshold": _get(test, "score_thr", None),
        "candidates_per_level": _get(test, "nms_pre", None),
        "nms_threshold": _first(test, ("nms.iou_threshold", "nms.iou_thr"), None),
        "max_detections": _get(test, "max_per_img", None),
        "size_divisor": _get(pixels, "pad_size_divisor", None),
    }
    scale = _test_scale(config)
    if scale is not None:
        settings["size"] = {"shortest_edge": min(scale), "longest_edge": max(scale)}
    return {key: value for key, value in settings.items() if value is not None}


def _test_scale(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The scale of the test pipeline's `Resize` (3.x) or `MultiScaleFlipAug` (2.x)."""
    for step in _get(config, "test_pipeline", ()):
        scale = _first(step, ("scale", "img_scale"), None) if isinstance(step, dict) else None
        if isinstance(scale, tuple | list) and len(scale) == 2 and all(isinstance(v, int) for v in scale):
            return scale[0], scale[1]
    return None


def _get(config: Any, path: str, default: Any) -> Any:
    """The value at a dotted path, or the default if a key on the way is missing.

    Raises:
        CheckpointError: There is a value, but no literal.
    """
    for key in path.split("."):
        if not isinstance(config, Mapping) or key not in config:
            return default
        config = config[key]
        if config is UNKNOWN:
            raise CheckpointError(f"'{path}' of the config is no literal; write its value out and use --config.")
    return config


def _first(config: Any, paths: tuple[str, ...], default: Any) -> Any:
    found = (_get(config, path, None) for path in paths)
    return next((value for value in found if value is not None), default)
