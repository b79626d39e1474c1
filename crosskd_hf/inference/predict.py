"""A saved detector on images and videos: detections, and pictures with them drawn in."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import PIL.Image
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.categories import CategoryMap
from ..data.class_names import class_names
from ..data.images import open_image
from ..text import strict_json
from .box_files import BOX_FORMATS
from .detection import detect
from .drawing import draw_objects
from .files import ImageFiles, find_images, is_video
from .speed import Speed, laid_out
from .video import VideoWriter, read_frames


@dataclass(frozen=True)
class Prediction:
    """What was found in one image, or in one frame of a video.

    Args:
        file: Path below the given folder.
        picture: The image with what was found drawn on it; None if it can't be read, or is too narrow to be resized.
        record: `file`, `width`, `height` and `detections` (each `label`, `score` in [0, 1], `box` [x1, y1, x2, y2] in
            pixels; where there are none, `highest_score` of what lies below the threshold), of videos also `frame`,
            counted from 0, and `time` in seconds; or `file` and `error`; JSON-able.
        rate: Of a video, frames a second.
    """

    file: Path
    picture: PIL.Image.Image | None
    record: dict[str, Any]
    rate: Fraction | None = None


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
    """Detect objects in an image or a video, or in all below a folder, one after the other.

    Args:
        model, processor: The detector.
        source: A file, a folder, a pattern, or what `find_images` or `open_sources` found there.
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
            yield from _of_file(model, processor, path, found_files.name_of(path), threshold, speed)


def _of_file(
    model: PreTrainedModel, processor: BaseImageProcessor, path: Path, file: Path, threshold: float, speed: Speed
) -> Iterator[Prediction]:
    """What is found in the image, or in the frames of the video, at `path`, which is told as `file`."""
    try:
        if is_video(path):
            for number, frame in enumerate(read_frames(path)):
                (result,) = detect(model, processor, [frame.image], 0.0, speed)
                moment = {"frame": number, "time": round(frame.time, 6)}
                yield _told(model, frame.image, result, {"file": str(file), **moment}, threshold, frame.rate)
        else:
            image = open_image(path, pixel_range=getattr(processor, "pixel_range", None))
            (result,) = detect(model, processor, [image], 0.0, speed)
            yield _told(model, image, result, {"file": str(file)}, threshold)
    except (OSError, ValueError, PIL.Image.DecompressionBombError) as error:
        yield Prediction(file, None, {"file": str(file), "error": str(error)})


def _told(
    model: PreTrainedModel,
    image: PIL.Image.Image,
    result: Mapping[str, Tensor],
    record: dict[str, Any],
    threshold: float,
    rate: Fraction | None = None,
) -> Prediction:
    scores = result["scores"]
    highest = float(scores.max()) if len(scores) else 0.0
    result = {key: value[scores > threshold].cpu() for key, value in result.items()}
    names = dict(enumerate(class_names(model.config)))
    rows = zip(*(result[key].tolist() for key in ("labels", "scores", "boxes")), strict=True)
    found = [{"label": names[label], "score": score, "box": box} for label, score, box in rows]
    record |= {"width": image.width, "height": image.height, "detections": found}
    if not found:
        record["highest_score"] = highest
    return Prediction(Path(record["file"]), draw_objects(image, result, names), record, rate)


def predict_to_folder(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    source: str | os.PathLike[str] | ImageFiles,
    folder: str | os.PathLike[str],
    threshold: float = 0.5,
    formats: Sequence[str] = (),
    *,
    bf16: bool = False,
    channels_last: bool = False,
    fast: bool = False,
) -> list[dict[str, Any]]:
    """Run :func:`predict`, and write a PNG for each image, an mp4 for each video and `predictions.json` into a folder.

    Args:
        model, processor, source, threshold: As there.
        folder: To write.
        formats: Of further files with the boxes: "coco" (`coco.json`), "yolo" (`data.yaml` and `labels/`), "csv"
            (`boxes.csv`).
        bf16, channels_last, fast: As of `Speed`.

    Returns:
        The records of all files; what lies in the folder already is left out. A picture has its image's name, suffix
        included: two images never share one.

    Raises:
        ValueError: There is no such format, or it has one name for two of the images.
    """
    unknown = [name for name in formats if name not in BOX_FORMATS]
    if unknown:
        raise ValueError(f"Boxes can't be written as {', '.join(unknown)}; choose of {', '.join(BOX_FORMATS)}.")
    folder = Path(folder)
    files = source if isinstance(source, ImageFiles) else find_images(source, without=folder)
    if "yolo" in formats:
        files.demand_own_stems()
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    speed = {"bf16": bf16, "channels_last": channels_last, "fast": fast}
    with _Pictures(folder) as pictures:
        for prediction in predict(model, processor, files, threshold, **speed):
            records.append(prediction.record)
            pictures.save(prediction)
    (folder / "predictions.json").write_text(strict_json(records, indent=2) + "\n")
    for name in dict.fromkeys(formats):
        BOX_FORMATS[name](records, CategoryMap.from_config(model.config), folder)
    return records


class _Pictures(ExitStack):
    """Writes what was drawn: a PNG for an image, one video for the frames of a video.

    Args:
        folder: To write.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self._folder = folder
        self._video: tuple[Path, VideoWriter] | None = None

    def save(self, prediction: Prediction) -> None:
        """Write a picture, if there is one. Frames come in their order, one video after the other."""
        if prediction.picture is None:
            return
        ending = ".png" if prediction.rate is None else ".mp4"
        path = self._folder / prediction.file.parent / f"{prediction.file.name}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if prediction.rate is None:
            prediction.picture.save(path)
            return
        if self._video is None or self._video[0] != path:
            self.close()
            self._video = path, self.enter_context(VideoWriter(path, prediction.rate))
        self._video[1].write(prediction.picture)
