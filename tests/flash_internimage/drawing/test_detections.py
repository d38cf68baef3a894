"""Test pictures of boxes, masks and their labels."""

import re
from dataclasses import replace

import numpy as np
import pytest

from flash_internimage.drawing import class_colors, draw_detections
from flash_internimage.drawing import detections as drawing
from flash_internimage.drawing.placement import place_labels
from flash_internimage.predictions import Detections

CLASSES = ("bolt", "nut", "screw")
WIDTH, HEIGHT = 640, 480


def detections(*boxes, labels=None, masks=None, scores=0.9) -> Detections:
    n = len(boxes)
    return Detections(
        boxes=np.array(boxes, np.float32).reshape(n, 4),
        scores=np.full(n, scores, np.float32),
        labels=np.array(labels if labels is not None else [0] * n, np.int64),
        masks=masks,
        classes=CLASSES,
    )


def image(height=HEIGHT, width=WIDTH) -> np.ndarray:
    return np.full((height, width, 3), 90, np.uint8)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    return float(sides.clip(0).prod())


def places(boxes, size=(80, 20)) -> np.ndarray:
    boxes = np.array(boxes, float).reshape(-1, 4)
    return place_labels(boxes, np.array([size] * len(boxes)), WIDTH, HEIGHT)


def test_a_label_is_above_its_box():
    [place] = places([(100, 200, 300, 400)])
    assert place.tolist() == [100, 180, 180, 200]


@pytest.mark.parametrize(
    "box",
    [
        (100, 0, 300, 200),  # no room above
        (0, 0, 300, 470),  # beside
        (340, 0, 640, 480),
        (0, 100, 640, 480),
        (635, 470, 640, 480),  # in a corner
        (0, 0, 3, 3),
        (-20, -30, 50, 50),  # partly outside
    ],
)
def test_a_label_is_inside_the_picture_and_not_on_its_box(box):
    [place] = places([box])
    assert (place[:2] >= 0).all()
    assert (place[2:] <= (WIDTH, HEIGHT)).all()
    assert overlap(place, np.array(box)) == 0


def test_a_label_is_on_a_box_that_fills_the_picture():
    [place] = places([(0, 0, WIDTH, HEIGHT)])
    assert place.tolist() == [0, 0, 80, 20]


@pytest.mark.parametrize("count", [2, 5, 8])
def test_labels_of_one_object_do_not_overlap(count):
    boxes = [(200 + i, 200 + i, 300 + i, 300 + i) for i in range(count)]
    found = places(boxes)
    for i in range(count):
        assert overlap(found[i], np.array(boxes[i])) == 0
        assert all(overlap(found[i], found[j]) == 0 for j in range(i))


def test_a_label_avoids_other_objects():
    below, above = (200, 200, 300, 300), (190, 100, 310, 198)
    found = places([below, above])
    assert overlap(found[0], np.array(above)) == 0
    assert overlap(found[1], np.array(below)) == 0


def test_labels_of_many_objects_rarely_overlap():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, (WIDTH - 60, HEIGHT - 60), (40, 2))
    found = places(np.hstack([corners, corners + rng.uniform(20, 60, (40, 2))]))
    pairs = [(i, j) for i in range(40) for j in range(i)]
    assert sum(overlap(found[i], found[j]) > 0 for i, j in pairs) <= 3


def test_a_box_has_its_color_and_its_inside_is_unchanged():
    result = detections((100, 200, 300, 400), labels=[1])
    picture = draw_detections(image(), result)
    assert picture.shape == (HEIGHT, WIDTH, 3)
    color = class_colors(3)[1]
    assert (picture[300, 100] == color).all()
    assert (picture[300, 299] == color).all()
    assert (picture[210:390, 110:290] == 90).all()
    assert (picture[300, 320:] == 90).all()
    label = (picture[170:199, 100:220] == color).all(2)
    assert label.mean() > 0.3  # background of the label, above the box


def test_boxes_of_small_images_are_enlarged_with_them():
    small = draw_detections(image(48, 64), detections((10, 20, 30, 40)))
    assert small.shape == (480, 640, 3)
    assert (small == draw_detections(image(), detections((100, 200, 300, 400)))).all()


def test_masks_have_an_outline_and_show_the_image():
    masks = np.zeros((1, HEIGHT, WIDTH), bool)
    masks[0, 220:380, 120:280] = True
    picture = draw_detections(image(), detections((120, 220, 280, 380), labels=[2], masks=masks))
    color = class_colors(3)[2].astype(float)
    inside = picture[260:340, 160:240].astype(float)
    assert (inside == inside[0, 0]).all()
    share = (inside[0, 0] - 90) / (color - 90)
    assert (share > 0.2).all()
    assert (share < 0.8).all()


def test_outlines_scale_with_the_picture():
    masks = np.zeros((1, 1500, 2000), bool)
    masks[0, 200:1400, 200:1800] = True
    picture = draw_detections(image(1500, 2000), detections((0, 0, 1, 1), labels=[2], masks=masks))
    outline = (picture[800, 200:1000] == class_colors(3)[2]).all(1)
    assert outline.sum() == 8  # a sixth of the font size, which is a fortieth of the width
    assert outline[:8].all()


def test_outlines_separate_touching_masks():
    masks = np.zeros((2, HEIGHT, WIDTH), bool)
    masks[0, 100:300, 100:300] = True
    masks[1, 100:300, 300:500] = True
    result = detections((0, 0, 1, 1), (0, 0, 1, 1), masks=masks)
    row = draw_detections(image(), result)[200]
    color = class_colors(3)[0]
    assert (row[[298, 299, 300, 301]] == color).all()
    assert not (row[[250, 350]] == color).all(1).any()


def test_the_best_detection_is_in_front():
    boxes = (100, 200, 300, 400), (100, 200, 300, 400)
    picture = draw_detections(image(), detections(*boxes, labels=[1, 2]))
    assert (picture[300, 100] == class_colors(3)[1]).all()


def test_annotations_have_no_scores():
    box = 100, 200, 300, 400
    truth = draw_detections(image(), detections(box, scores=np.nan))
    scored = draw_detections(image(), detections(box, scores=0.5))
    color = class_colors(3)[0]
    widths = [np.ptp(np.flatnonzero((picture[185] == color).all(1))) for picture in (truth, scored)]
    assert widths[0] < widths[1] - 20


def test_labels_of_very_many_objects_leave_the_image_visible(monkeypatch):
    captions = []
    monkeypatch.setattr(
        drawing, "add_caption", lambda picture, caption: captions.append(caption) or picture
    )
    corners = np.random.default_rng(0).uniform(0, (WIDTH - 9, HEIGHT - 9), (300, 2))
    many = detections(*np.hstack([corners, corners + 8]))
    picture = draw_detections(image(), many, caption="Prediction")
    assert (picture == 90).all(-1).mean() > 0.5
    [count] = re.fullmatch(r"Prediction \((\d+) of 300 with labels\)", captions[0]).groups()
    assert 20 < int(count) < 200


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (480, 640)])
def test_pictures_without_objects(size):
    for masks in (None, np.zeros((0, *size), bool)):
        picture = draw_detections(image(*size), detections(masks=masks))
        assert (picture == 90).all()


def test_labels_of_a_narrow_image_are_beside_it():
    picture = draw_detections(image(2000, 10), detections((0, 0, 10, 2000)))
    assert picture.shape == (8192, 640, 3)
    color = class_colors(3)[0]
    assert (picture[:, 60:] == color).all(2).any()
    assert (picture[4000, 60:] == 255).all()


def test_an_image_of_one_pixel_with_an_object():
    masks = np.ones((1, 1, 1), bool)
    picture = draw_detections(image(1, 1), detections((0, 0, 1, 1), masks=masks))
    assert picture.shape == (640, 640, 3)


def test_boxes_outside_empty_and_of_unknown_classes_are_drawn():
    boxes = (-50, -50, -10, -10), (900, 900, 950, 950), (20, 20, 20, 20), (50, 50, 40, 40)
    picture = draw_detections(image(), detections(*boxes, labels=[0, 1, 17, -1]))
    assert picture.shape == (HEIGHT, WIDTH, 3)


def test_the_image_is_unchanged_and_the_picture_deterministic():
    before = image()
    masks = np.zeros((1, HEIGHT, WIDTH), bool)
    masks[:, 20:70] = True
    result = detections((1, 2, 30, 40), masks=masks)
    first = draw_detections(before, result, caption="Prediction")
    assert (before == image()).all()
    assert (first == draw_detections(before, result, caption="Prediction")).all()


def test_wrong_shapes_are_named():
    result = detections((1, 2, 3, 4), masks=np.zeros((1, 4, 4), bool))
    with pytest.raises(ValueError, match=r"masks must have the shape \(1, 480, 640\), got \(1, 4"):
        draw_detections(image(), result)
    with pytest.raises(ValueError, match="as many boxes as scores and labels, got 1, 1 and 2"):
        draw_detections(image(), replace(result, labels=np.array([1, 2])))
