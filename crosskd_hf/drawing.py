"""Objects drawn on a picture."""

from collections.abc import Mapping

import PIL.Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes

# Colours that colour-blind people can tell apart (Okabe and Ito), one a class in turn.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")


def draw_objects(image: PIL.Image.Image, result: Mapping[str, Tensor], names: Mapping[int, str]) -> PIL.Image.Image:
    """Draw boxes with class names, and scores where there are some.

    Args:
        image: RGB.
        result: `boxes` (n, 4) xyxy pixels, `labels` (n,), optionally `scores` (n,).
        names: Class name by label.
    """
    if not len(result["boxes"]):
        return image.copy()
    labels = result["labels"].tolist()
    texts = [names[label] for label in labels]
    if "scores" in result:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, result["scores"].tolist(), strict=True)]
    colours = [COLOURS[label % len(COLOURS)] for label in labels]
    width = max(1, min(image.size) // 100)
    drawn = draw_bounding_boxes(pil_to_tensor(image.convert("RGB")), result["boxes"], texts, colours, width=width)
    return to_pil_image(drawn)
