"""Label maps and images as they come in practice."""

import logging
import os
import re

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS
from mmseg.datasets import ADE20KDataset, BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.models import SegDataPreProcessor
from mmseg.registry import TRANSFORMS
from PIL import Image

from flash_internimage.images import UnreadableImage
from flash_internimage.openmmlab.label_maps import (
    CheckedADE20KDataset,
    CheckedSegDataset,
    LoadCheckedAnnotations,
)
from tools.make_demo_data import write_digits_scenes_ade20k

CLASSES = ("background", "bolt", "nut")
HEIGHT, WIDTH = 12, 16
TRAIN = [{"type": "LoadReadableImage"}, {"type": "LoadCheckedAnnotations"}]
TEST = [
    {"type": "mmseg.LoadImageFromFile"},
    {"type": "mmseg.Resize", "scale": (64, 32), "keep_ratio": True},
    {"type": "LoadCheckedAnnotations"},
]
DIGITS = ("background", *"0123456789")


def label_map(*values: int) -> np.ndarray:
    """A label map with these values, each as often as the others."""
    return np.resize(np.array(values, np.uint8), (HEIGHT, WIDTH))


@pytest.fixture
def folder(tmp_path):
    """Where images 1 to 4 and their label maps are."""
    rng = np.random.default_rng(0)
    for i in range(1, 5):
        (tmp_path / "images").mkdir(exist_ok=True)
        image = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.jpg")
        write_labels(tmp_path, i, label_map(0, 1, 2, 255))
    return tmp_path


def write_labels(folder, i, values):
    (folder / "labels").mkdir(exist_ok=True)
    Image.fromarray(values).save(folder / "labels" / f"{i}.png")


def arguments(folder, **kwargs):
    return {
        "data_root": str(folder),
        "data_prefix": {"img_path": "images", "seg_map_path": "labels"},
        "metainfo": {"classes": CLASSES},
        "pipeline": TEST if kwargs.get("test_mode") else TRAIN,
        **kwargs,
    }


def names(dataset) -> list[str]:
    return [dataset.get_data_info(i)["img_path"].rpartition("/")[2] for i in range(len(dataset))]


def both_modes(function):
    return pytest.mark.parametrize("test_mode", [False, True], ids=["train", "test"])(function)


def damage(path, how):
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "other": b"no image", "cut": content[:-24]}[how])


@pytest.mark.parametrize("name", ["CheckedSegDataset", "CheckedADE20KDataset"])
def test_configs_name_the_data_sets_and_the_transform(name, folder):
    kwargs = arguments(folder) | {"metainfo": None if "ADE" in name else {"classes": CLASSES}}
    dataset = DATASETS.build({"type": name, **kwargs})
    assert isinstance(dataset, ADE20KDataset if "ADE" in name else BaseSegDataset)
    assert TRANSFORMS.get("LoadCheckedAnnotations") is LoadCheckedAnnotations


@both_modes
def test_the_log_says_what_there_is(test_mode, folder, log):
    dataset = CheckedSegDataset(**arguments(folder, test_mode=test_mode))
    assert names(dataset) == ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    assert log.records[-1].levelno == logging.INFO
    assert log.messages[-1].endswith(
        f"{folder}/images: 4 images; left out: 0 that are missing or have no label map; 3 of the 3 "
        "classes occur in 4 label maps checked, 0 of them unreadable"
    )


def test_images_without_a_label_map_are_left_out_of_training(folder, log):
    (folder / "labels" / "2.png").unlink()
    assert names(CheckedSegDataset(**arguments(folder))) == ["1.jpg", "3.jpg", "4.jpg"]
    assert "3 images; left out: 1 that" in log.text
    assert log.records[-1].levelno == logging.WARNING


def test_label_maps_without_an_image_are_not_of_the_data_set(folder, log):
    (folder / "images" / "2.jpg").unlink()
    dataset = CheckedSegDataset(**arguments(folder, test_mode=True))
    assert names(dataset) == ["1.jpg", "3.jpg", "4.jpg"]
    assert log.records[-1].levelno == logging.INFO


def test_a_test_needs_all_label_maps(folder):
    for i in (2, 3):
        (folder / "labels" / f"{i}.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of the 4 images .*first is .*labels/2\.png"):
        CheckedSegDataset(**arguments(folder, test_mode=True))


def test_label_maps_of_another_suffix_are_an_error_in_training_too(folder):
    with pytest.raises(FileNotFoundError, match=r"4 of the 4 images .*first is .*labels/1_gt\.png"):
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
    with pytest.raises(FileNotFoundError, match=rf"data_prefix\['{key}'\] is None"):
        CheckedSegDataset(**arguments(folder, data_prefix=prefixes, test_mode=test_mode))


@both_modes
def test_a_folder_without_images(test_mode, folder):
    with pytest.raises(FileNotFoundError, match=rf"no images \(\*.jpeg\) in {folder}/images"):
        CheckedSegDataset(**arguments(folder, img_suffix=".jpeg", test_mode=test_mode))


def test_images_in_folders_of_folders(folder):
    for kind in ("images", "labels"):
        (folder / kind / "deep").mkdir()
    (folder / "images" / "2.jpg").rename(folder / "images" / "deep" / "2.jpg")
    (folder / "labels" / "2.png").rename(folder / "labels" / "deep" / "2.png")
    dataset = CheckedSegDataset(**arguments(folder, test_mode=True))
    assert sorted(names(dataset)) == ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]


def test_a_list_of_names(folder):
    (folder / "some.txt").write_text("4\n2\n")
    assert names(CheckedSegDataset(**arguments(folder, ann_file="some.txt"))) == ["4.jpg", "2.jpg"]


def test_a_list_with_the_name_of_no_image(folder, log):
    (folder / "some.txt").write_text("4\n5\n")
    assert names(CheckedSegDataset(**arguments(folder, ann_file="some.txt"))) == ["4.jpg"]
    assert "some.txt: 1 images; left out: 1 that" in log.text
    with pytest.raises(FileNotFoundError, match=r"1 of the 2 images of .*some.txt .*images/5\.jpg"):
        CheckedSegDataset(**arguments(folder, ann_file="some.txt", test_mode=True))


def test_a_list_of_names_that_is_missing_or_empty(folder):
    with pytest.raises(FileNotFoundError, match=rf"ann_file not found: {folder}/none.txt"):
        CheckedSegDataset(**arguments(folder, ann_file="none.txt"))
    (folder / "none.txt").touch()
    with pytest.raises(FileNotFoundError, match=rf"no images .* in {folder}/none.txt"):
        CheckedSegDataset(**arguments(folder, ann_file="none.txt"))


@pytest.mark.parametrize("how", ["empty", "other"])
@pytest.mark.parametrize("path", ["images/3.jpg", "labels/3.png"])
def test_a_test_needs_files_that_begin_as_images(path, how, folder):
    damage(folder / path, how)
    with pytest.raises(
        ValueError, match=rf"1 of the 4 .*first: cannot read image {folder}/{path}: "
    ):
        CheckedSegDataset(**arguments(folder, test_mode=True))


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [("reduce_zero_label", "False", "bool"), ("ignore_index", "void", "int")],
)
def test_options_of_another_type(name, value, kind, folder):
    with pytest.raises(ValueError, match=rf"^{name} must be {kind}, got '{value}'$"):
        CheckedSegDataset(**arguments(folder, test_mode=True) | {name: value})


def test_a_test_needs_label_maps_of_their_images_sizes(folder):
    for i in (2, 4):
        write_labels(folder, i, np.zeros((HEIGHT, WIDTH + 1), np.uint8))
    message = r"2 of the 4 .*labels/2.png has \(height, width\) \(12, 17\), its image has \(12, 16"
    with pytest.raises(ValueError, match=message):
        CheckedSegDataset(**arguments(folder, test_mode=True))


@both_modes
@pytest.mark.parametrize("classes", ["bolt", (), None, ("name",) * 256, 5, (1, 2)])
def test_classes_that_are_no_names(classes, test_mode, folder):
    metainfo = None if classes is None else {"classes": classes}
    with pytest.raises(ValueError, match=r"metainfo\['classes'\] must be 1 to 255 names"):
        CheckedSegDataset(**arguments(folder, metainfo=metainfo, test_mode=test_mode))


def test_classes_from_a_file(folder):
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    dataset = CheckedSegDataset(
        **arguments(folder, metainfo={"classes": str(folder / "classes.txt")})
    )
    assert dataset.metainfo["classes"] == list(CLASSES)


WRONG_VALUES = [
    # reduce_zero_label, the values of a label map, what the message says
    (False, label_map(0, 3, 254), "[3, 254]; with 3 classes and reduce_zero_label=False, "
     "0 to 2 are classes, and 255 to be ignored"),
    (True, label_map(0, 4, 254), "[4, 254]; with 3 classes and reduce_zero_label=True, "
     "1 to 3 are classes, and 0 and 255 to be ignored"),
    (False, label_map(0, 1).astype(np.uint16) + 256, "[256, 257]; with 3 classes"),  # 16 bits
]  # fmt: skip


@both_modes
@pytest.mark.parametrize(("reduce", "values", "said"), WRONG_VALUES)
def test_values_that_belong_to_no_class_are_an_error_at_the_start(
    reduce, values, said, test_mode, folder
):
    write_labels(folder, 3, values)
    with pytest.raises(ValueError, match=re.escape(f"labels/3.png has the values {said}")):
        CheckedSegDataset(**arguments(folder, reduce_zero_label=reduce, test_mode=test_mode))


@both_modes
@pytest.mark.parametrize(("reduce", "values", "said"), WRONG_VALUES)
def test_values_that_belong_to_no_class_are_an_error_when_they_are_read(
    reduce, values, said, test_mode, folder
):
    dataset = CheckedSegDataset(**arguments(folder, reduce_zero_label=reduce, test_mode=test_mode))
    write_labels(folder, 3, values)
    with pytest.raises(ValueError, match=re.escape(f"labels/3.png has the values {said}")):
        dataset[2]


@both_modes
def test_label_maps_in_colour(test_mode, folder):
    dataset = CheckedSegDataset(**arguments(folder, test_mode=test_mode))
    write_labels(folder, 1, np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    message = r"labels/1.png must have one channel, .* shape \(12, 16, 3\)"
    with pytest.raises(ValueError, match=message):
        dataset[0]
    with pytest.raises(ValueError, match=message):
        CheckedSegDataset(**arguments(folder, test_mode=test_mode))


def test_masks_of_0_and_255_are_suspicious(folder, log):
    for i in range(1, 5):
        write_labels(folder, i, label_map(0, 255))
    CheckedSegDataset(**arguments(folder))
    assert "1 of the 3 classes occur in 4 label maps" in log.text
    assert log.records[-1].levelno == logging.WARNING


@pytest.mark.parametrize(("number", "checked"), [(200, 200), (201, 101)])
def test_the_label_maps_checked_are_from_all_over_the_data_set(number, checked, tmp_path, log):
    for i in range(number):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{i:03d}.jpg").touch()
        write_labels(tmp_path, f"{i:03d}", label_map(i // (number // 3 + 1)))
    CheckedSegDataset(**arguments(tmp_path))
    assert f"3 of the 3 classes occur in {checked} label maps" in log.text


@both_modes
def test_one_wrong_label_map_of_two_hundred_is_an_error_at_the_start(test_mode, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(200):
        Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / "images" / f"{i:03d}.jpg")
        write_labels(tmp_path, f"{i:03d}", label_map(3 if i == 123 else 0))
    with pytest.raises(ValueError, match=r"labels/123.png has the values \[3\]"):
        CheckedSegDataset(**arguments(tmp_path, test_mode=test_mode))


@pytest.mark.parametrize("how", ["gone", "empty", "other", "cut", "size", "transposed"])
def test_training_leaves_out_a_label_map_that_cannot_be_used(how, folder, log):
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
def test_a_test_stops_at_a_label_map_that_cannot_be_used(how, folder):
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
def test_label_maps_that_are_all_damaged(test_mode, folder):
    for i in range(1, 5):
        damage(folder / "labels" / f"{i}.png", "cut")
    message = {
        False: r"none of the 4 label maps of .* can be used, .*labels/1.png: ",
        True: "1.png",
    }
    with pytest.raises(ValueError, match=message[test_mode]):
        CheckedSegDataset(**arguments(folder, test_mode=test_mode))


def test_a_training_without_a_readable_image_ends(folder):
    dataset = CheckedSegDataset(**arguments(folder))
    for i in range(1, 5):
        damage(folder / "images" / f"{i}.jpg", "other")
    with pytest.raises(ValueError, match=r"^.*images: none of 1001 images in a row can be used"):
        dataset[0]


def test_too_many_label_maps_that_cannot_be_used(folder):
    pipeline = [TRAIN[0], TRAIN[1] | {"max_left_out": 2}]
    dataset = CheckedSegDataset(**arguments(folder) | {"pipeline": pipeline})
    for i in range(1, 5):
        damage(folder / "labels" / f"{i}.png", "other")
    message = r"^more than max_left_out=2 images or label maps cannot be used, the last: .*png: "
    with pytest.raises(ValueError, match=message):
        dataset[0]


def test_a_test_names_the_image_that_cannot_be_read(folder):
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
def test_images_that_are_no_regular_files_are_counted(kind, folder, log):
    path = folder / "images" / "2.jpg"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere.jpg")
    assert names(CheckedSegDataset(**arguments(folder))) == ["1.jpg", "3.jpg", "4.jpg"]
    assert "3 images; left out: 1 that" in log.text
    with pytest.raises(FileNotFoundError, match=rf"1 images of .* the first is {path}"):
        CheckedSegDataset(**arguments(folder, test_mode=True))


@both_modes
def test_a_link_to_a_folder_above(test_mode, folder):
    (folder / "images" / "again").symlink_to(folder / "images")
    with pytest.raises(OSError, match=rf"symbolic link {folder}/images/again leads back to"):
        CheckedSegDataset(**arguments(folder, test_mode=test_mode))
    (folder / "some.txt").write_text("4\n2\n")
    dataset = CheckedSegDataset(**arguments(folder, test_mode=test_mode, ann_file="some.txt"))
    assert names(dataset) == ["4.jpg", "2.jpg"]


@both_modes
def test_data_that_is_not_on_a_disk(test_mode, folder, memory):
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


def test_the_classes_are_known_to_checkpoints(folder):
    assert CheckedSegDataset(**arguments(folder)).metainfo["classes"] == CLASSES


def test_a_label_map_damaged_behind_its_header_does_not_hinder_a_training_to_start(folder):
    damage(folder / "labels" / "1.png", "cut")
    assert names(CheckedSegDataset(**arguments(folder)))[0] == "1.jpg"
    with pytest.raises(ValueError, match=r"cannot read image .*labels/1.png: "):
        CheckedSegDataset(**arguments(folder, test_mode=True))


@pytest.mark.parametrize("how", ["empty", "other", "cut"])
def test_an_image_that_cannot_be_read_gives_way_to_another(how, folder, log):
    dataset = CheckedSegDataset(**arguments(folder))
    path = folder / "images" / "1.jpg"
    damage(path, how)
    drawn = {dataset[0]["img_path"].rpartition("/")[2] for _ in range(30)}
    assert drawn <= {"2.jpg", "3.jpg", "4.jpg"}
    assert log.text.count(f"left out: cannot read image {path}: ") == 1


@pytest.mark.parametrize("color_type", ["color", "color_ignore_orientation"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_photograph_that_its_exif_turns_is_read_as_its_label_map(turned, color_type, folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image = Image.new("RGB", (WIDTH, HEIGHT))
    image.save(folder / "images" / "1.jpg", exif=exif)
    if turned:
        write_labels(folder, 1, label_map(0, 1).T.copy())
    pipeline = [TEST[0] | {"color_type": color_type}, *TEST[1:]]
    dataset = CheckedSegDataset(**arguments(folder, test_mode=True) | {"pipeline": pipeline})
    if color_type == "color" or not turned:
        assert dataset[0]["gt_seg_map"].shape == dataset[0]["ori_shape"]
    else:
        with pytest.raises(ValueError, match=r"has \(height, width\) \(1[26], 1[26]\), its image"):
            dataset[0]


def reduced(value: int) -> int:
    """mmsegmentation's rule in words: zero is ignored, all other labels are one less."""
    return 255 if value in (0, 255) else value - 1


@pytest.mark.parametrize("reduce", [False, True])
def test_labels_are_those_of_the_rule_and_of_mmseg(reduce, folder):
    values = label_map(*(range(4) if reduce else range(3)), 255)
    for i in range(1, 5):
        write_labels(folder, i, values)
    dataset = CheckedSegDataset(**arguments(folder, reduce_zero_label=reduce))
    labels = dataset[0]["gt_seg_map"]
    expected = [[reduced(v) if reduce else v for v in row] for row in values.tolist()]
    np.testing.assert_array_equal(labels, np.array(expected, np.uint8), strict=True)
    stock = LoadAnnotations().transform(dataset.get_data_info(0))
    np.testing.assert_array_equal(labels, stock["gt_seg_map"], strict=True)
    assert dataset[0]["seg_fields"] == stock["seg_fields"] == ["gt_seg_map"]


def test_ade20k_has_150_classes_and_ignores_zero(folder):
    for i in range(1, 5):
        write_labels(folder, i, label_map(*range(151)))
    dataset = CheckedADE20KDataset(**arguments(folder, metainfo=None))
    expected = [[reduced(v) for v in row] for row in label_map(*range(151)).tolist()]
    np.testing.assert_array_equal(dataset[0]["gt_seg_map"], expected)
    assert {*np.unique(dataset[0]["gt_seg_map"])} == {*range(150), 255}

    write_labels(folder, 1, label_map(151))
    with pytest.raises(ValueError, match=r"1.png has the values \[151\]; with 150 classes"):
        dataset[0]


def test_a_choice_of_the_classes_of_ade20k(folder):
    # wall, building, sky and floor are 1 to 4 in its files
    for i in range(1, 5):
        write_labels(folder, i, label_map(0, 1, 2, 3, 4, 150))
    metainfo = {"classes": ("floor", "wall")}
    dataset = CheckedADE20KDataset(**arguments(folder, metainfo=metainfo))
    expected = label_map(255, 1, 255, 255, 0, 255)
    np.testing.assert_array_equal(dataset[0]["gt_seg_map"], expected, strict=True)
    stock = LoadAnnotations().transform(dataset.get_data_info(0))
    np.testing.assert_array_equal(dataset[0]["gt_seg_map"], stock["gt_seg_map"], strict=True)

    write_labels(folder, 1, label_map(151))
    with pytest.raises(ValueError, match=r"values \[151\]; with 150 classes .* 1 to 150 are"):
        dataset[0]


def test_another_value_to_be_ignored(folder):
    write_labels(folder, 1, label_map(0, 1, 200))
    with pytest.raises(ValueError, match=r"has the values \[200\]"):
        CheckedSegDataset(**arguments(folder))
    dataset = CheckedSegDataset(**arguments(folder, ignore_index=200))
    np.testing.assert_array_equal(dataset[0]["gt_seg_map"], label_map(0, 1, 200))


def test_indices_of_a_palette_and_single_bits_are_labels(folder):
    values = label_map(0, 1)
    image = Image.fromarray(values)
    image.putpalette([9, 9, 9, 200, 0, 0])
    image.save(folder / "labels" / "1.png")
    Image.fromarray(values == 1).save(folder / "labels" / "2.png")
    assert [Image.open(folder / "labels" / f"{i}.png").mode for i in (1, 2)] == ["P", "1"]
    dataset = CheckedSegDataset(**arguments(folder))
    for i in (0, 1):
        np.testing.assert_array_equal(dataset[i]["gt_seg_map"], values, strict=True)


def test_an_image_to_be_predicted_has_no_label_map():
    results = {"img": np.zeros((HEIGHT, WIDTH, 3), np.uint8)}
    assert LoadCheckedAnnotations().transform(results.copy()).keys() == {"img"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("ade20k") / "scenes"
    write_digits_scenes_ade20k(root, train=20, val=2)
    return root


def of_scenes(root, split, pipeline, **kwargs):
    return CheckedSegDataset(
        data_root=str(root),
        data_prefix={"img_path": f"images/{split}", "seg_map_path": f"annotations/{split}"},
        metainfo={"classes": DIGITS},
        reduce_zero_label=True,
        pipeline=pipeline,
        **kwargs,
    )


def train_pipeline(crop):
    return [
        *TRAIN,
        {
            "type": "mmseg.RandomResize",
            "scale": (320, 160),
            "ratio_range": (0.5, 2.0),
            "keep_ratio": True,
        },
        {"type": "mmseg.RandomCrop", "crop_size": crop, "cat_max_ratio": 0.75},
        {"type": "mmseg.RandomFlip", "prob": 0.5},
        {"type": "mmseg.PhotoMetricDistortion"},
        {"type": "mmseg.PackSegInputs"},
    ]


def preprocessor(size):
    return SegDataPreProcessor(
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        size=size,
        pad_val=0,
        seg_pad_val=255,
    )


def test_the_demo_data_of_digits_has_all_classes_and_crowds_are_ignored(scenes):
    dataset = of_scenes(scenes, "training", TRAIN)
    found = [set(np.unique(dataset[i]["gt_seg_map"])) for i in range(len(dataset))]
    assert set().union(*found) == {*range(11), 255}
    assert [i for i, labels in enumerate(found) if 255 in labels] == [19]


def test_crops_of_one_size_make_a_batch(scenes):
    dataset = of_scenes(scenes, "training", train_pipeline((64, 64)))
    items = [dataset[i] for i in range(4)]
    batch = {key: [item[key] for item in items] for key in ("inputs", "data_samples")}
    batch = preprocessor((64, 64))(batch, training=True)
    assert batch["inputs"].shape == (4, 3, 64, 64)
    for sample in batch["data_samples"]:
        assert sample.gt_sem_seg.data.shape == (1, 64, 64)
        assert sample.gt_sem_seg.data.max() < 11


def test_images_smaller_than_the_crop_are_padded_with_what_is_ignored(scenes):
    dataset = of_scenes(scenes, "training", train_pipeline((512, 512)))
    items = [dataset[i] for i in range(4)]
    shapes = [item["inputs"].shape[-2:] for item in items]
    assert max(max(shape) for shape in shapes) < 512
    before = [item["data_samples"].gt_sem_seg.data.clone() for item in items]
    batch = {key: [item[key] for item in items] for key in ("inputs", "data_samples")}
    batch = preprocessor((512, 512))(batch, training=True)
    for image, sample, labels, (height, width) in zip(
        batch["inputs"], batch["data_samples"], before, shapes, strict=True
    ):
        padded = torch.ones(512, 512, dtype=torch.bool)
        padded[:height, :width] = False
        assert (sample.gt_sem_seg.data[0][padded] == 255).all()
        assert (image[:, padded] == 0).all()
        torch.testing.assert_close(sample.gt_sem_seg.data[:, :height, :width], labels)


def test_an_image_to_be_ignored_as_a_whole_is_trained_on(folder):
    for i in range(1, 5):
        write_labels(folder, i, label_map(255))
    dataset = CheckedSegDataset(**arguments(folder) | {"pipeline": train_pipeline((8, 8))})
    assert (dataset[0]["data_samples"].gt_sem_seg.data == 255).all()


def test_labels_stay_with_their_pixels(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 12, (6, 8)).astype(np.uint8).repeat(16, axis=0).repeat(16, axis=1)
    for kind, array in (("images", labels * 20), ("labels", labels)):
        (tmp_path / kind).mkdir()
        Image.fromarray(array).save(tmp_path / kind / "1.png")
    pipeline = [step for step in train_pipeline((64, 48)) if "Photo" not in step["type"]]
    dataset = CheckedSegDataset(
        **arguments(
            tmp_path,
            metainfo={"classes": DIGITS},
            reduce_zero_label=True,
            img_suffix=".png",
            pipeline=pipeline,
        )
    )
    np.random.seed(0)  # mmcv's and mmseg's transforms draw from it
    for _ in range(5):
        item = dataset[0]
        shown = item["inputs"][0].float() / 20  # the value in the file, blurred at edges
        expected = torch.where(shown.round() == 0, 255, shown.round() - 1)
        plain = (shown - shown.round()).abs() < 0.01
        agreeing = (item["data_samples"].gt_sem_seg.data[0] == expected)[plain]
        assert agreeing.numel() > 1000
        assert agreeing.float().mean() > 0.95  # a shift by one pixel: 0.88


def test_a_test_takes_labels_of_the_images_own_size(scenes):
    pipeline = [*TEST, {"type": "mmseg.PackSegInputs"}]
    dataset = of_scenes(scenes, "validation", pipeline, test_mode=True)
    for i in range(2):
        sample = dataset[i]["data_samples"]
        values = np.asarray(Image.open(scenes / "annotations" / "validation" / f"00000{i + 1}.png"))
        expected = [[reduced(v) for v in row] for row in values.tolist()]
        np.testing.assert_array_equal(sample.gt_sem_seg.data[0], expected)
        assert sample.ori_shape == values.shape != sample.img_shape
