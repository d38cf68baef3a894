"""Predictions as sentences and tables; the pictures are tested in `drawing`."""

import numpy as np
import pytest

from flash_internimage.app.presentation import above, describe_error, present
from flash_internimage.inference import Classification, Detections, LabelMap

IMAGE = np.zeros((20, 30, 3), np.uint8)
MASKS = np.zeros((3, 20, 30), bool)
MASKS[0, :5] = True
OBJECTS = Detections(
    np.array([[1, 2, 11, 12], [3.4, 3.6, 9, 9], [0, 0, 30, 20]], np.float32),
    np.array([0.9, 0.5, 0.2], np.float32),
    np.array([1, 0, 1]),
    MASKS,
    ("cat", "dog"),
)


def test_classification():
    result = Classification(np.array([0.75, 0.25], np.float32), np.array([1, 0]), ("dog", "cat"))
    shown = present(IMAGE, result, 0.3)
    assert shown.summary == "dog: 75.0 %"
    assert shown.headers == ["class", "probability"]
    assert shown.rows == [["dog", "75.0 %"], ["cat", "25.0 %"]]


@pytest.mark.parametrize(
    ("threshold", "summary"),
    [
        (0.1, "3 objects with a score of at least 0.10: dog (2), cat (1)"),
        (0.3, "2 objects with a score of at least 0.30: dog (1), cat (1)"),
        (0.6, "1 object with a score of at least 0.60: dog (1)"),
        (0.95, "0 objects with a score of at least 0.95"),
    ],
)
def test_objects_above_the_threshold(threshold, summary):
    shown = present(IMAGE, OBJECTS, threshold)
    assert shown.summary == summary
    rows = [
        ["dog", "90.0 %", "1", "2", "11", "12"],
        ["cat", "50.0 %", "3", "4", "9", "9"],
        ["dog", "20.0 %", "0", "0", "30", "20"],
    ]
    assert shown.rows == rows[: int(summary[0])]


def test_masks_stay_with_their_objects():
    kept = above(OBJECTS, 0.4)
    assert kept.masks is not None
    np.testing.assert_array_equal(kept.masks, MASKS[:2])
    assert above(Detections(*vars(OBJECTS).values()), 0.4).classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "There is not enough memory for this image"),
        (
            RuntimeError("can't allocate memory: 9 bytes"),
            "There is not enough memory for this image",
        ),
        (ValueError("x must be 1, got 2"), "x must be 1, got 2"),
        (OSError(), "OSError"),
    ],
)
def test_errors_are_described(error, message):
    assert describe_error(error) == message


def test_label_map():
    labels = np.zeros((20, 30), np.uint8)
    labels[:5] = 2
    shown = present(IMAGE, LabelMap(labels, ("sky", "sea", "land")), 0.3)
    assert shown.summary == "sky 75.0 %, land 25.0 %"
    assert shown.rows == [["sky", "75.0 %"], ["land", "25.0 %"]]


def test_a_long_summary_ends_early():
    labels = np.repeat(np.arange(6, dtype=np.uint8), 100).reshape(20, 30)
    shown = present(IMAGE, LabelMap(labels, tuple("abcdef")), 0.3)
    assert shown.summary.endswith("16.7 %, ...")
    assert shown.summary.count("16.7 %") == 5
    assert len(shown.rows) == 6


def test_the_last_of_256_classes_is_not_ignored():
    image = np.full((20, 640, 3), 200, np.uint8)
    classes = tuple(map(str, range(256)))
    shown = present(image, LabelMap(np.full((20, 640), 255, np.uint8), classes), 0.3)
    assert not (shown.picture[:20] == image).all(-1).any()


def test_the_picture_of_a_large_image_is_reduced():
    result = Classification(np.array([1], np.float32), np.array([0]), ("cat",))
    picture = present(np.zeros((4000, 5000, 3), np.uint8), result, 0.3).picture
    assert 4400 < picture.shape[1] < 4500
