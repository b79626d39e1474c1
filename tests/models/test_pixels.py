"""One conversion to 8-bit RGB for all that reaches a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from crosskd_hf.data.collators import DetectionCollator
from crosskd_hf.data.images import open_image
from crosskd_hf.models import DetectionImageProcessor
from crosskd_hf.models import pixels as conversion
from crosskd_hf.models.pixels import array_to_8_bit, to_rgb

SIZE = (24, 16)
RAMP = np.linspace(0, 1, SIZE[0] * SIZE[1]).reshape(SIZE[1], SIZE[0])


def palette_with_transparency() -> PIL.Image.Image:
    image = PIL.Image.fromarray((RAMP * 255).astype(np.uint8)).quantize(8)
    image.info["transparency"] = 0
    return image


def images() -> dict[str, PIL.Image.Image]:
    """An image of every kind that could be converted in more than one way."""
    transparent = PIL.Image.fromarray(np.dstack([np.zeros((*RAMP.shape, 3)), RAMP * 255]).astype(np.uint8), "RGBA")
    with_key = PIL.Image.new("RGB", SIZE, (10, 20, 30))
    with_key.info["transparency"] = (10, 20, 30)
    return {
        "16-bit": PIL.Image.fromarray((RAMP * 65535).astype(np.uint16)),
        "16-bit, big endian": PIL.Image.frombytes("I;16B", SIZE, (RAMP * 65535).astype(">u2").tobytes()),
        "12 of 16 bits": PIL.Image.fromarray((RAMP * 4095).astype(np.uint16)),
        "32-bit": PIL.Image.fromarray((RAMP * 65535).astype(np.int32)),
        "float": PIL.Image.fromarray(RAMP.astype(np.float32)),
        "palette with transparency": palette_with_transparency(),
        "RGB with a transparent colour": with_key,
        "RGBA": transparent,
        "LA": transparent.convert("LA"),
        "CMYK": PIL.Image.new("CMYK", SIZE, (10, 20, 30, 40)),
        "one bit": PIL.Image.fromarray(RAMP > 0.5),
        "L": PIL.Image.fromarray((RAMP * 255).astype(np.uint8)),
    }


def seen(image: object, **settings: object) -> np.ndarray:
    """The (H, W, 3) pixels that a model gets to see, on the scale 0 to 255."""
    processor = DetectionImageProcessor(do_resize=False, do_normalize=False, **settings)
    values = processor(images=[image], return_tensors="pt")["pixel_values"][0, :, : SIZE[1], : SIZE[0]]
    return (values * 255).permute(1, 2, 0).round().numpy()


class TestOneConversion:
    @pytest.mark.parametrize("pixel_range", [None, (0, 4095)])
    @pytest.mark.parametrize("kind", images())
    def test_training_and_processor_see_the_same(self, kind: str, pixel_range: tuple[int, int] | None) -> None:
        image = images()[kind]
        processor = DetectionImageProcessor(do_resize=False, do_normalize=False, pixel_range=pixel_range)
        objects = {"id": [1], "bbox": [[1.0, 2, 3, 4]], "category": [0], "area": [12.0], "iscrowd": [0]}
        example = {"image": image, "image_id": 1, "width": SIZE[0], "height": SIZE[1], "objects": objects}
        trained = DetectionCollator(processor)([example])["pixel_values"][0, :, : SIZE[1], : SIZE[0]] * 255
        expected = np.asarray(open_image(image, pixel_range=pixel_range))
        assert np.array_equal(trained.permute(1, 2, 0).round().numpy(), expected)
        assert np.array_equal(seen(image, pixel_range=pixel_range), expected)
        assert np.array_equal(np.asarray(to_rgb(image, pixel_range)), expected)

    @pytest.mark.parametrize("name", ["a.png", "a.tif"])
    def test_a_path_is_opened_by_the_same_rules(self, tmp_path: Path, name: str) -> None:
        images()["16-bit"].save(tmp_path / name)
        processor = DetectionImageProcessor(do_resize=False, do_normalize=False)
        expected = np.asarray(open_image(tmp_path / name))
        assert abs(expected.mean() - 127.5) < 1
        assert np.array_equal(np.asarray(processor.open_image(tmp_path / name)), expected)
        assert np.array_equal(seen(str(tmp_path / name)), expected)

    def test_an_opened_file_is_upright(self, tmp_path: Path) -> None:
        exif = PIL.Image.Exif()
        exif[0x0112] = 6
        PIL.Image.new("RGB", SIZE).save(tmp_path / "a.jpg", exif=exif)
        assert DetectionImageProcessor().open_image(tmp_path / "a.jpg").size == SIZE[::-1]

    @pytest.mark.parametrize("kind", ["16-bit", "12 of 16 bits", "float", "palette with transparency", "RGBA"])
    def test_strips_make_no_difference(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = np.asarray(to_rgb(images()[kind]))
        monkeypatch.setattr(conversion, "_STRIP", 3 * SIZE[0])
        assert np.array_equal(np.asarray(to_rgb(images()[kind])), whole)


class TestPixelRange:
    def test_a_narrow_range_gets_all_grey_levels(self) -> None:
        narrow = PIL.Image.fromarray((28000 + RAMP * 3000).astype(np.uint16))
        assert len(np.unique(np.asarray(to_rgb(narrow)))) <= 13
        levels = np.asarray(to_rgb(narrow, (28000, 31000)))[..., 0]
        assert np.abs(levels - RAMP * 255).max() <= 1.5
        assert len(np.unique(levels)) > 200

    def test_what_lies_beyond_is_clipped(self) -> None:
        image = PIL.Image.fromarray(np.array([[0, 100, 200, 65535]], dtype=np.uint16))
        assert np.asarray(to_rgb(image, (100, 200)))[0, :, 0].tolist() == [0, 0, 253, 255]
        floats = PIL.Image.fromarray(np.array([[-np.inf, -1, 0, 0.5, 1, 9, np.inf, np.nan]], dtype=np.float32))
        assert np.asarray(to_rgb(floats, (0, 1)))[0, :, 0].tolist() == [0, 0, 0, 127, 255, 255, 255, 0]

    def test_floats_that_are_not_finite_do_not_spoil_the_others(self) -> None:
        image = PIL.Image.fromarray(np.array([[np.nan, 2, 3, 4, np.inf]], dtype=np.float32))
        assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 0, 127, 255, 255]
        nothing = PIL.Image.fromarray(np.full((2, 2), np.nan, dtype=np.float32))
        assert np.asarray(to_rgb(nothing)).max() == 0

    def test_it_is_saved(self, tmp_path: Path) -> None:
        DetectionImageProcessor(pixel_range=(0, 4095)).save_pretrained(tmp_path)
        again = DetectionImageProcessor.from_pretrained(tmp_path)
        assert tuple(again.pixel_range) == (0, 4095)
        full = seen(images()["12 of 16 bits"], pixel_range=again.pixel_range)
        assert np.abs(full - seen(images()["16-bit"])).max() <= 1

    @pytest.mark.parametrize("value", [(1, 1), (2, 1), (0,), 5, (0, float("inf")), (float("nan"), 1), "0-4095"])
    def test_refuses(self, value: object) -> None:
        with pytest.raises(ValueError, match="pixel_range is"):
            DetectionImageProcessor(pixel_range=value)


class TestArrays:
    @pytest.mark.parametrize("dtype", ["uint16", "int32", "int64", "float32", "bool", "uint8"])
    @pytest.mark.parametrize("tensor", [False, True])
    def test_what_has_the_scale_is_taken(self, dtype: str, tensor: bool) -> None:
        grey = (RAMP * 255).astype(np.uint8)
        given = {"uint16": grey.astype(np.uint16) * 257, "bool": grey > 127}.get(dtype, grey.astype(dtype))
        expected = np.where(grey > 127, 255, 0) if dtype == "bool" else grey
        given = given[None].repeat(3, 0)
        found = seen(torch.from_numpy(given) if tensor else given)
        assert np.array_equal(found, np.repeat(expected[..., None], 3, 2))

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (RAMP.astype(np.float32), r"float32 in \[0, 1\].*do_rescale=False"),
            (RAMP * 3 - 1, "values from -1 to 2"),
            ((RAMP * 65535).astype(np.int32), r"int32 with values from 0 to 65535.*pixel_range"),
            (RAMP * np.nan, "needed is the scale"),
        ],
    )
    def test_what_is_on_another_scale_is_refused(self, values: np.ndarray, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            seen(values[None].repeat(3, 0))

    def test_floats_are_fine_where_nothing_is_rescaled(self) -> None:
        floats = RAMP.astype(np.float32)[None].repeat(3, 0)
        assert np.abs(seen(floats, do_rescale=False)[..., 0] - RAMP * 255).max() <= 0.5

    def test_a_range_holds_for_every_type(self) -> None:
        assert array_to_8_bit(np.array([0, 2048, 4095]), (0, 4095)).tolist() == [0, 128, 255]
        assert array_to_8_bit(np.array([0, 0.5, 1]), (0, 1)).tolist() == [0, 127, 255]

    def test_nothing_at_all(self) -> None:
        assert array_to_8_bit(np.zeros((0, 3), dtype=np.int64)).shape == (0, 3)
