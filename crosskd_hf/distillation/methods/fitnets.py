"""FitNets: the student's features imitate the whole of the teacher's maps (ICLR 2015)."""

from dataclasses import dataclass

from ..method import Paper
from .imitation import Imitation, ImitationConfig


class FitNetsMethod(Imitation):
    """See :class:`FitNets`."""

    name = "fitnets"
    paper = Paper("FitNets: Hints for Thin Deep Nets", "ICLR 2015", "https://arxiv.org/abs/1412.6550")


@dataclass(frozen=True)
class FitNets(ImitationConfig):
    """Hint regression on every level of the features: mean squared error, levels added up, weight 1.

    Args:
        adapter: See :class:`ImitationConfig`. False is the form of LD's comparison (weight 2 there).

    Raises:
        ValueError:
            "adapter=False, but the student's features are": Features of different widths need an adapter.
    """

    method = FitNetsMethod
