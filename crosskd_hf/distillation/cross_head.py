"""Cross-head knowledge distillation of dense detectors (CrossKD, CVPR 2024): tap, align, finish, mimic.

The student's half-done head features finish in the frozen teacher's head, and these cross predictions mimic the
teacher's own. Ground truth and teacher therefore never pull at the same layer of the student.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from crosskd_hf.models.dense import DenseHead, Predictions, Taps

from .config import Statistics
from .statistics import center, count


def align(feature: Tensor, reference: Tensor, statistics: Statistics = "image") -> Tensor:
    """Give `feature` the mean and standard deviation of `reference`, channel by channel.

    Gradient flows through the student's statistics, not through the teacher's. A map of a single element has no
    deviation and is returned as it is.

    Args:
        feature, reference: (B, C, H, W) taps of student and teacher; the maps may differ in size.
        statistics: "image" takes them over (H, W), "batch" over (B, H, W) as the authors' code does.
    """
    if min(count(feature, statistics), count(reference, statistics)) == 1:
        return feature.float()
    centered, _, deviation = center(feature, statistics)
    _, target_mean, target_deviation = center(reference.detach(), statistics)
    return centered * (target_deviation / (deviation + 1e-6)) + target_mean


class CrossHead(nn.Module):
    """The path of a student's taps through the teacher's head.

    Args:
        student_width, teacher_width: Channels at the cut; where they differ, trainable 1x1 adapters map between them.
        cut: The teacher's cut; the pyramid itself (0) is not rectified.
        statistics: Of :func:`align`.
    """

    def __init__(self, student_width: int, teacher_width: int, cut: int, statistics: Statistics):
        super().__init__()
        self.cut, self.statistics = cut, statistics
        same = student_width == teacher_width
        self.cls_adapter = nn.Identity() if same else nn.Conv2d(student_width, teacher_width, 1)
        self.reg_adapter = nn.Identity() if same else nn.Conv2d(student_width, teacher_width, 1)

    def forward(self, student: Taps, teacher: Taps, head: DenseHead) -> Predictions:
        """Cross predictions: the teacher's `head` on the student's aligned taps."""
        taps = Taps(
            self._prepare(self.cls_adapter, student.cls, teacher.cls),
            self._prepare(self.reg_adapter, student.reg, teacher.reg),
        )
        return head.finish(taps, self.cut)

    def _prepare(self, adapter: nn.Module, features: list[Tensor], references: list[Tensor]) -> list[Tensor]:
        aligned = [align(adapter(f), r, self.statistics) for f, r in zip(features, references, strict=True)]
        return aligned if self.cut == 0 else [F.relu(feature) for feature in aligned]
