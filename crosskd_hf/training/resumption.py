"""What has to be as it was when a run goes on from a checkpoint: images an update, their order, the optimiser.

A checkpoint knows its place in the data as a number of updates. With other images an update, another order or other
data the rest of the epoch would repeat some images and leave out others, in silence; and an optimiser that is loaded
brings its old rates along, whatever the arguments say. `run.json` beside the optimiser's state says what it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from accelerate.optimizer import AcceleratedOptimizer
from safetensors import SafetensorError, safe_open

from ..files import without_folders
from . import provenance
from .config import CrossKDConfig

logger = logging.getLogger(__name__)

FILE = "run.json"
WEIGHTS_ONLY = ("optimizer.pt", "scheduler.pt")
"""Files without which a checkpoint can't be gone on from."""

_NEEDED = ("training_args.json", "trainer_state.json")
# Settings that change what is learned, and are told by nothing else when they differ.
_TOLD = (
    "num_train_epochs", "max_steps", "schedule", "decay_epochs", "warmup_steps", "warmup_kind", "lr_scheduler_type",
    "lr_scheduler_kwargs", "max_grad_norm", "ema_decay", "bf16", "fp16", "exact_accumulation", "nonfinite",
)  # fmt: skip
_IMAGE = ("image_id", "width", "height")
_OBJECT = ("bbox", "category", "iscrowd")
_KEPT_APART = ("params", "lr", "initial_lr")


# ---- Data ----


def describe_run(args: CrossKDConfig, dataset: Any, processor: Any = None, transform: Any = None) -> dict[str, Any]:
    """What a checkpoint of this run remembers of its training data, their order and what becomes of the images.

    Args:
        args: Of the run.
        dataset: Its training data.
        processor, transform: The student's image processor and the augmentation, or None.
    """
    order = {
        "seed": args.seed if args.data_seed is None else args.data_seed,
        "train_sampling_strategy": args.train_sampling_strategy,
        "group_by_aspect_ratio": args.group_by_aspect_ratio,
        "dataloader_drop_last": args.dataloader_drop_last,
    }
    images = {"image processor": _described(processor), "augmentation": _described(transform)}
    return {"order": order, "data": describe_data(dataset), "images": images}


def _described(part: Any) -> dict[str, Any] | None:
    """Class and settings of what makes pixels; nothing that another process would tell otherwise."""
    if part is None:
        return None
    settings = part.to_dict() if hasattr(part, "to_dict") else getattr(part, "__dict__", {})
    plain = json.loads(json.dumps(settings, default=lambda value: type(value).__name__, skipkeys=True))
    return {"class": getattr(part, "__name__", type(part).__name__)} | without_folders(plain)


def describe_update(args: CrossKDConfig, micro_batch: int) -> dict[str, int]:
    """How many images an update takes, and, where that decides what an epoch leaves out, all processes at once.

    Args:
        args: Of the run.
        micro_batch: Images that one process takes at once.
    """
    at_once = micro_batch * args.world_size
    update = {"images an update": at_once * args.gradient_accumulation_steps}
    return update | {"images at once": at_once} if args.dataloader_drop_last else update


def describe_data(dataset: Any) -> dict[str, Any]:
    """Number of images, and a SHA-256 of ids, sizes and boxes, as far as `dataset` tells them without being read."""
    content: dict[str, Any] = {"images": len(dataset) if isinstance(dataset, Sized) else None}
    if isinstance(dataset, datasets.Dataset) and {"image_id", "objects"} <= set(dataset.column_names):
        content["sha256"] = _digest(dataset)
    return content


def _digest(dataset: datasets.Dataset) -> str:
    columns = [name for name in (*_IMAGE, "objects") if name in dataset.column_names]
    digests: dict[str, Any] = {}
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=10_000):
        for name, array in _arrays(table):
            digests.setdefault(name, hashlib.sha256()).update(_bytes(array))
    whole = hashlib.sha256()
    for name, digest in sorted(digests.items()):
        whole.update(f"{name} {digest.hexdigest()}\n".encode())
    return whole.hexdigest()


def _arrays(table: pa.Table) -> Iterator[tuple[str, pa.Array]]:
    """Arrays by name, flat where the schema is that of `load_coco`."""
    for name in table.column_names:
        column = table[name].combine_chunks()
        if name != "objects" or not pa.types.is_struct(column.type):
            yield name, column
            continue
        for field in _OBJECT:
            if column.type.get_field_index(field) < 0:
                continue
            values = pc.struct_field(column, field)
            while pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type):
                yield f"{field}: {values.type}", pc.list_value_length(values)
                values = pc.list_flatten(values)
            yield field, values


def _bytes(array: pa.Array) -> bytes:
    """The content of an array; what isn't plain numbers is written out."""
    if pa.types.is_primitive(array.type) and array.null_count == 0:
        return array.to_numpy(zero_copy_only=False).tobytes()
    return repr(array.to_pylist()).encode()


# ---- Optimiser ----


def describe_optimizer(optimizer: Any, scheduler: Any, settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a checkpoint remembers of its optimiser.

    Args:
        optimizer, scheduler: As the trainer has them.
        settings: As of :func:`group_settings`.
    """
    plain = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    return {
        "optimizer": type(plain).__name__,
        "scheduler": type(scheduler).__name__,
        "parameters": [sum(parameter.numel() for parameter in group["params"]) for group in optimizer.param_groups],
        "settings": [dict(group) for group in settings],
    }


def group_settings(optimizer: Any) -> list[dict[str, Any]]:
    """The settings of each group of parameters; `lr` is that which the schedule multiplies."""
    return [
        {"lr": group.get("initial_lr", group["lr"])}
        | {name: value for name, value in group.items() if name not in _KEPT_APART}
        for group in optimizer.param_groups
    ]


def adopt_settings(folder: Path, optimizer: Any, scheduler: Any, settings: Sequence[Mapping[str, Any]]) -> None:
    """Give an optimiser that was loaded from `folder` the settings of this run; those that differ are told.

    Args:
        folder: The checkpoint.
        optimizer, scheduler: With the state of the checkpoint.
        settings: Of this run, taken before that state was loaded.
    """
    told = []
    for group, then, now in zip(optimizer.param_groups, read(folder).get("settings", ()), settings, strict=False):
        changed = [name for name in now if _plain(now[name]) != then.get(name)]
        told += [f"{name}: {then.get(name)} -> {now[name]}" for name in changed]
        group.update({name: now[name] for name in changed if name != "lr"})
        if "lr" in changed:
            group["lr"] = group["lr"] * now["lr"] / then["lr"] if then["lr"] else now["lr"]
            group["initial_lr"] = now["lr"]
    if told:
        changes = "; ".join(dict.fromkeys(told))
        logger.warning("The optimiser goes on with other settings than %s had: %s", folder, changes)
        rates = {
            "base_lrs": [setting["lr"] for setting in settings],
            "_last_lr": [group["lr"] for group in optimizer.param_groups],
        }
        scheduler.load_state_dict(scheduler.state_dict() | rates)


# ---- Checkpoint ----


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `run.json` into the checkpoint `folder`."""
    (folder / FILE).write_text(json.dumps(_plain(content), indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """What :func:`write` wrote; nothing of a checkpoint that is older than this file."""
    path = folder / FILE
    return _object(path) if path.is_file() else {}


def check_files(folder: Path) -> None:
    """Look into the files of a checkpoint; `fault` of checkpoints judges only those that the manifest lists.

    Raises:
        ValueError: One that is needed is missing, or can't be read.
    """
    for name in _NEEDED:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} lacks {name}: resume from an earlier checkpoint.")
    for name in (*_NEEDED, FILE, provenance.FILE):
        if (folder / name).is_file():
            _object(folder / name)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            safe_open(path, "pt")
        except SafetensorError as error:
            raise ValueError(f"{path} can't be read ({error}): resume from an earlier checkpoint.") from error


def check_state(folder: Path, scales: bool) -> None:
    """Refuse a checkpoint that holds weights only, or a gradient scaler for which this run has no use.

    Args:
        folder: The checkpoint.
        scales: Whether this run scales its gradients (fp16).

    Raises:
        ValueError: Momentum and schedule would start anew.
    """
    missing = [name for name in WEIGHTS_ONLY if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} holds weights only, for it lacks {' and '.join(missing)} (save_only_model?): momentum and "
            "schedule would start anew. Start a new run from its weights: load it with from_pretrained and call "
            "train() without resume_from_checkpoint."
        )
    if (folder / "scaler.pt").is_file() and not scales:
        raise ValueError(f"{folder} belongs to a run with fp16=True: resume with fp16=True.")


def check_run(folder: Path, run: Mapping[str, Any], ignore_data_skip: bool) -> None:
    """Refuse to go on with other data or in another order.

    Args:
        folder: The checkpoint.
        run: As of :func:`describe_run`, for the present run.
        ignore_data_skip: The run begins a new epoch instead of going on within one; then data and order may differ.

    Raises:
        ValueError: Something differs.
    """
    then = read(folder)
    differing = []
    if then.get("data", run["data"]) != run["data"]:
        sizes = then["data"]["images"], run["data"]["images"]
        differing.append(f"training data: {sizes[0]} images -> {'others, ' if sizes[0] == sizes[1] else ''}{sizes[1]}")
    differing += _differences(then.get("order", {}), run["order"])
    if not differing:
        return
    if ignore_data_skip:
        logger.warning("The run goes on with other settings than %s had: %s", folder, "; ".join(differing))
        return
    raise ValueError(
        f"{folder} can't be gone on from with another order of images ({'; '.join(differing)}): the rest of the "
        "epoch would repeat some and leave out others. Give what the run began with; or begin a new epoch with "
        "ignore_data_skip=True; or start a new run from the checkpoint's weights."
    )


def warn_of_changes(folder: Path, run: Mapping[str, Any], args: CrossKDConfig) -> None:
    """Tell of images and settings that are others than those of checkpoint `folder`; they don't keep it from going on.

    Args:
        folder: The checkpoint.
        run: As of :func:`describe_run`, for the present run.
        args: Of the present run.
    """
    told = []
    for part, then in read(folder).get("images", {}).items():
        now = _plain(run["images"][part])
        names = sorted(
            name for name in {*(then or {}), *(now or {})} if (then or {}).get(name) != (now or {}).get(name)
        )
        told += [f"{part}: {name} {(then or {}).get(name)} -> {(now or {}).get(name)}" for name in names]
    saved, given = _object(folder / "training_args.json"), _plain(args.to_dict())
    told += _differences(saved, {name: given[name] for name in _TOLD if name in given})
    if told:
        logger.warning("The run goes on with other settings than %s had: %s", folder, "; ".join(told))


def check_update(folder: Path, update: Mapping[str, int]) -> None:
    """Raise `ValueError` if the updates of checkpoint `folder` were not like :func:`describe_update` of this run."""
    differing = _differences(read(folder), update)
    if differing:
        raise ValueError(
            f"{folder} was written with other updates ({'; '.join(differing)}): learning rate and place in the data "
            "would not fit. Choose per_device_train_batch_size x gradient_accumulation_steps x processes to give the "
            "same number of images, or start a new run from the checkpoint's weights."
        )


def check_optimizer(folder: Path, optimizer: Mapping[str, Any]) -> None:
    """Refuse to load the state of another optimiser.

    Args:
        folder: The checkpoint.
        optimizer: As of :func:`describe_optimizer`, for the present run.

    Raises:
        ValueError: Kind, schedule or groups of parameters differ.
    """
    differing = _differences(read(folder), {name: value for name, value in optimizer.items() if name != "settings"})
    if differing:
        raise ValueError(
            f"{folder} has the state of another optimiser ({'; '.join(differing)}). Give schedule, optim, "
            "lr_scheduler_type, backbone_lr, bias_lr_factor, bias_weight_decay and frozen parameters as the run had "
            "them, or start a new run from the checkpoint's weights."
        )


def _object(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint; raises ValueError, with its name, for anything else."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} can't be read ({error}): resume from an earlier checkpoint.") from error


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In words, for the entries that both have."""
    return [f"{name}: {then[name]} -> {value}" for name, value in now.items() if then.get(name, value) != value]


def _plain(value: Any) -> Any:
    """`value` as JSON gives it back; what JSON doesn't know is told in words."""
    return json.loads(json.dumps(value, default=str))
