"""Tests of finding and reading images."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flash_internimage.images import UnreadableImage
from flash_internimage.inference import read_rgb
from flash_internimage.inference.sources import find_sources

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
GRAY = PIXELS[..., 0]


def save(path: Path, image: Image.Image | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(PIXELS) if image is None else image).save(path, **options)
    return path


def names(sources) -> list[str]:
    return [source.name for source in sources]


def test_grayscale_of_8_and_16_bits_is_read_in_its_full_range(tmp_path):
    expected = np.repeat(GRAY[..., None], 3, 2)
    save(tmp_path / "8.png", Image.fromarray(GRAY))
    save(tmp_path / "16.png", Image.fromarray(GRAY.astype(np.uint16) * 257))
    for name in ("8.png", "16.png"):
        np.testing.assert_array_equal(read_rgb(tmp_path / name), expected)


def test_transparency_is_dropped(tmp_path):
    rgba = np.concatenate([PIXELS, GRAY[..., None]], 2)
    np.testing.assert_array_equal(read_rgb(save(tmp_path / "a.png", Image.fromarray(rgba))), PIXELS)


def test_cmyk_is_converted(tmp_path):
    # Without black, CMYK is the complement of RGB.
    image = Image.fromarray(PIXELS).convert("CMYK")
    np.testing.assert_array_equal(read_rgb(save(tmp_path / "a.tiff", image)), PIXELS)


def test_photographs_are_rotated_as_their_exif_data_says(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # Show it rotated by 90 degrees, clockwise.
    image = read_rgb(save(tmp_path / "a.png", exif=exif))
    np.testing.assert_array_equal(image, np.rot90(PIXELS, -1))


def test_an_image_of_one_pixel(tmp_path):
    image = save(tmp_path / "a.png", Image.fromarray(PIXELS[:1, :1]))
    np.testing.assert_array_equal(read_rgb(image), PIXELS[:1, :1])


def test_images_with_more_pixels_than_pillow_accepts_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableImage, match=r"a\.png.*exceeds limit"):
        read_rgb(save(tmp_path / "a.png"))


@pytest.mark.parametrize("kind", ["text", "truncated", "float", "missing"])
def test_unreadable_images_are_named(kind, tmp_path):
    path = tmp_path / "wrong.tiff"
    if kind == "text":
        path.write_text("text")
    elif kind == "truncated":
        path.write_bytes(save(tmp_path / "a.jpg").read_bytes()[:-100])
    elif kind == "float":
        save(path, Image.fromarray(np.ones((2, 2), np.float32)))
    with pytest.raises(UnreadableImage, match=r"cannot read image .*wrong\.tiff: "):
        read_rgb(path)


def test_folders_are_searched_recursively_by_name(tmp_path, caplog):
    for name in ("b.JPG", "a/2.png", "a/1.webp", ".hidden/3.png", "out/4.png"):
        save(tmp_path / name)
    save(tmp_path / ".hidden.png")
    (tmp_path / "notes.txt").write_text("")
    with caplog.at_level(logging.INFO):
        found = find_sources([str(tmp_path)], output=tmp_path / "out")
    assert [source.file_name for source in found] == ["b.JPG", "a/1.webp", "a/2.png"]
    assert names(found) == ["b", "a/1", "a/2"]
    assert "1 files that are not images are left out" in caplog.text


def test_equal_names_get_different_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x/1.jpg", "y/1.jpg", "x/1.png", "x/A.png", "x/a.png"):
        save(tmp_path / name)
    found = names(find_sources(["x", "y/1.jpg"]))
    assert sorted(found) == ["x/1.jpg", "x/1.png", "x/A.png", "x/a.png_2", "y/1"]


def test_names_are_relative_to_the_folder_of_all_inputs(tmp_path):
    path = save(tmp_path / "x" / "1.jpg")
    assert names(find_sources([str(path)])) == ["1"]
    assert names(find_sources([str(tmp_path)])) == ["x/1"]


def test_a_file_that_is_given_twice_counts_once(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "x" / "1.jpg")
    (tmp_path / "x" / "link.jpg").symlink_to("1.jpg")
    assert names(find_sources(["x", "x/1.jpg", "x/*.jpg"])) == ["1"]
    assert "4 files are given more than once" in caplog.text


def test_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x/1.jpg", "x/deep/2.jpg", "[3].jpg"):
        save(tmp_path / name)
    assert names(find_sources(["x/*.jpg"])) == ["1"]
    assert names(find_sources(["x/**/*.jpg"])) == ["1", "deep/2"]
    assert names(find_sources(["[3].jpg"])) == ["[3]"]  # a file, not a pattern


def test_videos_and_cameras(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("1").touch()  # an image rather than a camera
    Path("clip.MP4").touch()
    found = [(source.kind, source.name) for source in find_sources(["clip.MP4", "0", "1"])]
    assert found == [
        ("video", "clip"),
        ("image", "1"),
        ("camera", "camera_0"),
    ]


def test_inputs_that_do_not_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("empty", "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"INPUT not found: a\.jpg"):
        find_sources(["a.jpg"])
    with pytest.raises(ValueError, match=r"match at least one file, got '\*\.jpg'"):
        find_sources(["*.jpg"])
    with pytest.raises(ValueError, match="contain images, got the folder empty with 1 other"):
        find_sources(["empty"])


@pytest.fixture
def with_results(tmp_path, monkeypatch):
    """Change to a folder with an image and the results of a run with `-o out`."""
    monkeypatch.chdir(tmp_path)
    for name in ("1.jpg", "out/2.jpg", "out/pictures/1.jpg", "out/label_maps/1.png"):
        save(tmp_path / name)


@pytest.mark.parametrize(
    ("given", "output", "expected"),
    [
        ("**/*.jpg", "out", ["1.jpg", "out/2.jpg"]),
        ("*", "out", ["1.jpg"]),
        ("out", "out", ["2.jpg"]),
        ("out/*/*", "elsewhere", ["label_maps/1.png", "pictures/1.jpg"]),
    ],
)
def test_results_of_an_earlier_run_are_left_out(with_results, given, output, expected):
    assert [s.file_name for s in find_sources([given], Path(output))] == expected


@pytest.mark.parametrize("given", ["out/pictures/1.jpg", "out/pictures", "link.jpg"])
def test_a_result_is_not_an_input(with_results, given):
    Path("link.jpg").symlink_to("out/pictures/1.jpg")
    with pytest.raises(ValueError, match=f"not be a result in the output folder out, got {given}"):
        find_sources([given], Path("out"))
