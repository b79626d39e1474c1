"""One training run from files: read the data, build or load the student, train, evaluate, save."""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import BaseImageProcessor, PreTrainedModel

from ..create import ARCHITECTURES, DetectorSpec, build_detector
from ..data.categories import CategoryMap
from ..data.dataset import load_coco
from ..data.transforms import TrainTransform
from ..inference.evaluation import ap_metrics
from ..inference.loading import load_detector
from ..models import DetectionImageProcessor
from ..models.pixels import check_pixel_range
from ..training.config import CrossKDConfig
from ..training.trainer import CrossKDTrainer


@dataclass
class RunArguments:
    """What is trained on what; how is said by `CrossKDConfig`."""

    train_annotations: str = field(metadata={"help": "COCO-format json of the training images."})
    train_images: str = field(metadata={"help": "Folder of the training images."})
    val_annotations: str | None = field(default=None, metadata={"help": "COCO-format json of the validation images."})
    val_images: str | None = field(default=None, metadata={"help": "Folder of the validation images."})
    student: str = field(
        default="gfl:resnet18",
        metadata={"help": "Folder or Hub id of a detector, or a new one as ARCHITECTURE:BACKBONE (gfl:resnet18)."},
    )
    teacher: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the trained teacher; without one, no distillation."}
    )
    backbone_weights: str | None = field(
        default=None, metadata={"help": "For a new student: 'timm' (downloads), a tag or a file of timm."}
    )
    width: int = field(default=256, metadata={"help": "Channels of pyramid and towers of a new student."})
    shortest_edge: int = field(default=800, metadata={"help": "New student: images are resized to this shorter side,"})
    longest_edge: int = field(default=1333, metadata={"help": "unless the longer side would exceed this one."})
    pixel_range: list[float] | None = field(
        default=None,
        metadata={
            "help": "Lowest and highest value of 16-bit or float pixels; check-data tells them. The student's image "
            "processor keeps them. Default: 0 65535, and of floats what each image has."
        },
    )
    multi_scale: list[int] = field(default_factory=list, metadata={"help": "Shorter sides to draw from in training."})

    def __post_init__(self) -> None:
        if (self.val_annotations is None) != (self.val_images is None):
            raise ValueError("Give both of --val_annotations and --val_images, or neither.")
        check_pixel_range(self.pixel_range)


def train(run: RunArguments, args: CrossKDConfig) -> dict[str, float]:
    """Train, and save the student into `args.output_dir`.

    Returns:
        Metrics of the last evaluation; empty without validation data.

    Raises:
        DataError: The data set is faulty. ValueError: Student, teacher and data don't go together.
    """
    data = load_coco(run.train_annotations, run.train_images)
    val = None
    if run.val_annotations is not None and run.val_images is not None:
        val = load_coco(run.val_annotations, run.val_images, data.categories)
    model, processor = _student(run, data.categories)
    data, val = data.for_model(model.config), None if val is None else val.for_model(model.config)
    model.config.category_ids = list(data.categories.raw_ids)
    if run.pixel_range is not None:
        processor.pixel_range = run.pixel_range
    trainer = CrossKDTrainer(
        model=model,
        args=args,
        train_dataset=data.dataset,
        eval_dataset=None if val is None else val.dataset,
        processing_class=processor,
        teacher_model=run.teacher,
        train_transform=TrainTransform(shortest_edges=run.multi_scale, longest_edge=run.longest_edge),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    metrics = {} if val is None else ap_metrics(trainer.evaluate())
    trainer.save_model()
    return metrics


def _student(run: RunArguments, categories: CategoryMap) -> tuple[PreTrainedModel, BaseImageProcessor]:
    if not Path(run.student).exists() and run.student.split(":")[0] in ARCHITECTURES:
        spec = DetectorSpec.parse(run.student, backbone_weights=run.backbone_weights, width=run.width)
        size = {"shortest_edge": run.shortest_edge, "longest_edge": run.longest_edge}
        return build_detector(spec, categories), DetectionImageProcessor(size=size)
    return load_detector(run.student)
