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
