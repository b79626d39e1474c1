"""What scripts that run a `Comparison` share: options of the data and the steps, and reading or making the data."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..data.dataset import DetectionData, load_coco
from ..data.shapes import ShapesPaths, make_shapes
from ..data.transforms import TrainTransform
from ..training.config import CrossKDConfig

STEPS = ("teacher", "alone", "distilled")
PATHS = ("train_images", "train_annotations", "val_images", "val_annotations")


@dataclass
class ComparisonOptions:
    """What is trained on what; made images of shapes, if no data is given.

    Raises:
        ValueError: Some paths of the data but not all, an unknown step, or nothing to distil from.
    """

    train_images: str | None = field(default=None, metadata={"help": "Folder of the training images."})
    train_annotations: str | None = field(default=None, metadata={"help": "COCO-format json of the training images."})
    val_images: str | None = field(default=None, metadata={"help": "Folder of the validation images."})
    val_annotations: str | None = field(default=None, metadata={"help": "COCO-format json of the validation images."})
    steps: list[str] = field(default_factory=lambda: list(STEPS), metadata={"help": f"Which of {', '.join(STEPS)}."})
    student: str | None = field(
        default=None, metadata={"help": "Go on with this folder or Hub id: its weights, classes and image processor."}
    )
    student_backbone: str = field(default="resnet18", metadata={"help": "timm backbone of a new student."})
    teacher: str | None = field(default=None, metadata={"help": "Folder or Hub id of a trained teacher."})
    teacher_backbone: str = field(default="resnet50", metadata={"help": "timm backbone of a teacher to be trained."})
    teacher_epochs: float | None = field(default=None, metadata={"help": "Epochs of that teacher, if others."})
    shortest_edge: int = field(default=800, metadata={"help": "Images are resized to this shorter side,"})
    longest_edge: int = field(default=1333, metadata={"help": "unless the longer side would exceed this one."})
    multi_scale: list[int] = field(default_factory=list, metadata={"help": "Shorter sides to draw from in training."})
    num_made_images: int = field(default=400, metadata={"help": "Training images of the made data set."})

    def __post_init__(self) -> None:
        missing = self.missing_paths()
        if 0 < len(missing) < len(PATHS):
            raise ValueError(f"Give all of {', '.join('--' + name for name in PATHS)}; missing: {', '.join(missing)}.")
        unknown = [step for step in self.steps if step not in STEPS]
        if unknown:
            raise ValueError(f"--steps {' '.join(unknown)}: choose from {', '.join(STEPS)}.")
        if "distilled" in self.steps and "teacher" not in self.steps and self.teacher is None:
            raise ValueError("--steps distilled needs a teacher: add the step 'teacher', or give --teacher.")

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
        """Names of the paths that were not given."""
        return [name for name in PATHS if getattr(self, name) is None]

    @property
    def image_size(self) -> dict[str, int]:
        """The `size` of an image processor."""
        return {"shortest_edge": self.shortest_edge, "longest_edge": self.longest_edge}

    @property
    def transform(self) -> TrainTransform:
        """The training augmentation."""
        return TrainTransform(shortest_edges=self.multi_scale, longest_edge=self.longest_edge)

    def read_data(self, config: CrossKDConfig) -> tuple[DetectionData, DetectionData]:
        """Training and validation data; without paths, made ones in the folder `shapes` of `output_dir`."""
        paths = vars(self._make_shapes(config) if self.missing_paths() else self)
        train = load_coco(paths["train_annotations"], paths["train_images"])
        return train, load_coco(paths["val_annotations"], paths["val_images"], train.categories)

    def _make_shapes(self, config: CrossKDConfig) -> ShapesPaths:
        torch.set_num_threads(1)  # tiny nets on a few cores: more threads would only wait for each other
        folder = Path(config.output_dir) / "shapes"
        with config.main_process_first(desc="making images"):
            if config.local_process_index == 0:
                make_shapes(folder, self.num_made_images, num_val=100, size=self.longest_edge)
        return ShapesPaths.below(folder)
