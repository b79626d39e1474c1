"""What the teacher gets is what its own image processor would have made of the images."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from crosskd_hf.distillation.pixels import PixelAdapter, PixelFormat
from crosskd_hf.models import DetectionImageProcessor

SIZE = {"shortest_edge": 40, "longest_edge": 80}
FORMATS = {
    "imagenet": {},
    "caffe": {
        "channel_order": "bgr",
        "rescale_factor": 1.0,
        "image_mean": [102.9801, 115.9465, 122.7717],
        "image_std": [1.0, 1.0, 1.0],
    },
    "inception": {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
    "bgr imagenet": {"channel_order": "bgr", "image_mean": [0.406, 0.456, 0.485], "image_std": [0.225, 0.224, 0.229]},
    "only rescaled": {"do_normalize": False},
    "raw": {"do_normalize": False, "do_rescale": False},
}


def make_images(seed: int) -> list[Image.Image]:
    generator = np.random.default_rng(seed)
    shapes = [(50, 60, 3), (45, 80, 3), (90, 40, 3)]
    return [Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]


@pytest.mark.parametrize(("source", "target"), list(itertools.product(FORMATS, FORMATS)))
def test_equals_the_teachers_own_processor(source: str, target: str) -> None:
    processors = [DetectionImageProcessor(size=SIZE, size_divisor=32, **FORMATS[name]) for name in (source, target)]
    batches = [processor(make_images(0), return_tensors="pt") for processor in processors]
    adapter = PixelAdapter(*map(PixelFormat.of, processors))
    got = adapter(batches[0]["pixel_values"].float(), batches[0]["pixel_mask"])
    expected = batches[1]["pixel_values"].float()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6 * max(1.0, expected.abs().max().item()))
    outside = batches[0]["pixel_mask"][:, None].expand_as(got) == 0
    assert outside.any()
    assert not got[outside].any()
    assert adapter.identity == (source == target)


def test_equal_formats_cost_nothing() -> None:
    pixels = torch.randn(1, 3, 4, 4)
    formats = PixelFormat.of(DetectionImageProcessor()), PixelFormat.of(DetectionImageProcessor())
    assert PixelAdapter(*formats)(pixels, None) is pixels


def test_without_a_mask_nothing_is_padding() -> None:
    rgb, bgr = (PixelFormat.of(DetectionImageProcessor(channel_order=order)) for order in ("rgb", "bgr"))
    got = PixelAdapter(rgb, bgr)(torch.zeros(1, 3, 2, 2), None)
    mean, std = np.array(rgb.mean), np.array(rgb.std)
    np.testing.assert_allclose(got[0, :, 0, 0].numpy(), (mean[::-1] - mean) / std, rtol=1e-4, atol=1e-6)
