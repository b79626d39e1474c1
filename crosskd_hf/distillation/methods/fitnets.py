"""FitNets: the student's features imitate the whole of the teacher's maps (ICLR 2015)."""

from dataclasses import dataclass
from typing import Any

from ..method import Paper, option
from ..passes import Pair
from .imitation import LD_CODE, Form, Imitation, ImitationConfig


class FitNetsMethod(Imitation):
    """See :class:`FitNets`."""

    name = "fitnets"
    paper = Paper("FitNets: Hints for Thin Deep Nets", "ICLR 2015", "https://arxiv.org/abs/1412.6550")


@dataclass(frozen=True)
class FitNets(ImitationConfig):
    """Hint regression on every level of the features: mean squared error, levels added up.

    Args:
        preset: "original" has weight 1 and a 1x1 convolution as adapter; "ld", the form of LD's comparison, has weight
            2 and an adapter between different widths alone.
        weight: None: by the preset.
        adapter: None: by the preset; see :class:`ImitationConfig`.

    Raises:
        ValueError:
            "adapter=False, but the student's features are": Features of different widths need an adapter.
    """

    method = FitNetsMethod
    published_numbers = {"original": {"weight": 1.0, "adapter": True}, "ld": {"weight": 2.0, "adapter": False}}

    weight: float | None = option(None, "Factor on the whole method.", LD_CODE, least=0)
    preset: Form = option("original", "The form of the paper, or of LD's comparison.", LD_CODE)

    def defaults(self, pair: Pair) -> dict[str, Any]:
        """By the preset."""
        known = super().defaults(pair)
        return known | ({"weight": 2.0} if self.preset == "ld" else {"weight": 1.0, "adapter": True})
