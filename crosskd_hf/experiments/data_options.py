"""Options that say where the data lies: one folder, whatever its format, or a COCO json and a folder for each split."""

from dataclasses import dataclass

from ..data.dataset import DetectionData, load_coco
from ..data.loading import load_detection_dataset
from ..training.config import CrossKDConfig, option

_READING = ("one_based", "difficult", "bbox_format", "drop", "val_fraction")  # as of `load_detection_dataset`
PATHS = ("train_images", "train_annotations", "val_images", "val_annotations")


@dataclass
class DataOptions:
    """Where training and validation data lie.

    Raises:
        ValueError: Both ways are used, half of one, or an option that has no effect.
    """

    data: list[str] = option(
        [],
        "Folder, data.yaml, csv, json or Hub id of a data set in any known format; several are joined by class name.",
    )
    data_format: str | None = option(
        None, "Format of --data, if it holds several: coco, voc, yolo, csv, imagefolder, datasets."
    )
    one_based: bool | None = option(
        None, "VOC: the first pixel has the number 1. Default: in files whose <database> is PASCAL VOC's."
    )
    difficult: str | None = option(
        None, "VOC: `ignore` makes crowd regions of difficult objects, `keep` objects. Default: ignore."
    )
    bbox_format: str | None = option(
        None, "csv with one column for the box, imagefolder, datasets: xywh or xyxy, in px. Default: xywh."
    )
    drop: list[str] = option(
        [], "datasets: leave out rows with these faults, such as size-mismatch or broken-image, instead of stopping."
    )
    val_fraction: float | None = option(
        None, "Share of the images of --data that is drawn for validation if it has no such split. Default: 0.2."
    )
    train_images: str | None = option(None, "Folder of the training images, instead of --data.")
    train_annotations: str | None = option(None, "COCO-format json of the training images.")
    val_images: str | None = option(None, "Folder of the validation images.")
    val_annotations: str | None = option(None, "COCO-format json of the validation images.")
    decode_images: bool = option(
        True, "Decode every image before training, once until it changes; without, only headers and ends are looked at."
    )

    def __post_init__(self) -> None:
        given = [name for name in PATHS if getattr(self, name) is not None]
        if self.data and given:
            raise ValueError(f"Give --data or {', '.join('--' + name for name in given)}, not both.")
        if self.unread:
            raise ValueError(f"{', '.join('--' + name for name in self.unread)} has no effect without --data.")
        for split in ("train", "val"):
            if (getattr(self, f"{split}_annotations") is None) != (getattr(self, f"{split}_images") is None):
                raise ValueError(f"Give both of --{split}_annotations and --{split}_images, or neither.")

    @property
    def unread(self) -> list[str]:
        """Given options that say how to read data which are not given."""
        names = () if self.data else ("data_format", *_READING)
        return [name for name in names if getattr(self, name) not in (None, [])]

    def read_files(self, config: CrossKDConfig) -> tuple[DetectionData, DetectionData | None]:
        """Training and validation data; None if there is none to validate.

        Of several processes on a machine the first one alone decodes the images to check them.

        Raises:
            DataError: The data set is faulty. ValueError: No training data are given.
        """
        with config.main_process_first(desc="checking the images"):
            return self._read(self.decode_images and config.local_process_index == 0)

    def _read(self, decode: bool) -> tuple[DetectionData, DetectionData | None]:
        if self.data:
            given = {name: getattr(self, name) for name in _READING if getattr(self, name) is not None}
            data = load_detection_dataset(self.data, self.data_format, decode=decode, **given)
            if "train" not in data:
                raise ValueError(f"{data.source} has no training split, only {', '.join(data)}.")
            return data.train, data.val
        if self.train_annotations is None or self.train_images is None:
            raise ValueError("Give the training data: --data PATH, or --train_annotations and --train_images.")
        train = load_coco(self.train_annotations, self.train_images, decode=decode)
        if self.val_annotations is None or self.val_images is None:
            return train, None
        return train, load_coco(self.val_annotations, self.val_images, train.categories, decode)
