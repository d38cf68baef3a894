"""Tests of torchvision datasets: splits, colors, classes and damaged files."""

import shutil
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from flash_internimage.classification.config import ConfigError, Data
from flash_internimage.classification.data import (
    SKIPPED,
    build_dataset,
    class_to_index,
    warn_of_shared_images,
)

COUNTS = {"train": 12, "t10k": 6}


@pytest.fixture
def gray(tmp_path):
    """Write random images as MNIST and the datasets that share its format."""
    generator = np.random.default_rng(0)
    for name in ("MNIST", "KMNIST", "FashionMNIST"):
        (tmp_path / name / "raw").mkdir(parents=True)
        for part, count in COUNTS.items():
            images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
            labels = np.arange(count, dtype=np.uint8) % 10
            for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
                header = struct.pack(f">{1 + values.ndim}I", 2048 + values.ndim, *values.shape)
                path = tmp_path / name / "raw" / f"{part}-{kind}-ubyte"
                path.write_bytes(header + values.tobytes())
    return tmp_path


def build(root, kind: str, split: str, is_training: bool = False):
    dataset = build_dataset(Data(root=str(root), kind=kind), split, is_training, 2)
    dataset.transform = np.asarray
    return dataset


class TestBasic:
    @pytest.mark.parametrize(
        ("kind", "own"),
        [
            ("torch/mnist", datasets.MNIST),
            ("torch/kmnist", datasets.KMNIST),
            ("TORCH/Fashion_MNIST", datasets.FashionMNIST),
        ],
    )
    @pytest.mark.parametrize(
        ("split", "is_train"),
        [("train", True), ("training", True), ("test", False), ("val", False), ("eval", False)],
    )
    def test_grayscale_images_of_the_split_are_converted_to_rgb(
        self, gray, kind, own, split, is_train
    ):
        expected = own(str(gray), train=is_train)
        dataset = build(gray, kind, split)
        assert len(dataset) == COUNTS["train" if is_train else "t10k"]
        assert class_to_index(dataset) == expected.class_to_idx
        for i, (image, label) in enumerate(expected):
            np.testing.assert_array_equal(dataset[i][0], np.asarray(image.convert("RGB")))
            assert dataset[i][1] == label

    @pytest.mark.parametrize(
        "name", ["mnist", "kmnist", "fashion_mnist", "qmnist", "cifar10", "cifar100"]
    )
    @pytest.mark.parametrize("split", ["Train", "trainset", "train+val", "train[:50%]", "extra"])
    def test_an_unknown_split_is_an_error(self, tmp_path, name, split):
        with pytest.raises(ConfigError) as error:
            build(tmp_path, f"torch/{name}", split)
        message = str(error.value)
        assert message.startswith(f"a split of data.kind=torch/{name} must be one of train, ")
        assert message.endswith(f"for the test images, got {split!r}")

    @pytest.mark.parametrize("name", ["minst", "", "places", "svhn"])
    def test_an_unknown_data_set_is_a_one_line_error(self, tmp_path, name):
        with pytest.raises(ConfigError, match=rf"one of cifar10, .*, qmnist, got 'torch/{name}'$"):
            build(tmp_path, f"torch/{name}", "train")

    @pytest.mark.parametrize(("val_split", "is_same"), [("training", True), ("val", False)])
    def test_two_names_for_the_same_split_are_a_warning(self, gray, caplog, val_split, is_same):
        data = Data(root=str(gray), kind="torch/mnist", val_split=val_split)
        sets = [build(gray, data.kind, split) for split in (data.train_split, data.val_split)]
        warn_of_shared_images(data, *sets)
        assert ("contain the same images" in caplog.text) == is_same


@pytest.fixture
def folders(tmp_path):
    """Write classes at two depths, with different natural and lexicographic orders."""
    for i, split in enumerate(("train", "val")):
        for j, name in enumerate(("1", "2", "10/day", "10/night")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for k in range(2):
                Image.new("RGB", (8, 8), (i, j, k)).save(folder / f"{k}.png")
    return tmp_path


@pytest.mark.parametrize("kind", ["torch/image_folder", "torch/folder", "Torch/Image_Folder"])
class TestImageFolder:
    @pytest.mark.parametrize("split", ["train", "val"])
    def test_images_and_classes_match_torchvision(self, folders, kind, split):
        expected = datasets.ImageFolder(str(folders / split))
        dataset = build(folders, kind, split)
        assert class_to_index(dataset) == expected.class_to_idx == {"1": 0, "10": 1, "2": 2}
        assert sorted(dataset.reader.samples) == sorted(expected.samples)

    def test_a_root_without_the_split_is_a_one_line_error(self, folders, kind):
        with pytest.raises(ConfigError, match=r"must contain a folder 'test', got train, val$"):
            build(folders, kind, "test")

    def test_splits_are_compared(self, folders, kind, caplog):
        data = Data(root=str(folders), kind=kind)
        shutil.copy(folders / "train" / "1" / "0.png", folders / "val" / "2" / "0.png")
        warn_of_shared_images(data, *(build(folders, kind, split) for split in ("train", "val")))
        assert "1 of the 8 validation images" in caplog.text
        caplog.clear()
        data = Data(root=str(folders), kind=kind, val_split="train")
        warn_of_shared_images(data, *(build(folders, kind, "train") for _ in range(2)))
        assert "contain the same images" in caplog.text

    def test_damaged_and_16_bit_images_are_read_as_in_other_folders(self, folders, kind, caplog):
        ramp = np.arange(65536).reshape(256, 256).astype(np.uint16)
        Image.fromarray(ramp).save(folders / "val" / "1" / "0.png")
        broken = folders / "val" / "1" / "1.png"
        broken.write_bytes(broken.read_bytes()[:40])
        (folders / "val" / "2" / "notes.txt").write_text("no image")
        dataset = build(folders, kind, "val")
        np.testing.assert_array_equal(dataset[0][0][..., 2], ramp >> 8)
        assert dataset[1][1] == SKIPPED
        assert dataset.corrupt == 1
        assert f"skipped: cannot read image {broken}" in caplog.text
        assert "8 images; other files: 1 .txt" in caplog.text

    @pytest.mark.parametrize("name", ["3", "10/dusk"])
    def test_a_class_without_images_stops_training(self, folders, kind, name):
        (folders / "train" / name).mkdir()
        if name == "3":
            with pytest.raises(ConfigError, match="1 class folders contain no images: 3 "):
                build(folders, kind, "train", is_training=True)
        else:  # a folder inside a class
            assert len(build(folders, kind, "train", is_training=True)) == 8


def test_classes_of_imagenet_are_synsets(tmp_path, caplog):
    names = {"n01440764": ("tench", "Tinca tinca"), "n01443537": ("goldfish", "Carassius auratus")}
    torch.save((names, []), tmp_path / "meta.bin")
    for synset in names:
        (tmp_path / "val" / synset).mkdir(parents=True)
        (tmp_path / "val" / synset / "0.png").write_bytes(b"no image")
    dataset = build(tmp_path, "torch/imagenet", "val")
    assert class_to_index(dataset) == {"n01440764": 0, "n01443537": 1}
    assert [dataset[i][1] for i in range(2)] == [SKIPPED, SKIPPED]
    assert f"cannot read image {tmp_path}/val/n01440764/0.png" in caplog.text
