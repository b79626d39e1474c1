"""What is distilled and how, independent of the models."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Method = Literal["crosskd", "kd", "pkd"]
Statistics = Literal["image", "batch"]
Normalizer = Literal["teacher", "student", "score_sum"]
Queries = Literal["teacher", "student"]
BoxLoss = Literal["l1_pixel", "l1_giou", "giou"]


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
        box_loss: DETR: distance of boxes; "l1_pixel" is published, "l1_giou" relative L1 plus GIoU, "giou" GIoU alone.

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

    def __post_init__(self) -> None:
        self.methods = tuple(self.methods)
        choices = {
            "statistics": get_args(Statistics),
            "normalizer": get_args(Normalizer),
            "queries": get_args(Queries),
            "box_loss": get_args(BoxLoss),
        }
        for name, allowed in choices.items():
            value = asdict(self)[name]
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: choose one of {', '.join(allowed)}.")
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

    def weights(self, defaults: dict[str, float]) -> dict[str, float]:
        """The published `defaults` with the user's changes."""
        return {**defaults, **(self.loss_weights or {})}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able settings."""
        return asdict(self)
