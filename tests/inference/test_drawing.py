"""Pictures with objects: captions can be read whatever the size of the picture."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch

from crosskd_hf.inference.drawing import COLOURS, MIN_SIDE, draw_objects, place_captions


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


def test_captions_cover_no_other_and_stay_in_the_picture() -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 600, (60, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(10, 100, (60, 2))], 1).clip(0, 640)
    places = place_captions(boxes.tolist(), [(80.0, 20.0)] * 60, (640, 640))
    placed = np.array([place for place in places if place is not None])
    assert 30 < len(placed) < 60
    assert placed.min() >= 0
    assert (placed + np.array([80, 20])).max() <= 640
    apart = np.abs(placed[:, None] - placed[None]) >= [80, 20]
    assert (apart.any(-1) | np.eye(len(placed), dtype=bool)).all()


def test_a_caption_goes_above_its_box_and_where_there_is_no_room_below() -> None:
    boxes = [(100, 100, 200, 200), (100, 0, 200, 50), (590, 100, 640, 200), (100, 100, 200, 200)]
    places = place_captions(boxes, [(60, 20)] * 4, (640, 480))
    assert places == [(100, 80), (100, 0), (580, 80), (100, 200)]
    assert place_captions([(0, 0, 9, 9)] * 2, [(60, 20)] * 2, (64, 30)) == [(0, 0), None]


def test_the_highest_score_chooses_first() -> None:
    """Of two objects in one spot of a small picture there is room for one caption."""
    boxes = torch.tensor([[0.0, 0, 480, 30]] * 2)
    found = {"boxes": boxes, "labels": torch.tensor([0, 1]), "scores": torch.tensor([0.4, 0.9])}
    picture = np.asarray(draw_objects(PIL.Image.new("RGB", (480, 30)), found, {0: "a" * 40, 1: "b" * 40}))
    counts = [(picture == tuple(bytes.fromhex(colour[1:]))).all(-1).sum() for colour in COLOURS[:2]]
    assert counts[1] > 3 * counts[0]
