"""Annotations and images as they come in practice."""

import json
import logging
import re

import numpy as np
import pytest
from PIL import Image

from flash_internimage.openmmlab.coco import CheckedCocoDataset
from flash_internimage.openmmlab.runtime import LoadReadableImage

CLASSES = ("cat", "dog")
CATEGORIES = ((7, "cow"), (1, "cat"), (2, "dog"))
SIDE = 20
PIPELINE = [{"type": "LoadReadableImage"}]


def box(image_id: int, bbox: list[float], category: int = 1, **kwargs) -> dict:
    area = bbox[2] * bbox[3]
    return {"image_id": image_id, "bbox": bbox, "category_id": category, "area": area, **kwargs}


@pytest.fixture
def write(tmp_path):
    """Writes images 1 to n and annotations; returns the arguments of the data set."""

    def write(annotations: list[dict], images: int = 3, **kwargs) -> dict:
        for i in range(1, images + 1):
            Image.fromarray(np.full((SIDE, SIDE, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
        content = {
            "images": [
                {"id": i, "file_name": f"{i}.png", "height": SIDE, "width": SIDE}
                for i in range(1, images + 1)
            ],
            "annotations": [{"id": i, "iscrowd": 0, **a} for i, a in enumerate(annotations, 1)],
            "categories": [
                {"id": 7, "name": "cow"},
                {"id": 1, "name": "cat"},
                {"id": 2, "name": "dog"},
            ],
            **kwargs,
        }
        (tmp_path / "annotations.json").write_text(json.dumps(content))
        return {
            "ann_file": "annotations.json",
            "data_root": str(tmp_path),
            "data_prefix": {"img": ""},
            "metainfo": {"classes": CLASSES},
            "filter_cfg": {"filter_empty_gt": True, "min_size": 8},
            "pipeline": PIPELINE,
        }

    return write


def test_what_cannot_be_trained_on_is_left_out_and_counted(write, log):
    arguments = write(
        [
            box(1, [2, 2, 5, 5]),
            box(1, [2, 2, 9, 9], category=2, iscrowd=1),
            box(1, [2, 2, 0, 5]),  # no area
            box(1, [25, 2, 5, 5]),  # outside
            box(1, [2, 2, 5, 5], category=7),  # of no class
            box(2, [-3, 2, 5, 5]),  # partly outside
        ]
    )
    dataset = CheckedCocoDataset(**arguments)
    assert [info["img_id"] for info in dataset] == [1, 2]
    labels = [(i["bbox_label"], i["ignore_flag"]) for i in dataset[0]["instances"]]
    assert labels == [(0, 0), (1, 1)]
    message = (
        "2 images, 2 objects and 1 crowds; left out: 0 images that are missing, 1 that have no"
    )
    assert message in log.text
    assert "and 3 annotations without a usable box" in log.text


def test_missing_images_are_left_out_of_training(write, tmp_path, log):
    arguments = write([box(i, [2, 2, 5, 5]) for i in (1, 2, 3)])
    (tmp_path / "2.png").unlink()
    assert [info["img_id"] for info in CheckedCocoDataset(**arguments)] == [1, 3]
    assert "left out: 1 images that are missing" in log.text
    assert log.records[-1].levelno == logging.WARNING


@pytest.mark.parametrize("content", [None, b"", b"no image"])
def test_a_test_needs_all_images(content, write, tmp_path):
    arguments = write([box(i, [2, 2, 5, 5]) for i in (1, 2, 3)])
    (tmp_path / "2.png").unlink()
    if content is not None:
        (tmp_path / "2.png").write_bytes(content)
    with pytest.raises(FileNotFoundError, match=r"1 of the 3 images .*first is .*2\.png"):
        CheckedCocoDataset(**arguments, test_mode=True)


def test_a_wrong_image_folder_is_an_error_in_training_too(write):
    arguments = write([box(1, [2, 2, 5, 5])]) | {"data_prefix": {"img": "nowhere/"}}
    with pytest.raises(FileNotFoundError, match=r"3 of the 3 images"):
        CheckedCocoDataset(**arguments)


def test_a_missing_annotation_file(write, tmp_path):
    arguments = write([]) | {"ann_file": "none.json"}
    with pytest.raises(FileNotFoundError, match=rf"ann_file not found: {tmp_path}/none.json"):
        CheckedCocoDataset(**arguments)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"images": [{"id": 1}]}'])
def test_a_damaged_annotation_file(content, write, tmp_path):
    arguments = write([])
    (tmp_path / "annotations.json").write_text(content)
    with pytest.raises(ValueError, match=r"annotations.json cannot be used: "):
        CheckedCocoDataset(**arguments)


def test_an_annotation_without_a_box(write):
    arguments = write([{"image_id": 1, "category_id": 1, "area": 1}])
    with pytest.raises(ValueError, match=r"annotations.json cannot be used: KeyError\('bbox'\)"):
        CheckedCocoDataset(**arguments)


MASK = {"segmentation": [[2, 2, 7, 2, 7, 7, 2, 7]]}
WITH_MASKS = {"pipeline": [*PIPELINE, {"type": "mmdet.LoadAnnotations", "with_mask": True}]}


@pytest.mark.parametrize("second", [{}, {"segmentation": []}])
def test_an_object_without_a_mask_where_masks_are_loaded(second, write):
    arguments = write([box(1, [2, 2, 5, 5], **MASK), box(2, [2, 2, 5, 5], **second)])
    assert len(CheckedCocoDataset(**arguments)) == 2
    message = r"annotations.json cannot be used: .*2\.png has no segmentation"
    with pytest.raises(ValueError, match=message):
        CheckedCocoDataset(**arguments | WITH_MASKS)


def test_masks_are_loaded(write):
    arguments = write([box(1, [2, 2, 5, 5], **MASK), box(1, [2, 2, 0, 5])])  # one is left out
    assert len(CheckedCocoDataset(**arguments | WITH_MASKS)[0]["gt_masks"]) == 1


@pytest.mark.parametrize(
    "classes", [("cat", "horse"), ("dog", "cat"), ("cat", "dog", "owl"), ("cat")]
)
def test_classes_that_are_not_those_of_the_file(classes, write):
    arguments = write([box(1, [2, 2, 5, 5])]) | {"metainfo": {"classes": classes}}
    message = r"metainfo\['classes'\] must list .* \('cow', 'cat', 'dog'\), got " + re.escape(
        repr(classes)
    )
    with pytest.raises(ValueError, match=message):
        CheckedCocoDataset(**arguments)


def test_an_image_that_cannot_be_read_gives_way_to_another(write, tmp_path, log):
    arguments = write([box(i, [2, 2, 5, 5]) for i in (1, 2)])
    dataset = CheckedCocoDataset(**arguments)
    (tmp_path / "1.png").write_bytes(b"no image")
    assert {dataset[0]["img_id"] for _ in range(5)} == {2}
    assert log.text.count(f"left out: image {tmp_path}/1.png cannot be read") == 1
    assert "; 1 so far in process" in log.text


@pytest.mark.parametrize("content", [None, b"", b"no image"])
def test_no_image_is_read_from(content, tmp_path):
    path = tmp_path / "1.jpg"
    if content is not None:
        path.write_bytes(content)
    assert LoadReadableImage().transform({"img_path": str(path)}) is None
