import os

import numpy as np
import pytest
from PIL import Image, ImageFile

from flash_internimage.images import UnreadableImage, check_image_file, read_image, read_size

READERS = pytest.mark.parametrize("read", [read_image, read_size, check_image_file])


def refused(read, path, reason: str = "") -> None:
    with pytest.raises(UnreadableImage, match=f"^cannot read image {path}: .*{reason}"):
        read(path)


def test_an_image_is_read_with_its_mode_and_size(tmp_path):
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    image = read_image(tmp_path / "grey.png")
    assert image.mode == "L"
    np.testing.assert_array_equal(np.asarray(image), pixels)
    assert read_size(tmp_path / "grey.png") == (3, 4)


def test_a_stream_is_named_by_its_argument(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with open(tmp_path / "a.png", "rb") as file, pytest.raises(UnreadableImage, match="member a"):
        read_image(file, "member a of t.tar")


@READERS
@pytest.mark.parametrize("kind", ["missing", "fifo", "folder", "loop", "device"])
def test_paths_that_are_no_files_are_never_opened(tmp_path, read, kind):
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
def test_aspect_ratios_that_no_network_can_use(tmp_path, read, size):
    Image.new("1", size).save(tmp_path / "line.png")
    refused(read, tmp_path / "line.png", f"{size[0]} x {size[1]} pixels; one side must not")


def test_aspect_ratios_up_to_the_limit(tmp_path):
    Image.new("L", (2, 400)).save(tmp_path / "strip.png")
    assert read_size(tmp_path / "strip.png") == (400, 2)


@READERS
def test_decompression_bombs(tmp_path, read):
    side = 20_000
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    refused(read, tmp_path / "bomb.png", "decompression bomb")


@pytest.mark.parametrize(
    "error", [NotImplementedError, IndexError, TypeError, OverflowError, MemoryError, KeyError]
)
def test_whatever_a_decoder_raises_is_an_unreadable_image(tmp_path, monkeypatch, error):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")

    def fail(self):
        raise error("of a decoder")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    refused(read_image, tmp_path / "a.png", "of a decoder")


def test_formats_that_pillow_does_not_know_are_left_to_other_decoders(tmp_path):
    path = tmp_path / "a.hdr"
    path.write_bytes(b"#?RADIANCE\n")
    check_image_file(path)
    refused(read_size, path, "cannot identify")
