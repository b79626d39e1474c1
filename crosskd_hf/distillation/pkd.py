"""PKD: features mimic features up to scale and offset (NeurIPS 2022), on the pyramid."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosskd_hf.models.losses import LossPart

from .config import Statistics
from .statistics import standardise


class PearsonKD(nn.Module):
    """Half the squared distance of standardised maps, which is 1 - Pearson's correlation, summed over levels.

    Args:
        student_channels, teacher_channels: Width of the pyramids; a 1x1 adapter maps one to the other if they differ.
        weight: Of the loss.
        statistics: Over what a channel is standardised.
    """

    def __init__(self, student_channels: int, teacher_channels: int, weight: float, statistics: Statistics):
        super().__init__()
        self.weight, self.statistics = weight, statistics
        same = student_channels == teacher_channels
        self.adapter = nn.Identity() if same else nn.Conv2d(student_channels, teacher_channels, 1)

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> LossPart:
        """Loss of pyramids (B, C, H_l, W_l); maps of another size are resized to the teacher's. The normalizer is B."""
        losses = []
        for feature, target in zip(student, teacher, strict=True):
            feature = self.adapter(feature)
            if feature.shape[-2:] != target.shape[-2:]:
                feature = F.interpolate(feature, size=target.shape[-2:], mode="bilinear", align_corners=False)
            distance = standardise(feature, self.statistics) - standardise(target.detach(), self.statistics)
            losses.append(distance.square().mean() / 2)
        batch = len(student[0])
        return LossPart(self.weight * batch * torch.stack(losses).sum(), losses[0].new_tensor(float(batch)))
