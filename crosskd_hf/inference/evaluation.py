"""COCO AP of a detector on a data set, outside of training."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils.logging import tqdm

from ..data.categories import CategoryMap, match_categories
from ..data.class_names import class_names, match_names
from ..data.coco_json import read_coco
from ..data.collators import EvaluationCollator
from ..data.dataset import DetectionData, load_coco
from ..data.sampling import ByShape
from ..models.normalization import Normalizer
from ..text import one_line
from .coco_evaluator import BY_IOU, SUMMARY, CocoEvaluator
from .coco_library import COUNTED
from .detection import detections, forward, handing_on, parts_of_one_canvas, to_device
from .speed import FLOAT32, Speed, running

TITLES = dict(zip(SUMMARY, ("AP", "AP50", "AP75", "APs", "APm", "APl"), strict=True))
HEAD = "".join(f"{title:>8s}" for title in TITLES.values())


def evaluate(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    annotations: str | os.PathLike[str],
    images: str | os.PathLike[str],
    *,
    batch_size: int = 8,
    workers: int = 0,
    bf16: bool = False,
    channels_last: bool = False,
    fast: bool = False,
    max_detections: int | None = None,
) -> dict[str, float]:
    """COCO AP of a model on a COCO json and its images: :func:`evaluate_data` of what `load_coco` reads.

    Args:
        model, processor, batch_size, workers, bf16, channels_last, fast, max_detections: As of :func:`evaluate_data`.
        annotations, images: COCO-format json and its image folder. A class without objects may be unknown to the model.

    Raises:
        DataError: The data set is faulty. ValueError: As of :func:`evaluate_data`.
    """
    table = read_coco(annotations)
    used = {int(raw) for raw in table.annotation_categories}
    categories = match_categories(model.config, CategoryMap.from_coco(table.categories, used), used)
    return evaluate_data(
        model,
        processor,
        load_coco(annotations, images, categories),
        batch_size=batch_size,
        workers=workers,
        bf16=bf16,
        channels_last=channels_last,
        fast=fast,
        max_detections=max_detections,
    )


def evaluate_data(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    data: DetectionData,
    *,
    batch_size: int = 8,
    workers: int = 0,
    bf16: bool = False,
    channels_last: bool = False,
    fast: bool = False,
    max_detections: int | None = None,
) -> dict[str, float]:
    """COCO AP of a model on a split, as of `CocoEvaluator.compute`, in [0, 1]; NaN where there is no truth.

    Classes are matched by name, in whatever order the data has them.

    Args:
        model, processor: The detector. It is moved to the first accelerator, if there is one, and left in evaluation
            mode.
        data: The split, such as `load_detection_dataset(...)["val"]`.
        batch_size: Images at once; AP doesn't depend on it.
        workers: Processes that read images; 0: this one.
        bf16, channels_last, fast: As of `Speed`.
        max_detections: So many detections of an image are evaluated, and if it is more than COCO's 100, so many of each
            class count. None: as many as the processor hands on, and 100.

    Raises:
        ValueError: The data uses classes that the model doesn't know, or an option would have no effect.
    """
    known = data.for_model(model.config, training=False)
    return detect_dataset(
        to_device(model),
        processor,
        known.dataset,
        known.categories,
        batch_size=batch_size,
        workers=workers,
        speed=Speed(bf16, channels_last, fast),
        max_detections=max_detections,
    ).compute()


def detect_dataset(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    dataset: datasets.Dataset,
    categories: CategoryMap,
    *,
    batch_size: int = 8,
    workers: int = 0,
    threshold: float = 0.0,
    reader: BaseImageProcessor | None = None,
    adapt: Callable[[Tensor, Tensor], Tensor] | None = None,
    speed: Speed = FLOAT32,
    max_detections: int | None = None,
) -> CocoEvaluator:
    """The detections of a data set beside its truth, whose `compute()` is COCO AP.

    Detections of classes that the data doesn't have are left out, classes that the model doesn't know are never found.

    Args:
        model: On its device, which is used; it is left in evaluation mode.
        processor: Resizes and normalises the images.
        dataset, categories: As made by `load_coco`.
        batch_size, workers, max_detections: As of :func:`evaluate_data`.
        threshold: Lowest score that is evaluated; AP is defined with 0.
        reader: The processor that reads the model's outputs, if it is another one.
        adapt: Makes of pixels (B, 3, H, W) and their mask (B, H, W) those that the model sees.
        speed: How the model runs.
    """
    evaluator = CocoEvaluator(dataset, categories, most=max_detections or COUNTED)
    reader = reader or processor
    if max_detections is not None:
        reader = handing_on(reader, max_detections)
    to_data = torch.tensor(match_names(class_names(model.config), categories.names).indices)
    loader = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_size,
        sampler=ByShape(dataset["width"], dataset["height"]),
        num_workers=workers,
        collate_fn=EvaluationCollator(processor, compact=True),
        pin_memory=model.device.type == "cuda",
    )
    normalize = Normalizer(processor)
    model.eval()
    with running(model, speed.on(model.device)):
        for batch in tqdm(loader, desc="evaluation", disable=None):
            labels: Sequence[Mapping[str, Any]] = batch.pop("labels")
            inputs = normalize({name: value.to(model.device) for name, value in batch.items()})
            if adapt is not None:
                inputs["pixel_values"] = adapt(inputs["pixel_values"], inputs["pixel_mask"])
            for part, its_labels in parts_of_one_canvas(inputs, labels):
                sizes = torch.stack([label["orig_size"] for label in its_labels])
                found = detections(reader, forward(model, part), sizes.to(model.device), threshold)
                evaluator.update(
                    [int(label["image_id"]) for label in its_labels], [_renamed(result, to_data) for result in found]
                )
    return evaluator


def _renamed(result: Mapping[str, Tensor], to_data: Tensor) -> dict[str, Tensor]:
    """A model's detections with the labels of the data, without those of classes that the data doesn't have."""
    labels = to_data[result["labels"].cpu()]
    keep = labels >= 0
    return {"scores": result["scores"].cpu()[keep], "labels": labels[keep], "boxes": result["boxes"].cpu()[keep]}


# ---- In words ----


def table(metrics: Mapping[str, float]) -> str:
    """The COCO summary in percent, and AP of each class that has a truth."""
    known = {*SUMMARY, *BY_IOU}
    classes = {key: value for key, value in metrics.items() if key not in known and not math.isnan(value)}
    lines = [f"{100 * value:8.1f}  {one_line(key.removeprefix('map_'))}" for key, value in classes.items()]
    return "\n".join([HEAD, ap_row(metrics), *(["", "AP of each class", *lines] if lines else [])])


def ap_row(metrics: Mapping[str, float]) -> str:
    """The COCO summary in percent, in the columns of `HEAD`."""
    return "".join(f"{100 * metrics[key]:8.1f}" for key in SUMMARY)


def ap_metrics(evaluation: Mapping[str, float]) -> dict[str, float]:
    """The AP values of what a trainer's `evaluate` returns, without its prefix; in [0, 1]."""
    return {key.removeprefix("eval_"): value for key, value in evaluation.items() if key.startswith("eval_map")}
