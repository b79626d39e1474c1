"""Batches of uint8 pixels, normalised later, are what image processors make."""

from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import (
    ConditionalDetrImageProcessor,
    DeformableDetrImageProcessor,
    DetrImageProcessor,
    RTDetrImageProcessor,
)

from crosskd_hf.data import DetectionCollator, KeepSize, TrainTransform
from crosskd_hf.data.collators import EvaluationCollator
from crosskd_hf.data.compact import compact_pixels
from crosskd_hf.models import DetectionImageProcessor
from crosskd_hf.models.normalization import Normalizer
from crosskd_hf.models.processors import CAFFE_PIXELS

EDGES = {"shortest_edge": 48, "longest_edge": 80}
PROCESSORS = {
    "ours": DetectionImageProcessor(size=EDGES),
    "bgr": DetectionImageProcessor(
        size=EDGES, channel_order="bgr", image_mean=[0.406, 0.456, 0.485], image_std=[0.225, 0.224, 0.229]
    ),
    "caffe": DetectionImageProcessor(size=EDGES, **CAFFE_PIXELS),
    "no antialias": DetectionImageProcessor(size=EDGES, antialias=False, size_divisor=1),
    "pad size": DetectionImageProcessor(size=EDGES, pad_size={"height": 100, "width": 90}),
    "square": DetectionImageProcessor(size={"height": 64, "width": 64}, do_pad=False),
    "not normalised": DetectionImageProcessor(size=EDGES, do_normalize=False),
    "not rescaled": DetectionImageProcessor(size=EDGES, do_rescale=False, image_mean=[123.0, 116.0, 103.0]),
    "detr": DetrImageProcessor(size=EDGES),
    "deformable": DeformableDetrImageProcessor(size=EDGES),
    "conditional": ConditionalDetrImageProcessor(size=EDGES),
    "rt": RTDetrImageProcessor(size={"height": 64, "width": 64}),
}


def examples(*sizes: tuple[int, int]) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    objects = {"id": [1], "bbox": [[3.0, 4.0, 20.0, 12.0]], "category": [1], "area": [200.0], "iscrowd": [0]}
    return [
        {
            "image": PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)),
            "image_id": number,
            "width": width,
            "height": height,
            "objects": objects,
        }
        for number, (width, height) in enumerate(sizes)
    ]


def assert_same(batch: Any, expected: Any, processor: Any) -> None:
    """A uint8 batch, normalised, is the other one, labels included."""
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["pixel_mask"].dtype == torch.bool
    labels = batch["labels"]
    made = Normalizer(processor)(batch)
    assert made["pixel_values"].dtype == torch.float32
    torch.testing.assert_close(made["pixel_values"], expected["pixel_values"], rtol=0, atol=scale(processor) * 1e-6)
    assert torch.equal(made["pixel_mask"], expected["pixel_mask"])
    for label, other in zip(labels, expected["labels"], strict=True):
        assert label.keys() == other.keys()
        for key in label:
            torch.testing.assert_close(label[key], other[key], rtol=0, atol=0)


def scale(processor: Any) -> float:
    """255 where pixels stay on the scale of 255, so that a millionth of the range is meant."""
    return 1.0 if processor.do_rescale and max(processor.image_std) < 1 and min(processor.image_std) > 0.1 else 255.0


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("kind", [DetectionCollator, EvaluationCollator])
def test_normalised_later_is_the_same(name: str, kind: Any) -> None:
    processor = PROCESSORS[name]
    batch = examples((70, 50), (40, 60), (64, 64))
    assert_same(kind(processor, compact=True)(batch), kind(processor)(batch), processor)


@pytest.mark.parametrize("transform", [TrainTransform(1.0), TrainTransform(1.0, shortest_edges=[40]), KeepSize()])
def test_transforms_come_first(transform: Any) -> None:
    processor, batch = PROCESSORS["bgr"], examples((70, 50), (40, 60))
    both = [DetectionCollator(processor, transform, compact=compact)(batch) for compact in (True, False)]
    assert_same(*both, processor)


def test_a_fifth_of_the_bytes() -> None:
    batch = examples((70, 50), (40, 60))
    sizes = [
        sum(made[key].nbytes for key in ("pixel_values", "pixel_mask"))
        for made in (DetectionCollator(PROCESSORS["ours"], compact=compact)(batch) for compact in (True, False))
    ]
    assert sizes[0] * 5 == sizes[1]


@pytest.mark.parametrize("shape", ["corner", "elsewhere", "nothing", "everything"])
def test_a_mask_of_any_shape_leaves_zeros_outside(shape: str) -> None:
    pixels = torch.randint(256, (2, 3, 12, 10), dtype=torch.uint8)
    mask = (
        torch.ones(2, 12, 10, dtype=torch.bool) if shape == "everything" else torch.zeros(2, 12, 10, dtype=torch.bool)
    )
    mask[:, :7, :9] |= shape == "corner"
    mask[:, 2:, 3:] |= shape == "elsewhere"
    normalize = Normalizer(PROCESSORS["bgr"])
    made = normalize({"pixel_values": pixels, "pixel_mask": mask})["pixel_values"]
    whole = normalize({"pixel_values": pixels})["pixel_values"]
    assert torch.equal(made, torch.where(mask[:, None], whole, torch.zeros(())))


def test_floats_of_a_users_own_collator_stay() -> None:
    values, mask = torch.randn(2, 3, 4, 4), torch.ones(2, 4, 4)
    made = Normalizer(PROCESSORS["ours"])({"pixel_values": values, "pixel_mask": mask})
    assert made["pixel_values"] is values
    assert made["pixel_mask"] is mask


def test_without_a_processor_nothing_is_normalised() -> None:
    values = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    assert Normalizer(None)({"pixel_values": values})["pixel_values"] is values


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [(480, 640), (97, 31), (33, 200), (5, 1), (48, 64)])
def test_pixels_channels_last_are_resized_as_by_the_processor(name: str, size: tuple[int, int]) -> None:
    processor: Any = PROCESSORS[name]
    pixels = torch.randint(256, (*size, 3), dtype=torch.uint8).permute(2, 0, 1)
    compact = compact_pixels(processor)
    assert compact is not None
    assert compact.direct
    options: Any = {"do_rescale": False, "do_normalize": False, "do_pad": False, "return_tensors": "pt"}
    options |= {"channel_order": "rgb"} if isinstance(processor, DetectionImageProcessor) else {}
    wanted = processor(images=[pixels.contiguous()], input_data_format="channels_first", **options)["pixel_values"][0]
    (made,) = compact.resized([pixels])
    assert torch.equal(made, wanted)


class Own(DetectionImageProcessor):
    """Does more than to normalise."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        batch = super().__call__(*args, **options)
        if options.get("do_normalize", True):
            batch["pixel_values"] = batch["pixel_values"] ** 2
        return batch


def test_a_processor_that_does_something_else_goes_on_making_floats() -> None:
    processor = Own(size=EDGES)
    assert compact_pixels(processor) is None
    batch = examples((70, 50), (40, 60))
    made = [DetectionCollator(processor, compact=compact)(batch) for compact in (True, False)]
    assert made[0]["pixel_values"].dtype == torch.float32
    assert torch.equal(made[0]["pixel_values"], made[1]["pixel_values"])


def test_a_processor_of_others_is_called_as_a_whole() -> None:
    class Others(DetectionImageProcessor):
        calls = 0

        def __call__(self, *args: Any, **options: Any) -> Any:
            type(self).calls += 1
            return super().__call__(*args, **options)

    Others.__module__ = "somewhere"
    processor, batch = Others(size=EDGES), examples((70, 50), (40, 60))
    collator = DetectionCollator(processor, compact=True)
    before = Others.calls
    assert_same(collator(batch), DetectionCollator(PROCESSORS["ours"])(batch), processor)
    assert Others.calls == before + 2


def test_images_of_several_sizes_without_padding_are_refused_as_by_the_processor() -> None:
    for compact in (True, False):
        collator = DetectionCollator(DetectionImageProcessor(size=EDGES, do_pad=False), compact=compact)
        with pytest.raises(RuntimeError, match="equal size"):
            collator(examples((70, 50), (40, 60)))
