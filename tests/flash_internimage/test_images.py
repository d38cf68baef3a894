import os

import numpy as np
import pytest
from PIL import Image, ImageFile

from flash_internimage.images import (
    UnreadableImage,
    check_image_file,
    image_suffixes,
    read_image,
    read_label_map,
    read_size,
    to_rgb,
)
from tests.flash_internimage.openmmlab.label_maps import write_grey_png, write_grey_tiff

READERS = pytest.mark.parametrize("read", [read_image, read_label_map, read_size, check_image_file])


def refused(read, path, reason: str = "") -> None:
    with pytest.raises(UnreadableImage, match=f"^cannot read image {path}: .*{reason}"):
        read(path)


def test_an_image_is_read_with_its_mode_and_size(tmp_path):
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(pixels).save(tmp_path / "gray.png")
    image = read_image(tmp_path / "gray.png")
    assert image.mode == "L"
    np.testing.assert_array_equal(np.asarray(image), pixels)
    assert read_size(tmp_path / "gray.png") == (3, 4)


def test_an_error_names_a_stream_by_the_argument(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with open(tmp_path / "a.png", "rb") as file, pytest.raises(UnreadableImage, match="member a"):
        read_image(file, "member a of t.tar")


@READERS
@pytest.mark.parametrize("kind", ["missing", "fifo", "folder", "loop", "device"])
def test_paths_other_than_files_are_never_opened(tmp_path, read, kind):
    path = tmp_path / "image.png"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    refused(read, path)


@READERS
@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (2, 401)])
def test_extreme_aspect_ratios_are_rejected(tmp_path, read, size):
    Image.new("1", size).save(tmp_path / "line.png")
    refused(read, tmp_path / "line.png", f"{size[0]} x {size[1]} pixels; one side must not")


def test_aspect_ratios_up_to_the_limit_are_accepted(tmp_path):
    Image.new("L", (2, 400)).save(tmp_path / "strip.png")
    assert read_size(tmp_path / "strip.png") == (400, 2)


@READERS
def test_decompression_bombs_are_rejected(tmp_path, read):
    side = 20_000
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    refused(read, tmp_path / "bomb.png", "decompression bomb")


@pytest.mark.parametrize(
    "error", [NotImplementedError, IndexError, TypeError, OverflowError, MemoryError, KeyError]
)
def test_any_error_of_a_decoder_means_an_unreadable_image(tmp_path, monkeypatch, error):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")

    def fail(self):
        raise error("of a decoder")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    refused(read_image, tmp_path / "a.png", "of a decoder")


def test_formats_unknown_to_pillow_are_left_to_other_decoders(tmp_path):
    path = tmp_path / "a.hdr"
    path.write_bytes(b"#?RADIANCE\n")
    check_image_file(path)
    refused(read_size, path, "cannot identify")


RAMP = np.arange(256).reshape(16, 16)


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.arange(4096), np.arange(4096) // 16),  # 12 bits stored in 16
        (np.arange(65536), np.arange(65536) // 256),
        (np.arange(1024), np.arange(1024) // 4),
        (RAMP, RAMP),
        (RAMP * 257, RAMP),
        (RAMP * 256, RAMP),
        (np.zeros(256), np.zeros(256)),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, ">u2"])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grayscale_uses_the_full_range(tmp_path, pixels, expected, dtype, suffix):
    if suffix == "png" and dtype == np.int32:
        dtype = np.uint16  # PNG has at most 16 bits
    side = int(pixels.size**0.5)
    Image.fromarray(pixels.reshape(side, side).astype(dtype)).save(tmp_path / f"a.{suffix}")
    rgb = to_rgb(read_image(tmp_path / f"a.{suffix}"))
    assert rgb.mode == "RGB"
    np.testing.assert_array_equal(
        np.asarray(rgb), np.repeat(expected.reshape(side, side, 1), 3, axis=2)
    )


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_8_bit_modes_are_converted_as_pillow_does(mode):
    colors = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    image = colors.convert("P").convert(mode) if mode == "PA" else colors.convert(mode)
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.linspace(0, 1, 256, dtype=np.float32), "must be integers, got floating-point"),
        (np.arange(-1000, 3096, dtype=np.int32), "must not be negative, got -1000"),
    ],
)
def test_pixels_without_a_known_range_are_rejected(pixels, message):
    side = int(pixels.size**0.5)
    with pytest.raises(ValueError, match=message):
        to_rgb(Image.fromarray(pixels.reshape(side, side)))


class TestLabelMaps:
    """Labels are the numbers in the file, which Pillow scales in some formats."""

    @pytest.mark.parametrize("write", [write_grey_png, write_grey_tiff])
    @pytest.mark.parametrize("bits", [1, 2, 4, 8])
    def test_bits_per_pixel(self, bits, write, tmp_path):
        numbers = np.arange(9 * 11).reshape(9, 11) % 2**bits
        write(tmp_path / "1.png", numbers, bits)
        np.testing.assert_array_equal(read_label_map(tmp_path / "1.png"), numbers)
        shades = np.array(read_image(tmp_path / "1.png").convert("L"))
        np.testing.assert_array_equal(shades, numbers * (255 // (2**bits - 1)))

    @pytest.mark.parametrize("magic", ["P2", "P5"])
    @pytest.mark.parametrize("maximum", [1, 2, 3, 18, 100, 254, 255, 256, 300, 4095, 65534, 65535])
    def test_maximum_of_pgm(self, maximum, magic, tmp_path):
        numbers = (np.arange(9 * 11) * 41 % (maximum + 1)).reshape(9, 11)
        binary = numbers.astype(">u2" if maximum > 255 else np.uint8).tobytes()
        plain = " ".join(map(str, numbers.ravel().tolist())).encode()
        header = f"{magic}\n11 9\n{maximum}\n".encode()
        (tmp_path / "1.pgm").write_bytes(header + (binary if magic == "P5" else plain))
        np.testing.assert_array_equal(read_label_map(tmp_path / "1.pgm"), numbers)

    @pytest.mark.parametrize("bits", [1, 2, 4, 8])
    def test_indices_of_a_palette(self, bits, tmp_path):
        numbers = (np.arange(9 * 11).reshape(9, 11) % 2**bits).astype(np.uint8)
        image = Image.fromarray(numbers)
        image.putpalette([value for i in range(2**bits) for value in (255 - i, i, 7)])
        image.save(tmp_path / "1.png", bits=bits)
        np.testing.assert_array_equal(read_label_map(tmp_path / "1.png"), numbers)

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
    def test_other_label_maps_are_read_as_by_pillow(self, dtype, tmp_path):
        numbers = np.arange(99, dtype=dtype).reshape(9, 11)
        Image.fromarray(numbers).save(tmp_path / "1.tiff", compression="tiff_lzw")
        np.testing.assert_array_equal(read_label_map(tmp_path / "1.tiff"), numbers)

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_white_is_zero(self, bits, tmp_path):
        write_grey_tiff(tmp_path / "1.tiff", np.zeros((9, 11), int), bits, photometric=0)
        message = f"label map {tmp_path}/1.tiff must have 0 for black, got a TIFF file with 0 for"
        with pytest.raises(ValueError, match=message):
            read_label_map(tmp_path / "1.tiff")
        assert read_image(tmp_path / "1.tiff").getpixel((0, 0)) == 255

    @pytest.mark.parametrize("compression", ["group4", "tiff_lzw"])
    def test_masks_of_single_bits(self, compression, tmp_path):
        mask = np.arange(99).reshape(9, 11) % 3 == 1
        Image.fromarray(mask).save(tmp_path / "1.tiff", compression=compression)
        np.testing.assert_array_equal(read_label_map(tmp_path / "1.tiff"), mask)

    @pytest.mark.parametrize(
        ("suffix", "options", "got"),
        [("jpg", {}, "JPEG"), ("jp2", {}, "JPEG2000"), ("tiff", {"compression": "jpeg"}, "TIFF")],
    )
    def test_lossy_formats_are_rejected(self, suffix, options, got, tmp_path):
        path = tmp_path / f"1.{suffix}"
        Image.fromarray(np.zeros((9, 11), np.uint8)).save(path, **options)
        with pytest.raises(ValueError, match=f"label map {path} must be lossless, .* got {got}$"):
            read_label_map(path)


def test_suffixes_are_those_that_pillow_decodes():
    assert {".png", ".jpg", ".jpeg", ".webp", ".tif", ".gif", ".bmp", ".ppm"} <= image_suffixes()
    assert image_suffixes().isdisjoint({".pdf", ".eps", ".h5", ".mpg", ".txt", ""})
