"""Test segmentation datasets with flawed label maps and images."""

import logging
import os
import re

import numpy as np
import pytest
from mmengine.registry import DATASETS
from mmseg.datasets import ADE20KDataset, BaseSegDataset
from mmseg.registry import TRANSFORMS
from PIL import Image

from flash_internimage.images import UnreadableImage
from flash_internimage.openmmlab.segmentation import CheckedSegDataset, LoadCheckedAnnotations
from tests.flash_internimage.openmmlab.label_maps import (
    CLASSES,
    HEIGHT,
    TEST,
    TRAIN,
    WIDTH,
    arguments,
    both_modes,
    label_map,
    write_labels,
)


def names(dataset) -> list[str]:
    return [dataset.get_data_info(i)["img_path"].rpartition("/")[2] for i in range(len(dataset))]


def damage(path, how):
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "other": b"no image", "cut": content[:-24]}[how])


@pytest.mark.parametrize("name", ["CheckedSegDataset", "CheckedADE20KDataset"])
def test_data_sets_and_transform_are_registered(name, folder):
    kwargs = arguments(folder) | {"metainfo": None if "ADE" in name else {"classes": CLASSES}}
    dataset = DATASETS.build({"type": name, **kwargs})
    assert isinstance(dataset, ADE20KDataset if "ADE" in name else BaseSegDataset)
    assert TRANSFORMS.get("LoadCheckedAnnotations") is LoadCheckedAnnotations


@both_modes
def test_the_contents_are_logged(test_mode, folder, log):
    dataset = CheckedSegDataset(**arguments(folder, test_mode=test_mode))
    assert names(dataset) == ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    assert log.records[-1].levelno == logging.INFO
    assert log.messages[-1].endswith(
        f"{folder}/images: 4 images; left out: nothing; 3 of the 3 classes occur in 4 label maps "
        "checked"
    )


def test_images_without_a_label_map_are_left_out_of_training(folder, log):
    (folder / "labels" / "2.png").unlink()
    assert names(CheckedSegDataset(**arguments(folder))) == ["1.jpg", "3.jpg", "4.jpg"]
    assert "3 images; left out: 1 images without a label map; 3 of" in log.text
    assert log.records[-1].levelno == logging.WARNING


@both_modes
def test_label_maps_without_an_image_are_counted(test_mode, folder, log):
    (folder / "images" / "2.jpg").unlink()
    dataset = CheckedSegDataset(**arguments(folder, test_mode=test_mode))
    assert names(dataset) == ["1.jpg", "3.jpg", "4.jpg"]
    assert "3 images; left out: 1 label maps without an image; 3 of" in log.text
    assert log.records[-1].levelno == logging.WARNING


def test_label_maps_in_the_folder_of_their_images(folder, log):
    for path in (folder / "labels").iterdir():
        path.rename(folder / "images" / path.name)
    prefixes = {"img_path": "images", "seg_map_path": "images"}
    dataset = CheckedSegDataset(**arguments(folder, data_prefix=prefixes))
    assert names(dataset) == ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    assert log.records[-1].levelno == logging.INFO


@both_modes
@pytest.mark.parametrize("suffix", [".JPG", ".jpeg", ".png"])
def test_images_with_another_suffix_and_a_label_map_are_an_error(suffix, test_mode, folder, log):
    path = folder / "images" / "2.jpg"
    message = rf"1 images of {folder}/images .* img_suffix='.jpg', the first: .*/2{suffix}; "
    path.rename(path.with_suffix(suffix))
    with pytest.raises(ValueError, match=message):
        CheckedSegDataset(**arguments(folder, test_mode=test_mode))
    (folder / "labels" / "2.png").unlink()
    CheckedSegDataset(**arguments(folder, test_mode=test_mode))
    assert log.records[-1].levelno == logging.INFO


@both_modes
def test_suffixes_are_suggested_if_images_and_label_maps_do_not_match(test_mode, folder):
    for i in range(1, 5):
        (folder / "images" / f"{i}.jpg").rename(folder / "images" / f"{i}_leftImg8bit.jpg")
        (folder / "labels" / f"{i}.png").rename(folder / "labels" / f"{i}_gtFine_labelIds.png")
    (folder / "labels" / "readme.txt").touch()
    message = (
        r"4 of the 4 images .*; that folder contains 1_gtFine_labelIds.png: set "
        r"img_suffix='_leftImg8bit.jpg' and seg_map_suffix='_gtFine_labelIds.png'$"
    )
    with pytest.raises(FileNotFoundError, match=message):
        CheckedSegDataset(**arguments(folder, test_mode=test_mode))
    suffixes = {"img_suffix": "_leftImg8bit.jpg", "seg_map_suffix": "_gtFine_labelIds.png"}
    assert len(CheckedSegDataset(**arguments(folder, test_mode=test_mode, **suffixes))) == 4


def test_a_test_requires_all_label_maps(folder):
    for i in (2, 3):
        (folder / "labels" / f"{i}.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of the 4 images .*first: .*labels/2\.png"):
        CheckedSegDataset(**arguments(folder, test_mode=True))


def test_label_maps_with_another_suffix_are_an_error_in_training_too(folder):
    message = r"4 of the 4 images .*first: .*labels/1_gt\.png; .* seg_map_suffix='.png'$"
    with pytest.raises(FileNotFoundError, match=message):
        CheckedSegDataset(**arguments(folder, seg_map_suffix="_gt.png"))


@both_modes
@pytest.mark.parametrize("key", ["img_path", "seg_map_path"])
def test_a_missing_folder(key, test_mode, folder):
    prefixes = {"img_path": "images", "seg_map_path": "labels"}
    message = rf"folder not found: data_prefix\['{key}'\] is '{folder}/nowhere'"
    with pytest.raises(FileNotFoundError, match=message):
        CheckedSegDataset(
            **arguments(folder, data_prefix=prefixes | {key: "nowhere"}, test_mode=test_mode)
        )
    del prefixes[key]
    message = rf"data_prefix\['{key}'\] is None"
    if test_mode and key == "seg_map_path":
        message = "must have seg_map_path, the folder of .* set type='BaseSegDataset' .*format_only"
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        CheckedSegDataset(**arguments(folder, data_prefix=prefixes, test_mode=test_mode))


@both_modes
def test_a_list_of_names_must_not_contain_suffixes(test_mode, folder):
    (folder / "split.txt").write_text("1.jpg\n2.jpg\n")
    message = r"2 of the 2 images .*; ann_file must list names without the suffix '\.jpg'$"
    with pytest.raises(FileNotFoundError, match=message):
        CheckedSegDataset(**arguments(folder, ann_file="split.txt", test_mode=test_mode))


@both_modes
def test_a_folder_without_images(test_mode, folder):
    message = rf"no images \(\*.jpeg\) in {folder}/images, but 4 \*.jpg: set img_suffix$"
    with pytest.raises(FileNotFoundError, match=message):
        CheckedSegDataset(**arguments(folder, img_suffix=".jpeg", test_mode=test_mode))


def test_images_in_nested_folders(folder):
    for kind in ("images", "labels"):
        (folder / kind / "deep").mkdir()
    (folder / "images" / "2.jpg").rename(folder / "images" / "deep" / "2.jpg")
    (folder / "labels" / "2.png").rename(folder / "labels" / "deep" / "2.png")
    dataset = CheckedSegDataset(**arguments(folder, test_mode=True))
    assert sorted(names(dataset)) == ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]


@both_modes
@pytest.mark.parametrize("content", ["4\n2\n", "\n4\n\n \t\n2\n\n", "4\r\n\r\n2 \r\n\r\n"])
def test_a_list_of_names(content, test_mode, folder, log):
    (folder / "some.txt").write_bytes(content.encode())
    listed = arguments(folder, ann_file="some.txt", test_mode=test_mode)
    assert names(CheckedSegDataset(**listed)) == ["4.jpg", "2.jpg"]
    assert "some.txt: 2 images; left out: nothing; " in log.text


def test_a_list_with_a_name_that_is_no_image(folder, log):
    (folder / "some.txt").write_text("4\n5\n")
    assert names(CheckedSegDataset(**arguments(folder, ann_file="some.txt"))) == ["4.jpg"]
    assert "some.txt: 1 images; left out: 1 missing images; 3 of" in log.text
    with pytest.raises(FileNotFoundError, match=r"1 of the 2 images of .*some.txt .*images/5\.jpg"):
        CheckedSegDataset(**arguments(folder, ann_file="some.txt", test_mode=True))


def test_a_list_of_names_that_is_missing_or_empty(folder):
    with pytest.raises(FileNotFoundError, match=rf"ann_file not found: {folder}/none.txt"):
        CheckedSegDataset(**arguments(folder, ann_file="none.txt"))
    for content in ("", "\n \n"):
        (folder / "none.txt").write_text(content)
        with pytest.raises(FileNotFoundError, match=rf"no images .* in {folder}/none.txt"):
            CheckedSegDataset(**arguments(folder, ann_file="none.txt"))


@pytest.mark.parametrize("how", ["empty", "other"])
@pytest.mark.parametrize("path", ["images/3.jpg", "labels/3.png"])
def test_a_test_requires_valid_image_headers(path, how, folder):
    damage(folder / path, how)
    with pytest.raises(
        ValueError, match=rf"1 of the 4 .*first: cannot read image {folder}/{path}: "
    ):
        CheckedSegDataset(**arguments(folder, test_mode=True))


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("reduce_zero_label", "False", "bool"),
        ("ignore_index", "void", "int"),
        ("img_suffix", (".jpg", ".png"), "str"),
        ("seg_map_suffix", None, "str"),
    ],
)
def test_options_of_a_wrong_type(name, value, kind, folder):
    message = re.escape(f"{name} must be {kind}, got {value!r}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        CheckedSegDataset(**arguments(folder, test_mode=True) | {name: value})


def test_a_test_requires_label_maps_of_the_size_of_their_images(folder):
    for i in (2, 4):
        write_labels(folder, i, np.zeros((HEIGHT, WIDTH + 1), np.uint8))
    message = r"2 of the 4 .*labels/2.png has \(height, width\) \(12, 17\), but its image \(12, 16"
    with pytest.raises(ValueError, match=message):
        CheckedSegDataset(**arguments(folder, test_mode=True))


@pytest.mark.parametrize("how", ["gone", "empty", "other", "cut", "size", "transposed"])
def test_unusable_label_maps_are_left_out_of_training(how, folder, log):
    dataset = CheckedSegDataset(**arguments(folder))
    path = folder / "labels" / "1.png"
    if how == "gone":
        path.unlink()
    elif how == "size":
        write_labels(folder, 1, np.zeros((HEIGHT, WIDTH - 1), np.uint8))
    elif how == "transposed":
        write_labels(folder, 1, np.zeros((WIDTH, HEIGHT), np.uint8))
    else:
        damage(path, how)
    log.clear()
    drawn = {dataset[0]["img_path"].rpartition("/")[2] for _ in range(30)}
    assert drawn <= {"2.jpg", "3.jpg", "4.jpg"}
    (warning,) = [record for record in log.records if "left out: " in record.message]
    assert warning.levelno == logging.WARNING
    assert "left out: " in warning.message
    assert str(path) in warning.message
    assert "; 1 so far in process" in warning.message


@pytest.mark.parametrize("how", ["gone", "cut", "transposed"])
def test_unusable_label_maps_are_an_error_in_a_test(how, folder):
    dataset = CheckedSegDataset(**arguments(folder, test_mode=True))
    path = folder / "labels" / "1.png"
    if how == "gone":
        path.unlink()
    elif how == "transposed":
        write_labels(folder, 1, np.zeros((WIDTH, HEIGHT), np.uint8))
    else:
        damage(path, how)
    with pytest.raises(UnreadableImage, match=r"labels/1.png"):
        dataset[0]


@both_modes
def test_all_label_maps_damaged(test_mode, folder):
    for i in range(1, 5):
        damage(folder / "labels" / f"{i}.png", "cut")
    message = {
        False: r"none of the 4 label maps of .* can be used, .*labels/1.png: ",
        True: "1.png",
    }
    with pytest.raises(ValueError, match=message[test_mode]):
        CheckedSegDataset(**arguments(folder, test_mode=test_mode))


def test_training_without_a_readable_image_is_an_error(folder):
    dataset = CheckedSegDataset(**arguments(folder))
    for i in range(1, 5):
        damage(folder / "images" / f"{i}.jpg", "other")
    with pytest.raises(ValueError, match=r"^.*images: none of 1001 images in a row can be used"):
        dataset[0]


def test_too_many_unusable_label_maps_are_an_error(folder):
    pipeline = [TRAIN[0], TRAIN[1] | {"max_corrupt": 2}]
    dataset = CheckedSegDataset(**arguments(folder) | {"pipeline": pipeline})
    for i in range(1, 5):
        damage(folder / "labels" / f"{i}.png", "other")
    message = r"^more than max_corrupt=2 images or label maps cannot be used, the last: .*png: "
    with pytest.raises(ValueError, match=message):
        dataset[0]


def test_an_unreadable_image_is_named_in_a_test(folder):
    dataset = CheckedSegDataset(**arguments(folder, test_mode=True))
    damage(folder / "images" / "1.jpg", "other")
    with pytest.raises(UnreadableImage, match=rf"^cannot read image {folder}/images/1.jpg: .+$"):
        dataset[0]


@both_modes
@pytest.mark.parametrize("kind", ["images", "labels"])
def test_files_that_would_block_or_exhaust_memory(kind, test_mode, folder):
    path = folder / kind / ("1.jpg" if kind == "images" else "1.png")
    (folder / "all.txt").write_text("1\n2\n3\n4\n")
    listed = arguments(folder, test_mode=test_mode, ann_file="all.txt")
    for content in ("fifo", "strip"):
        path.unlink()
        if content == "fifo":
            os.mkfifo(path)
        else:
            Image.new("L", (1, 60_000)).save(path, "PNG")
        if test_mode:
            with pytest.raises(ValueError, match=rf"cannot read image {path}: .+$"):
                CheckedSegDataset(**listed)
        else:
            dataset = CheckedSegDataset(**listed)
            assert dataset[0]["img_path"].rpartition("/")[2] in ("2.jpg", "3.jpg", "4.jpg")


@pytest.mark.parametrize("kind", ["fifo", "link"])
def test_images_that_are_not_regular_files_are_counted(kind, folder, log):
    path = folder / "images" / "2.jpg"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere.jpg")
    assert names(CheckedSegDataset(**arguments(folder))) == ["1.jpg", "3.jpg", "4.jpg"]
    assert "3 images; left out: 1 images that are not regular files; 3 of" in log.text
    with pytest.raises(FileNotFoundError, match=rf"1 images of .* the first: {path}"):
        CheckedSegDataset(**arguments(folder, test_mode=True))


@both_modes
def test_a_link_to_a_parent_folder(test_mode, folder):
    (folder / "images" / "again").symlink_to(folder / "images")
    with pytest.raises(OSError, match=rf"symbolic link {folder}/images/again leads back to"):
        CheckedSegDataset(**arguments(folder, test_mode=test_mode))
    (folder / "some.txt").write_text("4\n2\n")
    dataset = CheckedSegDataset(**arguments(folder, test_mode=test_mode, ann_file="some.txt"))
    assert names(dataset) == ["4.jpg", "2.jpg"]


@both_modes
def test_remote_data(test_mode, folder, memory):
    for path in folder.glob("*/*"):
        memory[f"memory://{path.parent.name}/{path.name}"] = path.read_bytes()
        path.unlink()
    (folder / "some.txt").write_text("4\n2\n")
    prefixes = {"img_path": "memory://images", "seg_map_path": "memory://labels"}
    remote = {"data_root": None, "data_prefix": prefixes, "ann_file": str(folder / "some.txt")}
    dataset = CheckedSegDataset(**arguments(folder, test_mode=test_mode) | remote)
    assert dataset[0]["gt_seg_map"].shape == (HEIGHT, WIDTH)
    memory["memory://labels/4.png"] = memory["memory://images/4.jpg"]
    with pytest.raises(ValueError, match=r"label map memory://labels/4.png must have one channel"):
        dataset[0]


def test_training_starts_with_a_label_map_damaged_after_its_header(folder):
    damage(folder / "labels" / "1.png", "cut")
    assert names(CheckedSegDataset(**arguments(folder)))[0] == "1.jpg"
    with pytest.raises(ValueError, match=r"cannot read image .*labels/1.png: "):
        CheckedSegDataset(**arguments(folder, test_mode=True))


@pytest.mark.parametrize("how", ["empty", "other", "cut"])
def test_unreadable_images_are_replaced_in_training(how, folder, log):
    dataset = CheckedSegDataset(**arguments(folder))
    path = folder / "images" / "1.jpg"
    damage(path, how)
    drawn = {dataset[0]["img_path"].rpartition("/")[2] for _ in range(30)}
    assert drawn <= {"2.jpg", "3.jpg", "4.jpg"}
    assert log.text.count(f"left out: cannot read image {path}: ") == 1


@pytest.mark.parametrize("color_type", ["color", "color_ignore_orientation"])
@pytest.mark.parametrize("turned", [False, True])
def test_images_are_rotated_by_exif_if_their_label_map_is(turned, color_type, folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    image = Image.new("RGB", (WIDTH, HEIGHT))
    image.save(folder / "images" / "1.jpg", exif=exif)
    if turned:
        write_labels(folder, 1, label_map(0, 1).T.copy())
    pipeline = [TEST[0] | {"color_type": color_type}, *TEST[1:]]
    dataset = CheckedSegDataset(**arguments(folder, test_mode=True) | {"pipeline": pipeline})
    if color_type == "color" or not turned:
        assert dataset[0]["gt_seg_map"].shape == dataset[0]["ori_shape"]
    else:
        with pytest.raises(
            ValueError, match=r"has \(height, width\) \(1[26], 1[26]\), but its image"
        ):
            dataset[0]


def test_inference_needs_no_label_map():
    results = {"img": np.zeros((HEIGHT, WIDTH, 3), np.uint8)}
    assert LoadCheckedAnnotations().transform(results.copy()).keys() == {"img"}
