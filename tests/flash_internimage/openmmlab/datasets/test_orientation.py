"""Test images with EXIF orientation, and images of 16 bits."""

import json
import logging
import re

import numpy as np
import pytest
from mmcv.transforms import Compose, LoadImageFromFile
from mmengine.registry import TRANSFORMS, init_default_scope
from PIL import Image

from flash_internimage.images import UnreadableImage
from flash_internimage.openmmlab.datasets.transforms import (
    LoadCheckedImage,
    LoadReadableImage,
    read_orientation,
)
from flash_internimage.openmmlab.detection import CheckedCocoDataset

HEIGHT, WIDTH = 20, 60
TURNS = {1: 0, 3: 2, 6: 3, 8: 1}  # EXIF orientation: k of np.rot90
LOADERS = ["LoadReadableImage", "LoadImageFromFile"]


def stored(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Return an image that is white in its right third and dark at its top left corner."""
    image = np.full((height, width, 3), 100, np.uint8)
    image[:, 2 * width // 3 :] = 250
    image[: height // 2, : width // 4] = 0
    return image


def save(path, orientation: int, pixels: np.ndarray | None = None) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored() if pixels is None else pixels).save(path, exif=exif, lossless=True)


@pytest.fixture
def dataset(tmp_path):
    """Build a dataset of one image with an object in its right third as stored."""
    init_default_scope("mmdet")

    def build(orientation, size, loader, suffix="png", test_mode=False, **kwargs):
        save(tmp_path / f"1.{suffix}", orientation)
        height, width = size
        third = (
            [40, 0, 60, 0, 60, 20, 40, 20] if size == (HEIGHT, WIDTH) else [0, 40, 20, 60, 0, 60]
        )
        box = [40, 0, 20, 20] if size == (HEIGHT, WIDTH) else [0, 40, 20, 20]
        entry = {"id": 1, "image_id": 1, "category_id": 1, "area": 400, "bbox": box}
        content = {
            "images": [{"id": 1, "file_name": f"1.{suffix}", "height": height, "width": width}],
            "annotations": [{**entry, "segmentation": [third]}],
            "categories": [{"id": 1, "name": "cat"}],
        }
        (tmp_path / "a.json").write_text(json.dumps(content))
        return CheckedCocoDataset(
            ann_file="a.json", data_root=str(tmp_path), data_prefix={"img": ""},
            metainfo={"classes": ("cat",)}, test_mode=test_mode,
            pipeline=[{"type": loader, **kwargs}, {"type": "LoadAnnotations", "with_mask": True}],
        )  # fmt: skip

    return build


@pytest.mark.parametrize("test_mode", [False, True])
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_boxes_and_masks_fit_the_image_as_stored(orientation, suffix, loader, test_mode, dataset):
    results = dataset(orientation, (HEIGHT, WIDTH), loader, suffix, test_mode)[0]
    assert results["img"].shape == (HEIGHT, WIDTH, 3)
    difference = np.abs(results["img"].astype(int) - stored())
    assert np.median(difference) <= 2  # JPEG is lossy
    assert results["gt_bboxes"].tensor.tolist() == [[40, 0, 60, 20]]
    mask = results["gt_masks"].masks[0].astype(bool)
    assert mask.sum() == 400
    assert results["img"][mask].min() > 200 > results["img"][~mask].max()


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("orientation", [6, 8])
def test_annotations_of_the_rotated_image(orientation, loader, dataset):
    results = dataset(orientation, (WIDTH, HEIGHT), loader, test_mode=True)[0]
    turned = np.rot90(stored(), TURNS[orientation])
    np.testing.assert_array_equal(results["img"], turned)


@pytest.mark.parametrize("loader", LOADERS)
def test_another_size_is_an_error_at_the_start(loader, dataset, tmp_path):
    message = f"image {tmp_path}/1.png has (height, width) (20, 60), but its annotations (60, 20)"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        dataset(1, (WIDTH, HEIGHT), loader, test_mode=True)  # not rotated
    with pytest.raises(FileNotFoundError, match=r"1\.png has .* its annotations \(20, 61\)"):
        dataset(6, (HEIGHT, WIDTH + 1), loader, test_mode=True)


def test_images_rotated_by_180_degrees_are_a_warning_once(dataset, log):
    data = dataset(3, (HEIGHT, WIDTH), "LoadReadableImage")
    np.testing.assert_array_equal(data[0]["img"], np.rot90(stored(), 2))
    np.testing.assert_array_equal(data[0]["img"], np.rot90(stored(), 2))
    (warning,) = [r.getMessage() for r in log.records if r.levelno == logging.WARNING]
    assert "1.png has EXIF orientation 3 and the same size rotated and as" in warning
    as_stored = {"color_type": "color_ignore_orientation"}
    data = dataset(3, (HEIGHT, WIDTH), "LoadReadableImage", **as_stored)
    np.testing.assert_array_equal(data[0]["img"], stored())


@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (WIDTH, HEIGHT)])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_label_map_has_the_size_of_its_image(orientation, size, tmp_path):
    if orientation in (1, 3) and size != (HEIGHT, WIDTH):
        return
    save(tmp_path / "1.png", orientation)
    Image.new("L", size[::-1]).save(tmp_path / "label.png")
    paths = {"img_path": str(tmp_path / "1.png"), "seg_map_path": str(tmp_path / "label.png")}
    image = LoadCheckedImage().transform(paths)["img"]
    turn = TURNS[orientation] if orientation == 3 or size == (WIDTH, HEIGHT) else 0
    np.testing.assert_array_equal(image, np.rot90(stored(), turn))


@pytest.mark.parametrize("color_type", ["color", "grayscale", "unchanged"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_images_without_annotations_equal_those_of_mmcv(suffix, orientation, color_type, tmp_path):
    path = tmp_path / f"1.{suffix}"
    save(path, orientation)
    expected = LoadImageFromFile(color_type=color_type).transform({"img_path": str(path)})
    results = LoadCheckedImage(color_type=color_type).transform({"img_path": str(path)})
    assert results.keys() == expected.keys()
    np.testing.assert_array_equal(results["img"], expected["img"])
    assert results["ori_shape"] == results["img_shape"] == expected["ori_shape"]


def test_exif_data_of_any_kind(tmp_path):
    for exif in (b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"\0" * 100):
        image = Image.new("L", (4, 4))
        image.info["exif"] = exif
        assert read_orientation(image) == 1
    save(tmp_path / "1.png", 77)
    assert read_orientation(Image.open(tmp_path / "1.png")) == 1


class TestSixteenBits:
    """Grayscale images keep their full range in pipelines and inferencers."""

    @pytest.fixture(params=["png", "tiff"])
    def ramp(self, request, tmp_path) -> str:
        path = tmp_path / f"ramp.{request.param}"
        Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(path)
        return str(path)

    @pytest.mark.parametrize("color_type", ["color", "grayscale"])
    def test_12_bit_values_in_16_bits(self, color_type, ramp):
        image = LoadReadableImage(color_type=color_type).transform({"img_path": ramp})["img"]
        expected = (np.arange(4096) >> 4).reshape(64, 64)
        channels = 3 if color_type == "color" else 1
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image.reshape(64, 64, channels)[..., 0], expected)
        np.testing.assert_array_equal(image.reshape(64, 64, channels)[..., -1], expected)

    def test_color_type_unchanged_keeps_the_values(self, ramp):
        image = LoadReadableImage(color_type="unchanged").transform({"img_path": ramp})["img"]
        np.testing.assert_array_equal(image, np.arange(4096).reshape(64, 64))

    def test_pipelines_and_inferencers_of_mmdet(self, ramp, safe_loading):
        init_default_scope("mmdet")
        for loader in ("LoadImageFromFile", "InferencerLoader"):
            image = Compose([TRANSFORMS.build({"type": loader})])({"img_path": ramp})["img"]
            assert (image.min(), image.max(), len(np.unique(image))) == (0, 255, 256)

    @pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (WIDTH, HEIGHT)])
    def test_rotated_images(self, size, tmp_path):
        pixels = (np.arange(HEIGHT * WIDTH, dtype=np.uint16) * 50).reshape(HEIGHT, WIDTH)
        save(tmp_path / "1.png", 6, pixels)
        declared = dict(zip(("height", "width"), size, strict=True))
        results = {"img_path": str(tmp_path / "1.png"), **declared}
        image = LoadCheckedImage().transform(results)["img"]
        expected = np.rot90(pixels >> 8, 3 if size == (WIDTH, HEIGHT) else 0)
        np.testing.assert_array_equal(image[..., 0], expected)

    def test_floating_point_is_unreadable(self, tmp_path):
        Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "1.tiff")
        with pytest.raises(UnreadableImage, match=r"1\.tiff: pixels must be integers"):
            LoadCheckedImage().transform({"img_path": str(tmp_path / "1.tiff")})


def test_empty_files_may_be_ignored(tmp_path):
    (tmp_path / "1.png").write_bytes(b"")
    results = {"img_path": str(tmp_path / "1.png")}
    assert LoadCheckedImage(ignore_empty=True).transform(dict(results)) is None
    assert LoadCheckedImage(ignore_empty=True).transform({"img_path": "none.png"}) is None
    Image.new("RGB", (3, 2)).save(tmp_path / "1.png")
    image = LoadCheckedImage(to_float32=True).transform(results)["img"]
    assert (image.dtype, image.shape) == (np.float32, (2, 3, 3))


def test_file_client_args_are_obsolete():
    with pytest.raises(ValueError, match="file_client_args is obsolete"):
        LoadCheckedImage(file_client_args={"backend": "disk"})
