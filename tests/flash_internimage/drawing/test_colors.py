"""Test that colors of classes can be told apart, with color blindness too."""

import numpy as np
import pytest

from flash_internimage.drawing import class_colors
from flash_internimage.drawing.colors import appearances, label_color, text_color, visible_distances

# Linear RGB as dichromats see it, by Vienot, Brettel and Mollon (1999): another simulation than the
# one that the colors are chosen with.
VIENOT = {
    "protanopia": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
    "deuteranopia": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
}


def as_dichromats_see(colors: np.ndarray, vision: str) -> np.ndarray:
    linear = (colors / 255) ** 2.2
    seen = (linear @ np.array(VIENOT[vision]).T).clip(0, 1)
    return np.rint(255 * seen ** (1 / 2.2)).astype(np.uint8)


def least_distance(colors: np.ndarray) -> float:
    lab = appearances(colors)[0]
    distances = np.linalg.norm(lab[:, None] - lab, axis=-1)
    return distances[~np.eye(len(colors), dtype=bool)].min()


def test_first_colors_are_those_of_okabe_and_ito():
    assert [f"{r:02x}{g:02x}{b:02x}" for r, g, b in class_colors(7)] == [
        "e69f00", "56b4e9", "009e73", "f0e442", "0072b2", "d55e00", "cc79a7",
    ]  # fmt: skip


@pytest.mark.parametrize(("count", "distance"), [(7, 17), (20, 16), (80, 6.5), (150, 4.5)])
def test_colors_are_distinct_in_normal_vision_and_with_color_blindness(count, distance):
    colors = class_colors(count)
    distances = visible_distances(colors, colors)
    assert distances[~np.eye(count, dtype=bool)].min() >= distance


@pytest.mark.parametrize("vision", VIENOT)
@pytest.mark.parametrize(("count", "distance"), [(7, 17), (20, 14.5), (80, 4.5), (150, 1.5)])
def test_colors_are_distinct_in_another_simulation(count, distance, vision):
    assert least_distance(as_dichromats_see(class_colors(count), vision)) >= distance


def test_first_colors_do_not_depend_on_the_number_of_classes():
    most = class_colors(150)
    for count in (0, 1, 7, 8, 80):
        assert (class_colors(count) == most[:count]).all()
    assert len(np.unique(class_colors(300), axis=0)) == 300


def test_distances_are_those_of_cielab():
    # CIELAB of sRGB red, green and blue under D65, from tables
    expected = [[53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86]]
    primaries = np.eye(3, dtype=np.uint8) * 255
    np.testing.assert_allclose(appearances(primaries)[0], expected, atol=0.02)


def test_red_and_green_look_alike_with_color_blindness():
    red, green = np.array([[200, 60, 40]], np.uint8), np.array([[110, 110, 10]], np.uint8)
    normal, protanopia, deuteranopia = (
        np.linalg.norm(a - b) for a, b in zip(appearances(red), appearances(green), strict=True)
    )
    assert normal > 60
    assert min(protanopia, deuteranopia) < 25
    assert visible_distances(red, green) == pytest.approx(min(protanopia, deuteranopia))
    gray = np.array([[40, 40, 40], [200, 200, 200]], np.uint8)  # grays look the same to everyone
    for seen in appearances(gray)[1:]:
        np.testing.assert_allclose(seen, appearances(gray)[0], atol=0.5)


def test_labels_without_a_class_are_gray():
    assert label_color(2, 3) == (0, 158, 115)
    assert label_color(3, 3) == label_color(-1, 3) == label_color(0, 0) == (128, 128, 128)


def test_text_is_black_on_bright_and_white_on_dark_colors():
    assert text_color((240, 228, 66)) == text_color((255, 255, 255)) == (0, 0, 0)
    assert text_color((0, 60, 120)) == text_color((0, 0, 0)) == (255, 255, 255)


def test_colors_repeat_after_a_thousand():
    colors = class_colors(1203)  # as many as the classes of LVIS
    assert (colors[1000:] == colors[:203]).all()
    assert label_color(1202, 1203) == tuple(colors[202])


def test_a_negative_number_of_colors_is_rejected():
    with pytest.raises(ValueError, match="count must not be negative, got -1"):
        class_colors(-1)
