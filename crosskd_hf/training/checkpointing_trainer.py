"""`CheckpointingTrainer`: checkpoints that are whole or not there, averaged weights, and what goes to the Hub."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from accelerate.utils import extract_model_from_parallel
from huggingface_hub import HfApi
from safetensors.torch import save_model
from torch import nn
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..data.class_names import class_names
from ..inference.precision import as_stored, widen
from ..sources import asking_the_hub
from . import checkpoints, layout, provenance, resumption, run_folder, saving, termination, upstream
from .attempts import StartingPoint
from .coco_trainer import CocoTrainer
from .ema import WeightAverage
from .loading import bare_model, has_adapters, load_student
from .model_card import CardContent, model_card
from .saving import AVERAGED_WEIGHTS, TRAINING_WEIGHTS
from .trained_weights import demand_trainable

logger = logging.getLogger(__name__)


class CheckpointingTrainer(CocoTrainer):
    """Every checkpoint and the final folder hold a plain model that `from_pretrained` loads, and no pickle of classes.

    With `ema_decay` that model, and the one that is evaluated, has the averaged weights; the trained ones lie beside
    it. A student stored in half precision is trained in float32 and saved in its own type; a checkpoint holds the
    float32 weights too. A subclass adds its own files by `_save_beside`, and `_provenance` for the card.
    """

    ema: WeightAverage | None = None
    _stored_types: Mapping[str, torch.dtype] = MappingProxyType({})
    _resumed: Path | None = None  # the checkpoint that this run goes on from
    _start: StartingPoint | None = None
    _written: Sequence[Path] = ()  # checkpoints of the present attempt
    _run: Mapping[str, Any] = MappingProxyType({})
    _pushed = False
    _group_settings: Sequence[Mapping[str, Any]] = ()

    # ---- Run ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As of `Trainer`; incomplete checkpoints are passed over, and those of another teacher refused.

        Args:
            resume_from_checkpoint: Folder of a checkpoint, or True for the newest complete one in `output_dir`.
            trial, ignore_keys_for_eval: As of `Trainer`.

        Raises:
            ValueError: There is no such checkpoint, it is damaged or holds weights only, or it belongs to a run with
                another teacher, other data, updates or another optimiser.
            RunFolderError: `output_dir` can't be written, or another run writes into it.
            NonFiniteLossError: A loss part became NaN or infinite.
            SystemExit: SIGTERM came, and a checkpoint was saved (unless `save_strategy="no"`).
        """
        run, args = Path(self.args.output_dir), self.args
        if trial is None:
            saving.demand_meant(resume_from_checkpoint, args)
        its_folder = Path(upstream.trial_folder(self, trial))
        with run_folder.held(its_folder, args.should_save, args.save_strategy != "no"):
            if args.should_save:
                checkpoints.recover(run)
            self.accelerator.wait_for_everyone()
            made = self.processing_class, self._train_transform
            self._run = resumption.describe_run(args, self.train_dataset, *made)
            folder = saving.checkpoint_to_resume(run, resume_from_checkpoint)
            if folder is not None:
                resumption.check_files(folder)
                self._check_resume(folder)
            self._resumed, self._start, self._written = folder, None, ()
            if self.model is not None:  # it is None between the trials of a search for hyperparameters
                demand_trainable(self.model)
                self._stored_types = widen(self.model) or self._stored_types
            self._forget_preparation()
            with termination.watched(self, lambda: self._save_checkpoint(self.model, trial)):
                return super().train(None if folder is None else str(folder), trial, ignore_keys_for_eval)

    def _check_resume(self, folder: Path) -> None:
        """Raise `ValueError` if this run can't go on from the complete checkpoint `folder`."""
        resumption.check_state(folder, self.accelerator.scaler is not None)
        saving.check_average(folder, self.args.ema_decay)
        resumption.check_run(folder, self._run, self.args.ignore_data_skip)
        resumption.warn_of_changes(folder, self._run, self.args)
        if not self.args.auto_find_batch_size:  # which goes on with the size that it found, and is checked then
            resumption.check_update(folder, self._update())

    def _update(self) -> dict[str, int]:
        return resumption.describe_update(self.args, upstream.micro_batch_size(self))

    def _forget_preparation(self) -> None:
        """Let a model that `evaluate` prepared be wrapped for training; accelerate would leave it as it is."""
        if self.model is None:  # between the trials of a search for hyperparameters
            return
        if self.model_wrapped is self.model and upstream.is_prepared(self.model):
            extract_model_from_parallel(self.model, keep_fp32_wrapper=False)
            upstream.forget_preparation(self.model)

    # ---- Averaged weights ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As of `CocoTrainer`, over float32 weights. `auto_find_batch_size` begins each of its attempts here."""
        self._stored_types = widen(self.model) or self._stored_types
        if self._start is not None:
            self._start.restore()
            self._give_up_checkpoints()
        elif self.args.auto_find_batch_size:
            self._start = StartingPoint(self._trained_modules())
        optimizer = super().create_optimizer(model)
        if self.args.channels_last:
            layout.keep_contiguous_in_files(optimizer)
        return optimizer

    def _give_up_checkpoints(self) -> None:
        """Remove what an attempt that ran out of memory has saved: its updates had another number of images.

        A resumed run will be refused for just that reason, and keeps what it has.
        """
        if self._resumed is not None or not self.args.should_save:
            return
        for folder in filter(Path.is_dir, self._written):
            logger.warning("%s is removed: it belongs to the attempt that ran out of memory.", folder)
            checkpoints.remove(folder)
        self._written = ()

    def _trained_modules(self) -> list[nn.Module]:
        return [self.model]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As of `CocoTrainer`; the last moment before a checkpoint's optimiser is loaded."""
        self._group_settings = resumption.group_settings(self.optimizer)
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self._resumed is not None:
            resumption.check_optimizer(self._resumed, self._describe_optimizer())
        return scheduler

    def _describe_optimizer(self) -> dict[str, Any]:
        return resumption.describe_optimizer(self.optimizer, self.lr_scheduler, self._group_settings)

    def _begin_training(self) -> None:
        super()._begin_training()
        if self._resumed is not None:
            resumption.check_update(self._resumed, self._update())
            resumption.adopt_settings(self._resumed, self.optimizer, self.lr_scheduler, self._group_settings)
        saving.load_if_there(self.model, self._resumed, AVERAGED_WEIGHTS)
        if self.args.ema_decay is not None:
            self.ema = WeightAverage(self.model, self.args.ema_decay, self.state.global_step)
        saving.load_if_there(self.model, self._resumed, TRAINING_WEIGHTS)
        if self._resumed is not None:
            saving.find_best(self.state, self._resumed.parent, self.args)
            saving.tell_of_end(self._resumed, self.state)
        if self.args.save_strategy != "no":
            self._rehearse()

    def _rehearse(self) -> None:
        """Save and load the student before the first update, as every checkpoint will be."""
        staging = Path(self.args.output_dir, f"{checkpoints.SAVING}checkpoint-0")  # `recover` knows such folders

        def step() -> None:
            if self.args.should_save:
                saving.rehearse(self._save_student, self.model, staging)

        saving.together(step, saving.NOT_LOADED_AGAIN, staging if self.args.should_save else None)

    def _end_training(self) -> None:
        super()._end_training()
        if self.ema is not None:
            self.ema.copy_to(self.model)
            self.ema = None

    def _after_optimizer_step(self) -> None:
        super()._after_optimizer_step()
        if self.ema is not None:
            self.ema.update(self.model)

    def _as_student(self) -> AbstractContextManager[None]:
        """Inside of it the model holds the weights that count: the averaged ones, if there is an average."""
        return nullcontext() if self.ema is None else self.ema.swapped(self.model)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As of `CocoTrainer`, with the weights that count."""
        with self._as_student():
            return super().evaluation_loop(*args, **kwargs)

    # ---- Saving and loading ----

    @property
    def _public(self) -> bool:
        """Whether others will see what is saved: adapters in a folder of this machine name the one of their base."""
        return self._pushed or bool(self.args.push_to_hub)

    def _save_student(self, folder: Path) -> None:
        """Write the student and what lies beside it. Only the process that saves does anything."""
        if not self.args.should_save:
            return
        with as_stored(self.model, self._stored_types):
            self.model.save_pretrained(folder)
        if self._public and has_adapters(self.model):
            provenance.hide_base(folder, bare_model(self.model))
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        (folder / "training_args.json").write_text(self.args.to_json_string() + "\n", encoding="utf-8")
        self._save_beside(folder)

    def _save_beside(self, folder: Path) -> None:
        """Write what belongs to the run, not to the student, into the folder of its weights."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student with its model card. Files appear whole: each one replaces its predecessor in one move."""
        if self.args.should_save:
            folder = Path(self.args.output_dir if output_dir is None else output_dir)
            with checkpoints.replaced(folder) as staging, self._as_student():
                self._save_student(staging)
                (staging / "README.md").write_text(str(self._card()), encoding="utf-8")
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write `checkpoint-N` under another name, rename it when it is complete, then drop the oldest ones."""
        self.store_flos()
        run = Path(upstream.trial_folder(self, trial))
        folder = run / f"checkpoint-{self.state.global_step}"
        staging = run / f"{checkpoints.SAVING}{folder.name}"
        steps: tuple[Callable[[], None], ...] = (
            lambda: self._begin_checkpoint(staging, folder),
            lambda: self._write_checkpoint(staging),
            lambda: self._end_checkpoint(staging, folder),
        )
        for step in steps:
            told = saving.not_written(self.state.global_step)
            saving.together(step, told, staging if self.args.should_save else None)
        if self.args.push_to_hub and self.is_world_process_zero():
            saving.upload(folder, str(self.hub_model_id), self.args)  # waits: the folder may be rotated away

    def _begin_checkpoint(self, staging: Path, folder: Path) -> None:
        best = self.state.best_global_step
        best_folder = folder.with_name(f"checkpoint-{best}")
        if best and (best_folder == folder or best_folder.is_dir()):
            self.state.best_model_checkpoint = str(best_folder)
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)

    def _write_checkpoint(self, staging: Path) -> None:
        with self._as_student():
            self._save_student(staging)
        if self.args.save_only_model:
            return
        if self.args.should_save:
            self._save_exact_weights(staging)
            resumption.write(staging, {**self._run, **self._update(), **self._describe_optimizer()})
        upstream.save_training_state(self, str(staging))

    def _save_exact_weights(self, folder: Path) -> None:
        """What `model.safetensors` doesn't hold of the trained weights and their average."""
        if self.ema is not None and self._stored_types:
            with self._as_student():
                save_model(self.model, str(folder / AVERAGED_WEIGHTS))
        if self.ema is not None or self._stored_types:
            save_model(self.model, str(folder / TRAINING_WEIGHTS))

    def _end_checkpoint(self, staging: Path, folder: Path) -> None:
        if not self.args.should_save:
            return
        saving.note_callback_states(self.state, [*self.callback_handler.callbacks, self.control])
        saving.write_state(self.state, staging / "trainer_state.json")
        checkpoints.write_manifest(staging)
        checkpoints.publish(staging, folder)
        self._written = [*self._written, folder]
        checkpoints.rotate(folder.parent, self.args.save_total_limit, self.state.best_model_checkpoint)

    def save_state(self) -> None:
        """Write `trainer_state.json` into `output_dir`, as `Trainer` does, without paths of this machine."""
        if self.is_world_process_zero():
            saving.write_state(self.state, Path(self.args.output_dir, "trainer_state.json"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_student(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        logger.info("Best model: %s (%s)", best, self.state.best_metric)
        if (found := checkpoints.fault(best)) is not None:
            raise RuntimeError(
                f"The best checkpoint {best} is damaged: {found}. The student of the last update is not lost: "
                f"it lies in {checkpoints.last_checkpoint(best.parent, contents=True)}."
            )
        self.ema = None  # that checkpoint holds averaged weights already
        load_student(self.model, best)

    # ---- Hub ----

    def init_hf_repo(self, token: str | None = None, **kwargs: Any) -> None:
        """As of `Trainer`, which makes the repository when it is built with `push_to_hub`.

        Raises:
            OSError: It can't be made or reached.
        """
        folder = Path(self.args.output_dir)
        name = self.args.hub_model_id or folder.absolute().name
        with asking_the_hub(
            f"The repository {name!r} (push_to_hub, hub_model_id) can't be made or reached on the Hub",
            "Log in by `hf auth login` or give hub_token, and look at the name and the network; or train without "
            f"push_to_hub and push what is in {folder} afterwards, by trainer.push_to_hub().",
        ):
            super().init_hf_repo(token, **kwargs)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As of `Trainer`; what tells of this machine or shows the data (`saving.LOCAL`) is not uploaded.

        Args:
            commit_message, blocking, token, revision, private: As of `Trainer.push_to_hub`.
            kwargs: Of :meth:`create_model_card`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        if self.hub_model_id is None:
            self.args.hub_private_repo = self.args.hub_private_repo if private is None else private
            self.init_hf_repo(token=token)
        self._pushed = True
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        tags = kwargs.pop("tags", None)
        tags = [*(getattr(self.model, "model_tags", None) or ()), *([tags] if isinstance(tags, str) else tags or ())]
        name = str(self.hub_model_id).rpartition("/")[2]
        self.create_model_card(**{"model_name": name, "tags": tags} | kwargs)
        options: dict[str, Any] = {"repo_id": str(self.hub_model_id), "folder_path": self.args.output_dir}
        options |= {"commit_message": commit_message, "token": token, "run_as_future": not blocking}
        options["revision"] = self.args.hub_revision if revision is None else revision
        with asking_the_hub(
            f"The student could not be uploaded to {self.hub_model_id}",
            f"Nothing is lost, all of it lies in {self.args.output_dir}: call push_to_hub() once more.",
        ):
            return HfApi().upload_folder(**options, ignore_patterns=saving.LOCAL)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write `README.md` into `output_dir`, as of `Trainer`.

        Raises:
            ValueError: Another task than the detection of objects, or `dataset_args`, for which a card has no place.
        """
        if _listed(tasks) not in ([], ["object-detection"]) or dataset_args:
            raise ValueError(
                f"tasks={tasks!r} and dataset_args={dataset_args!r} have no place on the card of a detector: leave "
                "them out; dataset='...' is the name of the data, dataset_tags='OWNER/NAME' their id on the Hub."
            )
        if self.is_world_process_zero():
            given: dict[str, Any] = {"license": license, "tags": _listed(tags), "model_name": model_name}
            given |= {"language": language, "base": finetuned_from, "data_ids": _listed(dataset_tags)}
            card = self._card(**given, dataset=", ".join(_listed(dataset)) or None)
            Path(self.args.output_dir, "README.md").write_text(str(card), encoding="utf-8")

    def _card(
        self,
        license: str | None = None,
        tags: Sequence[str] = (),
        model_name: str | None = None,
        dataset: str | None = None,
        **more: Any,
    ) -> Any:
        record = self._provenance()
        return model_card(
            CardContent(
                name=model_name or Path(self.args.output_dir).absolute().name,
                architecture=type(bare_model(self.model)).__name__,
                metrics=self._metrics_of_these_weights(),
                dataset=dataset or self.args.dataset_name or "evaluation data",
                model_id=self.hub_model_id or Path(self.args.output_dir).name,
                license=license or self.args.license,
                teacher=provenance.hub_id(record),
                provenance=record,
                tags=tags,
                own_code=not type(self.model).__module__.startswith("transformers."),
                classes=class_names(bare_model(self.model).config),
                training=self._settings_of_the_card(),
                **more,
            )
        )

    def _settings_of_the_card(self) -> dict[str, str]:
        images = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        size = getattr(self.processing_class, "size", None)
        shown = {
            "training images": str(len(self.train_dataset)) if isinstance(self.train_dataset, Sized) else "",
            "updates": f"{self.state.global_step} of {images} images" if self.state.global_step else "",
            "learning rate": f"{self.args.learning_rate:g}",
            "seed": str(self.args.seed),
            "image size": ", ".join(f"{name} {value}" for name, value in dict(size or {}).items() if value),
            "versions": f"transformers {transformers.__version__}, torch {torch.__version__}",
        }
        return {name: value for name, value in shown.items() if value}

    def _provenance(self) -> dict[str, Any] | None:
        """Where the student's knowledge comes from beside the labels, as of `provenance.describe`."""
        return None

    def _metrics_of_these_weights(self) -> dict[str, float]:
        """The evaluation of the best checkpoint, if that is what was loaded, or else the last one."""
        evaluations = [entry for entry in self.state.log_history if "eval_map" in entry]
        if self.args.load_best_model_at_end and self.state.best_global_step:
            best = [entry for entry in evaluations if entry["step"] == self.state.best_global_step]
            evaluations = best or evaluations
        return evaluations[-1] if evaluations else {}


def _listed(names: str | Sequence[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())
