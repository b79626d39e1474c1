"""What still differs between a preset and the published experiment, why, and what to expect of it.

`python -m tests.parity.protocol` compares every field of the published configurations; a field that differs has to be
named here, or the comparison fails.
"""

from __future__ import annotations

from typing import NamedTuple


class Difference(NamedTuple):
    """One difference that remains.

    Args:
        published: What the authors' implementation does.
        ours: What is done here.
        reason: Why.
        effect: What to expect on AP.
    """

    published: str
    ours: str
    reason: str
    effect: str


REMAINING: dict[str, Difference] = {
    "Caffe's weights": Difference(
        "FCOS starts from Caffe's ResNets: BGR pixels of unit deviation, stride on the first 1x1 convolution",
        "the same with `--backbone_checkpoint FILE`; without it torchvision's first weights, RGB, stride on the 3x3",
        "timm has no Caffe weights, and a net of Caffe's stride must not be filled with others",
        "without the file unknown: not measured; with it none",
    ),
    "seed": Difference(
        "none: every run is another one",
        "42, or `--seed`",
        "a run can be repeated, and goes on after an interruption as if there had been none",
        "none on the mean of several runs",
    ),
    "rate of another batch": Difference(
        "students alone and teachers keep their rate whatever the batch; CrossKD's students scale it by the batch",
        "every rate is scaled by the images of an update, from 16 (Deformable DETR: 32)",
        "a run on fewer GPUs than the authors' would diverge or learn too slowly",
        "none at the published batch",
    ),
    "evaluation workers": Difference(
        "2 processes read the images of the evaluation",
        "as many as in training",
        "Hugging Face's Trainer has one number for both",
        "none",
    ),
    "checkpoints": Difference(
        "saved every 1, 2, 10 or 12 epochs, all are kept; the last one is evaluated",
        "saved after every epoch, the last one is kept, and evaluated",
        "a run that was interrupted goes on from its last epoch",
        "none",
    ),
    "resize library": Difference(
        "OpenCV's bilinear resize in fixed point",
        "torchvision's without antialiasing, the same positions in floating point",
        "no further requirement, and tensors may lie on any device",
        "single pixels differ by a level of grey; none on AP",
    ),
    "FCOS without objects": Difference(
        "FCOS's losses of a batch without positives are divided by 1e-6",
        "by 1",
        "the published loss explodes on such a batch",
        "none: such batches do not occur on COCO once empty images are left out",
    ),
    "orientation": Difference(
        "each GPU draws batches of one orientation by itself",
        "all images of an update have one orientation",
        "the order of the images does not depend on how an update is split over GPUs",
        "none expected",
    ),
}
"""By the name under which the comparison prints it."""


def differences_table() -> str:
    """The table of `docs/reproduce.md`."""
    titles = ("difference", "published", "here", "why", "effect on AP")
    rows = [titles, ["---"] * len(titles), *((name, *row) for name, row in REMAINING.items())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
