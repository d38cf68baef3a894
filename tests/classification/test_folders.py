"""Tests of folders and tar files of images: classes, other files, and shared images."""

import os
import re
import shutil
import tarfile
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

from flash_internimage.classification.config import ConfigError, Data
from flash_internimage.classification.data import (
    build_dataset,
    class_names,
    class_to_index,
    val_loader,
    warn_of_shared_images,
)


@pytest.fixture
def root(tmp_path):
    """Write two splits of two classes of two PNG files; all pixels differ."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def read(root, split="train", as_tar=False):
    """Build the dataset of a split from its folder, or from a tar file of the folder."""
    if as_tar:
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            tar.add(root / split, arcname=".")
        split = f"{split}.tar"
    dataset = build_dataset(Data(root=str(root)), split, split.startswith("train"), 2)
    dataset.transform = np.asarray
    return dataset


FORMS = pytest.mark.parametrize("as_tar", [False, True])


@FORMS
@pytest.mark.parametrize(
    "suffix",
    [".webp", ".tif", ".TIFF", ".gif", ".bmp", ".ppm", ".pgm", ".JPG", ".jp2", ".tga", ".avif"],
)
def test_every_format_of_pillow_is_found(root, suffix, as_tar):
    for path in (root / "train" / "dog").iterdir():
        with Image.open(path) as image:
            image.convert("L" if suffix == ".pgm" else "RGB").save(path.with_suffix(suffix))
        path.unlink()
    dataset = read(root, as_tar=as_tar)
    assert class_to_index(dataset) == {"cat": 0, "dog": 1}
    assert [dataset[i][1] for i in range(len(dataset))] == [0, 0, 1, 1]
    assert dataset.corrupt == 0


@FORMS
def test_skipped_files_are_counted_by_suffix(root, caplog, as_tar):
    for name in ("a.txt", "b.TXT", "c.npy", "LICENSE"):
        (root / "train" / "cat" / name).write_text("no image")
    assert len(read(root, as_tar=as_tar)) == 4
    assert "4 images; other files: 2 .txt, 1 .npy, 1 without suffix" in caplog.text


@FORMS
def test_hidden_files_and_folders_are_ignored_silently(root, caplog, as_tar):
    image = (root / "train" / "cat" / "0.png").read_bytes()
    for name in ("cat/._0.png", "cat/.DS_Store", ".ipynb_checkpoints/0.png", "__MACOSX/cat/0.png"):
        path = root / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    dataset = read(root, as_tar=as_tar)
    assert class_to_index(dataset) == {"cat": 0, "dog": 1}
    assert [dataset[i][1] for i in range(len(dataset))] == [0, 0, 1, 1]
    assert not caplog.records


@FORMS
@pytest.mark.parametrize("content", [None, "a.txt", "a.npy"])
def test_a_class_folder_without_images_is_an_error_only_in_training(root, content, as_tar):
    for split in ("train", "val"):
        shutil.rmtree(root / split / "dog")
        (root / split / "dog").mkdir()
        if content:
            (root / split / "dog" / content).write_text("no image")
    files = f"1 {content[1:]}" if content else "none"
    with pytest.raises(ConfigError, match=rf"1 class folders .*: dog \(other files: {files}\)"):
        read(root, as_tar=as_tar)
    assert len(read(root, "val", as_tar)) == 2


@FORMS
def test_folders_within_a_class_are_part_of_it(root, caplog, as_tar):
    (root / "train" / "cat" / "masks").mkdir()
    (root / "train" / "animals").mkdir()
    (root / "train" / "dog").rename(root / "train" / "animals" / "dog")
    assert class_to_index(read(root, as_tar=as_tar)) == {"cat": 0, "dog": 1}
    assert "not all in the same folder, for example animals/dog: the folders that" in caplog.text


def nest(root, split="train"):
    """Move the images of each class into a subfolder."""
    for name in ("cat", "dog"):
        (root / split / name).rename(root / split / "day")
        (root / split / name).mkdir()
        (root / split / "day").rename(root / split / name / "day")


@FORMS
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_name_in_two_folders_is_a_one_line_error(root, split, as_tar):
    nest(root, split)
    message = (
        r": class names must be unique, got 'day' in several folders \(cat/day, dog/day\): "
        r"the folders that directly contain images are the classes$"
    )
    with pytest.raises(ConfigError, match=message):
        read(root, split, as_tar)


@FORMS
def test_a_class_within_a_class_is_a_warning(root, caplog, as_tar):
    (root / "train" / "cat" / "day").mkdir()
    (root / "train" / "cat" / "1.png").rename(root / "train" / "cat" / "day" / "1.png")
    assert class_to_index(read(root, as_tar=as_tar)) == {"cat": 0, "day": 1, "dog": 2}
    assert "not all in the same folder, for example cat/day:" in caplog.text


@FORMS
def test_a_folder_around_all_class_folders_is_accepted_silently(root, caplog, as_tar):
    (root / "train").rename(root / "images")
    (root / "train").mkdir()
    (root / "images").rename(root / "train" / "images")
    assert class_to_index(read(root, as_tar=as_tar)) == {"cat": 0, "dog": 1}
    assert not caplog.records


@FORMS
def test_names_that_differ_only_in_case_have_a_fixed_order(root, as_tar):
    (root / "train" / "dog").rename(root / "train" / "Cat")
    assert class_to_index(read(root, as_tar=as_tar)) == {"Cat": 0, "cat": 1}


@FORMS
@pytest.mark.parametrize("split", ["train", "val"])
def test_composed_and_decomposed_names_are_the_same_class(root, split, as_tar):
    """Archives created on macOS contain decomposed accents."""
    for part, form in (("train", "NFC"), ("val", "NFC"), (split, "NFD")):
        folder = next(iter((root / part).glob("[!c]*")))
        folder.rename(root / part / unicodedata.normalize(form, "é"))
    for part in ("train", "val"):
        dataset = read(root, part, as_tar)
        assert class_to_index(dataset) == {"cat": 0, "é": 1}
        assert [dataset[i][1] for i in range(4)] == [0, 0, 1, 1]


@FORMS
def test_a_split_without_images_is_a_one_line_error(root, as_tar):
    for path in root.glob("train/*/*.png"):
        path.rename(path.with_suffix(".raw"))
    with pytest.raises(
        ConfigError, match=r"as a dataset: it contains no images \(other .*: 4 .raw\)"
    ):
        read(root, as_tar=as_tar)


def test_an_empty_tar_is_a_one_line_error(root):
    with tarfile.open(root / "train.tar", "w"):
        pass
    with pytest.raises(
        ConfigError, match=r"train\.tar cannot .*: it contains no images \(.*none\)"
    ):
        build_dataset(Data(root=str(root)), "train.tar", True, 2)


def test_links_within_a_tar_are_counted(root, caplog):
    (root / "train" / "cat" / "2.png").symlink_to("0.png")
    assert len(read(root, as_tar=True)) == 4
    assert "other files: 1 links and devices" in caplog.text


def nest_tars(path, classes, mode="w"):
    """Write a tar file of one tar file per class."""
    with tarfile.open(path, "w") as tar:
        for folder in classes:
            with tarfile.open(path.with_name(f"{folder.name}.tar"), mode) as inner:
                inner.add(folder, arcname=".")
            tar.add(path.with_name(f"{folder.name}.tar"), arcname=f"{folder.name}.tar")


def test_a_tar_of_tars_is_read(root, caplog):
    nest_tars(root / "all.tar", [root / "train" / name for name in ("cat", "dog")])
    dataset = build_dataset(Data(root=str(root)), "all.tar", True, 2)
    assert (len(dataset), class_to_index(dataset)) == (4, {"cat": 0, "dog": 1})
    assert not caplog.records


def test_a_tar_of_tars_is_checked_like_other_tars(root, caplog):
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    (root / "train" / "elk").mkdir()
    nest_tars(root / "all.tar", [root / "train" / name for name in ("cat", "dog", "elk")])
    assert len(build_dataset(Data(root=str(root)), "all.tar", False, 2)) == 4
    assert "4 images; other files: 1 .txt" in caplog.text
    with pytest.raises(ConfigError, match=r"1 class folders contain no images: elk \(other"):
        build_dataset(Data(root=str(root)), "all.tar", True, 2)
    nest_tars(root / "all.tar", [root / "train" / "cat"], "w:gz")
    with pytest.raises(ConfigError, match=r": nested cat\.tar must be an uncompressed tar file$"):
        build_dataset(Data(root=str(root)), "all.tar", False, 2)


def test_no_tar_in_a_tar_of_tars_is_skipped(root):
    nest_tars(root / "train" / "deep.tar", [root / "train" / name for name in ("cat", "dog")])
    nest_tars(root / "all.tar", [root / "train"])
    with pytest.raises(ConfigError, match=r"timm reads 4 of its 12 images: nested tar files must"):
        build_dataset(Data(root=str(root)), "all.tar", True, 2)


def test_a_class_name_in_two_nested_tars_is_a_one_line_error(root):
    nest(root)
    nest_tars(root / "all.tar", [root / "train" / name for name in ("cat", "dog")])
    with pytest.raises(ConfigError, match=r"got 'day' in several folders \(cat/day, dog/day\)"):
        build_dataset(Data(root=str(root)), "all.tar", True, 2)


def test_a_folder_that_cannot_be_read_is_an_error(root, monkeypatch):
    scan = os.scandir

    def fail(path):
        if os.fspath(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(ConfigError, match=r"cannot be read as a dataset: .*Permission.*dog"):
        read(root)


def test_a_single_class_is_an_error(root):
    shutil.rmtree(root / "train" / "dog")
    with pytest.raises(ConfigError, match="must have at least 2 classes, got 1: cat"):
        class_names(read(root), 2)


def both_splits(root, **settings):
    data = Data(root=str(root), **settings)
    sets = [
        build_dataset(data, getattr(data, f"{kind}_split"), False, 2) for kind in ("train", "val")
    ]
    warn_of_shared_images(data, *sets)


@FORMS
def test_disjoint_splits_give_no_warning(root, caplog, as_tar):
    if as_tar:
        for split in ("train", "val"):
            read(root, split, as_tar)
    suffix = ".tar" if as_tar else ""
    both_splits(root, train_split=f"train{suffix}", val_split=f"val{suffix}")
    assert not caplog.records


@pytest.mark.parametrize("how", ["copied", "renamed", "linked", "hard-linked", "large"])
def test_validation_images_that_are_training_images_are_counted(root, caplog, monkeypatch, how):
    source, target = root / "train" / "cat" / "0.png", root / "val" / "dog" / "0.png"
    target.unlink()
    if how == "renamed":
        target = target.with_name("other.png")
    if how == "large":  # Names are compared before contents.
        monkeypatch.setattr("flash_internimage.classification.data.folders._LARGE", 2)
    {"linked": os.symlink, "hard-linked": os.link}.get(how, shutil.copy)(source, target)
    both_splits(root)
    assert "1 of the 4 validation images that were compared are also training images" in caplog.text


@pytest.mark.parametrize("how", ["same name", "link", "tar", "copy of a tar"])
def test_the_same_images_for_both_splits_are_a_warning(root, caplog, how):
    data, settings = root, {}
    if how == "same name":
        settings = {"val_split": "train"}
    elif how == "link":
        shutil.rmtree(root / "val")
        (root / "val").symlink_to("train")
    elif how == "copy of a tar":
        settings = {"train_split": "train.tar", "val_split": "val.tar"}
        read(root, "train", as_tar=True)
        shutil.copy(root / "train.tar", root / "val.tar")
    else:
        data = root / "all.tar"
        with tarfile.open(data, "w") as tar:
            tar.add(root / "train", arcname=".")
    both_splits(data, **settings)
    assert "data.train_split and data.val_split contain the same images (" in caplog.text
    assert len(caplog.records) == 1


@FORMS
def test_16_bit_images_are_not_clipped(root, as_tar):
    ramp = np.linspace(0, 4095, 4096).reshape(64, 64).astype(np.uint16)
    for path in root.glob("val/*/*"):
        Image.fromarray(ramp).save(path)
    dataset = read(root, "val", as_tar)
    for i in range(len(dataset)):
        np.testing.assert_array_equal(dataset[i][0][..., 0], ramp >> 4)
    loader = val_loader(dataset, Data(image_size=64, workers=0), 4, torch.device("cpu"))
    assert next(iter(loader))[0].std() > 0.5


@pytest.mark.parametrize(
    ("kind", "packages"),
    [
        ("wds/", "webdataset"),
        ("tfds/mnist", "tensorflow tensorflow-datasets"),
        ("hfds/mnist", "datasets"),
        ("HFIDS/mnist", "datasets"),
    ],
)
def test_a_missing_package_for_a_kind_is_a_one_line_error(root, monkeypatch, kind, packages):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = rf"^data\.kind={kind} requires a package: pip install {re.escape(packages)}$"
    with pytest.raises(ConfigError, match=message):
        build_dataset(Data(root=str(root), kind=kind), "train", True, 2)
