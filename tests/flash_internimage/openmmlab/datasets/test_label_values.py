"""Test the values of label maps: classes, ignored and invalid values."""

import logging
import re
from functools import partial

import numpy as np
import pytest
from mmengine.dataset import ConcatDataset
from mmseg.datasets import ADE20KDataset, BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations
from PIL import Image

from flash_internimage.images import UnreadableImage
from flash_internimage.openmmlab.segmentation import CheckedADE20KDataset, CheckedSegDataset
from tests.flash_internimage.openmmlab.label_maps import (
    CLASSES,
    HEIGHT,
    WIDTH,
    arguments,
    both_modes,
    label_map,
    reduced,
    write_grey_png,
    write_labels,
)


@both_modes
@pytest.mark.parametrize(
    "classes",
    ["bolt", (), None, (*map(str, range(256)),), 5, (1, 2), ("bolt",), ("nut", "bolt", "nut")],
    ids=lambda classes: f"{classes!s:.20}",
)
def test_classes_must_be_several_names(classes, test_mode, folder):
    metainfo = None if classes is None else {"classes": classes}
    with pytest.raises(ValueError, match=r"metainfo\['classes'\] must be 2 to 255 different"):
        CheckedSegDataset(**arguments(folder, metainfo=metainfo, test_mode=test_mode))


def test_classes_from_a_file(folder):
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    dataset = CheckedSegDataset(
        **arguments(folder, metainfo={"classes": str(folder / "classes.txt")})
    )
    assert dataset.metainfo["classes"] == list(CLASSES)


WRONG_VALUES = [
    # reduce_zero_label, label map, part of the error message
    (False, label_map(0, 3, 254), "[3, 254]; with 3 classes and reduce_zero_label=False, "
     "0 to 2 are classes; ignored: 255"),
    (True, label_map(0, 4, 254), "[4, 254]; with 3 classes and reduce_zero_label=True, "
     "1 to 3 are classes; ignored: 0, 255"),
    (False, label_map(0, 1).astype(np.uint16) + 256, "[256, 257]; with 3 classes"),  # 16 bits
]  # fmt: skip


@both_modes
@pytest.mark.parametrize(("reduce", "values", "said"), WRONG_VALUES)
def test_invalid_values_are_an_error_at_the_start(reduce, values, said, test_mode, folder):
    write_labels(folder, 3, values)
    with pytest.raises(ValueError, match=re.escape(f"labels/3.png has invalid values {said}")):
        CheckedSegDataset(**arguments(folder, reduce_zero_label=reduce, test_mode=test_mode))


@both_modes
@pytest.mark.parametrize(("reduce", "values", "said"), WRONG_VALUES)
def test_invalid_values_are_an_error_when_read(reduce, values, said, test_mode, folder):
    dataset = CheckedSegDataset(**arguments(folder, reduce_zero_label=reduce, test_mode=test_mode))
    write_labels(folder, 3, values)
    with pytest.raises(ValueError, match=re.escape(f"labels/3.png has invalid values {said}")):
        dataset[2]


@both_modes
@pytest.mark.parametrize("channels", [2, 3, 4], ids=["LA", "RGB", "RGBA"])
def test_label_maps_with_several_channels(channels, test_mode, folder):
    dataset = CheckedSegDataset(**arguments(folder, test_mode=test_mode))
    write_labels(folder, 1, np.zeros((HEIGHT, WIDTH, channels), np.uint8))
    message = rf"labels/1.png must have one channel .* shape \(12, 16, {channels}\)"
    with pytest.raises(ValueError, match=message):
        dataset[0]
    with pytest.raises(ValueError, match=message):
        CheckedSegDataset(**arguments(folder, test_mode=test_mode))


def test_masks_of_0_and_255_are_a_warning(folder, log):
    for i in range(1, 5):
        write_labels(folder, i, label_map(0, 255))
    CheckedSegDataset(**arguments(folder))
    assert "1 of the 3 classes occur (not bolt, nut) in 4 label maps" in log.text
    assert log.messages[-1].endswith("; pixels must be class indices, and 255 is ignored")
    assert log.records[-1].levelno == logging.WARNING


def test_reducing_a_first_class_of_0_is_a_warning(folder, log):
    hint = "; reduce_zero_label=True ignores 0, and 1 is the first class"
    for values, level in ((label_map(0, 1, 2), logging.WARNING), (label_map(0, 3), logging.INFO)):
        write_labels(folder, 4, values)
        for i in range(1, 4):
            write_labels(folder, i, label_map(0, 1, 2))
        CheckedSegDataset(**arguments(folder, reduce_zero_label=True))
        assert log.records[-1].levelno == level
        assert log.messages[-1].endswith(hint) == (level == logging.WARNING)


@both_modes
@pytest.mark.parametrize("reduce", [False, True])
def test_label_maps_that_contain_only_ignored_values(reduce, test_mode, folder):
    for i in range(1, 5):
        write_labels(folder, i, label_map(0 if reduce else 255))
    with pytest.raises(
        ValueError, match=rf"the label maps of {folder}/images contain only ignored"
    ):
        CheckedSegDataset(**arguments(folder, reduce_zero_label=reduce, test_mode=test_mode))


def test_label_maps_with_different_palettes(folder, log):
    colors = [[0, 0, 0], [200, 0, 0], [0, 200, 0]]
    for i in range(1, 5):
        order = [0, 2, 1] if i == 3 else [0, 1, 2]
        image = Image.fromarray(label_map(0, 1, 2))
        image.putpalette([value for k in order for value in colors[k]])
        image.save(folder / "labels" / f"{i}.png")
    CheckedSegDataset(**arguments(folder))
    assert log.records[-1].levelno == logging.WARNING
    assert log.messages[-1].endswith(
        f"; 1 have different colors for the same values, such as {folder}/labels/3.png"
    )


@both_modes
def test_lossy_label_maps(test_mode, folder):
    for i in range(1, 5):
        Image.fromarray(label_map(0, 1)).save(folder / "labels" / f"{i}.jpg")
    message = r"label map .*labels/1.jpg must be lossless, such as PNG, got JPEG"
    with pytest.raises(ValueError, match=message):
        CheckedSegDataset(**arguments(folder, seg_map_suffix=".jpg", test_mode=test_mode))


@pytest.mark.parametrize(("number", "checked"), [(200, 200), (201, 101)])
def test_the_label_maps_checked_are_spread_over_the_data_set(number, checked, tmp_path, log):
    for i in range(number):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{i:03d}.jpg").touch()
        write_labels(tmp_path, f"{i:03d}", label_map(i // (number // 3 + 1)))
    CheckedSegDataset(**arguments(tmp_path))
    assert f"3 of the 3 classes occur in {checked} label maps" in log.text


@both_modes
def test_one_invalid_label_map_of_two_hundred_is_an_error_at_the_start(test_mode, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(200):
        Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / "images" / f"{i:03d}.jpg")
        write_labels(tmp_path, f"{i:03d}", label_map(3 if i == 123 else 0))
    with pytest.raises(ValueError, match=r"labels/123.png has invalid values \[3\]"):
        CheckedSegDataset(**arguments(tmp_path, test_mode=test_mode))


def test_class_names_are_saved_in_checkpoints(folder):
    assert CheckedSegDataset(**arguments(folder)).metainfo["classes"] == CLASSES


@pytest.mark.parametrize("reduce", [False, True])
def test_labels_equal_those_of_mmseg(reduce, folder):
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
    with pytest.raises(ValueError, match=r"1.png has invalid values \[151\]; with 150 classes"):
        dataset[0]


def test_subset_of_the_classes_of_ade20k(folder):
    # The files contain 1 to 4 for wall, building, sky and floor.
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


@both_modes
@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("ignored", [11, 200, 65535])
def test_another_ignore_index_is_read_as_255(ignored, reduce, test_mode, folder):
    values = np.resize(np.array([1, 2, ignored, 255], np.uint16), (HEIGHT, WIDTH))
    for i in range(1, 5):
        write_labels(folder, i, values if ignored > 255 else values.astype(np.uint8))
    keywords = {"reduce_zero_label": reduce, "test_mode": test_mode}
    with pytest.raises(ValueError, match=rf"has invalid values \[{ignored}\]; .*; ignored: "):
        CheckedSegDataset(**arguments(folder, **keywords))
    dataset = CheckedSegDataset(**arguments(folder, ignore_index=ignored, **keywords))
    expected = label_map(0, 1, 255, 255) if reduce else label_map(1, 2, 255, 255)
    np.testing.assert_array_equal(dataset[0]["gt_seg_map"], expected, strict=True)
    stock = LoadAnnotations().transform(dataset.get_data_info(0))
    np.testing.assert_array_equal(stock["gt_seg_map"], expected, strict=True)
    values[0, 0] = 77
    write_labels(folder, 1, values)
    message = f"[77]; with 3 classes and reduce_zero_label={reduce}, "
    message += f"1 to 3 are classes; ignored: 0, {min(ignored, 255)}" if reduce else "0 to 2 are"
    with pytest.raises(ValueError, match=re.escape(message)):
        dataset[0]


def test_another_ignore_index_with_a_subset_of_the_classes(folder):
    for i in range(1, 5):
        write_labels(folder, i, label_map(1, 2, 4, 151))
    metainfo = {"classes": ("floor", "wall")}
    dataset = CheckedADE20KDataset(**arguments(folder, metainfo=metainfo, ignore_index=151))
    np.testing.assert_array_equal(dataset[0]["gt_seg_map"], label_map(1, 255, 0, 255), strict=True)


@pytest.mark.parametrize(("reduce", "ignored"), [(False, 0), (False, 2), (True, 1), (True, 3)])
def test_the_ignore_index_must_not_be_a_class(reduce, ignored, folder):
    message = rf"ignore_index must not be a class, got {ignored}; .* 3 classes"
    with pytest.raises(ValueError, match=message):
        CheckedSegDataset(**arguments(folder, reduce_zero_label=reduce, ignore_index=ignored))


def test_labels_in_palette_and_binary_images(folder):
    values = label_map(0, 1)
    image = Image.fromarray(values)
    image.putpalette([9, 9, 9, 200, 0, 0])
    image.save(folder / "labels" / "1.png")
    Image.fromarray(values == 1).save(folder / "labels" / "2.png")
    assert [Image.open(folder / "labels" / f"{i}.png").mode for i in (1, 2)] == ["P", "1"]
    dataset = CheckedSegDataset(**arguments(folder))
    for i in (0, 1):
        np.testing.assert_array_equal(dataset[i]["gt_seg_map"], values, strict=True)


@both_modes
@pytest.mark.parametrize("bits", [2, 4])
def test_grayscale_of_few_bits_is_not_rescaled(bits, test_mode, folder):
    highest = 2**bits - 1
    for i in range(1, 5):
        write_grey_png(folder / "labels" / f"{i}.png", label_map(0, 1, 2, highest), bits)
    with pytest.raises(ValueError, match=rf"labels/1.png has invalid values \[{highest}\]"):
        CheckedSegDataset(**arguments(folder, test_mode=test_mode))
    dataset = CheckedSegDataset(**arguments(folder, test_mode=test_mode, ignore_index=highest))
    expected = label_map(0, 1, 2, 255)
    np.testing.assert_array_equal(dataset[0]["gt_seg_map"], expected, strict=True)


CHOICE = {"metainfo": {"classes": ("floor", "wall")}}
OF_MMSEG = [
    (BaseSegDataset, {}, (0, 1, 2, 77, 255)),
    (BaseSegDataset, {"reduce_zero_label": True}, (0, 1, 2, 77, 255)),
    (ADE20KDataset, {"metainfo": None}, (*range(151), 255)),
    (ADE20KDataset, CHOICE, (*range(151), 255)),
    (ADE20KDataset, CHOICE | {"reduce_zero_label": False}, (*range(150), 255)),
]


class TestDataSetsOfMmseg:
    """mmseg's own datasets pass neither their classes nor their ignore index to transforms."""

    @both_modes
    @pytest.mark.parametrize(("kind", "kwargs", "values"), OF_MMSEG)
    def test_labels_equal_those_of_mmseg(self, kind, kwargs, values, test_mode, folder):
        for i in range(1, 5):
            write_labels(folder, i, label_map(*values))
        dataset = kind(**arguments(folder, test_mode=test_mode) | kwargs)
        results = dataset[0]
        stock = LoadAnnotations().transform(dataset.get_data_info(0))
        np.testing.assert_array_equal(results["gt_seg_map"], stock["gt_seg_map"], strict=True)
        assert results["seg_fields"] == stock["seg_fields"] == ["gt_seg_map"]

    @pytest.mark.parametrize(
        ("kind", "kwargs", "value", "said"),
        [
            (BaseSegDataset, {}, 256, "[256]; with 255 classes"),
            (ADE20KDataset, CHOICE, 151, "[151]; with 150 classes and reduce_zero_label=True"),
        ],
    )
    def test_invalid_values(self, kind, kwargs, value, said, folder):
        dataset = kind(**arguments(folder) | kwargs)
        write_labels(folder, 1, np.full((HEIGHT, WIDTH), value, np.uint16))
        with pytest.raises(ValueError, match=re.escape(f"labels/1.png has invalid values {said}")):
            dataset[0]

    @both_modes
    def test_unreadable_label_map(self, test_mode, folder):
        dataset = BaseSegDataset(**arguments(folder, test_mode=test_mode))
        (folder / "labels" / "1.png").write_bytes(b"")
        with pytest.raises(UnreadableImage, match=rf"^cannot read image {folder}/labels/1.png: "):
            dataset[0]
        write_labels(folder, 1, label_map(0).T.copy())
        with pytest.raises(UnreadableImage, match=r"labels/1.png has \(height, width\) \(16, 12\)"):
            dataset[0]


def test_concatenated_data_sets_with_and_without_reduce_zero_label(folder):
    build = partial(CheckedSegDataset, **arguments(folder))
    joined = ConcatDataset(
        [build(), build(reduce_zero_label=True)], ignore_keys=["reduce_zero_label"]
    )
    labels = [joined[i]["gt_seg_map"] for i in (0, 4)]
    np.testing.assert_array_equal(labels, [label_map(0, 1, 2, 255), label_map(255, 0, 1, 255)])
