import io
import os
import warnings

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import pytest

from crosskd_hf.data import images
from crosskd_hf.data.images import open_image, probe_image

SIZE = (24, 16)
ramp = np.linspace(0, 255, SIZE[0] * SIZE[1]).reshape(SIZE[1], SIZE[0])


def saved(tmp_path, image, name, **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def pixels(source, size=None):
    image = open_image(source, size)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


class TestOpenImage:
    def test_grey_and_one_bit(self, tmp_path):
        grey = PIL.Image.fromarray(ramp.astype(np.uint8))
        assert np.array_equal(pixels(saved(tmp_path, grey, "a.png")), np.repeat(ramp.astype(int)[..., None], 3, 2))
        assert set(pixels(saved(tmp_path, grey.convert("1"), "b.png")).ravel()) == {0, 255}

    @pytest.mark.parametrize("name", ["a.png", "a.tif"])
    def test_16_bit_is_scaled_not_clipped(self, tmp_path, name):
        wide = PIL.Image.fromarray((ramp * 257).astype(np.uint16))
        assert np.abs(pixels(saved(tmp_path, wide, name))[..., 0] - ramp).max() <= 1

    def test_32_bit_integers_are_taken_for_16_bit(self, tmp_path):
        wide = PIL.Image.fromarray((ramp * 257).astype(np.int32))
        assert np.abs(pixels(saved(tmp_path, wide, "a.tif"))[..., 1] - ramp).max() <= 1

    def test_floats_are_stretched(self, tmp_path):
        image = PIL.Image.fromarray((ramp / 1000).astype(np.float32))
        assert np.abs(pixels(saved(tmp_path, image, "a.tif"))[..., 0] - ramp).max() <= 1
        assert pixels(PIL.Image.new("F", SIZE, 3.0)).max() == 0

    def test_cmyk(self, tmp_path):
        red = PIL.Image.new("CMYK", SIZE, (0, 255, 255, 0))
        assert np.abs(pixels(saved(tmp_path, red, "a.jpg", quality=95)) - [255, 0, 0]).max() < 12

    def test_palette(self, tmp_path):
        image = PIL.Image.new("RGB", SIZE, (10, 200, 30)).quantize(4)
        assert np.abs(pixels(saved(tmp_path, image, "a.png")) - [10, 200, 30]).max() <= 4

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
    def test_what_is_transparent_is_white(self, tmp_path, mode):
        image = PIL.Image.new(mode, SIZE, (0,) * PIL.Image.getmodebands(mode))
        assert (pixels(image) == 255).all()
        if mode != "PA":
            assert (pixels(saved(tmp_path, image, "a.png")) == 255).all()

    def test_the_first_frame_of_an_animation(self, tmp_path):
        frames = [PIL.Image.new("RGB", SIZE, colour) for colour in ("red", "blue")]
        path = saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
        assert (pixels(path) == [255, 0, 0]).all()

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation(self, tmp_path, orientation):
        image = PIL.Image.fromarray(ramp.astype(np.uint8)).convert("RGB")
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        path = saved(tmp_path, image, "a.jpg", exif=exif, quality=100)
        seen = pixels(path)
        sideways = orientation > 4
        assert seen.shape[:2] == (SIZE if sideways else SIZE[::-1])
        corners = [seen[0, 0, 0], seen[0, -1, 0], seen[-1, 0, 0], seen[-1, -1, 0]]
        brightest = {1: 3, 2: 2, 3: 0, 4: 1, 5: 3, 6: 2, 7: 0, 8: 1}  # corner of the ramp's end
        assert int(np.argmax(corners)) == brightest[orientation]
        assert open_image(path).getexif().get(0x0112) is None
        if sideways:
            assert pixels(path, SIZE).shape[:2] == SIZE[::-1]

    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation_in_every_format(self, tmp_path, format, orientation):
        """PIL itself turns a TIFF while it decodes it, and no other format: turned twice, it lies on its side."""
        if format not in PIL.Image.SAVE:
            pytest.skip(f"this PIL has no {format}")
        pixels = np.zeros((16, 32, 3), dtype=np.uint8)
        pixels[:8, :16] = 255
        exif = PIL.Image.Exif()
        exif[PIL.ExifTags.Base.Orientation] = orientation
        path = tmp_path / "image"
        PIL.Image.fromarray(pixels).save(path, format, exif=exif.tobytes())
        with PIL.Image.open(path) as image:
            upright = np.asarray(PIL.ImageOps.exif_transpose(image).convert("RGB"))
        header = probe_image(path, decode=True)
        assert (header.upright_size, header.turned) == (upright.shape[1::-1], orientation > 1)
        np.testing.assert_allclose(np.asarray(open_image(path)), upright, atol=40)
        size = upright.shape[1::-1]
        np.testing.assert_allclose(np.asarray(open_image(path, size)), upright, atol=40)
        if orientation > 4:  # annotations that were made for the image as it is stored
            assert header.size == (32, 16)
            np.testing.assert_allclose(np.asarray(open_image(path, (32, 16))), pixels, atol=40)

    def test_a_size_that_does_not_fit(self, tmp_path):
        path = saved(tmp_path, PIL.Image.new("RGB", SIZE), "a.png")
        with pytest.raises(ValueError, match=r"a\.png has 24x16 pixels .* annotations are for \(24, 17\)"):
            open_image(path, (24, 17))

    @pytest.mark.parametrize("as_stored", [False, True])
    def test_files_are_closed_and_sources_stay_open(self, tmp_path, as_stored):
        path = saved(tmp_path, PIL.Image.new("RGB", SIZE), "a.png")
        with warnings.catch_warnings():
            warnings.simplefilter("error", ResourceWarning)
            open_image({"path": str(path), "bytes": None} if as_stored else path)
        image = PIL.Image.open(path)
        assert np.array_equal(pixels(image), pixels(image))

    @pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n" + b"\0" * 30])
    def test_broken_files_are_named(self, tmp_path, content):
        (tmp_path / "bad.png").write_bytes(content)
        with pytest.raises(OSError, match=r"bad\.png can't be decoded"):
            open_image(tmp_path / "bad.png")

    def test_missing_files_are_named(self, tmp_path):
        with pytest.raises(OSError, match=r"gone\.png can't be decoded: .*No such file"):
            open_image(tmp_path / "gone.png")

    @pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
    def test_pipes_are_not_waited_for(self, tmp_path, make):
        make(tmp_path / "a.jpg")
        for source in (tmp_path / "a.jpg", {"path": str(tmp_path / "a.jpg"), "bytes": None}):
            with pytest.raises(OSError, match="no regular file"):
                open_image(source)

    def test_bombs_are_refused_before_decoding(self, tmp_path, monkeypatch):
        path = saved(tmp_path, PIL.Image.new("1", (400, 300)), "bomb.png")
        monkeypatch.setattr(images, "MAX_PIXELS", 1000)
        with pytest.raises(PIL.Image.DecompressionBombError, match=r"bomb\.png is refused"):
            open_image(path)
        monkeypatch.setattr(images, "MAX_PIXELS", 10**9)
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
        with pytest.raises(PIL.Image.DecompressionBombError, match=r"bomb\.png is refused"):
            open_image(path)


class TestProbeImage:
    def test_reads_the_header(self, tmp_path):
        header = probe_image(saved(tmp_path, PIL.Image.new("CMYK", SIZE), "a.jpg"))
        assert (header.format, header.mode, header.size, header.animated) == ("JPEG", "CMYK", SIZE, False)

    @pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.gif", "a.tif"])
    def test_finds_truncation(self, tmp_path, name):
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        path = saved(tmp_path, PIL.Image.fromarray(noise), name)
        whole = path.read_bytes()
        probe_image(path)
        for keep in (0.9, 0.5):
            path.write_bytes(whole[: int(len(whole) * keep)])
            with pytest.raises(OSError, match="can't be decoded"):
                probe_image(path)
            with pytest.raises(OSError, match="can't be decoded"):
                probe_image({"path": None, "bytes": path.read_bytes()})

    def test_whole_files_are_not_decoded_unless_asked(self, tmp_path, monkeypatch):
        path = saved(tmp_path, PIL.Image.new("RGB", SIZE), "a.jpg")
        loads, load = [], PIL.ImageFile.ImageFile.load
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: loads.append(1) or load(image))
        probe_image(path)
        probe_image({"path": None, "bytes": path.read_bytes()})
        assert not loads
        probe_image(path, decode=True)
        assert loads

    @pytest.mark.parametrize("decode", [False, True])
    def test_finds_damage_inside_of_pngs(self, tmp_path, decode):
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        path = saved(tmp_path, PIL.Image.fromarray(noise), "a.png")
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
        with pytest.raises(OSError, match=r"a\.png can't be decoded"):
            probe_image(path, decode)

    @pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
    def test_whatever_is_broken_gives_an_os_error(self, format, monkeypatch):
        monkeypatch.setattr(images, "MAX_PIXELS", 10**6)
        rng = np.random.default_rng(0)
        buffer = io.BytesIO()
        PIL.Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(buffer, format)
        readable = 0
        for _ in range(60):
            content = bytearray(buffer.getvalue())
            for place in rng.integers(0, min(len(content), 300), 4):
                content[place] = rng.integers(256)
            source = {"path": None, "bytes": bytes(content)}
            try:
                probe_image(source, decode=True)
            except (OSError, PIL.Image.DecompressionBombError):
                continue
            readable += 1
            assert open_image(source).mode == "RGB"
        assert readable < 60

    def test_takes_images_in_memory(self):
        buffer = io.BytesIO()
        PIL.Image.new("RGB", SIZE).save(buffer, "PNG")
        assert probe_image(PIL.Image.open(buffer)).size == SIZE
