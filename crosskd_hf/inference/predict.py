"""A saved detector on image files: detections, and pictures with them drawn in."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.class_names import class_names
from ..data.images import open_image
from ..text import strict_json
from .detection import detect
from .drawing import draw_objects
from .files import ImageFiles, find_images
from .speed import Speed, laid_out


@dataclass(frozen=True)
class Prediction:
    """What was found in one file.

    Args:
        file: Path below the given folder.
        picture: The image with what was found drawn on it; None if it can't be read, or is too narrow to be resized.
        record: `file`, `width`, `height` and `detections` (each `label`, `score` in [0, 1], `box` [x1, y1, x2, y2] in
            pixels; where there are none, `highest_score` of what lies below the threshold), or `file` and `error`;
            JSON-able.
    """

    file: Path
    picture: PIL.Image.Image | None
    record: dict[str, Any]


def predict(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    source: str | os.PathLike[str] | ImageFiles,
    threshold: float = 0.5,
    *,
    bf16: bool = False,
    channels_last: bool = False,
    fast: bool = False,
) -> Iterator[Prediction]:
    """Detect objects in an image, or in every image below a folder, one after the other.

    Args:
        model, processor: The detector.
        source: A file, a folder, or what `find_images` found there.
        threshold: Lowest score that is reported, in [0, 1].
        bf16, channels_last, fast: As of `Speed`.

    Raises:
        FileNotFoundError: There is no such file, or no image in the folder.
        ValueError: `channels_last` would have no effect.
    """
    found_files = source if isinstance(source, ImageFiles) else find_images(source)
    speed = Speed(bf16, channels_last, fast).on(model.device)
    with laid_out(model, speed):
        for path in found_files.files:
            yield _prediction(model, processor, path, path.relative_to(found_files.root), threshold, speed)


def _prediction(
    model: PreTrainedModel, processor: BaseImageProcessor, path: Path, file: Path, threshold: float, speed: Speed
) -> Prediction:
    """What is found in the image at `path`, which is told as `file`."""
    try:
        image = open_image(path, pixel_range=getattr(processor, "pixel_range", None))
        (result,) = detect(model, processor, [image], 0.0, speed)
    except (OSError, ValueError, PIL.Image.DecompressionBombError) as error:
        return Prediction(file, None, {"file": str(file), "error": str(error)})
    scores = result["scores"]
    highest = float(scores.max()) if len(scores) else 0.0
    result = {key: value[scores > threshold].cpu() for key, value in result.items()}
    names = dict(enumerate(class_names(model.config)))
    rows = zip(*(result[key].tolist() for key in ("labels", "scores", "boxes")), strict=True)
    found = [{"label": names[label], "score": score, "box": box} for label, score, box in rows]
    record = {"file": str(file), "width": image.width, "height": image.height, "detections": found}
    if not found:
        record["highest_score"] = highest
    return Prediction(file, draw_objects(image, result, names), record)


def predict_to_folder(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    source: str | os.PathLike[str] | ImageFiles,
    folder: str | os.PathLike[str],
    threshold: float = 0.5,
    *,
    bf16: bool = False,
    channels_last: bool = False,
    fast: bool = False,
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
    for prediction in predict(model, processor, files, threshold, bf16=bf16, channels_last=channels_last, fast=fast):
        records.append(prediction.record)
        if prediction.picture is not None:
            path = folder / prediction.file.parent / f"{prediction.file.name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            prediction.picture.save(path)
    (folder / "predictions.json").write_text(strict_json(records, indent=2) + "\n")
    return records
