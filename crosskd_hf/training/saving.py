"""Steps of writing a checkpoint that several processes take together, its upload, and what may be resumed."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from huggingface_hub import HfApi
from safetensors.torch import load_model
from torch import nn
from transformers import TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import HubStrategy

from . import checkpoints, resumption
from .arguments import same_chance
from .config import CrossKDConfig
from .loading import has_adapters, load_fresh

TRAINING_WEIGHTS = "training_weights.safetensors"  # float32, where the student itself is an average or stored in half
AVERAGED_WEIGHTS = "averaged_weights.safetensors"  # float32, of a student that is stored in half
RUN_FILE = "run.yaml"  # settings of a run of the command line
_STATE = ["optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*", "trainer_state.json"]
LOCAL = ["_*", "checkpoint-*", RUN_FILE, "*.png"]  # of a run's folder: has paths of this machine, or shows the data
_NOT_THE_STUDENT = [*_STATE, resumption.FILE, TRAINING_WEIGHTS, AVERAGED_WEIGHTS]

logger = logging.getLogger(__name__)


def together(step: Callable[[], None], told: str, staging: Path | None) -> None:
    """Do a step of saving; if it fails in one process, clear up and raise in all, so that none waits for ever.

    Args:
        step: What this process does.
        told: The message, with `{}` for what failed.
        staging: Unfinished folder that this process removes after a failure.

    Raises:
        RuntimeError: The step failed in some process.
    """
    failure, cause = "", None
    try:
        step()
    except Exception as error:  # safetensors has error classes of its own
        failure, cause = f"{type(error).__name__}: {error}", error
    failures = [text for text in gather_object([failure]) if text]
    if not failures:
        return
    if staging is not None:
        shutil.rmtree(staging, ignore_errors=True)
    raise RuntimeError(told.replace("{}", failures[0])) from cause


def not_written(update: int) -> str:
    """What :func:`together` tells of a checkpoint."""
    return (
        f"The checkpoint of update {update} could not be written ({{}}). The earlier checkpoints are as they were: "
        "make room and resume from the last one."
    )


NOT_LOADED_AGAIN = (
    "The student can't be saved and loaded again, so no checkpoint of this run would be of use ({}). If there is room "
    "on the disk: layers that were replaced, shared or wrapped after the model was built belong into its class, where "
    "its config builds them; save_strategy='no' trains it without checkpoints."
)


def rehearse(save: Callable[[Path], None], model: Any, staging: Path) -> None:
    """Save a student once and load it again; what fails would fail at the first checkpoint, or when it is needed.

    Args:
        save: Writes the student into a folder.
        model: The student.
        staging: A folder that is made for it and removed.

    Raises:
        Exception: Whatever fails.
    """
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    save(staging)
    if not has_adapters(model):
        with same_chance():
            load_fresh(model, staging)
    shutil.rmtree(staging)


def write_state(state: TrainerState, path: Path) -> None:
    """Write `trainer_state.json` without the absolute path of the best checkpoint: `best_global_step` names it."""
    state = copy.copy(state)
    state.best_model_checkpoint = None
    state.save_to_json(str(path))


def find_best(state: TrainerState, run: Path, args: CrossKDConfig) -> None:
    """Note in a resumed `state` where its best checkpoint lies; with `load_best_model_at_end` forget a lost one."""
    if not state.best_global_step:
        return
    for folder in (run, Path(args.output_dir)):
        best = folder / f"checkpoint-{state.best_global_step}"
        if best.is_dir():
            state.best_model_checkpoint = str(best)
            return
    if args.load_best_model_at_end:
        logger.warning(
            "The best checkpoint so far, that of update %d (%s), is not in %s: the best one will be chosen among the "
            "evaluations from now on.",
            state.best_global_step,
            state.best_metric,
            run,
        )
        state.best_metric = state.best_global_step = None


def note_callback_states(state: TrainerState, callbacks: Sequence[Any]) -> None:
    """Put what callbacks want to be saved into `state`, in place of what it held."""
    found: dict[str, list[Any]] = {}
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            found.setdefault(type(callback).__name__, []).append(callback.state())
    states = {name: several if len(several) > 1 else several[0] for name, several in found.items()}
    state.stateful_callbacks = states  # type: ignore[assignment]


def upload(folder: Path, repository: str, args: CrossKDConfig) -> None:
    """Upload a checkpoint's student and, by `args.hub_strategy`, all of it. A Hub that fails doesn't stop the run.

    Args:
        folder: `checkpoint-N`.
        repository: Id on the Hub.
        args: Of the run.
    """
    if args.hub_strategy == HubStrategy.END:
        return
    number = folder.name.removeprefix("checkpoint-")
    options = {"repo_id": repository, "folder_path": str(folder), "token": args.hub_token}
    options |= {"commit_message": f"Update {number}", "revision": args.hub_revision}
    api = HfApi()
    try:
        api.upload_folder(**options, ignore_patterns=[*_NOT_THE_STUDENT, checkpoints.MANIFEST])
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = args.hub_strategy == HubStrategy.CHECKPOINT
            api.upload_folder(**options, path_in_repo="last-checkpoint" if last else folder.name)
    except Exception as error:  # of the Hub, of its client, of the network: each has classes of its own
        logger.warning(
            "%s could not be uploaded to %s (%s: %s). It is not lost, and the run goes on; the next checkpoint is "
            "uploaded again.", folder, repository, type(error).__name__, str(error).partition("\n")[0],
        )  # fmt: skip


def tell_of_end(folder: Path, state: TrainerState) -> None:
    """Warn of a run that has nothing left to do behind the checkpoint `folder`."""
    if state.global_step >= state.max_steps:
        logger.warning(
            "%s is of update %d, and the run has %d: nothing is left to train. More num_train_epochs or max_steps go "
            "on.", folder, state.global_step, state.max_steps,
        )  # fmt: skip


def load_if_there(model: nn.Module, folder: Path | None, name: str) -> None:
    """Load the float32 weights `name` of a checkpoint, if this is a resumed run and the checkpoint has such."""
    if folder is not None and (folder / name).is_file():
        load_model(model, folder / name, strict=True)


def check_average(folder: Path, decay: float | None) -> None:
    """A checkpoint's `model.safetensors` is the average in a run with `ema_decay`, and the trained weights without."""
    averaged = json.loads((folder / "training_args.json").read_text(encoding="utf-8"))["ema_decay"] is not None
    if averaged and decay is None:
        raise ValueError(f"{folder} belongs to a run with ema_decay: give it again to resume.")
    if not averaged and decay is not None:
        raise ValueError(
            f"{folder} belongs to a run without ema_decay: resume without it, or start a new run from its weights."
        )


def demand_meant(resume: str | bool | None, args: CrossKDConfig) -> None:
    """Raise `ValueError` if the settings name a checkpoint that `train` wasn't told of: the run would begin anew."""
    if resume is None and args.resume_from_checkpoint not in (None, False, "False"):
        raise ValueError(
            f"resume_from_checkpoint={args.resume_from_checkpoint!r} is in the settings, which Trainer doesn't read: "
            "trainer.train(resume_from_checkpoint=args.resume_from_checkpoint) goes on from it, "
            "train(resume_from_checkpoint=False) begins anew."
        )


def checkpoint_to_resume(run: Path, resume: str | bool | None) -> Path | None:
    """The folder to resume from, or None for a new run; command lines write True as a word.

    The first process reads the checkpoint and compares it with its manifest; the others take its answer.

    Raises:
        ValueError: In all processes: there is no such checkpoint, or its files are not those that were written.
    """
    if not resume or resume in ("False", "false"):
        return None
    answer: list[Any] = [None, ""]
    if PartialState().is_main_process:
        try:
            answer[0] = _whole_checkpoint(run, resume)
        except ValueError as error:
            answer[1] = str(error)
    broadcast_object_list(answer)
    if answer[1]:
        raise ValueError(answer[1])
    return Path(answer[0])


def _whole_checkpoint(run: Path, resume: str | bool) -> str:
    if resume is True or resume in ("True", "true"):
        last = checkpoints.last_checkpoint(run, contents=True)
        if last is None:
            raise ValueError(f"There is no complete checkpoint in {run}: call train() without resume_from_checkpoint.")
        return last
    found = checkpoints.fault(Path(str(resume)))
    if not Path(str(resume)).is_dir():
        found = "there is no such folder"
    elif found is not None and (inside := checkpoints.checkpoints(Path(str(resume)))):
        raise ValueError(
            f"{resume} is no checkpoint, it holds {', '.join(path.name for path in inside)}: resume from one of them, "
            f"such as {inside[-1]}."
        )
    if found is not None:
        raise ValueError(
            f"{resume} is no complete checkpoint of CrossKDTrainer: {found}. Resume from an earlier one, or with "
            "resume_from_checkpoint=True, which takes the newest that is whole. If you changed the file on purpose, "
            f"remove its entry from {checkpoints.MANIFEST}."
        )
    return str(resume)
