"""Objects drawn on a picture."""

import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import PIL.Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes

from ..text import one_line

# Colours that colour-blind people can tell apart (Okabe and Ito), one a class in turn.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")

MIN_SIDE = 480  # px
_DARK = {"#0072B2"}  # white is read better on them than black
_CAPTION = 1 / 30  # height of letters as a share of the longer side: they are read in a picture that is shown in small
_LINE = 1 / 200  # width of boxes' lines, likewise
_LONGEST_CAPTION = 40  # characters


def draw_objects(image: PIL.Image.Image, result: Mapping[str, Tensor], names: Mapping[int, str]) -> PIL.Image.Image:
    """Draw boxes with class names, and scores where there are some.

    Args:
        image: RGB.
        result: `boxes` (n, 4) xyxy pixels, `labels` (n,), optionally `scores` (n,).
        names: Class name by label.
    """
    scale = max(1, MIN_SIDE // max(image.size))  # small pictures are enlarged, for their captions to be read
    image = image.convert("RGB").resize((image.width * scale, image.height * scale), PIL.Image.Resampling.NEAREST)
    if not len(result["boxes"]):
        return image
    labels = result["labels"].tolist()
    texts = [one_line(names[label], _LONGEST_CAPTION) for label in labels]
    if "scores" in result:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, result["scores"].tolist(), strict=True)]
    colours = [COLOURS[label % len(COLOURS)] for label in labels]
    drawn = draw_bounding_boxes(
        pil_to_tensor(image),
        result["boxes"] * scale,
        texts,
        colours,
        width=max(2, round(_LINE * max(image.size))),
        font=_font(),
        font_size=round(_CAPTION * max(image.size)),
        label_colors=["white" if colour in _DARK else "black" for colour in colours],
        fill_labels=True,
    )
    return to_pil_image(drawn)


@cache
def _font() -> str:
    """DejaVu Sans, which matplotlib brings along; found without importing matplotlib."""
    spec = importlib.util.find_spec("matplotlib")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return str(Path(spec.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf")
