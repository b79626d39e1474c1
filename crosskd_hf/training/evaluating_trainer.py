"""`EvaluatingTrainer`: Hugging Face's `Trainer` whose evaluation is COCO AP."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from transformers import EvalPrediction, Trainer
from transformers.trainer_utils import EvalLoopOutput, denumpify_detensorize

from ..data.categories import CategoryMap
from ..data.class_names import class_names
from ..data.sampling import ByShape
from ..inference.coco_evaluator import CocoEvaluator
from ..inference.detection import detections, forward, parts_of_one_canvas
from ..inference.precision import widened
from ..models.normalization import Normalizer
from . import arguments
from .best_metric import adds_metrics, check_metric
from .classes import check_classes
from .config import CrossKDConfig
from .loading import bare_model
from .predictions import Kept, KeptPredictions

logger = logging.getLogger(__name__)


class EvaluatingTrainer(Trainer):
    """Detections of every batch go to a `CocoEvaluator`, over all processes; nothing else is kept of them."""

    args: CrossKDConfig
    _own_collator = False  # whether the user gave the collator
    _kept: KeptPredictions | None = None
    _detections: CocoEvaluator | None = None

    @cached_property
    def _evaluators(self) -> dict[int, tuple[Any, CocoEvaluator]]:
        return {}

    @cached_property
    def _normalize(self) -> Normalizer:
        return Normalizer(self.processing_class)

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        """The batch on the device, uint8 pixels normalised there."""
        return self._normalize(super()._prepare_inputs(inputs))

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] = "maximize",
        backend: Any = None,
        hp_name: Callable[[Any], str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As of `Trainer`, but the highest `metric_for_best_model` (`eval_map`) is looked for.

        `Trainer` would look for the lowest sum of all metrics.

        Raises:
            ValueError: Evaluation doesn't give that metric.
        """
        metric = self.args.metric_for_best_model or "eval_map"
        if compute_objective is None:
            names = class_names(bare_model(self.model).config)
            others = adds_metrics(type(self), self.compute_metrics, self.callback_handler.callbacks)
            check_metric(metric, self.eval_dataset, names, others=others)
            metric = f"eval_{metric.removeprefix('eval_')}"

        def objective(metrics: dict[str, float]) -> float:
            return metrics[metric]

        chosen = compute_objective or objective
        return super().hyperparameter_search(hp_space, chosen, n_trials, direction, backend, hp_name, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """COCO AP: `<prefix>_map`, `_map_50`, `_map_75`, `_map_small`, `_map_medium`, `_map_large`, `_map_<class>`."""
        evaluator = self._detections = self._evaluator(dataloader.dataset)
        evaluator.reset()
        self._kept = None if self.compute_metrics is None else KeptPredictions(self.preprocess_logits_for_metrics)
        with widened(self.model):
            output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        for rows in gather_object([evaluator.rows]):
            evaluator.merge(rows)
        others = [] if self._kept is None else self._kept.gathered(len(dataloader.dataset))
        metrics = [evaluator.compute() | self._other_metrics(others) if self.args.process_index == 0 else None]
        broadcast_object_list(metrics)
        rows, self._detections, self._kept = evaluator.rows, None, None
        prefix = f"{metric_key_prefix}_"
        found = {prefix + name.removeprefix(prefix): value for name, value in (metrics[0] or {}).items()}
        output.metrics.update(found)
        return output._replace(predictions=rows)

    def _other_metrics(self, batches: list[Kept]) -> dict[str, float]:
        """What `compute_metrics` makes of the kept batches; with `batch_eval_metrics` it is called for each."""
        if self.compute_metrics is None:
            return {}
        if not self.args.batch_eval_metrics:
            predictions, labels = [batch[0] for batch in batches], [batch[1] for batch in batches]
            return _of_user(self.compute_metrics(EvalPrediction(predictions, labels)))
        metrics: dict[str, float] = {}
        for number, batch in enumerate(batches, start=1):
            metrics = self.compute_metrics(EvalPrediction(*batch), compute_result=number == len(batches))
        return _of_user(metrics)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, None, None]:
        """Detections of one batch go straight to the evaluator; nothing else is kept."""
        assert self._detections is not None
        if self.processing_class is None:
            raise ValueError(arguments.NEEDS_PROCESSOR)
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"] if self._kept is not None else inputs.pop("labels")
        if self._kept is not None:
            self._kept.begin_batch()
        for part, its_labels in parts_of_one_canvas(inputs, labels):
            outputs = forward(model, part)
            if self._kept is not None:
                self._kept.add(outputs, its_labels, ignore_keys or self.model.config.keys_to_ignore_at_inference)
            sizes = torch.stack([label["orig_size"] for label in its_labels])
            image_ids = [int(label["image_id"]) for label in its_labels]
            if self._own_collator:
                self._detections.demand_sizes(image_ids, sizes)
            results = detections(self.processing_class, outputs, sizes, self.args.eval_threshold)
            self._detections.update(image_ids, results)
        return None, None, None

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Images of one padded size together; for `compute_metrics` and with a user's own collator as of `Trainer`."""
        columns = getattr(eval_dataset, "column_names", None) or ()
        if self.compute_metrics is not None or self._own_collator or not {"width", "height"} <= set(columns):
            return super()._get_eval_sampler(eval_dataset)
        return ByShape(eval_dataset["width"], eval_dataset["height"])

    def _evaluator(self, dataset: Any) -> CocoEvaluator:
        """The evaluator of a data set; its truth is read once."""
        known = self._evaluators.get(id(dataset))
        if known is not None and known[0] is dataset:
            return known[1]
        arguments.check_truth(dataset)
        given = self.eval_dataset
        if not any(dataset is one for one in (given.values() if isinstance(given, Mapping) else (given,))):
            check_classes(bare_model(self.model), None, dataset)
        evaluator = CocoEvaluator(dataset, CategoryMap.from_config(self.model.config))
        self._evaluators[id(dataset)] = (dataset, evaluator)
        return evaluator


def _of_user(metrics: Any) -> dict[str, float]:
    """What `compute_metrics` returned as plain numbers; nothing of it stops a run."""
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        logger.warning("compute_metrics returned a %s, no dict of numbers by name: left out.", type(metrics).__name__)
        return {}
    return dict(denumpify_detensorize(dict(metrics)))
