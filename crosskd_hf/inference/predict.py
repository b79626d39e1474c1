"""A saved detector on files: AP on a COCO-format data set, and detections drawn on pictures."""

import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.categories import CategoryMap, match_categories
from ..data.class_names import class_names
from ..data.coco_json import read_coco
from ..data.dataset import load_coco
from ..data.images import open_image
from ..experiments.comparison import HEAD, TITLES, ap_metrics, ap_row, detect
from ..text import one_line, strict_json
from ..training.config import CrossKDConfig
from ..training.trainer import CrossKDTrainer
from .drawing import draw_objects
from .files import ImageFiles, find_images


def evaluate(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    annotations: str | os.PathLike[str],
    images: str | os.PathLike[str],
    batch_size: int = 8,
    workers: int = 0,
) -> dict[str, float]:
    """COCO AP of a model, as of `CocoEvaluator.compute`, in [0, 1].

    Args:
        model, processor: The detector.
        annotations, images: COCO-format json and its image folder; classes are matched by name.
        batch_size: Images at once.
        workers: Processes that read images.

    Raises:
        DataError: The data set is faulty. ValueError: It uses classes that the model doesn't know.
    """
    table = read_coco(annotations)
    used = {int(raw) for raw in table.annotation_categories}
    categories = match_categories(model.config, CategoryMap.from_coco(table.categories, used), used)
    data = load_coco(annotations, images, categories)
    model.config.category_ids = list(categories.raw_ids)
    with tempfile.TemporaryDirectory() as folder:
        args = CrossKDConfig(
            output_dir=folder,
            per_device_eval_batch_size=batch_size,
            dataloader_num_workers=workers,
            report_to="none",
        )
        trainer = CrossKDTrainer(model=model, args=args, eval_dataset=data.dataset, processing_class=processor)
        return ap_metrics(trainer.evaluate())


def table(metrics: Mapping[str, float]) -> str:
    """The COCO summary in percent, and AP of each class that has a truth."""
    classes = {key: value for key, value in metrics.items() if key not in TITLES and not math.isnan(value)}
    lines = [f"{100 * value:8.1f}  {one_line(key.removeprefix('map_'))}" for key, value in classes.items()]
    return "\n".join([HEAD, ap_row(metrics), *(["", "AP of each class", *lines] if lines else [])])


@dataclass(frozen=True)
class Prediction:
    """What was found in one file.

    Args:
        file: Path below the given folder.
        picture: The image with what was found drawn on it; None if it can't be read, or is too narrow to be resized.
        record: `file`, `width`, `height` and `detections` (each `label`, `score` in [0, 1], `box` [x1, y1, x2, y2] in
            pixels), or `file` and `error`; JSON-able.
    """

    file: Path
    picture: PIL.Image.Image | None
    record: dict[str, Any]


def predict(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    source: str | os.PathLike[str] | ImageFiles,
    threshold: float = 0.5,
) -> Iterator[Prediction]:
    """Detect objects in an image, or in every image below a folder, one after the other.

    Args:
        model, processor: The detector.
        source: A file, a folder, or what `find_images` found there.
        threshold: Lowest score that is reported, in [0, 1].

    Raises:
        FileNotFoundError: There is no such file, or no image in the folder.
    """
    found_files = source if isinstance(source, ImageFiles) else find_images(source)
    for path in found_files.files:
        file = path.relative_to(found_files.root)
        try:
            image = open_image(path, pixel_range=getattr(processor, "pixel_range", None))
            (result,) = detect(model, processor, [image], threshold)
        except (OSError, ValueError, PIL.Image.DecompressionBombError) as error:
            yield Prediction(file, None, {"file": str(file), "error": str(error)})
            continue
        result = {key: value.cpu() for key, value in result.items()}
        names = dict(enumerate(class_names(model.config)))
        rows = zip(*(result[key].tolist() for key in ("labels", "scores", "boxes")), strict=True)
        found = [{"label": names[label], "score": score, "box": box} for label, score, box in rows]
        record = {"file": str(file), "width": image.width, "height": image.height, "detections": found}
        yield Prediction(file, draw_objects(image, result, names), record)


def predict_to_folder(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    source: str | os.PathLike[str] | ImageFiles,
    folder: str | os.PathLike[str],
    threshold: float = 0.5,
) -> list[dict[str, Any]]:
    """Run :func:`predict`, and write a PNG for each image and `predictions.json` into a folder.

    Returns:
        The records of all files; what lies in the folder already is left out. A picture has its image's name, suffix
        included: two images never share one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    files = source if isinstance(source, ImageFiles) else find_images(source, without=folder)
    for prediction in predict(model, processor, files, threshold):
        records.append(prediction.record)
        if prediction.picture is not None:
            path = folder / prediction.file.parent / f"{prediction.file.name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            prediction.picture.save(path)
    (folder / "predictions.json").write_text(strict_json(records, indent=2) + "\n")
    return records


def to_device(model: PreTrainedModel, device: str | None = None) -> PreTrainedModel:
    """Move a model to a device; by default to the first accelerator, if there is one."""
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
