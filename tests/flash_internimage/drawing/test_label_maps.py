"""Test pictures of label maps and their legends."""

import numpy as np
import pytest
from PIL import Image

from flash_internimage.drawing import class_colors, draw_label_map
from flash_internimage.drawing.label_maps import legend_entries
from flash_internimage.predictions import LabelMap

CLASSES = ("sky", "road", "tree", "wall")


def halves(left: int, right: int, height=480, width=640) -> LabelMap:
    labels = np.full((height, width), left, np.uint8)
    labels[:, width // 2 :] = right
    return LabelMap(labels, CLASSES)


def image(height=480, width=640) -> np.ndarray:
    return np.full((height, width, 3), 90, np.uint8)


def colors_in(picture: np.ndarray) -> set[tuple[int, ...]]:
    numbers, counts = np.unique(picture @ (65536, 256, 1), return_counts=True)
    return {(n >> 16, n >> 8 & 255, n & 255) for n in numbers[counts > 100].tolist()}


def test_the_legend_lists_the_classes_present_by_their_share():
    labels = np.zeros((10, 10), np.uint8)
    labels[:7], labels[7:9], labels[9] = 2, 0, 255
    colors = class_colors(4).tolist()
    assert legend_entries(LabelMap(labels, CLASSES)) == [
        ("tree", tuple(colors[2]), 0.7),
        ("sky", tuple(colors[0]), 0.2),
        ("ignored", None, 0.1),
    ]


def test_labels_without_a_class_are_named_in_the_legend():
    labels = np.array([[9, 255], [255, 255]], np.uint8)
    entries = legend_entries(LabelMap(labels, CLASSES), ignore=None)
    assert entries == [("label 255", (128, 128, 128), 0.75), ("label 9", (128, 128, 128), 0.25)]
    negative = LabelMap(np.array([[-1, 3]]), CLASSES)
    assert [entry.name for entry in legend_entries(negative)] == ["label -1", "wall"]


def test_the_legend_has_the_colors_of_the_classes_present():
    picture = draw_label_map(image(), halves(1, 3))
    colors = [tuple(color) for color in class_colors(4).tolist()]
    legend = colors_in(picture[480:])
    assert legend & set(colors) == {colors[1], colors[3]}


def test_a_legend_of_fixed_height_sums_up_the_smallest_classes():
    classes = tuple(f"a class with quite a long name {i}" for i in range(200))
    few = LabelMap(np.tile(np.uint8([[0, 1]]), (20, 320)), classes)
    many = LabelMap(np.tile(np.arange(160, dtype=np.uint8), (20, 4)), classes)
    pictures = [draw_label_map(image(20), result, legend_rows=2) for result in (few, many)]
    assert pictures[0].shape == pictures[1].shape
    assert len(draw_label_map(image(20), many)) > len(pictures[1])
    gray = (128, 128, 128)  # the color of "157 more"
    assert gray in colors_in(pictures[1][20:])
    assert gray not in colors_in(pictures[0][20:])


@pytest.mark.parametrize("opacity", [0, 0.6, 1])
def test_opacity(opacity):
    picture = draw_label_map(image(), halves(1, 3), opacity=opacity)
    for label, column in ((1, 100), (3, 500)):
        expected = 90 + opacity * (class_colors(4)[label].astype(float) - 90)
        assert np.abs(picture[240, column] - expected).max() <= 1


def test_ignored_pixels_show_the_image():
    picture = draw_label_map(image(), halves(255, 0))
    assert (picture[:480, :300] == 90).all()
    assert not (picture[:480, 330:] == 90).all(2).any()
    other = draw_label_map(image(), halves(255, 0), ignore=0)
    assert (other[:480, 330:] == 90).all()


def test_colors_of_the_image_do_not_change_those_of_the_classes():
    colorful = image()
    colorful[..., 2] = 250
    picture = draw_label_map(colorful, halves(1, 255))
    [luminance] = np.unique(np.asarray(Image.fromarray(colorful).convert("L")))
    expected = luminance + 0.6 * (class_colors(4)[1].astype(float) - luminance)
    assert np.abs(picture[100, 100] - expected).max() <= 1
    assert (picture[100, 400:640] == colorful[0, 0]).all()


def test_classes_are_separated_by_a_line():
    row = draw_label_map(image(), halves(0, 0))[100, :640]
    assert (row == row[0]).all()
    row = draw_label_map(image(), halves(0, 1), opacity=1)[100, :640]
    assert (row[318:320] == 255).all(1).any()
    assert (row[330:] == class_colors(4)[1]).all()


def test_names_are_written_on_their_class_only():
    labels = np.zeros((480, 640), np.uint8)
    labels[300:350, 10:400], labels[:, 630:] = 1, 2  # the last one is too narrow for a name
    picture = draw_label_map(image(), LabelMap(labels, CLASSES), opacity=1)[:480]
    for label, named in ((0, True), (1, True), (2, False)):
        region = labels == label
        region[:-4, :-4] &= region[4:, 4:]  # without the lines between classes
        assert (picture[region] != class_colors(4)[label]).any() == named
    # Nothing but the two colors, and letters in black and white, is where the road is.
    around = picture[295:355, 5:405].reshape(-1, 3)
    letters = np.ptp(around, axis=1) == 0
    known = (around == class_colors(4)[0]).all(1) | (around == class_colors(4)[1]).all(1)
    assert (letters | known).mean() > 0.95


@pytest.mark.parametrize("name", ["", "a\nb", "名前", "x" * 300])
def test_any_name_is_written(name):
    result = LabelMap(np.zeros((480, 640), np.uint8), (name,))
    assert draw_label_map(image(), result).shape[1] == 640


def test_small_label_maps_are_enlarged_without_mixing_labels():
    labels = np.array([[0, 1], [2, 3]], np.uint8)
    picture = draw_label_map(image(2, 2), LabelMap(labels, CLASSES), opacity=1)
    assert picture.shape[1] == 640
    for row, column in np.ndindex(2, 2):
        block = picture[row * 320 + 5 : row * 320 + 100, column * 320 + 5 : column * 320 + 310]
        assert (block == class_colors(4)[labels[row, column]]).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (900, 10)])
def test_extreme_sizes(size):
    picture = draw_label_map(image(*size), LabelMap(np.zeros(size, np.uint8), CLASSES))
    assert picture.shape[1] == 640
    assert picture.shape[0] > size[0]


def test_a_legend_of_150_classes():
    names = tuple(f"class number {i}" for i in range(150))
    labels = np.arange(300 * 300).reshape(300, 300) % 150
    picture = draw_label_map(image(300, 300), LabelMap(labels, names), caption="Prediction")
    colors = {tuple(color) for color in class_colors(150).tolist()}
    assert colors <= colors_in(picture[700:])


def test_only_ignored_pixels():
    picture = draw_label_map(image(20, 20), LabelMap(np.full((20, 20), 255), CLASSES))
    assert (picture[:600, :] == 90).all()


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"labels must have the shape \(480, 640\), got \(2, 2\)"):
        draw_label_map(image(), LabelMap(np.zeros((2, 2), np.uint8), CLASSES))
    with pytest.raises(ValueError, match=r"opacity must be from 0 to 1, got 1\.5"):
        draw_label_map(image(), halves(0, 1), opacity=1.5)


def test_the_background_has_no_hue():
    result = LabelMap(np.repeat([[0, 1]], 2, 0), ("Background", "leaf"))
    background, leaf = (entry.color for entry in legend_entries(result))
    assert max(background) < 40
    assert leaf == tuple(class_colors(2)[1].tolist())
    picture = draw_label_map(image(2, 2), result, opacity=1)
    assert tuple(picture[320, 100]) == background
