"""What scripts that run a `Comparison` share: options of the data and the steps, and reading or making the data."""

from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import load_dataset

from ..data.dataset import DetectionData, load_objects
from ..data.shapes import ShapesPaths, make_shapes
from ..data.transforms import TrainTransform
from ..training.config import AUTHORS, CrossKDConfig, option
from .data_options import PATHS, DataOptions
from .presets import Model, preset

STEPS = ("teacher", "baseline", "distilled")


@dataclass
class ComparisonOptions(DataOptions):
    """What is trained on what; synthetic images of shapes, if no data is given.

    Raises:
        ValueError: Some paths of the data but not all, an unknown step or preset, a preset without the paths of its
            data, or nothing to distil from.
    """

    steps: list[str] = option([*STEPS], f"Which of {', '.join(STEPS)}.")
    student: str | None = option(None, "Go on with this folder or Hub id: its weights, classes and image processor.")
    student_backbone: str = option("resnet18", "timm backbone of a new student.")
    teacher: str | None = option(None, "Folder or Hub id of a trained teacher.")
    teacher_backbone: str = option("resnet50", "timm backbone of a teacher to be trained.")
    teacher_epochs: float | None = option(None, "Epochs of a teacher to be trained, if other than the student's.")
    shortest_edge: int = option(800, "Shorter side of images in pixels.", AUTHORS)
    longest_edge: int = option(1333, "Longest side of images in pixels; it wins over the shorter one.", AUTHORS)
    multi_scale: list[int] = option([], "Shorter sides to draw from in training.")
    num_synthetic_images: int = option(
        400,
        "Training images of the synthetic data set; a quarter as many for validation.",
        aliases=["--num_made_images"],
    )
    preset: str | None = option(None, "A published experiment, see docs/reproduce.md; needs its data and its teacher.")

    def __post_init__(self) -> None:
        self._check_preset()
        missing = self.missing_paths()
        if not self.data and 0 < len(missing) < len(PATHS):
            raise ValueError(f"Give all of {', '.join('--' + name for name in PATHS)}; missing: {', '.join(missing)}.")
        self.steps = ["baseline" if step == "alone" else step for step in self.steps]  # its name until 0.1
        unknown = [step for step in self.steps if step not in STEPS]
        if unknown:
            raise ValueError(f"--steps {' '.join(unknown)}: choose from {', '.join(STEPS)}.")
        if "distilled" in self.steps and "teacher" not in self.steps and self.teacher is None:
            raise ValueError("--steps distilled needs a teacher: add the step 'teacher', or give --teacher.")
        super().__post_init__()

    def _check_preset(self) -> None:
        if self.preset is not None and self.missing_paths():
            needed = ", ".join("--" + name for name in PATHS)
            data = {"coco": "COCO", "voc": "PASCAL VOC"}[preset(self.preset).training.data]
            raise ValueError(f"--preset {self.preset} is an experiment on {data}: give {needed}.")

    def check_push(self, config: CrossKDConfig) -> None:
        """What is pushed is the distilled student, and nothing else.

        Raises:
            ValueError: `--push_to_hub` without the step that makes it.
        """
        if config.push_to_hub and "distilled" not in self.steps:
            raise ValueError(
                f"--push_to_hub pushes the distilled student, but --steps {' '.join(self.steps)} makes none: add the "
                "step 'distilled', or leave --push_to_hub out."
            )

    def missing_paths(self) -> list[str]:
        """Names of the paths that were not given; none, if `data` is."""
        return [] if self.data else [name for name in PATHS if getattr(self, name) is None]

    @property
    def published_model(self) -> Model | None:
        """The student of the preset; None without a preset."""
        return None if self.preset is None else preset(self.preset).model

    @property
    def image_size(self) -> dict[str, int]:
        """The `size` of an image processor."""
        return {"shortest_edge": self.shortest_edge, "longest_edge": self.longest_edge}

    @property
    def transform(self) -> TrainTransform:
        """The training augmentation."""
        if self.preset is not None:
            return preset(self.preset).training.transform(self.multi_scale, self.longest_edge)
        return TrainTransform(shortest_edges=self.multi_scale, longest_edge=self.longest_edge)

    def read_data(self, config: CrossKDConfig) -> tuple[DetectionData, DetectionData]:
        """Training and validation data; without paths, synthetic ones in the folder `shapes` of `output_dir`."""
        shapes = vars(self._make_shapes(config)) if self.missing_paths() else None
        source = self if shapes is None else DataOptions(**{name: str(shapes[name]) for name in PATHS})  # type: ignore[arg-type]
        train, val = source.read_files(config)
        if val is None:
            raise ValueError("A comparison needs validation data, and there is none.")
        if self.preset is not None:
            published = preset(self.preset).training
            train = train.for_training(published.drop_empty, published.min_side).repeated(published.repeat)
        return train, val

    def _make_shapes(self, config: CrossKDConfig) -> ShapesPaths:
        torch.set_num_threads(1)  # tiny nets on a few cores: more threads would only wait for each other
        folder = Path(config.output_dir) / "shapes"
        with config.main_process_first(desc="making images"):
            if config.local_process_index == 0:
                train = self.num_synthetic_images
                make_shapes(folder, train, num_val=max(1, train // 4), size=self.longest_edge)
        return ShapesPaths.below(folder)


@dataclass
class DenseOptions(ComparisonOptions):
    """Options of examples/distill_coco.py: dense detectors and Faster R-CNN.

    Raises:
        ValueError: As :class:`ComparisonOptions`, or a file of weights for no preset.
    """

    detector: str = option("gfl", "Architecture of new models: gfl, retinanet, fcos, atss, tood, faster_rcnn.")
    teacher_detector: str | None = option(None, "Architecture of a new teacher, if another.")
    backbone_weights: str | None = option(
        None, "'timm' (downloads), a tag or a file of timm; without, backbones start random."
    )
    width: int = option(256, "Channels of pyramid and towers of new models.", AUTHORS)
    fixed_canvas: bool = option(
        False, "Pad all images to one square: then a loss does not depend on which images share a batch."
    )
    backbone_checkpoint: str | None = option(None, "File of backbone weights for a preset, instead of the published.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset is None and self.backbone_checkpoint is not None:
            raise ValueError("--backbone_checkpoint is for a --preset; other models take --backbone_weights.")

    @property
    def published_model(self) -> Model | None:
        """As of :class:`ComparisonOptions`; a given file counts as weights."""
        return None if self.preset is None else preset(self.preset).model.starting_from(self.backbone_checkpoint)


@dataclass
class DetrOptions(ComparisonOptions):
    """Options of examples/distill_deformable_detr.py: models of the DETR family. See :class:`ComparisonOptions`."""

    dataset: str | None = option(None, "Hub data set with image and objects, instead of files.")
    train_split: str = option("train", "Split of the Hub data set to train on.")
    val_split: str = option("validation", "Split of the Hub data set to evaluate on.")
    backbone_weights: str | None = option(None, "'timm': pretrained backbones (downloads).")
    d_model: int = option(256, "Width of new transformers.", "Deformable DETR (ICLR 2021)")
    feature_levels: int = option(4, "Levels of new models; those of the teacher.", "Deformable DETR (ICLR 2021)")
    encoder_layers: int = option(6, "Encoder layers of new models.", "Deformable DETR (ICLR 2021)")
    decoder_layers: int = option(6, "Decoder layers of new models.", "Deformable DETR (ICLR 2021)")
    num_queries: int = option(300, "Queries of new models.", "Deformable DETR (ICLR 2021)")

    @property
    def unread(self) -> list[str]:
        """As of :class:`DataOptions`; rows of `dataset` are read by two of the options."""
        read = () if self.dataset is None else ("bbox_format", "drop")
        return [name for name in super().unread if name not in read]

    def read_data(self, config: CrossKDConfig) -> tuple[DetectionData, DetectionData]:
        """Training and validation data: from the Hub, from a COCO folder, or synthetic."""
        if self.dataset is None:
            return super().read_data(config)
        splits, bbox_format = load_dataset(self.dataset), self.bbox_format or "xywh"
        train = load_objects(splits[self.train_split], bbox_format=bbox_format, drop=self.drop)
        return train, load_objects(splits[self.val_split], train.categories, bbox_format, self.drop)
