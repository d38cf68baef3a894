"""Test image loading by the transforms of training, tests and inferencers."""

import os

import cv2
import mmcv
import mmdet.registry
import mmseg.registry
import numpy as np
import pytest
import torch
from mmengine.dataset import BaseDataset, ConcatDataset
from mmengine.registry import DefaultScope
from PIL import Image

import flash_internimage.openmmlab.detection
import flash_internimage.openmmlab.segmentation  # noqa: F401  registers the loaders
from flash_internimage.images import UnreadableImage
from flash_internimage.openmmlab.datasets.files import find_missing, is_local, require_unique_names
from flash_internimage.openmmlab.datasets.transforms import LoadReadableImage

pytestmark = pytest.mark.usefixtures("safe_loading")


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
def test_unreadable_images_are_left_out_of_training(how, tmp_path):
    make(tmp_path / "1.jpg", how)
    loader = LoadReadableImage()
    assert loader.transform({"img_path": str(tmp_path / "1.jpg")}) is None
    assert loader.transform({"img_path": str(tmp_path / "1.jpg"), "test_mode": False}) is None


@UNREADABLE
def test_unreadable_images_are_an_error_in_tests(how, tmp_path):
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


def test_too_many_unreadable_images_end_the_training(tmp_path):
    loader = LoadReadableImage(max_corrupt=2)
    for i in (1, 2, 1, 2):
        assert loader.transform({"img_path": str(tmp_path / f"{i}.png")}) is None
    message = rf"^more than max_corrupt=2 images .*, the last: cannot read image {tmp_path}/3.png"
    with pytest.raises(ValueError, match=message):
        loader.transform({"img_path": str(tmp_path / "3.png")})


@pytest.mark.parametrize("how", ["scheme", "backend_args"])
def test_remote_images(how, tmp_path, memory):
    path = "memory://1.png" if how == "scheme" else "1.png"
    args = {} if how == "scheme" else {"backend_args": {"backend": "memory"}}
    Image.new("RGB", (4, 3), (1, 2, 3)).save(tmp_path / "1.png")
    memory[path] = (tmp_path / "1.png").read_bytes()
    image = LoadReadableImage(**args).transform({"img_path": path})["img"]
    np.testing.assert_array_equal(image, np.full((3, 4, 3), (3, 2, 1), np.uint8))
    del memory[path]
    assert LoadReadableImage(**args).transform({"img_path": path}) is None


def test_urls_are_not_local(memory):
    assert is_local("some/1.png")
    assert is_local("/some/1.png", {"backend": "local"})
    assert not is_local("memory://1.png")
    assert not is_local("1.png", {"backend": "memory"})


def test_missing_files(tmp_path):
    (tmp_path / "1.png").touch()
    paths = [str(tmp_path / name) for name in ("1.png", "2.png", "none/1.png")]
    assert find_missing(paths) == set(paths[1:])


MUST_BE = r"^img must be a path or an array, \(H, W\), .* of uint8 or uint16, got "


class TestArrays:
    """Inferencers treat arrays like files with the same pixels."""

    @pytest.fixture(params=[mmdet, mmseg], ids=lambda library: library.__name__)
    def load(self, request):
        """Load an image as the inferencers of a library do."""

        def load(image, **kwargs) -> dict:
            cfg = {"type": "InferencerLoader", **kwargs}
            with DefaultScope.overwrite_default_scope(request.param.__name__):
                loader = request.param.registry.TRANSFORMS.build(cfg)
            return loader(image if isinstance(image, str) else {"img": image})

        return load

    @pytest.mark.parametrize("top", [200, 255, 4095, 65535])
    def test_grayscale(self, top, load, tmp_path):
        bits = max(8, top.bit_length())
        pixels = np.linspace(0, top, 30 * 40).astype(np.uint8 if bits == 8 else np.uint16)
        pixels = pixels.reshape(30, 40)
        expected = np.stack([pixels // 2 ** (bits - 8)] * 3, axis=-1)
        Image.fromarray(pixels).save(tmp_path / "1.png")
        np.testing.assert_array_equal(load(str(tmp_path / "1.png"))["img"], expected)
        for image in (pixels, pixels[..., None], pixels.astype(pixels.dtype.newbyteorder(">"))):
            results = load(image)
            np.testing.assert_array_equal(results["img"], expected)
            assert results["img"].dtype == np.uint8
            assert results["img_shape"] == results["ori_shape"] == (30, 40)

    def test_color(self, load):
        image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
        np.testing.assert_array_equal(load(image)["img"], image)
        np.testing.assert_array_equal(load(image.astype(np.uint16) * 16 + 7)["img"], image)
        assert load(image, to_float32=True)["img"].dtype == np.float32
        other = image.astype(np.float32)[..., :2]
        assert load(other, color_type="unchanged")["img"] is other

    @pytest.mark.parametrize(
        ("image", "got"),
        [
            (np.zeros((3, 30, 40), np.uint8), r"\(3, 30, 40\) uint8"),
            (np.zeros((30, 40, 4), np.uint8), r"\(30, 40, 4\) uint8"),
            (np.zeros((1, 30, 40, 3), np.uint8), r"\(1, 30, 40, 3\) uint8"),
            (np.zeros(30, np.uint8), r"\(30,\) uint8"),
            (np.zeros((30, 40, 3), np.float32), r"\(30, 40, 3\) float32"),
            (np.zeros((30, 40), np.int64), r"\(30, 40\) int64"),
            (np.zeros((30, 40), bool), r"\(30, 40\) bool"),
            ([[1, 2]], "list"),
        ],
    )
    def test_invalid_arrays(self, image, got, load):
        with pytest.raises(ValueError, match=MUST_BE + f"{got}$"):
            load(image)

    @pytest.mark.parametrize("shape", [(0, 40, 3), (30, 0), (0, 0), (1, 201), (4000, 10, 3)])
    def test_invalid_sizes(self, shape, load):
        with pytest.raises(
            ValueError, match=r"^img must have pixels, and no side longer than 200 "
        ):
            load(np.zeros(shape, np.uint8))


LOADERS = pytest.mark.parametrize(
    "name", ["LoadImageFromFile", "LoadImageFromNDArray", "InferencerLoader"]
)
OTHERS = [Image.new("RGB", (40, 30)), torch.zeros(3, 30, 40), None, b"1.png", 7, [["1.png"]]]


class TestPathsAndArrays:
    """Every loader accepts both: inference functions select one by the first image."""

    @pytest.fixture(params=[mmdet, mmseg], ids=lambda library: library.__name__)
    def build(self, request):
        """Build a transform of a library."""

        def build(name, **kwargs):
            with DefaultScope.overwrite_default_scope(request.param.__name__):
                return request.param.registry.TRANSFORMS.build({"type": name, **kwargs})

        return build

    @LOADERS
    def test_in_any_order(self, name, build, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
        path = tmp_path / "1.png"
        Image.fromarray(pixels[..., ::-1]).save(path)
        loader = build(name)
        for results in ({"img": pixels}, {"img_path": str(path)}, {"img_path": path}) * 2:
            loaded = loader(dict(results))
            np.testing.assert_array_equal(loaded["img"], pixels, strict=True)
            assert loaded["img_path"] == results.get("img_path")
            assert loaded["img_shape"] == loaded["ori_shape"] == (30, 40)

    @LOADERS
    @pytest.mark.parametrize("key", ["img", "img_path"])
    @pytest.mark.parametrize("color_type", ["color", "unchanged"])
    @pytest.mark.parametrize("image", OTHERS, ids=lambda image: type(image).__name__)
    def test_invalid_types(self, image, color_type, key, name, build):
        with pytest.raises(ValueError, match=MUST_BE + f"{type(image).__name__}$"):
            build(name, color_type=color_type)({key: image})

    def test_the_inferencer_loader_accepts_images_directly(self, build, tmp_path):
        loader = build("InferencerLoader")
        Image.new("RGB", (40, 30)).save(tmp_path / "1.png")
        for image in (np.zeros((30, 40), np.uint8), tmp_path / "1.png", str(tmp_path / "1.png")):
            assert loader(image)["img"].shape == (30, 40, 3)
        for image in OTHERS:
            with pytest.raises(ValueError, match=MUST_BE + f"{type(image).__name__}$"):
                loader(image)

    def test_results_with_an_array_and_a_path(self, build, tmp_path):
        """The transform determines which one is used, as in mmdet and mmseg."""
        Image.new("L", (4, 3), 7).save(tmp_path / "1.png")
        both = {"img": np.zeros((3, 4), np.uint8), "img_path": str(tmp_path / "1.png")}
        assert build("LoadImageFromFile")(dict(both))["img"].max() == 7
        assert build("LoadImageFromNDArray")(dict(both))["img"].max() == 0


@pytest.mark.parametrize(
    ("paths", "suffixes", "unique"),
    [
        (("a/1.jpg", "a/2.jpg"), False, True),
        (("a/1.jpg", "b/1.jpg"), False, False),
        (("a/1.jpg", "b/1.jpg"), True, False),
        (("a/1.jpg", "a/1.png"), False, False),
        (("a/1.jpg", "a/1.png"), True, True),
        (("a/1.jpg", "a/1.jpg"), False, True),  # The results are equal.
    ],
)
def test_results_require_unique_file_names(paths, suffixes, unique):
    data = [BaseDataset(lazy_init=True, serialize_data=False) for _ in paths]
    for dataset, path in zip(data, paths, strict=True):
        dataset.data_list, dataset._fully_initialized = [{"img_path": path}], True
    joined = ConcatDataset(data)
    if unique:
        require_unique_names(joined, "--out", suffixes)
        return
    with pytest.raises(ValueError, match=rf"--out must not .*, got {paths[0]} and {paths[1]}$"):
        require_unique_names(joined, "--out", suffixes)
