"""Images that training and tests read through the engine's transforms."""

import os

import cv2
import mmcv
import numpy as np
import pytest
from PIL import Image

from flash_internimage.images import UnreadableImage
from flash_internimage.openmmlab.files import LoadReadableImage, find_missing, is_local


def make(path, how):
    if how == "fifo":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "loop":
        path.symlink_to(path)
    elif how == "strip":
        Image.new("L", (1, 60_000)).save(path, "PNG")
    elif how == "bomb":
        Image.new("1", (20_000, 10_000)).save(path, "PNG")
    elif how is not None:
        path.write_bytes(how)


UNREADABLE = pytest.mark.parametrize(
    "how", [None, b"", b"no image", "fifo", "folder", "loop", "strip", "bomb"]
)


@UNREADABLE
def test_training_leaves_out_what_cannot_be_read(how, tmp_path):
    make(tmp_path / "1.jpg", how)
    loader = LoadReadableImage()
    assert loader.transform({"img_path": str(tmp_path / "1.jpg")}) is None
    assert loader.transform({"img_path": str(tmp_path / "1.jpg"), "test_mode": False}) is None


@UNREADABLE
def test_what_cannot_be_read_is_an_error_in_tests(how, tmp_path):
    make(tmp_path / "1.jpg", how)
    with pytest.raises(UnreadableImage, match=rf"^cannot read image {tmp_path}/1.jpg: .+$"):
        LoadReadableImage().transform({"img_path": str(tmp_path / "1.jpg"), "test_mode": True})


ERRORS = (NotImplementedError, IndexError, TypeError, OverflowError, MemoryError, cv2.error)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("test_mode", [False, True])
def test_any_exception_of_a_decoder_is_an_unreadable_image(error, test_mode, tmp_path, monkeypatch):
    def decode(*args, **kwargs):
        raise error("over\nlines")

    path = str(tmp_path / "1.png")
    Image.new("RGB", (4, 4)).save(path)
    monkeypatch.setattr(mmcv, "imfrombytes", decode)
    results = {"img_path": path, "test_mode": test_mode}
    if test_mode:
        with pytest.raises(UnreadableImage, match=rf"^cannot read image {path}: over lines$"):
            LoadReadableImage().transform(results)
    else:
        assert LoadReadableImage().transform(results) is None


def test_the_training_ends_where_too_many_images_cannot_be_read(tmp_path):
    loader = LoadReadableImage(max_left_out=2)
    for i in (1, 2, 1, 2):
        assert loader.transform({"img_path": str(tmp_path / f"{i}.png")}) is None
    message = rf"^more than max_left_out=2 images .*, the last: cannot read image {tmp_path}/3.png"
    with pytest.raises(ValueError, match=message):
        loader.transform({"img_path": str(tmp_path / "3.png")})


@pytest.mark.parametrize("how", ["scheme", "backend_args"])
def test_images_that_are_not_on_a_disk(how, tmp_path, memory):
    path = "memory://1.png" if how == "scheme" else "1.png"
    args = {} if how == "scheme" else {"backend_args": {"backend": "memory"}}
    Image.new("RGB", (4, 3), (1, 2, 3)).save(tmp_path / "1.png")
    memory[path] = (tmp_path / "1.png").read_bytes()
    image = LoadReadableImage(**args).transform({"img_path": path})["img"]
    np.testing.assert_array_equal(image, np.full((3, 4, 3), (3, 2, 1), np.uint8))
    del memory[path]
    assert LoadReadableImage(**args).transform({"img_path": path}) is None


def test_addresses_are_not_paths(memory):
    assert is_local("some/1.png")
    assert is_local("/some/1.png", {"backend": "local"})
    assert not is_local("memory://1.png")
    assert not is_local("1.png", {"backend": "memory"})


def test_missing_files(tmp_path):
    (tmp_path / "1.png").touch()
    paths = [str(tmp_path / name) for name in ("1.png", "2.png", "none/1.png")]
    assert find_missing(paths) == set(paths[1:])
