"""The ways to store a detection data set. A new one is one file, and one entry here."""

from .coco import Coco
from .csv_table import Csv
from .folder import Folder
from .hub import Saved
from .image_folder import ImageFolder
from .raw import Format, Reading, ReadOptions
from .voc import Voc
from .yolo import Yolo

FORMATS: dict[str, Format] = {known.name: known for known in (Coco(), Voc(), Yolo(), Csv(), ImageFolder(), Saved())}
ALIASES = {"roboflow": "coco", "pascal_voc": "voc", "ultralytics": "yolo", "darknet": "yolo", "hub": "datasets"}

__all__ = ["ALIASES", "FORMATS", "Folder", "Format", "ReadOptions", "Reading"]
