"""One training run from files: read the data, build or load the student, train, evaluate, save."""

from dataclasses import dataclass

from ..create import ImageSize, create_detector
from ..data.transforms import TrainTransform
from ..inference.evaluation import ap_metrics
from ..models.pixels import check_pixel_range
from ..training.config import AUTHORS, CrossKDConfig, option
from ..training.trainer import CrossKDTrainer
from .data_options import DataOptions


@dataclass
class RunArguments(DataOptions):
    """What is trained on what; how is said by `CrossKDConfig`."""

    student: str = option(
        "gfl:resnet18",
        "Folder or Hub id of a detector, or a new one as ARCHITECTURE:BACKBONE (gfl:resnet18, "
        "faster_rcnn:resnet50, rt_detr_v2:resnet18, ...).",
    )
    teacher: str | None = option(None, "Folder or Hub id of the trained teacher; without one, no distillation.")
    backbone_weights: str = option(
        "auto",
        "For a new student: 'timm' (downloads), a tag or a file of timm, or 'none' for random weights. Default: timm's "
        "if they are in the cache or the Hub answers.",
    )
    width: int = option(256, "Channels of pyramid and towers of a new student.", AUTHORS)
    shortest_edge: int | None = option(
        None, "Shorter side of images in pixels, for a new student. Default: 800; RT-DETR and relatives 640.", AUTHORS
    )
    longest_edge: int | None = option(
        None, "Longest side of images in pixels; it wins over the shorter one. Default: 1333.", AUTHORS
    )
    pixel_range: list[float] | None = option(
        None,
        "Lowest and highest value of 16-bit or float pixels; check-data tells them. The student's image processor "
        "keeps them. Default: 0 65535, and of floats what each image has.",
    )
    multi_scale: list[int] = option([], "Shorter sides to draw from in training.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pixel_range(self.pixel_range)

    @property
    def image_size(self) -> ImageSize | None:
        """What was said of the size of images."""
        return ImageSize.of(self.shortest_edge, self.longest_edge)


def train(run: RunArguments, args: CrossKDConfig) -> dict[str, float]:
    """Train, and save the student into `args.output_dir`.

    Returns:
        Metrics of the last evaluation; empty without validation data.

    Raises:
        DataError: The data set is faulty. ValueError: Student, teacher and data don't go together.
    """
    data, val = run.read_files(args)
    model, processor = create_detector(
        run.student,
        data,
        backbone_weights=run.backbone_weights,
        width=run.width,
        image_size=run.image_size,
    )
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
        train_transform=TrainTransform(shortest_edges=run.multi_scale, longest_edge=run.longest_edge or 1333),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    metrics = {} if val is None else ap_metrics(trainer.evaluate())
    trainer.save_model()
    return metrics
