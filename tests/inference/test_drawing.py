"""Pictures with objects: captions can be read whatever the size of the picture."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch

from crosskd_hf.inference.drawing import COLOURS, MIN_SIDE, draw_objects


@pytest.mark.parametrize("size", [(64, 48), (640, 480), (4000, 3000)])
def test_captions_grow_with_the_picture(size: tuple[int, int]) -> None:
    box = torch.tensor([[0.3, 0.3, 0.8, 0.9]]) * torch.tensor([*size, *size])
    result = {"boxes": box, "labels": torch.tensor([0]), "scores": torch.tensor([0.5])}
    picture = draw_objects(PIL.Image.new("RGB", size), result, {0: "ячейка"})
    assert max(picture.size) > MIN_SIDE / 2
    colour = tuple(bytes.fromhex(COLOURS[0][1:]))
    filled = (np.asarray(picture) == colour).all(axis=-1)
    caption = filled[:, int(0.31 * picture.width) : int(0.45 * picture.width)].mean(axis=1) > 0.3  # rows of it
    assert 0.025 <= caption.sum() / max(picture.size) <= 0.08
