"""Test the checks of COCO annotation files."""

import copy
import gzip
import json
import re

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from flash_internimage.openmmlab.datasets.coco_annotations import check_annotations, parse_json

HEIGHT, WIDTH = 20, 30
SQUARE = [2, 2, 7, 2, 7, 7, 2, 7]
CONTENT = {
    "images": [
        {"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in (0, 1, 2)
    ],
    "categories": [{"id": 0, "name": "cat"}, {"id": 7, "name": "dog"}],
    "annotations": [
        {
            "id": i,
            "image_id": i % 3,
            "category_id": 7,
            "bbox": [2, 2.5, 5, 5],
            "area": 25.0,
            "iscrowd": 0,
            "segmentation": [SQUARE],
        }
        for i in range(1, 6)
    ],
}
MISSING = object()
NAN, INF = float("nan"), float("inf")


def changed(kind: str, number: int, key: str, value: object) -> dict:
    content = copy.deepcopy(CONTENT)
    if value is MISSING:
        del content[kind][number][key]
    else:
        content[kind][number][key] = value
    return content


def masks_of(*masks: np.ndarray) -> list[dict]:
    encoded = [coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]
    return [{"size": e["size"], "counts": e["counts"].decode()} for e in encoded]


def fails(content: object, message: str, **kwargs) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        check_annotations(content, **{"masks": True, **kwargs})
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_annotations_as_exporters_write_them_pass():
    check_annotations(CONTENT, masks=True, all_masks=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("iscrowd", MISSING),
        ("iscrowd", True),
        ("ignore", 1),
        ("ignore", False),
        ("area", 0),
        ("bbox", [-3, 2, 0, 500]),
        ("id", 2**40),
        ("segmentation", MISSING),
        ("segmentation", []),
        ("segmentation", None),
        ("segmentation", [SQUARE, [-4.5, 0, 35, 0, 9, 9]]),
        ("segmentation", {"size": [HEIGHT, WIDTH], "counts": [100, 50, 450]}),
        ("segmentation", {"size": [HEIGHT, WIDTH], "counts": [0, 600]}),
        ("segmentation", masks_of(np.eye(HEIGHT, WIDTH))[0]),
        ("segmentation", masks_of(np.zeros((HEIGHT, WIDTH)))[0]),
    ],
)
def test_values_supported_by_mmdet_pass(key, value):
    check_annotations(changed("annotations", 3, key, value), masks=True)


def test_annotations_are_optional_in_files_of_test_images():
    content = {key: CONTENT[key] for key in ("images", "categories")}
    check_annotations(content, masks=True, all_masks=True)
    check_annotations(content | {"annotations": []}, masks=True, all_masks=True)


IDS = [0, -1, True, 1.0, "4", None, [4], 2**63, MISSING]
NUMBERS = ["5", None, True, NAN, INF, -INF, 1e300, 10**400, [5], MISSING]
WRONG = [
    *[
        ("id", value, "id must be a unique integer of at least 1 and below 2**63, got ")
        for value in IDS
    ],
    ("id", 2, "id must be unique, got 2 again"),
    *[
        ("image_id", value, "image_id must be the id of an image in the file, got ")
        for value in (3, "1", 1.0, None, [1], {}, True, MISSING)
    ],
    *[
        ("category_id", value, "category_id must be the id of a category in the file, got ")
        for value in (1, "7", 7.0, None, [7], False, MISSING)
    ],
    *[
        ("bbox", value, "bbox must be [x, y, width, height], 4 finite numbers below 1e9, got ")
        for value in (MISSING, None, {}, "1234", 5, [], [1, 2, 3], [1, 2, 3, 4, 5], [[1, 2, 3, 4]])
    ],
    *[("bbox", [2, 2, value, 5], "bbox must be [x, y, ") for value in NUMBERS[:-1]],
    *[("area", value, "area must be a finite number, got ") for value in NUMBERS],
    *[
        (key, value, f"{key} must be 0 or 1, got ")
        for key in ("iscrowd", "ignore")
        for value in (2, -1, "0", None, 0.5, [0])
    ],
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
@pytest.mark.parametrize("masks", [False, True])
def test_fields_of_annotations(key, value, message, masks):
    content = changed("annotations", 3, key, value)
    image = f"image {'' if key == 'image_id' else '1 (1.png), annotation '}"
    annotation = "annotation" if key == "id" else "annotation 4: "
    for part in (image, annotation, message):
        fails(content, part, masks=masks)


POLYGON = (
    "segmentation must be an RLE or a list of polygons, each [x1, y1, x2, y2, x3, y3, ...] with "
    "finite numbers in or near the image, got "
)
RLE = "segmentation must be an RLE of size [20, 30] whose counts add up to 600, got "
DIAGONAL = masks_of(np.eye(HEIGHT, WIDTH))[0]["counts"]


@pytest.mark.parametrize(
    "segmentation",
    [
        SQUARE,
        [[]],
        [SQUARE, []],
        [[2, 2, 7, 7]],
        [[2, 2, 7, 2, 7]],
        [[2, 2, 7, 2, 7, 7, 2]],
        [[2, 2, 7, 2, 7, "7"]],
        [[2, 2, 7, 2, 7, None]],
        [[2, 2, 7, 2, 7, True]],
        [[2, 2, 7, 2, 7, NAN]],
        [[NAN, 2, 7, 2, 7, 7]],
        [[2, 2, 7, 2, 7, INF]],
        [[2, 2, 7, 2, 7, 10**400]],
        [[2, 2, 1e9, 2, 7, 7]],  # pycocotools would trace this outline
        [[[2, 2], [7, 2], [7, 7]]],
        [{"size": [HEIGHT, WIDTH], "counts": [600]}],
        "polygon",
        7,
        True,
    ],
)
def test_malformed_polygons(segmentation):
    content = changed("annotations", 3, "segmentation", segmentation)
    fails(content, f"image 1 (1.png), annotation 4: {POLYGON}")
    check_annotations(content, masks=False)


def test_outlines_of_one_or_two_points_pass_with_a_valid_one():
    segmentation = [[2, 2], SQUARE, [2, 2, 7, 7]]  # mmdet drops the short outlines
    check_annotations(changed("annotations", 3, "segmentation", segmentation), masks=True)


@pytest.mark.parametrize(
    "rle",
    [
        {"counts": [600]},
        {"size": [HEIGHT, WIDTH]},
        {"size": [WIDTH, HEIGHT], "counts": [600]},
        {"size": [20.0, 30.0], "counts": [600]},
        {"size": 600, "counts": [600]},
        {"size": [HEIGHT, WIDTH], "counts": []},
        {"size": [HEIGHT, WIDTH], "counts": [599]},
        {"size": [HEIGHT, WIDTH], "counts": [700, -100]},
        {"size": [HEIGHT, WIDTH], "counts": [600.0]},
        {"size": [HEIGHT, WIDTH], "counts": ["600"]},
        {"size": [HEIGHT, WIDTH], "counts": 600},
        {"size": [HEIGHT, WIDTH], "counts": ""},
        {"size": [HEIGHT, WIDTH], "counts": DIAGONAL[:-1]},
        {"size": [HEIGHT, WIDTH], "counts": DIAGONAL + "1"},
        {"size": [HEIGHT, WIDTH], "counts": DIAGONAL + "o"},  # truncated number
        {"size": [HEIGHT, WIDTH], "counts": "ooooooooo0"},
        {"size": [HEIGHT, WIDTH], "counts": DIAGONAL + " "},
        {"size": [HEIGHT, WIDTH], "counts": DIAGONAL + "~"},
        {"size": [HEIGHT, WIDTH], "counts": DIAGONAL + "\u0130"},
        {"size": [HEIGHT, WIDTH], "counts": "\ud800"},
        {"size": [HEIGHT, WIDTH], "counts": "\0"},
    ],
)
def test_malformed_run_lengths(rle):
    content = changed("annotations", 3, "segmentation", rle)
    fails(content, f"image 1 (1.png), annotation 4: {RLE}")
    check_annotations(content, masks=False)


def test_compressed_run_lengths_equal_those_of_pycocotools():
    rng = np.random.default_rng(0)
    masks = [rng.random((HEIGHT, WIDTH)) < rng.random() ** 2 for _ in range(50)]
    masks += [np.ones((HEIGHT, WIDTH)), np.arange(600).reshape(HEIGHT, WIDTH) % 200 < 100]
    for rle in masks_of(*masks):
        check_annotations(changed("annotations", 3, "segmentation", rle), masks=True)
    large = masks_of(np.arange(3000)[None].repeat(2000, 0) > 1500)[0]  # multi-character numbers
    content = changed("annotations", 0, "segmentation", large)
    content["images"][1].update(height=2000, width=3000)
    check_annotations(content, masks=True)
    content["images"][1].update(height=2000, width=3001)
    fails(content, "RLE of size [2000, 3001] whose counts add up to 6002000")


@pytest.mark.parametrize("value", [MISSING, None, []])
def test_mask_evaluation_requires_all_masks(value):
    content = changed("annotations", 3, "segmentation", value)
    fails(content, f"image 1 (1.png), annotation 4: {POLYGON}", all_masks=True)


def test_the_number_of_errors_is_reported():
    content = copy.deepcopy(CONTENT)
    for annotation in content["annotations"][1:]:
        annotation["bbox"] = [1, 2, 3]
    fails(content, "image 2 (2.png), annotation 2: bbox must be ")
    fails(content, ", got [1, 2, 3] (4 such annotations)")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        *[
            ("id", value, "id must be a unique integer of at least 0 and below 2**53, got ")
            for value in [*IDS[1:], 2**53]
        ],
        ("id", 0, "id must be unique, got 0 again"),
        *[
            ("file_name", value, "file_name must be the name of a file, got ")
            for value in ("", None, 1, ["1.png"], MISSING)
        ],
        *[
            ("file_name", value, f"image 1 ({value}): file_name must be unique, got {value} again")
            for value in ("0.png", "./0.png", "sub/../0.png")
        ],
        *[
            (key, value, f"{key} must be a positive integer, got ")
            for key in ("height", "width")
            for value in (0, -1, 20.0, "20", None, True, NAN, 2**31, MISSING)
        ],
    ],
)
def test_fields_of_images(key, value, message):
    fails(changed("images", 1, key, value), message)
    fails(changed("images", 1, key, value), "image ")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("id", "7", "category '7' (dog): id must be a unique integer of at least 0 and below "),
        ("id", 2**53, "id must be a unique integer of at least 0 and below 2**53, got 9007199"),
        ("id", 0, "category 0 (dog): id must be unique, got 0 again"),
        ("name", "cat", "category 7 (cat): name must be unique, got 'cat' again"),
        ("name", "", "category 7 (): name must be a string, got ''"),
        ("name", None, "category 7 (None): name must be a string, got None"),
        ("name", ["dog"], "category 7 (['dog']): name must be a string, got ['dog']"),
        ("name", MISSING, "category 7 (nothing): name must be a string, got nothing"),
    ],
)
def test_fields_of_categories(key, value, message):
    fails(changed("categories", 1, key, value), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "the file must contain a JSON object, got []"),
        ({}, "images must be a list of objects, got nothing; the file has []"),
        ({"shapes": [], "imagePath": ""}, "the file has ['shapes', 'imagePath']"),
        (CONTENT | {"images": {}}, "images must be a list of objects, got {}"),
        (CONTENT | {"images": []}, "images must not be empty"),
        (CONTENT | {"categories": None}, "categories must be a list of objects, got None"),
        (CONTENT | {"categories": []}, "categories must not be empty"),
        (CONTENT | {"annotations": [1]}, "annotations must be a list of objects, got [1]"),
        (CONTENT | {"annotations": None}, "annotations must be a list of objects, got None"),
    ],
)
def test_lists(content, message):
    fails(content, message)


def test_json_numbers_that_are_not_finite():
    text = json.dumps(CONTENT).replace("2.5", "Infinity", 1)
    fails(json.loads(text), "got [2, inf, 5, 5]")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"{}", mtime=0), "the file must be uncompressed, got a gzip file"),
        (b'{"id": 1}\n{"id": 2}\n', "one JSON object, got another at line 2 (JSON Lines are"),
        (b'{"id": 1', "delimiter"),
        (b"\xef\xbb\xbf{}", "BOM"),  # not supported by pycocotools
    ],
)
def test_other_formats(content, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_json(content)
