"""What is distilled and how, independent of the models."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Method = Literal["crosskd", "kd", "pkd"]
Statistics = Literal["image", "batch"]
Normalizer = Literal["teacher", "student", "score_sum"]
Queries = Literal["teacher", "student"]
BoxLoss = Literal["l1_pixel", "l1+giou", "giou"]
Reduce = Literal["best", "max"]


@dataclass(frozen=True)
class MapperOptions:
    """Choices of plain KD between heads of different kinds that no publication makes.

    Args:
        reduce: Several teacher anchors for one of the student: "best" takes scores and box of the anchor with the
            highest score; "max" takes each class's highest score over the anchors, and the box of the best one.
        broadcast: One teacher prior for several student anchors: all anchors of the place learn the class scores,
            instead of the one that overlaps the teacher's box most. Boxes are learnt by that one in any case.
        joint_quality: Multiply class scores by the teacher's centerness, if it has one: GFL's scores are joint ones.
        as_distribution: Students with box distributions learn the teacher's distances as soft targets of two bins,
            instead of by the generalized IoU of the decoded boxes.

    Raises:
        ValueError: An unknown `reduce`.
    """

    reduce: Reduce = "best"
    broadcast: bool = False
    joint_quality: bool = False
    as_distribution: bool = False

    def __post_init__(self) -> None:
        _check_choice("reduce", self.reduce, get_args(Reduce))


@dataclass
class DistillationConfig:
    """Settings of a distillation. `None` means the published value for the kind of teacher.

    Args:
        methods: Which methods add their losses: "crosskd" (cross-head), "kd" (plain prediction mimicking, which CrossKD
            becomes when cut behind the predictors), "pkd" (Pearson correlation of the pyramids).
        cut: Tower convolution in front of which the student's head is cut, 0 to n; n + 1 is the same as "kd".
            Published: 3, for FCOS 2.
        teacher_cut: The teacher's, if its towers differ. Default: `cut`.
        loss_weights: Weight of each loss by its key (`loss_cls_kd`, `loss_reg_kd`, `loss_iou_kd`,
            `loss_centerness_kd`, `loss_feat_kd`).
        statistics: Over what channels are standardised: each "image" by itself, which makes a loss independent of how
            a batch is split over processes and accumulation steps, or the local "batch", as the authors' code does.
        normalizer: Whose positives the dense losses are divided by; "score_sum" divides by the teacher's confidence.
        normalizer_floor: Smallest normalizer. The authors' FCOS uses 1e-6, which explodes on batches without objects.
        beta: Exponent of the quality focal loss between class scores. Published: 1 for dense heads, 0 for DETR.
        temperature: Of softmax distributions. Published: 1 for distances, 3 for the classes of Faster R-CNN.
        queries: DETR: whose decoder queries read the memories.
        box_loss: DETR: distance of boxes; "l1_pixel" is published, "l1+giou" relative L1 plus GIoU, "giou" GIoU alone.
        mapping: "kd" between dense heads of different kinds: choices of :class:`MapperOptions` by name.

    Raises:
        ValueError: An unknown name or a number out of range.
    """

    methods: tuple[Method, ...] = ("crosskd",)
    cut: int | None = None
    teacher_cut: int | None = None
    loss_weights: dict[str, float] | None = None
    statistics: Statistics = "image"
    normalizer: Normalizer = "teacher"
    normalizer_floor: float = 1.0
    beta: float | None = None
    temperature: float | None = None
    queries: Queries = "teacher"
    box_loss: BoxLoss = "l1_pixel"
    mapping: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.methods = tuple(self.methods)
        choices = {
            "statistics": get_args(Statistics),
            "normalizer": get_args(Normalizer),
            "queries": get_args(Queries),
            "box_loss": get_args(BoxLoss),
        }
        for name, allowed in choices.items():
            _check_choice(name, asdict(self)[name], allowed)
        unknown = [method for method in self.methods if method not in get_args(Method)]
        if unknown or not self.methods:
            raise ValueError(f"methods={self.methods}: choose from {', '.join(get_args(Method))}.")
        keys = {"loss_cls_kd", "loss_reg_kd", "loss_iou_kd", "loss_centerness_kd", "loss_feat_kd"}
        wrong = set(self.loss_weights or {}) - keys
        if wrong:
            raise ValueError(f"loss_weights has {sorted(wrong)}; the distillation losses are {sorted(keys)}.")
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be positive.")
        if self.beta is not None and self.beta < 0:
            raise ValueError(f"beta={self.beta} must not be negative.")
        strangers = set(self.mapping or {}) - {field.name for field in fields(MapperOptions)}
        if strangers:
            names = ", ".join(field.name for field in fields(MapperOptions))
            raise ValueError(f"mapping has {sorted(strangers)}; its choices are {names}.")
        self.mapper_options()

    def weights(self, defaults: dict[str, float]) -> dict[str, float]:
        """The published `defaults` with the user's changes."""
        return {**defaults, **(self.loss_weights or {})}

    def mapper_options(self) -> MapperOptions:
        """The choices of `mapping`, and the defaults of the others."""
        return MapperOptions(**(self.mapping or {}))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able settings."""
        return asdict(self)


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(allowed)}.")
