"""Objects drawn on a picture."""

import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TypeAlias

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes

from ..text import one_line

# Colours that colour-blind people can tell apart (Okabe and Ito), one a class in turn.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")

Corners: TypeAlias = Sequence[float]
"""Four numbers of a rectangle."""

MIN_SIDE = 480  # px
_DARK = {"#0072B2"}  # white is read better on them than black
_CAPTION = 1 / 30  # height of letters as a share of the longer side: they are read in a picture that is shown in small
_LINE = 1 / 200  # width of boxes' lines, likewise
_LONGEST_CAPTION = 40  # characters


def draw_objects(image: PIL.Image.Image, result: Mapping[str, Tensor], names: Mapping[int, str]) -> PIL.Image.Image:
    """Draw boxes with class names, and scores where there are some.

    Captions never cover each other: where there is no room for one, the box has its class's colour alone. The highest
    scores choose first.

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
    boxes, width = result["boxes"] * scale, max(2, round(_LINE * max(image.size)))
    picture = to_pil_image(draw_bounding_boxes(pil_to_tensor(image), boxes, colors=colours, width=width))
    order = (
        result["scores"].argsort(descending=True, stable=True).tolist() if "scores" in result else range(len(labels))
    )
    _write(picture, [(boxes[row].tolist(), texts[row], colours[row]) for row in order])
    return picture


def _write(picture: PIL.Image.Image, objects: Sequence[tuple[Corners, str, str]]) -> None:
    """Write captions, of (box, text, colour), in this order."""
    canvas = PIL.ImageDraw.Draw(picture)
    font = PIL.ImageFont.truetype(_font(), round(_CAPTION * max(picture.size)))
    ascent, descent = font.getmetrics()
    margin = max(1, font.size // 8)
    sizes = [(canvas.textlength(text, font) + 2 * margin, ascent + descent) for _, text, _ in objects]
    places = place_captions([box for box, _, _ in objects], sizes, picture.size)
    for (_, text, colour), (width, height), place in zip(objects, sizes, places, strict=True):
        if place is not None:
            x, y = place
            canvas.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
            canvas.text((x + margin, y), text, fill="white" if colour in _DARK else "black", font=font)


def place_captions(
    boxes: Sequence[Corners], sizes: Sequence[tuple[float, float]], picture: tuple[int, int]
) -> list[tuple[float, float] | None]:
    """Where captions go: above their box, below or inside, within the picture and on no other caption.

    Args:
        boxes: xyxy px, those first that choose first.
        sizes: Width and height of their captions.
        picture: Width and height.

    Returns:
        The upper left corners; None where there is no room.
    """
    taken: list[Corners] = []
    places: list[tuple[float, float] | None] = []
    for (x1, y1, x2, y2), (width, height) in zip(boxes, sizes, strict=True):
        left, right = (min(max(0.0, x), max(0.0, picture[0] - width)) for x in (x1, x2 - width))
        above, top, bottom, below = (
            min(max(0.0, y), max(0.0, picture[1] - height)) for y in (y1 - height, y1, y2 - height, y2)
        )
        spots = [(x, y) for y in (above, below, top, bottom) for x in (left, right)]
        free = next((spot for spot in spots if not any(_overlap((*spot, width, height), t) for t in taken)), None)
        places.append(free)
        if free is not None:
            taken.append((*free, width, height))
    return places


def _overlap(one: Corners, other: Corners) -> bool:
    """Whether two rectangles, x, y, width, height, have a part in common."""
    return all(one[i] < other[i] + other[i + 2] and other[i] < one[i] + one[i + 2] for i in (0, 1))


@cache
def _font() -> str:
    """DejaVu Sans, which matplotlib brings along; found without importing matplotlib."""
    spec = importlib.util.find_spec("matplotlib")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return str(Path(spec.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf")
